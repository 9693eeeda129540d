"""The tokenizer: Llama 3.2's split pattern and table, with SmolLM3's names in the reserved slots.

At full scale the vocabulary is Llama 3.2's own (128,000 BPE tokens and 256 special ones), of which
SmolLM3 renames ten reserved slots. At a small scale a byte-level BPE with the same split pattern is
trained on the run's own text and takes the same special tokens, in the same order, as its last ids.
Neither inserts a BOS: a pretraining document is its text and one EOS.

The five control tokens are special: decoding with `skip_special_tokens` drops them. The tags are
ordinary added tokens, since code that parses a reasoning trace or a tool call must find them in the
decoded text.
"""

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ground.checksums import seal
from ground.errors import UserError
from ground.files import folder_aside
from ground.hub import refusal

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Llama 3's split, as published with its tokenizer.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"
PAD = "<|finetune_right_pad_id|>"
CONTROL_TOKENS = (BOS, EOS, PAD, "<|im_start|>", "<|im_end|>")

# Token -> its id in SmolLM3's table of 128,256. The order is that of the ids.
SPECIAL_TOKENS = {
    BOS: 128000,
    EOS: 128001,
    "<think>": 128002,
    "</think>": 128003,
    PAD: 128004,
    "<|im_start|>": 128011,
    "<|im_end|>": 128012,
    "<tool_response>": 128013,
    "</tool_response>": 128014,
    "<tool_call>": 128015,
    "</tool_call>": 128016,
    "<code>": 128017,
    "</code>": 128018,
}
LLAMA_VOCAB_SIZE = 128_256


def special_ids(vocab_size: int) -> dict[str, int]:
    """The special tokens' ids: the published ones, or the last ones of a smaller vocabulary."""
    if vocab_size == LLAMA_VOCAB_SIZE:
        return SPECIAL_TOKENS
    first = vocab_size - len(SPECIAL_TOKENS)
    return {token: first + place for place, token in enumerate(SPECIAL_TOKENS)}


# Ids of plain text in Llama 3's table, printed in the Smol Training Playbook.
LLAMA_TEXT_IDS = {"user": 882, "assistant": 78191, "\n": 198, "\n\n": 271}
LLAMA_REMEDY = "take the tokenizer.json of meta-llama/Llama-3.2-1B"
# The names in Llama 3.2 of the slots that SmolLM3 renames; all other names stay.
RESERVED_SLOT = re.compile(r"<\|reserved_special_token_\d+\|>")


