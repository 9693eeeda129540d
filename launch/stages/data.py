"""A data stage: the sources of its mixtures as token shards in the cache."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ground.errors import UserError
from ground.files import read_json_object
from ground.hub import Repository
from launch.recipe.book import load_recipe
from launch.recipe.scale import Scale, scale
from launch.recipe.tables import StageRow, load_pipeline, stage_row
from launch.run.folder import StageRun, cache_root
from launch.stages.eval_texts import EvalTextsStage
from launch.stages.sources import (
    Data,
    HubData,
    OwnText,
    build_all,
    check_standins,
    mixture_of,
    mixtures_of,
    repositories,
    source_job,
)
from launch.stages.tokenizer import TokenizerStage

if TYPE_CHECKING:
    from datatrove_pipelines.shards import ShardInfo
    from datatrove_pipelines.sources import SourceJob

# Tokens to read of a hub's source for each that is drawn: some documents are held out, and the
# tokens of most are estimated from their bytes.
ROOM = 1.05


@dataclass(frozen=True)
class DataRecipe:
    sources: dict[str, Data]
    held_out_fraction: float  # of documents, never written
    unreleased: dict[str, str]  # what is left out, and what to build in its place
    seed: int
    least_tokens: int = 0  # of a source; with fewer it is written again and again
    decontaminate: str = "off"  # remove | report | off


@dataclass(frozen=True, kw_only=True)
class DataStage(StageRun):
    kind: ClassVar = "data"
    takes: ClassVar = ("tokenizer", "eval-texts")
    libraries: ClassVar = ("datatrove", "tokenizers")
    recipe: DataRecipe

    @staticmethod
    def resolve(row: StageRow, at: Scale) -> DataRecipe:
        mixture = mixtures_of(row.mixture_of, at)
        sources = dict(sorted(mixture.data.items()))
        if at.values.tokens:
            sources = _portions(sources, row.mixture_of, at)
        stages = [scale(load_recipe(recipe), at).nanotron for recipe in row.mixture_of]
        longest = max(nanotron.tokens.sequence_length for nanotron in stages)
        return DataRecipe(
            sources,
            at.values.held_out.fraction,
            mixture.unreleased,
            stages[0].data_seed,
            longest + 1 if at.values.fill_windows else 0,
            at.values.decontaminate,
        )

    def recipe_values(self) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "sources": {name: data.values() for name, data in recipe.sources.items()},
            "held_out_fraction": recipe.held_out_fraction,
            "unreleased": recipe.unreleased,
            "seed": recipe.seed,
            **({"least_tokens": recipe.least_tokens} if recipe.least_tokens else {}),
            **({"decontaminate": recipe.decontaminate} if recipe.decontaminate != "off" else {}),
        }

    @property
    def shards(self) -> dict[str, Any]:
        """Shards of a finished stage: {source: {folder, tokens, documents, bytes, token_bytes}}."""
        shards: dict[str, Any] = self._listed("shards")
        return shards

    @property
    def eos_id(self) -> int:
        return int(self._listed("eos_id"))

    def _listed(self, key: str) -> Any:
        """What the manifest of a finished stage has under a key."""
        file = self.folder / "manifest.json"
        try:
            return read_json_object(file)[key]
        except KeyError:
            raise UserError(f"{file}: no {key}; `{self.command} FORCE=1` writes it again") from None

    @property
    def portions(self) -> set[str]:
        """Sources of which the stage reads what no earlier stage has read."""
        data = self.recipe.sources
        return {n for n, one in data.items() if isinstance(one, HubData) and one.portion}

    def lost(self, thorough: bool = False) -> str | None:
        from datatrove_pipelines.shards import is_whole

        folders = (cache_root() / shard["folder"] for shard in self.shards.values())
        lost = next((folder for folder in folders if not is_whole(folder)), None)
        return f"{lost}: a file is missing or cut off" if lost else None

    def refuse(self) -> None:
        from datatrove_pipelines.clusters import executor_of

        executor_of(os.environ)
        check_standins(self.recipe.sources)

    def needs_of_hub(self) -> Iterable[Repository]:
        """Sources whose shards are not there yet."""
        from datatrove_pipelines.shards import is_whole, shard_folder

        recipe, tokenizer = self.recipe, self.input_of(TokenizerStage)
        missing = dict(recipe.sources)
        is_ready = all(run.is_finished() for run in self.inputs.values())
        for name, one in recipe.sources.items():
            if isinstance(one, HubData) and is_ready:
                job = self._job(name, one, {})
                folder = shard_folder(job, tokenizer.tokenizer, cache_root())
                if folder.is_dir() and is_whole(folder):
                    del missing[name]
        return repositories(missing)

    def _job(self, name: str, data: Data, files: Mapping[str, Path]) -> "SourceJob":
        recipe = self.recipe
        sizes = (recipe.held_out_fraction, recipe.seed, recipe.least_tokens)
        job: SourceJob = source_job(name, data, files, *sizes)
        if recipe.decontaminate == "off":
            return job
        texts = self.input_of(EvalTextsStage).texts
        return replace(job, decontaminate=texts, only_report=recipe.decontaminate == "report")

    def work(self, lock: int) -> dict[str, Any]:
        from datatrove_pipelines.building import tokenize_all
        from datatrove_pipelines.clusters import executor_of

        recipe = self.recipe
        for name, substitute in recipe.unreleased.items():
            print(
                f"{self.stage}: {name} was never released and is left out, the other weights are "
                f"renormalised; to put it back, build it ({substitute}) and name it in "
                "recipes/sources.yaml",
                flush=True,
            )
        files = build_all(recipe.sources)
        jobs = [self._job(name, data, files) for name, data in recipe.sources.items()]
        tokenizer = self.input_of(TokenizerStage)
        executor, workers = executor_of(os.environ)
        infos = tokenize_all(jobs, tokenizer.tokenizer, cache_root(), workers, executor)
        if len({info.eos_id for info in infos}) != 1:
            raise UserError(f"{self.stage}: shards of several tokenizers; {self.command} FORCE=1")
        found = self._contaminated(infos)
        own = {name: one.path for name, one in recipe.sources.items() if isinstance(one, OwnText)}
        return {
            "shards": {
                info.name: {
                    "folder": str(info.folder.relative_to(cache_root())),
                    "tokens": info.tokens,
                    "documents": info.documents,
                    "bytes": info.bytes,
                    "token_bytes": info.token_bytes,
                    **({"left_out": info.left_out} if info.name in own else {}),
                    **({"contaminated": found[info.name]} if info.name in found else {}),
                }
                for info in infos
            },
            "eos_id": infos[0].eos_id,
            **({"own_text": own} if own else {}),
        }

    def _contaminated(self, infos: "Sequence[ShardInfo]") -> dict[str, dict[str, int]]:
        """{source: {task: documents that hold an item of it}}, said to the user too."""
        if self.recipe.decontaminate == "off":
            return {}
        from datatrove_pipelines.decontaminate import REPORT, tasks_found

        found = {info.name: tasks_found(info.folder) for info in infos}
        if not any(found.values()):
            print(f"{self.stage}: no document holds a test item", flush=True)
        what = "left out" if self.recipe.decontaminate == "remove" else "listed and kept"
        for info in infos:
            if tasks := found[info.name]:
                shown = ", ".join(f"{task} {count:,}" for task, count in tasks.items())
                print(
                    f"{self.stage}: {info.name}: documents that hold test items, {what}: "
                    f"{sum(tasks.values()):,} ({shown}): {info.folder}/*.{REPORT}",
                    flush=True,
                )
        return found

    def shards_to_train_on(self) -> dict[str, Any]:
        """`shards`. Raises UserError where one may hold test items that the scale has removed."""
        from datatrove_pipelines.shards import content_hash, read_info

        if self.recipe.decontaminate != "remove":
            return self.shards
        texts = self.input_of(EvalTextsStage)
        for name, shard in self.shards.items():
            folder = cache_root() / shard["folder"]
            if read_info(folder).decontaminated != content_hash(texts.texts):
                raise UserError(
                    f"source {name}: {folder}: its text may hold test items, and {texts.recipe.key} "
                    f"says remove; `{self.command} FORCE=1` builds it without them, `off` there "
                    "trains on it as it is"
                )
        return self.shards


def _portions(sources: dict[str, Data], recipes: tuple[str, ...], at: Scale) -> dict[str, Data]:
    """The sources, those of the hub cut to what these stages draw, after what earlier ones drew.

    A stage that starts afresh, with another window, starts a new pass over each source.
    """
    taken, earlier = _drawn(recipes, at), Counter[str]()
    afresh = scale(load_recipe(recipes[0]), at).nanotron.starts_afresh
    before = None if afresh else _stage_before(recipes[0])
    while before:
        earlier += _drawn((before,), at)
        before = _stage_before(before)
    return {
        name: replace(data, portion=(earlier[name], taken[name]))
        if isinstance(data, HubData)
        else data
        for name, data in sources.items()
    }


def _drawn(recipes: tuple[str, ...], at: Scale) -> Counter[str]:
    """Tokens that stages draw of each source, with room for what is held out and cut at the end."""
    drawn = Counter[str]()
    for recipe in recipes:
        nanotron, before = scale(load_recipe(recipe), at).nanotron, _stage_before(recipe)
        tokens, steps = nanotron.tokens, nanotron.tokens.train_steps
        if before and not nanotron.starts_afresh:
            steps -= scale(load_recipe(before), at).nanotron.tokens.train_steps
        weights = mixture_of(recipe, at).weights
        of_stage = steps * nanotron.windows_a_step * tokens.sequence_length
        for name, weight in weights.items():
            share = weight / sum(weights.values())
            drawn[name] += round(ROOM * share * of_stage) + 2 * (tokens.sequence_length + 1)
    return drawn


def _stage_before(recipe: str) -> str | None:
    """The pretraining stage that a recipe's stage goes on from."""
    takes = stage_row(load_recipe(recipe).stage).takes
    return next((name for name in takes if load_pipeline()[name].engine == "pretrain"), None)
