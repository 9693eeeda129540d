"""Which rows of the token dataset a step reads: hashed as it reads them, and planned without it.

R  rows of the dataset: packed windows, or pairs
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ground.batch_hash import row_hash
from ground.errors import UserError
from posttrain.data import ROWS_OF_A_SPLIT
from posttrain.job import Job
from posttrain.rows import IGNORED

HASHES = "row_hashes"
# What a model reads of a row.
CHAT_COLUMNS = ("input_ids", "labels")
PAIR_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def hash_of(row: Mapping[str, Any]) -> int:
    """Of what the model reads of a row."""
    columns = CHAT_COLUMNS if "input_ids" in row else PAIR_COLUMNS
    return row_hash(*(row[name] for name in columns))


@dataclass
class HashedRows:
    """A collator whose batches carry their rows' hashes [B] too, wherever it runs."""

    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        hashes = torch.tensor([hash_of(row) for row in rows])
        return {**self.collate(rows), HASHES: hashes}


class RecordedBatches:
    """For a Trainer: `batch_hash` is the sum of the hashes of this process's rows of the last step,
    on the device, which is not waited for. A sum modulo 2^64 is one modulo 2^63 too."""

    batch_hash: int | torch.Tensor = 0
    data_collator: Any

    def get_batch_samples(self, iterator: Any, batches: int, device: torch.device) -> Any:
        samples, items = super().get_batch_samples(iterator, batches, device)  # type: ignore[misc]
        hashes = [batch.pop(HASHES).to(device, non_blocking=True) for batch in samples]
        self.batch_hash = torch.cat(hashes).sum() if hashes else 0
        return samples, items


@dataclass(frozen=True)
class Document:
    """A conversation, or the part of it that is in a row; for each part ids and labels."""

    split: str
    row: int  # of the split's file, from 0
    parts: dict[str, tuple[list[int], list[int]]]


def documents(job: Job, row: Mapping[str, Any]) -> Iterator[Document]:
    """The conversations of a row of the dataset."""
    splits = list(job.mixture)
    if "origin" in row:
        split, number = divmod(row["origin"], ROWS_OF_A_SPLIT)
        parts = {name.removesuffix("_ids"): row[name] for name in PAIR_COLUMNS}
        trained = {
            name: ([IGNORED] * len(ids) if name == "prompt" else ids) for name, ids in parts.items()
        }
        yield Document(
            splits[split], number, {name: (ids, trained[name]) for name, ids in parts.items()}
        )
        return
    begin = 0
    for origin, end in zip(row["origins"], row["ends"], strict=True):
        split, number = divmod(origin, ROWS_OF_A_SPLIT)
        part = (row["input_ids"][begin:end], row["labels"][begin:end])
        yield Document(splits[split], number, {"": part})
        begin = end


def texts_of(data: Any) -> Iterator[tuple[Any, Any, str, int]]:
    """All tokens of the dataset in parts: ids [T], where each row ends in them [R], what of the rows
    they are ("" is all of a chat), the number of the first row."""
    import numpy as np
    import pyarrow.compute as pc

    is_pairs = "origin" in data.column_names
    for column in PAIR_COLUMNS if is_pairs else CHAT_COLUMNS[:1]:
        first = 0
        for chunk in data.data.column(column).chunks:
            sizes = pc.list_value_length(chunk).to_numpy(zero_copy_only=False)
            ids = chunk.flatten().to_numpy(zero_copy_only=False)
            name = column.removesuffix("_ids") if is_pairs else ""
            yield np.ascontiguousarray(ids), sizes.cumsum(), name, first
            first += len(chunk)


@dataclass(frozen=True)
class Order:
    """The rows of each step of a job, from the sampler that its Trainer makes for them."""

    job: Job
    data: Any  # datasets.Dataset [R]

    @cached_property
    def _trainer(self) -> Any:
        """A Trainer of nothing, with the job's options that decide the order."""
        from transformers import Trainer, TrainingArguments

        names = (
            "seed", "data_seed", "max_steps", "num_train_epochs", "per_device_train_batch_size",
            "gradient_accumulation_steps", "dataloader_drop_last", "train_sampling_strategy",
        )  # fmt: skip
        options = {name: self.job.trl[name] for name in names if name in self.job.trl}
        with TemporaryDirectory() as scratch:
            arguments = TrainingArguments(
                scratch, use_cpu=True, report_to="none", remove_unused_columns=False, **options
            )
            return Trainer(torch.nn.Linear(1, 1), arguments, train_dataset=self.data)

    @cached_property
    def _sampler(self) -> Any:
        """Batches of one process, before they are dealt out; its epoch can be set."""
        return self._trainer.get_train_dataloader().batch_sampler

    def _of_processes(self) -> list[Any]:
        from accelerate.data_loader import BatchSamplerShard

        count = self.job.world_size
        if count == 1:
            return [self._sampler]
        return [BatchSamplerShard(self._sampler, count, number) for number in range(count)]

    @cached_property
    def _sizes(self) -> tuple[int, int]:
        """Steps of an epoch, and of the stage."""
        values = self._trainer.set_initial_training_values(
            self._trainer.args, self._of_processes()[0]
        )
        return values[1], values[-1]

    @property
    def last_step(self) -> int:
        return self._sizes[1]

    def epoch(self, number: int) -> list[list[int]]:
        """The rows of each step of an epoch, from 0: of all processes, in the order of these."""
        accumulated, (steps, _) = self.job.trl.get("gradient_accumulation_steps", 1), self._sizes
        rows = list[list[int]]([] for _ in range(steps))
        for sampler in self._of_processes():
            self._sampler.sampler.set_epoch(number)
            for batch, indices in enumerate(sampler):
                rows[batch // accumulated] += indices
        return rows

    def rows(self, step: int) -> list[int]:
        """The rows of a step, from 1."""
        if not 0 < step <= self.last_step:
            raise UserError(
                f"STEP={step}: {self.job.stage} takes the steps 1 to {self.last_step:,}; name one "
                "of them"
            )
        return self.epoch(self.epoch_of(step))[(step - 1) % self._sizes[0]]

    def epoch_of(self, step: int) -> int:
        """From 0."""
        return (step - 1) // self._sizes[0]

    def steps_of(self, rows: set[int]) -> list[tuple[int, int, int]]:
        """(row, step, place in the batch) of each time that one of these rows is read."""
        found, each = list[tuple[int, int, int]](), self._sizes[0]
        for epoch in range(-(-self.last_step // each)):
            for step, of_step in enumerate(self.epoch(epoch), start=epoch * each + 1):
                if step <= self.last_step:
                    places = enumerate(of_step)
                    found += [(row, step, place) for place, row in places if row in rows]
        return found
