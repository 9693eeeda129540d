"""Bits per byte is a count: of nats, bytes and tokens, whatever the batches look like."""

import math
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from eval_tasks.bits_per_byte import Score, byte_lengths, score, unigram, windows
from launch.stages.scoring import unigram_counts

V = 7
BYTES = np.array([1, 2, 3, 4, 5, 6, 7])
Documents = list[list[int]]
documents_of = st.lists(st.lists(st.integers(0, V - 1), max_size=12), min_size=1, max_size=6)


def uniform(ids: NDArray[np.int64]) -> NDArray[np.float32]:
    return np.full((len(ids), ids.shape[1] - 1), -math.log(V), np.float32)


def causal(ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Some model: the probability of a token depends on all tokens before it."""
    before = np.cumsum(ids * np.arange(1, ids.shape[1] + 1), axis=1)[:, :-1]
    return -((before + 3 * ids[:, 1:]) % 11 + 1).astype(np.float32) / 8


def close(one: Score, other: Score) -> bool:
    counts = (one.bytes, one.tokens) == (other.bytes, other.tokens)
    return counts and math.isclose(one.bits, other.bits, rel_tol=1e-9, abs_tol=1e-9)


@given(documents=documents_of, length=st.integers(2, 9))
def test_a_uniform_model_needs_log2_of_the_vocabulary_a_token(
    documents: Documents, length: int
) -> None:
    result = score(uniform, documents, BYTES, length)
    cut = windows(documents, length)
    assert result.tokens == sum(len(window) - 1 for window in cut)
    assert result.bytes == sum(int(BYTES[token]) for window in cut for token in window[1:])
    assert result.bits == pytest.approx(result.tokens * math.log2(V), rel=1e-6)
    if result.bytes:
        expected = math.log2(V) * result.tokens / result.bytes
        assert result.bits_per_byte == pytest.approx(expected, rel=1e-6)


def test_a_unigram_model_equals_the_sum_by_hand() -> None:
    counts = np.array([5.0, 0.0, 2.0])  # add one: 6, 1, 3 of 10
    result = score(unigram(counts), [[0, 1, 2, 2]], np.array([1, 4, 2]), length=8)
    bits = -(math.log2(1 / 10) + 2 * math.log2(3 / 10))
    assert (result.bytes, result.tokens) == (4 + 2 + 2, 3)
    assert result.bits_per_byte == pytest.approx(bits / 8, rel=1e-6)


def test_counting_a_shard_takes_little_memory_whatever_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whole files it took 8 bytes a token: 31 TB for the largest source."""
    monkeypatch.setenv("CACHE", str(tmp_path))
    drawn = np.random.default_rng(0).integers(0, V, 100_000).astype(np.uint32)
    for number, part in enumerate(np.split(drawn, [90_000])):
        part.tofile(tmp_path / f"{number}.ds")
    with (tmp_path / "0.ds").open("r+b") as file:
        file.truncate(2**27)  # sparse: 33M times token 0 more
    tokens = 2**25 + 10_000
    shards = {"a": {"folder": ".", "token_bytes": 4, "tokens": tokens}}
    tracemalloc.start()
    counts = unigram_counts(shards, {"a": 2 * tokens}, V)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    expected = np.bincount(drawn, minlength=V)
    expected[0] += 2**25 - 90_000
    assert (counts == 2 * expected).all()
    assert peak_bytes < 2**26


def test_the_unigram_model_is_a_distribution() -> None:
    log_p = unigram(np.array([3.0, 0.0, 0.5, 9.0]))
    every_token = np.array([[0, 0], [0, 1], [0, 2], [0, 3]])
    assert np.exp(log_p(every_token)).sum() == pytest.approx(1, rel=1e-6)


@given(documents=documents_of, length=st.integers(2, 9), batch_tokens=st.integers(1, 40))
def test_padding_and_batch_tokens_do_not_matter(
    documents: Documents, length: int, batch_tokens: int
) -> None:
    alone = Score(0, 0, 0)
    for document in documents:
        alone += score(causal, [document], BYTES, length, batch_tokens=1)
    assert close(score(causal, documents, BYTES, length, batch_tokens), alone)


def test_the_first_token_of_a_window_costs_nothing() -> None:
    asked: list[int] = []

    def recorded(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        asked.append(ids.shape[1] - 1)
        return uniform(ids)

    result = score(recorded, [[0, 1, 2, 3, 4]], BYTES, length=3)  # windows 0 1 2 and 3 4
    assert result.tokens == 3 and result.bytes == BYTES[1] + BYTES[2] + BYTES[4]
    first = score(uniform, [[0, 1]], BYTES, length=3)
    other = score(uniform, [[6, 1]], BYTES, length=3)
    assert first == other


@given(documents=documents_of, length=st.integers(2, 9))
def test_windows_keep_every_token_but_lone_ones(documents: Documents, length: int) -> None:
    cut = windows(documents, length)
    assert all(2 <= len(window) <= length for window in cut)
    lone = sum(len(document) % length == 1 for document in documents)
    assert sum(map(len, cut)) == sum(map(len, documents)) - lone


TEXTS = [
    "plain words, twice: words",
    "été Ελλάδα 日本語 हिन्दी ไทย",
    "🙂 tab\tnew\nline \x00",
    "x" * 40,
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Sequence[str]:
    from transformers import AutoTokenizer

    from datatrove_pipelines.tokenizer import train_bpe

    folder: Path = tmp_path_factory.mktemp("bpe") / "tokenizer"
    train_bpe(TEXTS * 5, 340, folder)
    loaded: Sequence[str] = AutoTokenizer.from_pretrained(str(folder))
    return loaded


@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_byte_lengths_of_a_texts_tokens_are_its_utf8_length(tokenizer: object, text: str) -> None:
    _assert_byte_lengths(tokenizer, text)


@pytest.mark.parametrize("text", TEXTS)
def test_byte_lengths_hold_for_every_script(tokenizer: object, text: str) -> None:
    _assert_byte_lengths(tokenizer, text)


def _assert_byte_lengths(tokenizer: object, text: str) -> None:
    table = byte_lengths(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))  # type: ignore[attr-defined, arg-type]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    assert int(table[ids].sum()) == len(text.encode())
