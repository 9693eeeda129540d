"""From a source's tokens to the documents that they are of, and from a text to its tokens.

source   the tokens of all shards of a folder, in the order of the files' names
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datatrove_pipelines.shards import INFO_FILE, content_hash
from datatrove_pipelines.tokenizer import plain_text_tokenizer
from ground.files import read_json_object
from ground.storage import NodeCache, open_shard

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTES_PER_READ, TOKENS_PER_READ = 1 << 26, 1 << 20
LEAST_ANCHOR_TOKENS = 3  # a shorter one is nearly everywhere
BORDER = b"\0"  # in place of EOS: no document holds it


@dataclass(frozen=True)
class Part:
    """Tokens [start, stop) of a document."""

    shard: Path
    number: int  # of the document in the shard, from 0
    start: int
    stop: int
    tokens: int  # of the whole document, its EOS included


@dataclass(frozen=True)
class Origin:
    """Where a document comes from; None and "" where the shard does not tell."""

    file: str
    row: int | None  # of the file, from 1


class SourceTokens:
    """The tokens of a source with their documents; `token_bytes` is 2 or 4."""

    def __init__(self, folder: Path, token_bytes: int, cache: NodeCache | None = None):
        self.folder, self.token_bytes, self.cache = folder, token_bytes, cache or NodeCache()
        # The indices are here even where the tokens are not.
        self.shards = sorted(index.with_suffix("") for index in folder.glob("*.ds.index"))
        sizes = [int(self.ends(number)[-1]) for number in range(len(self.shards))]
        self.starts = np.cumsum([0, *sizes])

    def tokens(self, shard: int) -> Any:
        """The tokens of a shard, fetched where they are not on this disk."""
        parts = open_shard(self.folder, self.shards[shard].name, self.token_bytes, self.cache)
        tokens = [part[0 : len(part)] for part in parts]
        return tokens[0] if len(tokens) == 1 else np.concatenate(tokens)

    def ends(self, shard: int) -> Any:
        """Where each document of a shard ends, in its tokens [D]."""
        path = self.shards[shard]
        return np.memmap(path.with_name(f"{path.name}.index"), np.uint64, "r")

    def read(self, start: int, stop: int) -> list[int]:
        """The tokens [start, stop) of the source."""
        ids = list[int]()
        for number, base in enumerate(self.starts[:-1].tolist()):
            if base < stop and start < self.starts[number + 1]:
                tokens = self.tokens(number)
                ids += tokens[max(start - base, 0) : max(stop - base, 0)].tolist()
        return ids

    def parts(self, start: int, stop: int) -> Iterator[Part]:
        """The documents of which tokens lie in [start, stop) of the source, with those tokens."""
        for number in range(len(self.shards)):
            base, end = int(self.starts[number]), int(self.starts[number + 1])
            if base >= stop or end <= start:
                continue
            first, last = max(start, base) - base, min(stop, end) - base
            ends = self.ends(number)
            document = int(np.searchsorted(ends, first, "right"))
            while first < last:
                begin = int(ends[document - 1]) if document else 0
                finish = int(ends[document])
                until = min(finish, last)
                yield Part(
                    self.shards[number], document, first - begin, until - begin, finish - begin
                )
                first, document = until, document + 1

    def origin(self, part: Part) -> Origin:
        """The file and row of a document."""
        rows = part.shard.with_name(f"{part.shard.name}.rows")
        row = int(np.memmap(rows, np.uint32, "r")[part.number]) if rows.exists() else None
        return Origin(self._files.get(part.shard.name, ""), row)

    @cached_property
    def _files(self) -> dict[str, str]:
        """The file of the unit that each shard holds."""
        units = read_json_object(self.folder / INFO_FILE).get("units", [])
        return {f"{unit['number']:05}.ds": unit["file"] for unit in units}


class TextSearch:
    """Finds a text in tokens, however they cut it: the bytes that they stand for must be the text's.

    Where it can, it looks for the ids of the text's inner part, which no text around it changes; a
    text without such a part is looked for in the decoded tokens, at a hundredth of the speed.
    """

    def __init__(self, text: str, tokenizer: "Tokenizer"):
        """`tokenizer` reads special tokens as plain text, as documents are read."""
        self.text, self.bytes_of = text.encode(), token_bytes(tokenizer)
        (end,) = tokenizer.encode("").ids
        self.bytes_of[end] = BORDER
        start, stop = inner_part(text)
        self.anchor = tokenizer.encode(text[start:stop], add_special_tokens=False).ids
        self.before, self.after = text[:start].encode(), text[stop:].encode()
        # A chat's control token and its name in a document have other ids, and the same bytes.
        added = tokenizer.get_added_tokens_decoder().values()
        spells = any(token.content in text for token in added)
        self.is_by_ids = len(self.anchor) >= LEAST_ANCHOR_TOKENS and not spells

    def find(self, source: SourceTokens) -> Iterator[tuple[int, int]]:
        """Each place of the text in the tokens of the source: [start, stop)."""
        for number, base in enumerate(source.starts[:-1].tolist()):
            for start, stop in self.in_tokens(source.tokens(number)):
                yield base + start, base + stop

    def in_tokens(self, tokens: Any) -> Iterator[tuple[int, int]]:
        """Each place of the text in an array of ids, of any width."""
        return self._by_ids(tokens) if self.is_by_ids else self._by_bytes(tokens)

    def _by_ids(self, tokens: Any) -> Iterator[tuple[int, int]]:
        size = tokens.itemsize
        wanted = np.array(self.anchor, tokens.dtype).tobytes()
        data = tokens.view(np.uint8)
        for begin in range(0, len(data), BYTES_PER_READ):
            block = data[begin : begin + BYTES_PER_READ + len(wanted) - size].tobytes()
            at = block.find(wanted)
            while at >= 0:
                token, misaligned = divmod(at, size)
                if not misaligned and (place := self._around(tokens, begin // size + token)):
                    yield place
                at = block.find(wanted, at + 1)

    def _around(self, tokens: Any, start: int) -> tuple[int, int] | None:
        """The place of the whole text, whose anchor begins at token `start`; None where it differs."""
        stop = start + len(self.anchor)
        before, after = b"", b""
        while len(before) < len(self.before) and start > 0:
            start -= 1
            before = self.bytes_of[tokens[start]] + before
        while len(after) < len(self.after) and stop < len(tokens):
            after += self.bytes_of[tokens[stop]]
            stop += 1
        is_text = before.endswith(self.before) and after.startswith(self.after)
        return (start, stop) if is_text else None

    def _by_bytes(self, tokens: Any) -> Iterator[tuple[int, int]]:
        for begin in range(0, len(tokens), TOKENS_PER_READ):
            # A token is at least a byte.
            ids = tokens[begin : begin + TOKENS_PER_READ + len(self.text)].tolist()
            block = b"".join(map(self.bytes_of.__getitem__, ids))
            if (at := block.find(self.text)) < 0:
                continue
            ends = np.cumsum([len(self.bytes_of[token]) for token in ids])
            while at >= 0:
                start = int(np.searchsorted(ends, at, "right"))
                stop = int(np.searchsorted(ends, at + len(self.text), "left")) + 1
                if start < TOKENS_PER_READ:  # else the next block has it too
                    yield begin + start, begin + stop
                at = block.find(self.text, at + 1)


def inner_part(text: str) -> tuple[int, int]:
    """[start, stop) of the text's part that has the same tokens whatever stands around the text.

    It begins and ends between a letter and a space before a letter: there Llama 3's pattern cuts in
    every text. (0, 0) where there are not two such places.
    """
    cuts = [
        at
        for at in range(1, len(text) - 1)
        if text[at] == " " and text[at - 1].isalpha() and text[at + 1].isalpha()
    ]
    return (cuts[0], cuts[-1]) if cuts else (0, 0)


def token_bytes(tokenizer: "Tokenizer") -> list[bytes]:
    """The bytes that each id of a byte-level BPE stands for."""
    # GPT-2's table: a printable character stands for its own byte, the others count from 256.
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    of_character = {chr(byte): byte for byte in shown}
    of_character |= {chr(256 + number): byte for number, byte in enumerate(hidden)}
    found = [b""] * tokenizer.get_vocab_size()
    added = tokenizer.get_added_tokens_decoder()
    for token, number in tokenizer.get_vocab().items():
        is_added = number in added
        found[number] = token.encode() if is_added else bytes(map(of_character.__getitem__, token))
    return found


def text_search(text: str, folder: Path) -> TextSearch:
    """A search in ids of the tokenizer in a folder."""
    return TextSearch(text, plain_text_tokenizer(folder, content_hash(folder / "tokenizer.json")))
