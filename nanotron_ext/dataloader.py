"""Windows of tokens from shards, in the mixture's order, as micro-batches.

Legend: B windows of a micro-batch, S sequence length. A window is S+1 tokens: inputs are the
first S, labels the last S. Windows of a source do not overlap and may span its shards; the tail
shorter than a window is dropped, once per source.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray

from ground.errors import UserError
from nanotron_ext import compat
from nanotron_ext.job import Source
from nanotron_ext.micro_batch import MicroBatch
from nanotron_ext.mixture import Mixture, permuted_window


class Windows:
    """Random access to a source's windows."""

    def __init__(self, source: Source, window_tokens: int):
        self.source, self.window_tokens = source, window_tokens
        dtype = np.dtype({2: np.uint16, 4: np.uint32}[source.token_bytes])
        files = sorted(source.folder.glob("*.ds"))
        if not files:
            raise UserError(
                f"source '{source.name}': no token shard (*.ds) in {source.folder}; "
                "run the data stage again"
            )
        self.shards = [np.memmap(file, dtype, "r") for file in files]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.count = int(self.ends[-1]) // window_tokens
        if self.count == 0:
            raise UserError(
                f"source '{source.name}': {self.ends[-1]} tokens in {source.folder}, fewer than "
                f"one window of {window_tokens}; add data or shorten tokens.sequence_length"
            )

    def read(self, index: int) -> NDArray[np.int64]:
        """Tokens [S+1] of window `index`."""
        start, out = index * self.window_tokens, np.empty(self.window_tokens, np.int64)
        shard, filled = int(np.searchsorted(self.ends, start, side="right")), 0
        while filled < self.window_tokens:
            offset = start + filled - (int(self.ends[shard - 1]) if shard else 0)
            part = self.shards[shard][offset : offset + self.window_tokens - filled]
            out[filled : filled + len(part)] = part
            filled, shard = filled + len(part), shard + 1
        return out


def positions(tokens: NDArray[np.int64], eos_id: int) -> NDArray[np.int64]:
    """Position of each token in its document [B, S+1]: 0 at the window's start and after EOS."""
    index = np.arange(tokens.shape[1])
    starts = np.zeros_like(tokens)
    starts[:, 1:] = np.where(tokens[:, :-1] == eos_id, index[1:], 0)
    return index - np.maximum.accumulate(starts, axis=1)


def borders(position_ids: NDArray[np.int64]) -> NDArray[np.int32]:
    """`cu_seqlens` [N+1] of positions [B, S]: a document starts where the position is 0.

    A window always starts at position 0, so windows never join.
    """
    starts = np.flatnonzero(position_ids.reshape(-1) == 0)
    return np.append(starts, position_ids.size).astype(np.int32)


@dataclass
class Loader:
    """Endless micro-batches of one data-parallel rank, from sample `first_sample` of the stage on.

    Sample index of window i of micro-batch m at step s: ((s * accumulation + m) * dp + rank) * B
    + i. Without `masks_documents` a window is one document to attention and to the positions, but
    no label crosses a border.
    """

    mixture: Mixture
    sources: Sequence[Source]
    sequence_length: int
    micro_batch_size: int
    dp_rank: int
    dp_size: int
    first_sample: int
    seed: int
    eos_id: int
    vocab_size: int
    masks_documents: bool = True

    def __post_init__(self) -> None:
        by_name = {source.name: source for source in self.sources}
        window_tokens = self.sequence_length + 1
        self.windows = [Windows(by_name[name], window_tokens) for name in self.mixture.names]

    def tokens_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Windows [len(samples), S+1] at these samples of the stage."""
        sources, draws = self.mixture.locate(samples)
        out = np.empty((len(samples), self.sequence_length + 1), np.int64)
        for row, (source, draw) in enumerate(zip(sources, draws, strict=True)):
            windows = self.windows[source]
            index = self.window_index(windows, int(draw))
            out[row] = windows.read(index)
            if out[row].max() >= self.vocab_size:
                raise UserError(
                    f"source '{windows.source.name}': token {out[row].max()} in window {index} of "
                    f"{windows.source.folder}, vocabulary {self.vocab_size}: the shard is corrupt; "
                    "delete the folder and run the data stage again"
                )
        return out

    def window_index(self, windows: Windows, draw: int) -> int:
        """The window of a source's `draw`-th draw in this stage."""
        key = f"{self.seed}/{windows.source.name}/{windows.window_tokens}"
        draws = np.array([windows.source.drawn_windows + draw])
        return int(permuted_window(draws, windows.count, key)[0])

    def __iter__(self) -> Iterator[MicroBatch]:
        size = self.micro_batch_size
        for start in count(self.first_sample + self.dp_rank * size, self.dp_size * size):
            samples = np.arange(start, start + size)
            tokens = self.tokens_of(samples)
            in_document = positions(tokens, self.eos_id)
            position_ids = in_document[:, :-1].copy()
            if not self.masks_documents:
                position_ids[:] = np.arange(self.sequence_length)
            yield MicroBatch(
                input_ids=torch.from_numpy(tokens[:, :-1].copy()),
                position_ids=torch.from_numpy(position_ids),
                cu_seqlens=torch.from_numpy(borders(position_ids)),
                label_ids=torch.from_numpy(tokens[:, 1:].copy()),
                label_mask=torch.from_numpy(in_document[:, 1:] != 0),
                sources=torch.from_numpy(self.mixture.locate(samples)[0]),
            )


def prefetch(batches: Iterator[MicroBatch], depth: int = 2) -> Iterator[MicroBatch]:
    """The same items, read ahead and pinned by one thread; its error is raised to the caller."""
    pinned = (batch.pinned() for batch in batches)
    with ThreadPoolExecutor(1, "prefetch", initializer=compat.same_gpu()) as thread:
        ahead = deque(thread.submit(next, pinned) for _ in range(depth))
        while True:
            ahead.append(thread.submit(next, pinned))
            yield ahead.popleft().result()
