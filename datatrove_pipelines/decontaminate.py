"""Which documents hold items of the evaluation: their n-grams, found in any case and punctuation.

A document goes when it holds SHARE of the n-grams of an item, as in Llama 3 and Tülu 3 (8 words, half
of the item). One n-gram alone says nothing: a rule that drops for one of 12 words drops most man
pages, since items quote licences. N-grams of many items of a task are its template, and those of many
documents of a source are its boilerplate: neither counts.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datatrove_pipelines.counts import Counts, Step
from ground.errors import UserError
from ground.files import read_json_lines, written_aside

if TYPE_CHECKING:
    from datatrove.data import Document

# Scripts without spaces between words: each character is a word. Thai to Burmese, Khmer, kana, Han.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
WORD = re.compile(f"[{UNSPACED}]|[^\\W_{UNSPACED}]+")
UNSPACED_WORD = re.compile(f"[{UNSPACED}]")
LENGTHS = WORDS, CHARACTERS = 8, 16  # of an n-gram; two characters are about a word
SHARE = 0.5  # of an item's n-grams
LEAST = 3  # n-grams of an item, 10 words: shorter ones stand in texts that never saw the task
TEMPLATE = 10  # items of a task that an n-gram may stand in; up to 5 share a passage
# Documents of a source that an n-gram may stand in, of its first SAMPLE.
SAMPLE, SAMPLE_CHARACTERS = 1000, 16_000_000
COMMON, COMMON_SHARE = 10, 0.02
HALVES = {8: (1, 2, 4), 16: (1, 2, 4, 8)}
FACTOR, MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1  # of the hash of an n-gram
# What decides, beside the texts, which documents are found: part of a shard's identity.
RULE = (*LENGTHS, SHARE, LEAST, TEMPLATE, SAMPLE, SAMPLE_CHARACTERS, COMMON, COMMON_SHARE)
REPORT = "ds.contaminated"  # end of the name of a shard's report, JSON lines
SHOWN = 300  # characters of a text in the report

Array = Any  # of numpy


def words_of(text: str) -> list[str]:
    """The words in lower case; of scripts without spaces the characters."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return WORD.findall(text.lower())


@dataclass(frozen=True)
class Table:
    """N-grams of one length: sorted hashes [G], and of each the items it stands in, from starts[g]."""

    length: int
    grams: Array
    starts: Array
    items: Array
    bits: Array  # bit h >> shift is set for each hash: most look-ups end here
    shift: Array

    @classmethod
    def of(cls, length: int, grams: Array, starts: Array, items: Array) -> "Table":
        width = max(len(grams).bit_length() + 4, 16)
        shift = np.uint64(64 - width)
        bits = np.zeros(1 << width, bool)
        bits[grams >> shift] = True
        return cls(length, grams, starts, items, bits, shift)

    def look_up(self, values: Array) -> tuple[Array, Array]:
        """Places in a document, given by its words' values (0: in no item), and numbers of n-grams."""
        if len(values) < self.length or not len(self.grams):
            return _NONE, _NONE
        hashes = _hashes(values, self.length)
        places = np.flatnonzero(self.bits[hashes >> self.shift])
        if not len(places):
            return _NONE, _NONE
        hashes = hashes[places]
        numbers = np.minimum(np.searchsorted(self.grams, hashes), len(self.grams) - 1)
        found = self.grams[numbers] == hashes
        return places[found], numbers[found]

    def items_of(self, numbers: Array) -> Array:
        """The items of some n-grams, each as often as it has them."""
        ranges = [self.items[self.starts[g] : self.starts[g + 1]] for g in numbers]
        return np.concatenate(ranges) if ranges else _NONE


_ZEROS = repeat(0)
_NONE = np.zeros(0, np.int64)


def _hashes(values: Array, length: int) -> Array:
    """A hash of each n-gram, its values as digits of a number modulo 2^64 [len(values) - length + 1].

    `length` is a power of 2: an n-gram is two of half the length.
    """
    hashes, factor = values, FACTOR
    for half in HALVES[length]:
        hashes = hashes[:-half] * factor + hashes[half:]
        factor = factor * factor & MASK
    return hashes


