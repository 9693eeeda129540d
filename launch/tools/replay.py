"""`make replay`: what the model sees at a step, from the order and the shards alone."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

from ground.errors import UserError
from launch.run.folder import StageRun, cache_root
from launch.stages.pretrain import PretrainStage

if TYPE_CHECKING:
    from datatrove_pipelines.lookup import Origin, Part, SourceTokens
    from nanotron_ext.trace import Trace, Window

MOST_WINDOWS, MOST_CHARACTERS = 8, 160  # that are printed, of a step and of a document


@dataclass(frozen=True)
class SeenPart:
    """A document's tokens in a window."""

    shard: str
    document: int  # of the shard, from 0
    file: str
    row: int | None  # of the file, from 1
    tokens: int  # in the window
    before: int  # tokens of the document that lie before the window
    after: int  # and after it
    text: str


@dataclass(frozen=True)
class SeenWindow:
    """A window of a step as it is printed."""

    place: int
    source: str
    window: int
    epoch: int
    hash: int
    documents: list[SeenPart]


@dataclass(frozen=True)
class PretrainReplay:
    """A pretraining stage's steps with their documents."""

    run: PretrainStage

    def __post_init__(self) -> None:
        refuse_other(self.run)
        if not self.run.data.is_finished():
            raise UserError(
                f"{self.run.stage}: its text is not tokenised yet; `{self.run.data.command}` does it"
            )

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

        return {one.name: SourceTokens(one.folder, one.token_bytes) for one in self.trace.job.sources}

    @cached_property
    def tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.run.tokenizer / "tokenizer.json"))

    def step(self, step: int) -> Iterator[SeenWindow]:
        from ground.batch_hash import token_hash

        for window in self.trace.windows(step):
            yield SeenWindow(
                window.place,
                window.source,
                window.index,
                window.epoch,
                token_hash(window.tokens),
                list(self._parts(window)),
            )

    def _parts(self, window: "Window") -> Iterator[SeenPart]:
        source, size = self.sources[window.source], len(window.tokens)
        first, at = window.index * size, 0
        for part in source.parts(first, first + size):
            count = part.stop - part.start
            ids = window.tokens[at : at + count].tolist()
            at += count
            origin = source.origin(part)
            yield SeenPart(
                part.shard.name,
                part.number,
                origin.file or self.file_of(window.source),
                origin.row,
                count,
                part.start,
                part.tokens - part.stop,
                self.tokenizer.decode(ids, skip_special_tokens=False),
            )

    def file_of(self, source: str) -> str:
        """The one file of a source whose shard names none: a stand-in's, or the user's own."""
        return file_of(self.run, source)


def file_of(run: PretrainStage, source: str) -> str:
    from datatrove_pipelines.standins.corpus import StandIn, target
    from launch.stages.sources import OwnText, StandInData, stand_in_values

    data = run.data.recipe.sources[source]
    if isinstance(data, StandInData):
        return str(target(StandIn(name=data.name, **stand_in_values(data.row)), cache_root()))
    return data.path if isinstance(data, OwnText) else data.hub_id


def refuse_other(run: StageRun) -> None:
    """Refuse a run folder that was made from another recipe: its steps were others."""
    manifest = run.manifest()
    if manifest and manifest["identity"] != run.identity:
        raise UserError(
            f"{run.folder}: was made from another recipe, input or library version "
            f"({run.what_changed(manifest)}), so its steps cannot be told from this one; put it back, "
            f"or run `{run.command}` again"
        )


def logged_hash(run: StageRun, step: int) -> int | None:
    """What the run wrote down of the step's batch; None where it has not come to it."""
    from ground.files import read_json_lines

    lines = (line for line in read_json_lines(run.folder / "metrics.jsonl"))
    return next((line.get("batch_hash") for line in lines if line["step"] == step), None)


def replay(run: StageRun, step: int, shows_all: bool, as_json: bool) -> None:
    """Print a step's batch: some of its windows, or all."""
    if not isinstance(run, PretrainStage):
        raise UserError(f"{run.stage}: trains nothing; STAGE= names one of the training stages")
    from ground.batch_hash import batch_hash

    stage = PretrainReplay(run)
    windows = stage.step(step)
    total, logged = stage.trace.windows_a_step, logged_hash(run, step)
    if as_json:
        whole = list(windows)
        print(json.dumps({
            "stage": run.stage, "step": step, "batch_hash": batch_hash(one.hash for one in whole),
            "logged_batch_hash": logged, "windows": [asdict(one) for one in whole],
        }, ensure_ascii=False))  # fmt: skip
        return
    sample = (step - run.first_step - 1) * total
    size = stage.trace.sequence_length
    print(f"{run.stage}, step {step:,}: samples {sample:,} to {sample + total - 1:,} of {size:,} tokens")
    for window in windows if shows_all else islice(windows, MOST_WINDOWS):
        print_window(window, shows_all)
    if not shows_all and total > MOST_WINDOWS:
        print(f"... and {total - MOST_WINDOWS:,} windows more: ALL=1 prints them, JSON=1 as JSON")
    print(_agreement(stage.trace.batch_hash(step), logged))


def _agreement(planned: int, logged: int | None) -> str:
    if logged is None:
        return f"batch_hash {planned}; the run has not logged this step"
    said = "as the run logged it" if planned == logged else f"but the run logged {logged}"
    return f"batch_hash {planned}, {said}"


def print_window(window: SeenWindow, is_whole: bool) -> None:
    print(f"\n[{window.place}] {window.source}, window {window.window:,}, epoch {window.epoch + 1}")
    for part in window.documents:
        outside = [f"{part.before:,} before" if part.before else "", f"{part.after:,} after" if part.after else ""]
        rest = " and ".join(filter(None, outside))
        print(
            f"  {place(part)}: {part.tokens:,} tokens"
            + (f", {rest} the window" if rest else ", whole")
        )
        print(f"    {shown(part.text, is_whole)}")


def place(part: SeenPart) -> str:
    """Where a document comes from."""
    row = f"{part.file}:{part.row}" if part.row is not None else part.file
    return f"{row} ({part.shard}, document {part.document:,})"


def shown(text: str, is_whole: bool) -> str:
    """A text on one line; its middle is cut out where it is long."""
    text = text.replace("\n", "\\n")
    if is_whole or len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]} ... {text[-half:]}"
