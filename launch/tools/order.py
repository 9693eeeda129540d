"""The order of a pretraining stage with the documents of its windows, for `make replay` and `make seen`."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from ground.batch_hash import shown, token_hash
from ground.errors import UserError
from launch.run.folder import StageRun, cache_root, node_cache
from launch.stages.pretrain import PretrainStage
from launch.stages.tokenizer import TokenizerStage

if TYPE_CHECKING:
    from datatrove_pipelines.lookup import Part, SourceTokens
    from nanotron_ext.trace import Trace, Window


@dataclass(frozen=True)
class SeenPart:
    """A document's tokens in a window."""

    file: str
    row: int | None  # of the file, from 1
    shard: str
    document: int  # of the shard, from 0
    tokens: int  # in the window
    before: int  # tokens of the document that lie before the window
    after: int  # and after it
    text: str


@dataclass(frozen=True)
class SeenWindow:
    """A window of a step."""

    place: int  # in the step's batch
    source: str
    window: int
    epoch: int  # from 0
    hash: str
    documents: list[SeenPart]


@dataclass(frozen=True)
class PretrainOrder:
    """Raises UserError where the shards are not there whole, or the run is not this recipe's."""

    run: PretrainStage

    def __post_init__(self) -> None:
        refuse_other(self.run)
        if not self.run.data.is_finished():
            raise UserError(
                f"{self.run.stage}: its text is not tokenised yet; `{self.run.data.command}` does it"
            )
        for taken in (self.run.data, self.run.input_of(TokenizerStage)):
            if lost := taken.lost(thorough=True):
                raise UserError(f"{lost}; `{taken.command}` writes it again")

    @cached_property
    def trace(self) -> "Trace":
        from nanotron_ext.trace import Trace

        nanotron = self.run.recipe.nanotron
        return Trace(
            self.run.job(),
            sequence_length=nanotron.tokens.sequence_length,
            windows_a_step=nanotron.windows_a_step,
            last_step=self.run.steps,
            vocab_size=nanotron.model.model_config.vocab_size,
        )

    @cached_property
    def sources(self) -> "dict[str, SourceTokens]":
        from datatrove_pipelines.lookup import SourceTokens
        from ground.storage import NodeCache

        return {
            one.name: SourceTokens(one.folder, one.token_bytes, NodeCache(*node_cache()))
            for one in self.trace.job.sources
        }

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.run.tokenizer / "tokenizer.json"))

    unit: ClassVar = "windows"

    def rows_of(self, step: int) -> int:
        return self.trace.windows_a_step

    def described(self, step: int) -> str:
        first = (step - self.run.first_step - 1) * self.trace.windows_a_step
        last = first + self.trace.windows_a_step - 1
        return f"of {self.trace.sequence_length:,} tokens, samples {first:,} to {last:,}"

    def batch_hash(self, step: int) -> str:
        return self.trace.batch_hash(step)

    def step(self, step: int) -> Iterator[SeenWindow]:
        """The windows of a step's batch."""
        for window in self.trace.windows(step):
            yield SeenWindow(
                window.place, window.source, window.index, window.epoch,
                shown(token_hash(window.tokens)), list(self._parts(window)),
            )  # fmt: skip

    def _parts(self, window: "Window") -> Iterator[SeenPart]:
        size, at = len(window.tokens), 0
        for part in self.sources[window.source].parts(
            window.index * size, (window.index + 1) * size
        ):
            count = part.stop - part.start
            ids = window.tokens[at : at + count].tolist()
            at += count
            file, row = self.origin(window.source, part)
            shard, after = part.shard.name, part.tokens - part.stop
            yield SeenPart(file, row, shard, part.number, count, part.start, after, self.text(ids))

    def text(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def origin(self, source: str, part: "Part") -> tuple[str, int | None]:
        """File and row of a document."""
        origin = self.sources[source].origin(part)
        return origin.file or file_of(self.run, source), origin.row


def file_of(run: PretrainStage, source: str) -> str:
    """What a source is read from, where its shards do not say it: a stand-in's file, a folder."""
    from datatrove_pipelines.standins.corpus import StandIn, target
    from launch.stages.sources import OwnText, StandInData, stand_in_values

    data = run.data.recipe.sources[source]
    if isinstance(data, StandInData):
        return str(target(StandIn(name=data.name, **stand_in_values(data.row)), cache_root()))
    return f"a file of {data.path}" if isinstance(data, OwnText) else data.hub_id


def refuse_other(run: StageRun) -> None:
    """Refuse a run folder that was made from another recipe: its steps were others."""
    manifest = run.manifest()
    if manifest and manifest["identity"] != run.identity:
        raise UserError(
            f"{run.folder}: was made from another recipe, input or library version "
            f"({run.what_changed(manifest)}), whose steps are not known; put that back, or begin the "
            f"stage again: `{run.command} FORCE=1`"
        )
