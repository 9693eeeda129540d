"""Bits per byte: -log2 p(text) / bytes(text), comparable across tokenizers.

A document is cut into windows of at most S tokens. A window's first token is context only: the
model was never trained to predict it, so neither its bits nor its bytes count, both for the model
and for the unigram baseline.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# (token ids [B, S], ids right-padded with 0) -> log p of each id given the ones before it, nats
# [B, S-1]; a causal model never sees the padding behind a window.
LogProbabilities = Callable[[NDArray[np.int64]], NDArray[np.float32]]


@dataclass(frozen=True)
class Score:
    """What a model needs for a text: `bits`, and the `bytes` and `tokens` they were spent on."""

    bits: float
    bytes: int
    tokens: int

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.bytes

    def __add__(self, other: "Score") -> "Score":
        return Score(self.bits + other.bits, self.bytes + other.bytes, self.tokens + other.tokens)


def windows(documents: Iterable[Sequence[int]], length: int) -> list[list[int]]:
    """Cut documents into windows of at most `length` tokens; a single token is dropped."""
    cut = [
        list(ids[i : i + length]) for ids in documents for i in range(0, len(ids), max(length, 2))
    ]
    return [window for window in cut if len(window) > 1]


def score(
    log_probabilities: LogProbabilities,
    documents: Iterable[Sequence[int]],
    token_bytes: NDArray[np.int64],
    length: int,
    batch_tokens: int = 2048,
) -> Score:
    """Score tokenised documents; `token_bytes` [V] is the byte length of each token.

    At most `batch_tokens` at a time, or one window: logits are the largest thing in memory.
    """
    nats, counted_bytes, tokens = 0.0, 0, 0
    # Similar lengths together: less padding to compute.
    cut = sorted(windows(documents, length), key=len)
    while cut:
        rows = max(batch_tokens // len(cut[-1]), 1)
        batch = cut[-rows:]
        del cut[-rows:]
        ids = np.zeros((len(batch), max(map(len, batch))), np.int64)
        for row, window in enumerate(batch):
            ids[row, : len(window)] = window
        log_p = log_probabilities(ids)
        for row, window in enumerate(batch):
            nats -= float(log_p[row, : len(window) - 1].sum(dtype=np.float64))
            counted_bytes += int(token_bytes[window[1:]].sum())
            tokens += len(window) - 1
    return Score(nats / math.log(2), counted_bytes, tokens)


def unigram(counts: NDArray[np.float64]) -> LogProbabilities:
    """The model that knows only how often each token occurs: counts [V], add-one smoothed."""
    log_p = np.log(counts + 1.0) - np.log(counts.sum() + len(counts))
    return lambda ids: log_p[ids[:, 1:]].astype(np.float32)


def byte_lengths(tokens: Sequence[str]) -> NDArray[np.int64]:
    """Bytes of each token of a byte-level BPE, which spells each byte as one character."""
    return np.array([len(token) for token in tokens], np.int64)
