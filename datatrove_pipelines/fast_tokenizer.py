"""A text's ids with tiktoken's core: those of the `tokenizers` library, at several times its speed.

The table is taken from tokenizer.json. `tokenizers` merges the pairs of a list, the first of the
list before others; tiktoken any two neighbours whose bytes are together a token, the lowest id first.
They agree where ids rise along the list and the bytes of each token, by themselves, end as that
token: inside a longer word they then go through the same merges, and a pair that is not in the list
never stands there. With `ignore_merges` (Llama 3) both take a word that is a token as it is, and a
token may have all its pairs in the list instead. A tokenizer for which that cannot be shown is
left to `tokenizers`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datatrove_pipelines.shards import content_hash
from datatrove_pipelines.tokenizer import LLAMA3_SPLIT, plain_text_tokenizer
from ground.files import read_json_object

if TYPE_CHECKING:
    from tiktoken import Encoding

# tiktoken's regex ends the process's work at a million blanks in a row. A run of twice this many
# characters is found, and left to `tokenizers`.
BLANK_CHARACTERS = 50_000
SPLIT = {
    "type": "Split",
    "pattern": {"Regex": LLAMA3_SPLIT},
    "behavior": "Isolated",
    "invert": False,
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
# With another value a text's ids are not its merges alone.
PLAIN_BPE = {"type": "BPE"} | dict.fromkeys(
    ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
)


@dataclass(frozen=True)
class Encoder:
    """The ids of a text, all of it plain text, and EOS. Loaded at the first text, once a process."""

    folder: Path  # with tokenizer.json
    digest: str  # of it

    def __call__(self, text: str) -> list[int]:
        table, fast, eos_id = _loaded(self.folder, self.digest)
        if fast is None or has_long_blank(text):
            ids: list[int] = table.encode(text).ids
        else:
            ids = fast.encode_ordinary(text)
            ids.append(eos_id)
        return ids

    @property
    def eos_id(self) -> int:
        return _loaded(self.folder, self.digest)[2]

    @property
    def token_bytes(self) -> int:
        return 2 if _loaded(self.folder, self.digest)[0].get_vocab_size() <= 1 << 16 else 4


def encoder(folder: Path) -> Encoder:
    return Encoder(folder, content_hash(folder / "tokenizer.json"))


def why_slow(folder: Path) -> str | None:
    """Why a tokenizer is left to the `tokenizers` library; None: it is not."""
    try:
        mergeable_ranks(folder)
    except Unsuited as error:
        return str(error)
    return None


def has_long_blank(text: str) -> bool:
    """Whether so much white space is in a row that tiktoken might not come to its end."""
    size = BLANK_CHARACTERS
    return any(text[n : n + size].isspace() for n in range(0, len(text) - size + 1, size))


@lru_cache(maxsize=2)
def _loaded(folder: Path, digest: str) -> "tuple[Any, Encoding | None, int]":
    """(tokenizer of the library, the fast one if there is one, EOS)."""
    from tiktoken import Encoding

    table = plain_text_tokenizer(folder, digest)
    eos_id = int(table.encode("").ids[-1])
    try:
        ranks = mergeable_ranks(folder)
    except Unsuited:
        return table, None, eos_id
    fast = Encoding(digest, pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={})
    return table, fast, eos_id


class Unsuited(ValueError):
    """A tokenizer that tiktoken is not shown to agree with."""


def mergeable_ranks(folder: Path) -> dict[bytes, int]:
    """The ids of the tokens that are made by merges, by their bytes. Raises Unsuited."""
    from tokenizers import models

    table = read_json_object(folder / "tokenizer.json", "run `make tokenizer` again")
    model = table["model"]
    _check_kind(table, model)
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    merges: list[tuple[str, str]] = [(left, right) for left, right in pairs]
    vocab: dict[str, int] = model["vocab"]
    byte_of = _byte_of_character()
    products = [vocab[left + right] for left, right in merges]
    if products != sorted(products) or not byte_of.keys() <= vocab.keys():
        raise Unsuited("its ids do not rise in the order of its merges")
    names = {name for name in vocab if byte_of.keys() >= {*name}}
    if not model.get("ignore_merges"):
        names &= {*byte_of, *(left + right for left, right in merges)}
    listed, alone = {*merges}, models.BPE(vocab, merges)
    for name in names:
        if len(alone.tokenize(name)) > 1 and not (
            model.get("ignore_merges") and listed.issuperset(_splits(name, vocab))
        ):
            raise Unsuited(f"its token {name!r} is not what its merges make of those bytes")
    return {bytes(byte_of[c] for c in name): vocab[name] for name in names}


def _check_kind(table: dict[str, Any], model: dict[str, Any]) -> None:
    splits = table["pre_tokenizer"] or {}
    steps = [
        {key: value for key, value in step.items() if key != "trim_offsets"}
        for step in splits.get("pretokenizers", ())
    ]
    if steps != [SPLIT, BYTE_LEVEL]:
        raise Unsuited("it does not split words as Llama 3 does")
    if table["normalizer"] or any(
        (model.get(key) or None) != value for key, value in PLAIN_BPE.items()
    ):
        raise Unsuited("it is not a plain byte-level BPE")


def _splits(name: str, vocab: dict[str, int]) -> Iterator[tuple[str, str]]:
    pairs = ((name[:n], name[n:]) for n in range(1, len(name)))
    return (pair for pair in pairs if pair[0] in vocab and pair[1] in vocab)


def _byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level table stands for: itself where it can be printed."""
    printed = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + n): b for n, b in enumerate(others)}
