"""What a step shows the model, and at which steps a window is shown: the loader's order both ways.

Nothing is trained: the order is a function of the job alone, so that steps to come are known too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ground.batch_hash import shown, token_hash, total
from ground.errors import UserError
from ground.storage import NodeCache
from nanotron_ext.dataloader import Loader, window_key
from nanotron_ext.job import Job
from nanotron_ext.mixture import Integers, build_mixture, draws_of


@dataclass(frozen=True)
class Window:
    """A window of a step's batch."""

    place: int  # in the batch, over all micro-batches and data-parallel ranks
    source: str
    index: int  # of the source's windows of this length
    epoch: int  # from 0: how often the source was read whole before
    tokens: NDArray[Any]  # [S+1]: the first S are inputs, the last S labels


@dataclass(frozen=True)
class Shown:
    """When a window is shown."""

    window: int
    step: int
    place: int  # in the step's batch
    epoch: int


@dataclass(frozen=True)
class Trace:
    """The order of one stage. Steps are those of its metrics.jsonl."""

    job: Job
    sequence_length: int  # tokens
    windows_a_step: int
    last_step: int
    vocab_size: int

    @cached_property
    def loader(self) -> Loader:
        """Every sample of the stage, on one rank."""
        return Loader(
            build_mixture(self.job.weights, self.job.cache),
            self.job.sources,
            sequence_length=self.sequence_length,
            micro_batch_size=1,
            dp_rank=0,
            dp_size=1,
            first_sample=0,
            seed=self.job.data_seed,
            eos_id=self.job.eos_id,
            vocab_size=self.vocab_size,
            node_cache=NodeCache(*self.job.node_cache) if self.job.node_cache else None,
        )

    @property
    def samples(self) -> int:
        """Windows that the whole stage shows."""
        return (self.last_step - self.job.first_step) * self.windows_a_step

    def windows(self, step: int) -> Iterator[Window]:
        """The windows of a step's batch, in the order of their samples."""
        first = self.job.first_step
        if not first < step <= self.last_step:
            raise UserError(
                f"STEP={step}: {self.job.stage} takes the steps {first + 1:,} to "
                f"{self.last_step:,}; name one of them"
            )
        loader, start = self.loader, (step - first - 1) * self.windows_a_step
        samples = start + np.arange(self.windows_a_step)
        _, draws = loader.mixture.locate(samples)
        sources, indices = loader.locate(samples)
        rows = zip(sources.tolist(), draws.tolist(), indices.tolist(), strict=True)
        for place, (number, draw, index) in enumerate(rows):
            windows = loader.windows[number]
            epoch = (windows.source.drawn_windows + draw) // windows.count
            yield Window(place, windows.source.name, index, epoch, loader.tokens(windows, index))

    def batch_hash(self, step: int) -> str:
        """What metrics.jsonl has for the step."""
        return shown(total(token_hash(window.tokens) for window in self.windows(step)))

    def count(self, source: str) -> int:
        """Whole windows of a source."""
        return self.loader.windows[self.loader.mixture.names.index(source)].count

    def shown(self, source: str, indices: Integers) -> list[Shown]:
        """Every time that the stage shows these windows [N] of a source, in the order of steps."""
        mixture, number = self.loader.mixture, self.loader.mixture.names.index(source)
        windows = self.loader.windows[number]
        before, drawn = windows.source.drawn_windows, mixture.counts(self.samples)[source]
        epochs = np.arange(before // windows.count, -(-(before + drawn) // windows.count))
        # [epoch, window], flattened
        epoch, index = np.repeat(epochs, len(indices)), np.tile(indices, len(epochs))
        key = window_key(windows, self.job.data_seed)
        draws = draws_of(index, epoch, windows.count, key) - before
        is_drawn = (draws >= 0) & (draws < drawn)
        samples = mixture.samples(number, draws[is_drawn])
        steps, places = np.divmod(samples, self.windows_a_step)
        steps += self.job.first_step + 1
        columns = (index[is_drawn], steps, places, epoch[is_drawn])
        showings = [Shown(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]
        return sorted(showings, key=lambda one: (one.step, one.place))
