"""Walks the pipeline: resolves a stage's recipe, runs what it takes, then the stage itself."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from ground.errors import UserError
from ground.files import checkpoints
from ground.hub import ask
from ground.processes import Stopped, asked, is_stop
from launch.recipe import load
from launch.recipe.book import RECIPE_TYPES, Loaded, load_recipe
from launch.recipe.load import is_recipe_file, short
from launch.recipe.scale import Scale, where
from launch.recipe.tables import StageRow, load_pipeline, stage_of_file, stage_row
from launch.run.folder import StageRun
from launch.stages import kind_of

# Runs that a tool makes, by the start of their names: the tool adds its own.
RESOLVERS: dict[str, Callable[[str, Scale], StageRun]] = {}


def resolve(stage: str, at: Scale, start: str = "") -> StageRun:
    """A stage, or the run of a recipe file, at a scale, with all that it takes.

    `start` names checkpoints (FROM=) that take the place of the stages that it starts from.
    """
    run = _resolve(stage, at)
    if not start:
        return run
    from launch.stages.checkpoint import started_from

    return started_from(run, start)


def _resolve(stage: str, at: Scale) -> StageRun:
    for start, resolver in RESOLVERS.items():
        if stage.startswith(start):
            return resolver(stage, at)
    walk = _Walk(at)
    if is_recipe_file(stage):
        file = Path(stage)
        named = stage_of_file(file)
        return walk.stage(named) if named else walk.own(file)
    return walk.stage(stage)


@dataclass
class _Walk:
    at: Scale
    runs: dict[str, StageRun] = field(default_factory=dict)

    def stage(self, name: str) -> StageRun:
        """A stage of pipeline.yaml."""
        if name not in self.runs:
            row = stage_row(name)
            inputs = {taken: self.stage(taken) for taken in row.takes}
            loaded = load_recipe(name) if row.engine in RECIPE_TYPES else None
            self.runs[name] = self._run(name, row, inputs, loaded)
        return self.runs[name]

    def own(self, file: Path) -> StageRun:
        """The run of a user's recipe: the row of the stage that it extends, under its own name.

        With a mixture it gets its own data stage, with sources its own held-out stage as well.
        """
        loaded = load_recipe(str(file))
        row, name = stage_row(loaded.stage), loaded.name
        inputs: dict[str, StageRun] = {}
        for taken in row.takes:
            taken_row = load_pipeline()[taken]
            keys = {"data": ("mixture", "sources"), "held-out": ("sources",)}
            changed = any(
                k in layer.values for layer in loaded.own for k in keys.get(taken_row.engine, ())
            )
            if changed and not self.at.text:
                inputs[f"{taken_row.engine}-{name}"] = self._prepared(name, file, taken_row)
            else:
                inputs[taken] = self.stage(taken)
        return self._run(name, row, inputs, loaded)

    def _prepared(self, name: str, file: Path, row: StageRow) -> StageRun:
        """The stage that prepares text for a user's recipe beside, or in place of, a published one."""
        # The first recipe that names a source says what it is: the user's.
        recipes = (str(file), *row.mixture_of) if row.engine == "held-out" else (str(file),)
        inputs = {taken: self.stage(taken) for taken in row.takes}
        return self._run(
            f"{row.engine}-{name}", replace(row, mixture_of=recipes), inputs, None, file
        )

    def _run(
        self,
        name: str,
        row: StageRow,
        inputs: Mapping[str, StageRun],
        loaded: Loaded[object] | None,
        own: Path | None = None,
    ) -> StageRun:
        if loaded and loaded.own:
            own = loaded.own[-1].file
        kind = kind_of(row.engine)
        for needed in kind.takes:
            if not any(run.kind == needed for run in inputs.values()):
                key = f"{short(load.RECIPES / 'pipeline.yaml')}: stages.{name}.takes"
                has = ", ".join(inputs) or "empty"
                raise UserError(f"{key}: {has}: no stage of engine '{needed}'; add one")
        return kind(
            stage=name,
            scale=self.at.name,
            arguments=self.at.arguments,
            inputs=inputs,
            recipe=kind.resolve(loaded or row, self.at),
            file=loaded.file if loaded else own,
            is_own=own is not None,
            rerun_on_change=self.at.values.rerun_on_change,
            named=partial(where, loaded, self.at) if loaded else None,
        )


def run_stage(run: StageRun, force: bool = False) -> bool:
    """Bring a stage and all that it takes up to date; False when there was nothing to do.

    All checks of all of them are made before the first is run.
    """
    if not force and is_whole(run):
        return False
    stages = unfinished(run, force)
    for stage in stages:
        if not (force and stage is run):
            report_loss(stage)
        stage.refuse()
    ask(needed for stage in stages for needed in stage.needs_of_hub())
    for stage in stages:
        with stage.locked() as lock:
            stage.begin(force and stage is run)
            print(f"{stage.stage}: {stage.folder}", flush=True)
            try:
                if asked():  # a library caught the exception, in an import for example
                    raise Stopped
                stage.finish(**stage.work(lock))
            except BaseException as error:
                if not is_stop(error):
                    raise
                raise Stopped(_stopped(stage, run)) from None
        stage.show()
    return True


def report_loss(stage: StageRun) -> None:
    """Say what a finished stage that is to run again has lost; UserError where nobody asked for that."""
    if stage.is_finished():
        problem = stage.lost(thorough=True) or "an output is lost"
        stage.refuse_loss(problem)
        print(f"{stage.stage}: {problem}; made again", flush=True)


def _stopped(stage: StageRun, run: StageRun) -> str:
    """What a stage that a signal stopped on the way to `run` leaves, and how to go on."""
    saved = checkpoints(stage.folder)
    what = f"{saved[-1]} is saved" if saved else stage.left_by_a_signal
    return f"{stage.stage}: stopped by a signal: {what}; `{run.command}` goes on"


def unfinished(run: StageRun, force: bool = False) -> list[StageRun]:
    """What is left to do for a stage, in the order in which it is done."""
    left: dict[str, StageRun] = {}
    whole = set[str]()

    def visit(stage: StageRun, is_last: bool) -> None:
        # A forced stage may have a broken manifest: it is set aside unread.
        is_forced = is_last and force
        if stage.stage in left or stage.stage in whole:
            return
        if not is_forced and is_whole(stage, thorough=not is_last):
            whole.add(stage.stage)
            return
        for taken in stage.inputs.values() if is_forced else stage.needed:
            visit(taken, False)
        left[stage.stage] = stage

    visit(run, True)
    return list(left.values())


def is_whole(run: StageRun, thorough: bool = False) -> bool:
    """Whether nothing is left to do; what a stage wrote may have been deleted since."""
    return run.is_finished() and run.lost(thorough) is None


def is_forced() -> bool:
    """FORCE=1 sets the named stage's folder aside and runs it again."""
    return os.environ.get("FORCE", "").lower() not in ("", "0", "no", "false")
