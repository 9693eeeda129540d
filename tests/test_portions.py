"""A source in proportion to what is drawn of it: portions of a hub's split, and texts repeated."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tokenize import TEXTS, VOCAB_SIZE, texts_of, write_jsonl

from datatrove_pipelines.building import tokenize_source
from datatrove_pipelines.shards import shard_folder
from datatrove_pipelines.sources import HubSplit, JsonlFile, SourceJob
from datatrove_pipelines.tokenizer import train_bpe
from datatrove_pipelines.units import StoredFile, in_order, units


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_bpe(TEXTS, VOCAB_SIZE, folder)
    return folder


def rows_of(files: list[StoredFile], portion: tuple[int, int]) -> list[tuple[str, float, float]]:
    """What a portion reads of files of a token a byte, until it has the tokens."""
    taken, parts = 0.0, []
    for unit in units(files, 1.0, portion):
        if taken >= portion[1]:
            break
        parts.append((unit.file, unit.start, unit.stop))
        taken += unit.stored_bytes
    return parts


@given(
    sizes=st.lists(st.integers(1, 99), min_size=1, max_size=30),
    takes=st.lists(st.integers(1, 200), min_size=1, max_size=5),
)
def test_portions_at_a_distance_do_not_meet_before_the_source_ends(
    sizes: list[int], takes: list[int]
) -> None:
    files = [StoredFile(f"{n}.jsonl", size) for n, size in enumerate(sizes)]
    seen, skip = list[tuple[str, float, float]](), 0
    for take in takes:
        if skip + take + max(sizes) > sum(sizes):  # its end is near
            break
        seen += rows_of(files, (skip, take))
        skip += 3 * take // 2 + 1
    for (file, start, stop), after in pairwise(sorted(seen)):
        assert file != after[0] or start < stop <= after[1] + 1e-9


@given(sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=30), skip=st.integers(0, 10**8))
def test_a_source_that_is_asked_for_more_than_it_has_is_read_whole_once(
    sizes: list[int], skip: int
) -> None:
    files = [StoredFile(f"{n}.jsonl", size) for n, size in enumerate(sizes)]
    parts = dict[str, list[tuple[float, float]]]()
    for unit in units(files, 1.0, (skip, 10**9)):
        parts.setdefault(unit.file, []).append((unit.start, unit.stop))
    assert set(parts) == {file.name for file in files}
    for shares in parts.values():
        borders = [0.0, *(stop for _, stop in sorted(shares))]
        assert [start for start, _ in sorted(shares)] == borders[:-1] and borders[-1] == 1.0


def test_the_order_of_files_is_of_seed_and_source_and_keeps_when_one_is_added() -> None:
    files = [StoredFile(f"{n:03}.parquet", 1) for n in range(50)]
    order = in_order(files, 7, "web")
    assert order != files and sorted(order, key=lambda file: file.name) == files
    assert order == in_order(files[::-1], 7, "web")
    assert order not in (in_order(files, 8, "web"), in_order(files, 7, "math"))
    added = in_order([*files, StoredFile("new.parquet", 1)], 7, "web")
    assert [file for file in added if file.name != "new.parquet"] == order


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
    assert half * 0.95 <= tokenize_source(first, tokenizer, tmp_path).tokens <= half * 1.2
    # The second asks for more than there is: it goes on from the start, and has all.
    assert sorted(texts[1]) == sorted(TEXTS) and set(texts[0]) < set(TEXTS)