def _value(word: str) -> int:
    return (
        int.from_bytes(blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")
        or 1
    )


@dataclass(frozen=True)
class Index:
    """The n-grams of a texts file. An item is a line of it."""

    texts: Path
    words: dict[str, int]  # of the items: their numbers, from 1
    values: Array  # of each number; 0 for any other word
    tables: tuple[Table, ...]
    sizes: Array  # n-grams of each item that count

    def of_words(self, words: list[str]) -> Array:
        return self.values[np.fromiter(map(self.words.get, words, _ZEROS), np.int64, len(words))]

    def look_up(self, text: str) -> list[tuple[Table, Array, Array]]:
        """What of a text stands in items: a table, places in the text's words, numbers of n-grams."""
        values = self.of_words(words_of(text))
        is_unspaced = not text.isascii() and UNSPACED_WORD.search(text) is not None
        return [
            (table, places, numbers)
            for table in self.tables[: 1 + is_unspaced]
            for places, numbers in [table.look_up(values)]
            if len(places)
        ]


def build_index(texts: Path) -> Path:
    """Write `<texts>.npz` beside a file of lines {task, text}; returns its path."""
    rows = read_json_lines(texts, "run the stage that writes it again")
    tasks = {task: number for number, task in enumerate(dict.fromkeys(r["task"] for r in rows))}
    values: dict[str, int] = {}
    grams_of: dict[int, list[tuple[int, Array]]] = {length: [] for length in LENGTHS}
    for item, row in enumerate(rows):
        words = words_of(row["text"])
        for word in words:
            values.setdefault(word, _value(word))
        unspaced = sum(UNSPACED_WORD.fullmatch(word) is not None for word in words)
        length = CHARACTERS if 2 * unspaced > len(words) else WORDS
        if len(words) >= length:
            found = np.fromiter((values[word] for word in words), np.uint64, len(words))
            grams_of[length].append((item, np.unique(_hashes(found, length))))
    task_of = np.array([tasks[row["task"]] for row in rows], np.int64)
    arrays: dict[str, Array] = {
        "words": np.array(list(values)),
        "sizes": np.zeros(len(rows), np.int32),
    }
    for length, pairs in grams_of.items():
        hashes = np.concatenate([found for _, found in pairs] or [np.zeros(0, np.uint64)])
        items = np.repeat([item for item, _ in pairs], [len(found) for _, found in pairs])
        items = items.astype(np.int32)
        kept = ~_is_template(hashes, task_of[items])
        hashes, items = hashes[kept], items[kept]
        order = np.argsort(hashes, kind="stable")
        grams, starts = np.unique(hashes[order], return_index=True)
        arrays["sizes"] += np.bincount(items, minlength=len(rows)).astype(np.int32)
        arrays[f"grams{length}"], arrays[f"items{length}"] = grams, items[order]
        arrays[f"starts{length}"] = np.append(starts, len(items))
    with written_aside(_index_file(texts)) as aside, aside.open("wb") as file:
        np.savez(file, **arrays)
    return _index_file(texts)


def _is_template(hashes: Array, tasks: Array) -> Array:
    """Whether each n-gram stands in more than TEMPLATE items of its task [like hashes]."""
    keys = hashes ^ (tasks.astype(np.uint64) + np.uint64(1)) * np.uint64(FACTOR)
    _, places, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return counts[places] > TEMPLATE


def _index_file(texts: Path) -> Path:
    return texts.with_suffix(".npz")


@lru_cache(maxsize=1)
def read_index(texts: Path) -> Index:
    """The index of a texts file, which `build_index` has written. Raises UserError."""
    file = _index_file(texts)
    try:
        with np.load(file) as arrays:
            words = {str(word): number for number, word in enumerate(arrays["words"], start=1)}
            values = np.array([0, *map(_value, words)], np.uint64)
            tables = tuple(
                Table.of(n, arrays[f"grams{n}"], arrays[f"starts{n}"], arrays[f"items{n}"])
                for n in LENGTHS
            )
            return Index(texts, words, values, tables, arrays["sizes"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{file}: not an index ({error}); delete {file.parent}, and make writes it again"
        ) from None


class Finder:
    """Finds items in the documents of a source, whose own boilerplate does not count."""

    def __init__(self, index: Index, sample: list[str]) -> None:
        self.index, self.sizes = index, index.sizes.copy()
        most = max(COMMON, COMMON_SHARE * len(sample))
        counts = {table.length: np.zeros(len(table.grams), np.int32) for table in index.tables}
        for text in sample:
            for table, _, numbers in index.look_up(text):
                counts[table.length][np.unique(numbers)] += 1
        self.is_common = {length: found > most for length, found in counts.items()}
        for table in index.tables:
            common = table.items_of(np.flatnonzero(self.is_common[table.length]))
            self.sizes -= np.bincount(common, minlength=len(self.sizes)).astype(np.int32)

    def find(self, text: str) -> dict[int, float]:
        """{item: share of its n-grams that the text holds}, of the items that are found."""
        shares = dict[int, float]()
        for table, _, numbers in self.index.look_up(text):
            numbers = np.unique(numbers)
            numbers = numbers[~self.is_common[table.length][numbers]]
            items, counts = np.unique(table.items_of(numbers), return_counts=True)
            found = (counts >= SHARE * self.sizes[items]) & (self.sizes[items] >= LEAST)
            shares |= {
                int(i): round(c / int(self.sizes[i]), 3)
                for i, c in zip(items[found], counts[found], strict=True)
            }
        return shares

    def excerpt(self, text: str, item: int) -> str:
        """The text from its first to its last n-gram of an item."""
        if not text.isascii():
            text = unicodedata.normalize("NFKC", text)
        spans = [match.span() for match in WORD.finditer(text.lower())]
        ends = [
            (place, place + table.length - 1)
            for table, places, numbers in self.index.look_up(text)
            for place, number in zip(places, numbers, strict=True)
            if item in table.items_of([number])
        ]
        return text[spans[ends[0][0]][0] : spans[ends[-1][1]][1]][:SHOWN]


def leave_out_contaminated(texts: Path, counts: Counts, report: Path, only_report: bool) -> Step:
    """A step that drops the documents in which an item is found, and writes down why.

    `report` gets a line {document, task, item, share, text} for each, by the item with most n-grams;
    with `only_report` nothing is dropped.
    """
    if not only_report:
        counts.left_out["contaminated"] = 0

    def leave_out(data: "Iterator[Document]", rank: int = 0, world_size: int = 1) -> Any:
        data = iter(data)
        index, sample = read_index(texts), _sample(data)
        finder = Finder(index, [document.text for document in sample])
        for document in chain(sample, data):
            if shares := finder.find(document.text):
                row = _why(finder, document, shares)
                with report.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(row, ensure_ascii=False) + "\n")
                if not only_report:
                    counts.left_out["contaminated"] += 1
                    continue
            yield document

    return leave_out


def tasks_found(folder: Path) -> dict[str, int]:
    """{task: documents that hold an item of it} of a shard folder's reports, most first."""
    rows = chain.from_iterable(map(read_json_lines, sorted(folder.glob(f"*.{REPORT}"))))
    tasks = {
        row["document"]: str(row["task"]) for row in rows
    }  # a short source stands there repeatedly
    return dict(Counter(tasks.values()).most_common())


def _sample(data: "Iterator[Document]") -> "list[Document]":
    sample, size = list["Document"](), 0
    for document in data:
        sample.append(document)
        size += len(document.text)
        if len(sample) >= SAMPLE or size >= SAMPLE_CHARACTERS:
            break
    return sample


def _why(finder: Finder, document: "Document", shares: dict[int, float]) -> dict[str, Any]:
    item = max(shares, key=lambda one: (shares[one] * int(finder.sizes[one]), -one))
    row = _rows(finder.index.texts)[item]
    return {
        "document": document.id,
        "task": row["task"],
        "item": row["text"][:SHOWN],
        "share": shares[item],
        "text": finder.excerpt(document.text, item),
    }


@lru_cache(maxsize=1)
def _rows(texts: Path) -> list[dict[str, Any]]:
    return read_json_lines(texts)
