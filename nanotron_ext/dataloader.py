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
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ground.batch_hash import token_hash
from ground.errors import UserError
from ground.storage import NodeCache, open_shards
from nanotron_ext import compat
from nanotron_ext.job import Source
from nanotron_ext.micro_batch import MicroBatch
from nanotron_ext.mixture import Integers, Mixture, permuted_window

# Windows whose places are looked up at once; what is read ahead is `prefetch`'s.
LOOKED_UP_WINDOWS = 1 << 13


class Windows:
    """Random access to a source's windows."""

    def __init__(self, source: Source, window_tokens: int, cache: NodeCache | None = None):
        self.source, self.window_tokens = source, window_tokens
        # Arrays that are mapped; of files that are elsewhere (`cache`), blocks fetched when read.
        self.shards = open_shards(source.folder, source.token_bytes, cache)
        if not self.shards:
            raise UserError(
                f"source '{source.name}': no token shard (*.ds) in {source.folder}; "
                "run the data stage again"
            )
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.count = int(self.ends[-1]) // window_tokens
        if self.count == 0:
            raise UserError(
                f"source '{source.name}': {self.ends[-1]} tokens in {source.folder}, fewer than "
                f"one window of {window_tokens}; add data or shorten tokens.sequence_length"
            )

    def read(self, index: int) -> NDArray[Any]:
        """Tokens [S+1] of window `index`, as stored; inside one shard they are not copied."""
        start = index * self.window_tokens
        shard = int(np.searchsorted(self.ends, start, side="right"))
        offset = start - (int(self.ends[shard - 1]) if shard else 0)
        parts = [self.shards[shard][offset : offset + self.window_tokens]]
        while missing := self.window_tokens - sum(map(len, parts)):
            shard += 1
            parts.append(self.shards[shard][:missing])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def positions(tokens: NDArray[np.int64], eos_id: int) -> NDArray[np.int64]:
    """Position of each token in its document [B, S]: 0 at the window's start and after EOS."""
    opens = np.ones(tokens.shape, bool)
    np.equal(tokens[:, :-1], eos_id, out=opens[:, 1:])
    starts = np.flatnonzero(opens)
    lengths = np.append(starts[1:], tokens.size) - starts
    return (np.arange(tokens.size) - np.repeat(starts, lengths)).reshape(tokens.shape)


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
    node_cache: NodeCache | None = None  # what shards are read through that are not on this disk

    def __post_init__(self) -> None:
        by_name = {source.name: source for source in self.sources}
        window_tokens = self.sequence_length + 1
        self.windows = [
            Windows(by_name[name], window_tokens, self.node_cache) for name in self.mixture.names
        ]

    def locate(self, samples: Integers) -> tuple[Integers, Integers]:
        """(source index, window of it) of each of these samples of the stage [N]."""
        sources, draws = self.mixture.locate(samples)
        indices = np.empty_like(draws)
        for source in np.unique(sources):
            of_source = sources == source
            indices[of_source] = window_indices(self.windows[source], draws[of_source], self.seed)
        return sources, indices

    def __iter__(self) -> Iterator[MicroBatch]:
        size, stride = self.micro_batch_size, self.dp_size * self.micro_batch_size
        # Looked up one by one, a window costs 100 us more.
        batches = max(LOOKED_UP_WINDOWS // size, 1)
        first = self.first_sample + self.dp_rank * size
        for start in count(first, batches * stride):
            samples = start + np.arange(batches)[:, None] * stride + np.arange(size)
            located = self.locate(samples.reshape(-1))
            for sources, indices in zip(*(x.reshape(-1, size) for x in located), strict=True):
                yield self.micro_batch(sources, indices)

    def micro_batch(self, sources: Integers, indices: Integers) -> MicroBatch:
        """These windows [B] of these sources, as the model reads them."""
        input_ids = np.empty((len(sources), self.sequence_length), np.int64)
        label_ids, hashes = np.empty_like(input_ids), list[int]()
        for row, (source, index) in enumerate(zip(sources.tolist(), indices.tolist(), strict=True)):
            window = self.tokens(self.windows[source], index)
            input_ids[row], label_ids[row] = window[:-1], window[1:]
            hashes.append(token_hash(window))
        if self.masks_documents:
            position_ids = positions(input_ids, self.eos_id)
        else:
            position_ids = np.tile(np.arange(self.sequence_length), (len(sources), 1))
        return MicroBatch(
            input_ids=torch.from_numpy(input_ids),
            position_ids=torch.from_numpy(position_ids),
            cu_seqlens=torch.from_numpy(borders(position_ids)),
            label_ids=torch.from_numpy(label_ids),
            label_mask=torch.from_numpy(input_ids != self.eos_id),
            sources=torch.from_numpy(sources),
            hashes=torch.from_numpy(np.array(hashes)),
        )

    def tokens(self, windows: Windows, index: int) -> NDArray[Any]:
        """Tokens [S+1] of a window, which the vocabulary must have."""
        tokens = windows.read(index)
        if (largest := tokens.max()) >= self.vocab_size:
            raise UserError(
                f"source '{windows.source.name}': token {largest} in window {index} of "
                f"{windows.source.folder}, vocabulary {self.vocab_size}: the shard is corrupt; "
                "delete the folder and run the data stage again"
            )
        return tokens


def window_indices(windows: Windows, draws: Integers, seed: int) -> Integers:
    """The windows of a source's `draws` in this stage."""
    drawn = windows.source.drawn_windows + draws
    return permuted_window(drawn, windows.count, window_key(windows, seed))


def window_key(windows: Windows, seed: int) -> str:
    """Of the permutations of a source's windows."""
    return f"{seed}/{windows.source.name}/{windows.window_tokens}"


def prefetch(batches: Iterator[MicroBatch], depth: int = 2) -> Iterator[MicroBatch]:
    """The same items, read ahead and pinned by one thread; its error is raised to the caller."""
    pinned = (batch.pinned() for batch in batches)
    with ThreadPoolExecutor(1, "prefetch", initializer=compat.same_gpu()) as thread:
        ahead = deque(thread.submit(next, pinned) for _ in range(depth))
        while True:
            ahead.append(thread.submit(next, pinned))
            yield ahead.popleft().result()