def train_bpe(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE of exactly `vocab_size` tokens, special ones included, into `folder`.

    The same texts in the same order give the same bytes, whatever the number of threads.
    """
    from tokenizers import AddedToken, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe_size = vocab_size - len(SPECIAL_TOKENS)
    if bpe_size < len(alphabet):
        raise UserError(
            f"vocab_size {vocab_size} is too small: {len(alphabet)} bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens need {len(alphabet) + len(SPECIAL_TOKENS)}; "
            "raise it in the scale file"
        )
    bpe = _untrained_bpe()
    trainer = trainers.BpeTrainer(
        vocab_size=bpe_size, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    if (size := bpe.get_vocab_size()) < bpe_size:
        if size == len(alphabet):  # bytes alone: nothing was there twice
            raise UserError("the training text is empty, or next to it; add text")
        fits = (size + len(SPECIAL_TOKENS)) // 64 * 64
        ids = special_ids(fits)
        remedy = (
            f", or write tokenizer.vocab_size {fits}, and in nanotron.model.model_config vocab_size "
            f"{fits}, bos_token_id {ids[BOS]} and eos_token_id {ids[EOS]} into a scale file that "
            "extends this one"
        )
        raise UserError(
            f"the text is too little for a vocabulary of {vocab_size:,}: it yields {size:,} tokens "
            f"beside the {len(SPECIAL_TOKENS)} special ones; add text"
            + (remedy if fits >= len(alphabet) + len(SPECIAL_TOKENS) else "")
        )
    for token in SPECIAL_TOKENS:
        add = bpe.add_special_tokens if token in CONTROL_TOKENS else bpe.add_tokens
        add([AddedToken(token, normalized=False, special=token in CONTROL_TOKENS)])
    _write(json.loads(bpe.to_str()), folder)


def _untrained_bpe() -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    return bpe


def llama_tokenizer(source: str | Path, folder: Path, revision: str = "main") -> None:
    """Write Llama 3.2's tokenizer with SmolLM3's special tokens into `folder`, every id checked.

    `source` is a hub id (`meta-llama/Llama-3.2-1B`, at `revision`) or a folder that holds its
    tokenizer.json.
    """
    table = json.loads(_tokenizer_file(source, revision).read_text("utf-8"))
    added = {entry["id"]: entry for entry in table["added_tokens"]}
    for token, slot in SPECIAL_TOKENS.items():
        entry = added.get(slot, {"content": "nothing"})
        content = entry["content"]
        if content != token and not RESERVED_SLOT.fullmatch(content):
            raise UserError(
                f"{source}: slot {slot} is for {token} and holds {content}, not a reserved token: "
                f"{LLAMA_REMEDY}"
            )
        entry |= {"content": token, "special": token in CONTROL_TOKENS}
    # Llama's own template inserts a BOS before every text.
    table["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    }
    _check_llama(table, source)
    _write(table, folder)


@lru_cache(maxsize=2)
def plain_text_tokenizer(folder: Path, digest: str) -> "Tokenizer":
    """The tokenizer that appends EOS and reads special tokens as plain text.

    Loaded once per process for the same `digest` of its tokenizer.json.
    """
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    table = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    # `encode_special_tokens` covers only tokens marked special, and the tags (<code>!) are not.
    for entry in table["added_tokens"]:
        entry["special"] = True
    tokenizer = Tokenizer.from_str(json.dumps(table))
    tokenizer.encode_special_tokens = True
    eos_id = tokenizer.token_to_id(EOS)
    if eos_id is None:
        raise UserError(f"{folder / 'tokenizer.json'} has no {EOS}: run `make tokenizer` again")
    tokenizer.post_processor = TemplateProcessing(
        single="$A <EOS>", pair=None, special_tokens=[("<EOS>", eos_id)]
    )
    return tokenizer


def is_cached(source: str, revision: str) -> bool:
    """Whether a hub's tokenizer.json needs not be fetched."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(source, "tokenizer.json", revision=revision), str)


def _tokenizer_file(source: str | Path, revision: str) -> Path:
    """The tokenizer.json of a local folder or of a hub repository."""
    if Path(source).is_dir():
        path = Path(source) / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{path} is missing: point to a folder with Llama 3.2's tokenizer.json")
        return path
    from huggingface_hub import hf_hub_download

    try:
        cached = is_cached(str(source), revision)
        return Path(
            hf_hub_download(
                str(source), "tokenizer.json", revision=revision, local_files_only=cached
            )
        )
    except Exception as error:  # any error of network, hub or name
        remedy = "name a hub id or a local folder that holds the file"
        raise refusal(error, f"{source}@{revision}: tokenizer.json", remedy) from error


def _check_llama(table: dict[str, Any], source: str | Path) -> None:
    """Assert every id that SmolLM3's data, template and generation config rely on."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(table))
    if (size := tokenizer.get_vocab_size()) != LLAMA_VOCAB_SIZE:
        raise UserError(
            f"{source}: the vocabulary has {size} tokens, not {LLAMA_VOCAB_SIZE}: {LLAMA_REMEDY}"
        )
    for token, number in (SPECIAL_TOKENS | LLAMA_TEXT_IDS).items():
        if (ids := tokenizer.encode(token).ids) != [number]:
            raise UserError(f"{source}: {token!r} has id {ids}, wanted {number}: {LLAMA_REMEDY}")


def _write(table: dict[str, Any], folder: Path) -> None:
    """Write the folder that transformers' AutoTokenizer loads, without its slow import."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    with folder_aside(folder) as partial:
        for name, content in (("tokenizer.json", table), ("tokenizer_config.json", config)):
            text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
            (partial / name).write_text(text, "utf-8")
        seal(partial)
