"""From a text to its place in the tokens, and from tokens to their documents."""

import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from datatrove_pipelines import lookup
from datatrove_pipelines.lookup import SourceTokens, TextSearch, inner_part
from datatrove_pipelines.shards import seal_shards
from datatrove_pipelines.tokenizer import plain_text_tokenizer, train_bpe
from ground.storage import NodeCache, push

VOCAB_SIZE = 600


def library_texts() -> list[str]:
    """Files of Python's own library, and text without spaces, with digits and marks."""
    library = Path(os.__file__).parent
    texts = [file.read_text("utf-8") for file in sorted((library / "email").glob("[a-g]*.py"))]
    texts = [part for text in texts for part in text.split("\n\n\n") if part.strip()]
    return [
        *texts,
        "東京の天気は" * 20,
        "12345678901 3.14159",
        "नमस्ते दुनिया, कैसे हैं",
        "<code>x</code> <|im_end|>",
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[SourceTokens, TextSearch, list[str]]:
    """Three shards of a source, some search to take the tokenizer from, the documents in order."""
    folder, texts = tmp_path_factory.mktemp("source"), library_texts()
    train_bpe(texts, VOCAB_SIZE, folder / "bpe")
    tokenizer = plain_text_tokenizer(folder / "bpe", "")
    for number in range(3):
        documents = [tokenizer.encode(text).ids for text in texts[number::3]]
        np.concatenate(documents).astype(np.uint16).tofile(folder / f"{number:05}.ds")
        ends = np.cumsum([len(document) for document in documents])
        ends.astype(np.uint64).tofile(folder / f"{number:05}.ds.index")
    (folder / "info.json").write_text('{"units": [{"number": 1, "file": "b.parquet"}]}')
    np.arange(100, dtype=np.uint32).tofile(folder / "00001.ds.rows")
    ordered = [text for number in range(3) for text in texts[number::3]]
    return SourceTokens(folder, 2), search_for("x", folder), ordered


def search_for(text: str, folder: Path) -> TextSearch:
    tokenizer = plain_text_tokenizer(folder / "bpe", "")
    return TextSearch(text, tokenizer)


def decoded(source: SourceTokens, search: TextSearch) -> tuple[bytes, list[int]]:
    """All bytes of the source, and where each token begins in them."""
    tokens = np.concatenate([np.fromfile(shard, np.uint16) for shard in source.shards])
    parts = [search.bytes_of[token] for token in tokens.tolist()]
    return b"".join(parts), np.cumsum([0, *map(len, parts)]).tolist()


def test_tokens_stand_for_the_bytes_of_the_documents(corpus) -> None:
    source, search, texts = corpus
    data, _ = decoded(source, search)
    assert data == b"".join(text.encode() + lookup.BORDER for text in texts)


@pytest.mark.parametrize("at_once", [50, 1 << 20])
def test_every_place_of_a_text_is_found_wherever_it_is_cut_out(
    corpus, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "BYTES_PER_READ", at_once)
    monkeypatch.setattr(lookup, "TOKENS_PER_READ", at_once)
    source, some, texts = corpus
    data, begins = decoded(source, some)
    rng, ways = random.Random(0), {True: 0, False: 0}
    for _ in range(50):
        document = rng.choice(texts)
        start = rng.randrange(len(document))
        text = document[start : start + rng.choice([6, 12, 30, 100, 10_000])]
        search, wanted = search_for(text, source.folder), text.encode()
        ways[search.is_by_ids] += 1
        places = [match.start() for match in re.finditer(b"(?=%b)" % re.escape(wanted), data)]
        found = list(search.find(source))
        assert len(found) == len(places)
        for (first, stop), at in zip(found, places, strict=True):
            # The fewest tokens that hold it.
            assert begins[first] <= at < begins[first + 1]
            assert begins[stop - 1] < at + len(wanted) <= begins[stop]
    assert min(ways.values()) > 5, "both ways are tried"


def test_no_text_is_found_across_two_documents(corpus) -> None:
    source, _, texts = corpus
    joined = texts[0][-400:] + texts[1][:400]
    assert search_for(joined, source.folder).is_by_ids
    assert list(search_for(joined, source.folder).find(source)) == []
    assert list(search_for(texts[0][-3:] + texts[1][:3], source.folder).find(source)) == []


def test_the_parts_of_a_range_are_its_documents(corpus) -> None:
    source, _, texts = corpus
    tokenizer = plain_text_tokenizer(source.folder / "bpe", "")
    sizes = [len(tokenizer.encode(text).ids) for text in texts]
    total, rng = sum(sizes), random.Random(1)
    whole = list(source.parts(0, total))
    assert [part.tokens for part in whole] == sizes
    for _ in range(50):
        start = rng.randrange(total)
        stop = rng.randint(start + 1, total)
        parts = list(source.parts(start, stop))
        assert sum(part.stop - part.start for part in parts) == stop - start
        assert [part.start for part in parts[1:]] == [0] * (len(parts) - 1)
        assert all(part.stop == part.tokens for part in parts[:-1])
        first = int(np.searchsorted(np.cumsum(sizes), start, "right"))
        assert [part.tokens for part in parts] == sizes[first : first + len(parts)]


def test_a_document_is_named_by_the_file_and_row_that_its_shard_tells(corpus) -> None:
    source, _, _ = corpus
    parts = list(source.parts(0, int(source.starts[-1])))
    second = [part for part in parts if part.shard.name == "00001.ds"]
    assert source.origin(second[7]) == lookup.Origin("b.parquet", 7)
    assert source.origin(parts[0]) == lookup.Origin("", None)


def test_the_inner_part_ends_between_words() -> None:
    text = "ie a few words, and mo"
    start, stop = inner_part(text)
    assert text[start:stop] == " a few words, and"
    assert inner_part("東京") == (0, 0)
    assert inner_part("one two") == (3, 3)


def test_a_text_is_found_where_the_tokens_are_elsewhere(
    corpus: tuple[SourceTokens, TextSearch, list[str]], tmp_path: Path
) -> None:
    here, search, _ = corpus
    folder = shutil.copytree(here.folder, tmp_path / "source-0")
    seal_shards(folder)
    push(folder, (tmp_path / "bucket").as_uri())
    for shard in folder.glob("*.ds"):
        shard.unlink()
    away = SourceTokens(folder, 2, NodeCache(tmp_path / "node"))
    assert away.starts.tolist() == here.starts.tolist()
    assert list(search.find(away)) == list(search.find(here)) != []
    last = int(here.starts[-1])
    assert away.read(0, last) == here.read(0, last)
    named = [
        [(p.shard.name, p.number, p.start) for p in one.parts(0, last)] for one in (away, here)
    ]
    assert named[0] == named[1] != []
