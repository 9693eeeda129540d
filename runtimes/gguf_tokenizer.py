"""A release's tokenizer in a GGUF file, where llama.cpp splits and merges as `tokenizers` does.

llama.cpp knows pre-tokenizers by name (`tokenizer.ggml.pre`). "llama-bpe" is Llama 3's split, which
SmolLM3 has. Its converter tells the name by a hash of ids, so that it refuses every new vocabulary
with the same split; here the split itself is looked at. Source: llama.cpp src/llama-vocab.cpp.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ground.errors import UserError
from ground.files import read_json_object

if TYPE_CHECKING:
    from gguf import GGUFWriter

# What "llama-bpe" is in llama.cpp: src/unicode.cpp, unicode_regex_split_custom_llama3.
LLAMA_BPE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp asks for merges; this one never applies, since its parts are no single bytes.
NO_MERGE = "<none> <none>"
END_OF_TURN = "<|im_end|>"


def write_tokenizer(writer: "GGUFWriter", release: Path, vocab_size: int) -> None:
    """Add vocabulary, merges, special tokens and chat template to a GGUF file's metadata.

    Added tokens that are special become control tokens, the others (`<think>`, `<tool_call>`)
    user-defined ones: both are read as one token, and only the others are shown when an answer is
    decoded without its special tokens, as in transformers. Rows of the embedding beyond the
    vocabulary are unused tokens. Raises UserError for a tokenizer that llama.cpp would read otherwise.
    """
    from gguf import SpecialVocab, TokenType

    file = release / "tokenizer.json"
    table = read_json_object(file)
    check_tokenizer(file, table)
    rows = [(f"[PAD{number}]", TokenType.UNUSED) for number in range(vocab_size)]
    added = {
        row["content"]: (row["id"], TokenType.CONTROL if row["special"] else TokenType.USER_DEFINED)
        for row in table["added_tokens"]
    }
    normal = {
        token: (number, TokenType.NORMAL) for token, number in table["model"]["vocab"].items()
    }
    for token, (number, kind) in (normal | added).items():
        if number >= vocab_size:
            raise UserError(
                f"{file}: token {token!r} has id {number}, beyond the {vocab_size} rows of the "
                "embedding: another model's tokenizer"
            )
        rows[number] = (token, kind)
    special = SpecialVocab(release, load_merges=True)
    special.merges = special.merges or [NO_MERGE]
    special.add_special_token.setdefault("bos", False)  # "llama-bpe" alone would insert one
    if END_OF_TURN in added:  # else llama.cpp takes any token that looks like an end
        writer.add_eot_token_id(added[END_OF_TURN][0])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([token for token, _ in rows])
    writer.add_token_types([kind for _, kind in rows])
    special.add_to_gguf(writer, quiet=True)


def check_tokenizer(file: Path, table: dict[str, Any]) -> None:
    """Refuse what "llama-bpe" does not mean: another split, normalised text, unreachable tokens."""
    model = table["model"]
    if model["type"] != "BPE" or table.get("normalizer"):
        raise UserError(f"{file}: not a byte-level BPE without normaliser, as SmolLM3's is")
    if not model["merges"]:
        return  # each byte is a token, however the text is split
    steps = (table.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
    if [step.get("type") for step in steps] != ["Split", "ByteLevel"] or (
        steps[0].get("pattern"), steps[0].get("behavior"), steps[0].get("invert")
    ) != ({"Regex": LLAMA_BPE}, "Isolated", False):  # fmt: skip
        raise UserError(
            f"{file}: pre_tokenizer: not Llama 3's split, the one of SmolLM3 that llama.cpp knows; "
            "name a model with a tokenizer of `make tokenizer`"
        )
    if not model.get("ignore_merges"):
        _check_merges(file, table)


def _check_merges(file: Path, table: dict[str, Any]) -> None:
    """Refuse a token that merges do not reach: llama.cpp takes a word that is a token as it is.

    Source: `ignore_merges` in llama.cpp, which "llama-bpe" sets.
    """
    from tokenizers import Tokenizer, decoders

    bytes_alone = Tokenizer.from_str(
        json.dumps(table | {"pre_tokenizer": None, "post_processor": None, "added_tokens": []})
    )
    bytes_alone.decoder = decoders.ByteLevel()
    tokens = list(table["model"]["vocab"])
    for token, encoding in zip(tokens, bytes_alone.encode_batch(tokens), strict=True):
        if len(encoding.ids) != 1:
            raise UserError(
                f"{file}: token {token!r} is not what its own bytes are merged to, and llama.cpp "
                "would take it: train the tokenizer again"
            )
