"""A source in proportion to what is drawn of it: portions of a hub's split, and texts repeated."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tokenize import TEXTS, VOCAB_SIZE, texts_of, write_jsonl

from datatrove_pipelines.pipeline import TokenEstimate, tokenize_source
from datatrove_pipelines.shards import shard_folder
from datatrove_pipelines.sources import HubSplit, JsonlFile, SourceJob, reader
from datatrove_pipelines.tokenizer import plain_text_tokenizer, train_bpe

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_bpe(TEXTS, VOCAB_SIZE, folder)
    return folder


def read(sizes: list[int], portion: tuple[int, int]) -> list[int]:
    """Numbers of the documents of a portion, where document n has `sizes[n]` tokens."""
    from datatrove.data import Document

    from datatrove_pipelines import sources

    def documents(split: HubSplit) -> object:
        return (Document(str(number), str(number)) for number in range(len(sizes)))

    job = SourceJob("s", HubSplit("hub", None, "train", "abc", portion=portion))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_read_hub", documents)
        return [int(d.text) for d in reader(job, lambda text: sizes[int(text)])(None)]


@given(sizes=SIZES, takes=st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_portions_one_after_the_other_are_the_source_each_document_once(
    sizes: list[int], takes: list[int]
) -> None:
    seen, skip = list[int](), 0
    for take in takes:
        if skip + take > sum(sizes) - max(sizes):  # its end is near
            break
        portion = read(sizes, (skip, take))
        assert abs(sum(sizes[number] for number in portion) - take) < max(sizes)
        seen += portion
        skip += take
    assert seen == list(range(len(seen)))


@given(sizes=SIZES, skip=st.integers(0, 400))
def test_a_source_that_is_asked_for_more_than_it_has_is_read_whole_once(
    sizes: list[int], skip: int
) -> None:
    assert sorted(read(sizes, (skip, 10**6))) == list(range(len(sizes)))


def test_tokens_of_most_documents_are_estimated_and_close(tokenizer: Path) -> None:
    table = plain_text_tokenizer(tokenizer, "test")
    counted = list[str]()

    def count(text: str) -> int:
        counted.append(text)
        return len(table.encode(text).ids)

    estimate, texts = TokenEstimate(count), TEXTS * 20
    total = sum(estimate(text) for text in texts)
    exact = sum(len(table.encode(text).ids) for text in texts)
    assert len(counted) == -(-len(texts) // estimate.every)
    assert total == pytest.approx(exact, rel=0.05)


def test_a_short_source_is_written_again_until_it_has_the_tokens(
    tokenizer: Path, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "short.jsonl.gz", [{"text": text} for text in TEXTS])
    job = SourceJob("short", JsonlFile(file), (0, 1), 0.1, 7)
    once = tokenize_source(job, tokenizer, tmp_path)
    enough = tokenize_source(replace(job, least_tokens=once.tokens), tokenizer, tmp_path)
    assert Counter(texts_of(enough, tokenizer)) == Counter(texts_of(once, tokenizer))
    more = tokenize_source(replace(job, least_tokens=2 * once.tokens + 1), tokenizer, tmp_path)
    assert (more.tokens, more.documents) == (3 * once.tokens, 3 * once.documents)
    times = Counter(texts_of(more, tokenizer))
    assert times == Counter({text: 3 * n for text, n in Counter(texts_of(once, tokenizer)).items()})
    assert more.left_out == once.left_out


def test_a_portion_of_a_data_set_is_a_shard_of_its_own(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    root = tmp_path / "dataset"
    root.mkdir()
    lines = (json.dumps({"text": text}) + "\n" for text in TEXTS)
    (root / "train.jsonl").write_text("".join(lines), "utf-8")
    whole = SourceJob("web", HubSplit(str(root), None, "train", "abc"))
    assert isinstance(whole.read, HubSplit)
    tokens = tokenize_source(whole, tokenizer, tmp_path).tokens
    half = tokens // 2
    first, second = (
        replace(whole, read=replace(whole.read, portion=portion))
        for portion in ((0, half), (half, 2 * tokens))
    )
    assert len({shard_folder(job, tokenizer, tmp_path) for job in (whole, first, second)}) == 3
    texts = [
        texts_of(tokenize_source(job, tokenizer, tmp_path), tokenizer) for job in (first, second)
    ]
    assert half * 0.95 <= tokenize_source(first, tokenizer, tmp_path).tokens <= half * 1.1
    # The second asks for more than there is: it goes on from the start, and has all.
    assert sorted(texts[1]) == sorted(TEXTS) and set(texts[0]) < set(TEXTS)
