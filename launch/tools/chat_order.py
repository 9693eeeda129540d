"""The order of a post-training stage with the conversations of its rows, for `make replay` and `make seen`."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ground.batch_hash import shown, total
from ground.checksums import verify_if_sealed
from ground.errors import UserError, first_line
from launch.stages.posttrain import PosttrainStage
from launch.tools.order import refuse_other

if TYPE_CHECKING:
    from datatrove_pipelines.lookup import TextSearch
    from posttrain.batches import Order
    from posttrain.job import Job

# Around what is trained of a conversation, in texts for people.
TRAINED = ("«", "»")


@dataclass(frozen=True)
class SeenChat:
    """A conversation, or the part of it that is in a row of the token dataset."""

    split: str
    file: str
    row: int  # of the file, from 1
    tokens: int
    trained_tokens: int
    texts: dict[str, str]  # of prompt, chosen and rejected; of a chat under ""


@dataclass(frozen=True)
class SeenRow:
    """A packed window or a pair of a step."""

    place: int  # in the step's batch, process after process
    row: int  # of the token dataset, from 0
    epoch: int  # from 0
    hash: str
    documents: list[SeenChat]


@dataclass(frozen=True)
class ChatPlace:
    """Tokens [start, stop) of a column of a row, in one conversation."""

    row: int
    column: str
    start: int
    stop: int
    split: str
    file: str
    line: int


@dataclass(frozen=True)
class PosttrainOrder:
    """Raises UserError where the token dataset is not there, or the run is not this recipe's."""

    run: PosttrainStage

    def __post_init__(self) -> None:
        refuse_other(self.run)
        if not self.run.is_prepared:
            raise self._not_there("its chats are not tokenised yet, or not whole")
        if not {"origin", "origins"} & set(self.order.data.column_names):
            raise UserError(
                f"{self.run.folder / 'data'}: does not say which conversations its rows are, being "
                f"made by an earlier version; `{self.run.command} FORCE=1` begins again"
            )
        verify_if_sealed(self.run.tokenizer)

    @property
    def job(self) -> "Job":
        return self.order.job

    @cached_property
    def order(self) -> "Order":
        from datasets import load_from_disk

        from posttrain.batches import Order
        from posttrain.job import Job

        try:
            data = load_from_disk(str(self.run.folder / "data"))
        except Exception as error:  # of JSON, of Arrow's format, or of a key that is missing
            raise self._not_there(f"{self.run.folder / 'data'}: {first_line(error)}") from error
        return Order(Job.read(self.run.folder), data)

    def _not_there(self, what: str) -> UserError:
        prepare = f"{sys.executable} -m launch run {self.run.stage} --part prepare"
        return UserError(f"{self.run.stage}: {what}; `{self.run.arguments} {prepare}` does it")

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.run.tokenizer / "tokenizer.json"))

    @property
    def unit(self) -> str:
        return "pairs" if self.job.trains_pairs else "packed windows"

    def rows_of(self, step: int) -> int:
        return len(self.order.rows(step))

    def described(self, step: int) -> str:
        processes = self.job.world_size
        marks = "" if self.job.trains_pairs else f"; {'...'.join(TRAINED)} is trained"
        return f"for {processes} process{'es' * (processes > 1)}{marks}"

    def batch_hash(self, step: int) -> str:
        from posttrain.batches import hash_of

        data = self.order.data
        return shown(total(hash_of(data[row]) for row in self.order.rows(step)))

    def step(self, step: int) -> Iterator[SeenRow]:
        """The rows of a step's batch."""
        from posttrain.batches import documents, hash_of

        for place, number in enumerate(self.order.rows(step)):
            row, job = self.order.data[number], self.job
            chats = [
                SeenChat(
                    one.split,
                    job.files[one.split],
                    one.row + 1,
                    sum(len(ids) for ids, _ in one.parts.values()),
                    sum(label >= 0 for _, labels in one.parts.values() for label in labels),
                    {name: self.marked(*part) for name, part in one.parts.items()},
                )
                for one in documents(job, row)
            ]
            epoch = self.order.epoch_of(step)
            yield SeenRow(place, number, epoch, shown(hash_of(row)), chats)

    def marked(self, ids: list[int], labels: list[int]) -> str:
        """The text of the ids, with marks around what is trained of it."""
        text, pairs = "", zip(ids, labels, strict=True)
        for is_trained, run in groupby(pairs, key=lambda pair: pair[1] >= 0):
            begin, end = TRAINED if is_trained else ("", "")
            text += begin + self.text([token for token, _ in run]) + end
        return text

    def text(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def places(self, search: "TextSearch") -> Iterator[ChatPlace]:
        """Each place of a text in a conversation."""
        from posttrain.batches import texts_of

        for tokens, ends, name, first_row in texts_of(self.order.data):
            for start, stop in search.in_tokens(tokens):
                row = int(ends.searchsorted(start, "right"))
                begin = int(ends[row - 1]) if row else 0
                place = self._place(first_row + row, name, start - begin, stop - begin)
                if place:
                    yield place

    def ids(self, at: ChatPlace) -> list[int]:
        row = self.order.data[at.row]
        column: list[int] = row[f"{at.column}_ids" if at.column else "input_ids"]
        return column[at.start : at.stop]

    def _place(self, row: int, column: str, start: int, stop: int) -> ChatPlace | None:
        """The conversation that holds these tokens; None where no single one does."""
        from posttrain.batches import documents

        begin = 0
        for one in documents(self.job, self.order.data[row]):
            name = column if column in one.parts else ""
            end = begin + len(one.parts[name][0])
            if begin <= start and stop <= end:
                return ChatPlace(
                    row, name, start, stop, one.split, self.job.files[one.split], one.row + 1
                )
            begin = end
        return None
