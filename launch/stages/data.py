"""A data stage: the sources of its mixtures as token shards in the cache."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ground.checksums import sizes_differ
from ground.errors import UserError
from ground.files import read_json_object
from ground.hub import Repository
from launch.recipe.book import load_recipe
from launch.recipe.scale import Scale, scale
from launch.recipe.tables import StageRow
from launch.report.results import counted
from launch.run.folder import StageRun, cache_root, shard_urls
from launch.stages.budget import within_budget
from launch.stages.eval_texts import EvalTextsStage
from launch.stages.sources import (
    Data,
    HubData,
    OwnText,
    StandInData,
    build_all,
    check_standins,
    mixtures_of,
    repositories,
    source_job,
)
from launch.stages.tokenizer import TokenizerStage

if TYPE_CHECKING:
    from datatrove_pipelines.shards import ShardInfo
    from datatrove_pipelines.sources import SourceJob


@dataclass(frozen=True)
class DataRecipe:
    sources: dict[str, Data]
    held_out_fraction: float  # of documents, never written
    unreleased: dict[str, str]  # what is left out, and what to build in its place
    seed: int
    least_tokens: int = 0  # of a source; with fewer it is written again and again
    decontaminate: str = "off"  # remove | report | off
    # What was never released, and the row that is read for it.
    replaced: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DataStage(StageRun):
    kind: ClassVar = "data"
    takes: ClassVar = ("tokenizer", "eval-texts")
    libraries: ClassVar = ("datatrove", "tokenizers")
    left_by_a_signal: ClassVar = "what is tokenised is kept"
    recipe: DataRecipe

    @staticmethod
    def resolve(row: StageRow, at: Scale) -> DataRecipe:
        mixture = mixtures_of(row.mixture_of, at)
        sources = within_budget(dict(sorted(mixture.data.items())), row.mixture_of, at)
        stages = [scale(load_recipe(recipe), at).nanotron for recipe in row.mixture_of]
        longest = max(nanotron.tokens.sequence_length for nanotron in stages)
        return DataRecipe(
            sources,
            at.values.held_out.fraction,
            mixture.unreleased,
            stages[0].data_seed,
            longest + 1 if at.values.fill_windows else 0,
            at.values.decontaminate,
            mixture.replaced,
        )

    def recipe_values(self) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "sources": {name: data.values() for name, data in recipe.sources.items()},
            "held_out_fraction": recipe.held_out_fraction,
            "unreleased": recipe.unreleased,
            **({"replaced": recipe.replaced} if recipe.replaced else {}),
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

    def lost(self, thorough: bool = False) -> str | None:
        from datatrove_pipelines.shards import is_whole

        folders = (cache_root() / shard["folder"] for shard in self.shards.values())
        if (lost := next((folder for folder in folders if not is_whole(folder)), None)) is None:
            return None
        return sizes_differ(lost) or f"{lost}: a file is missing or cut off"

    def refuse(self) -> None:
        from datatrove_pipelines.clusters import executor_of

        executor_of(os.environ)
        check_standins(self.recipe.sources)

    def needs_of_hub(self) -> Iterable[Repository]:
        """Sources whose shards are not there yet."""
        from datatrove_pipelines.shards import is_whole, shard_folder
        from ground.storage import is_kept

        urls = shard_urls()
        tokenizer, missing = self.input_of(TokenizerStage), dict(self.recipe.sources)
        is_ready = all(run.is_finished() for run in self.inputs.values())
        for job in self._jobs({}) if is_ready else ():
            if isinstance(missing[job.name], HubData):
                folder = shard_folder(job, tokenizer.tokenizer, cache_root())
                if (folder.is_dir() and is_whole(folder)) or is_kept(folder.name, urls):
                    del missing[job.name]
        return repositories(missing)

    def _jobs(self, files: Mapping[str, Path]) -> "list[SourceJob]":
        """What tokenises each source, but stand-ins that are not among `files`."""
        from datatrove_pipelines.cleaning.steps import in_order

        return in_order(
            [
                self._job(name, one, files)
                for name, one in self.recipe.sources.items()
                if not isinstance(one, StandInData) or one.name in files
            ]
        )

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
        self._name_what_is_not_read()
        files = build_all(recipe.sources)
        jobs = self._jobs(files)
        tokenizer = self.input_of(TokenizerStage)
        _pull(jobs, tokenizer)
        executor, workers = executor_of(os.environ)
        infos = tokenize_all(jobs, tokenizer.tokenizer, cache_root(), workers, executor)
        if len({info.eos_id for info in infos}) != 1:
            raise UserError(f"{self.stage}: shards of several tokenizers; {self.command} FORCE=1")
        cleaned = {
            job.name: _counts(info) for job, info in zip(jobs, infos, strict=True) if job.clean
        }
        for name, counts in cleaned.items():
            what = counted(counts) or "none left out or changed"
            print(f"{self.stage}: {name}: {counts['read']:,} documents read; {what}", flush=True)
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
                    **(_counts(info) if info.name in {*own, *cleaned} else {}),
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

    def _name_what_is_not_read(self) -> None:
        """One line for each source that was never released, or holds files that are no text."""
        from datatrove_pipelines.text_files import other_files

        for name, substitute in self.recipe.unreleased.items():
            print(
                f"{self.stage}: {name} was never released and is left out, the other weights are "
                f"renormalised; to put it back, build it ({substitute}) and name it in "
                "recipes/sources.yaml, or say SUBSTITUTES=1 where its row names another",
                flush=True,
            )
        for name, other in self.recipe.replaced.items():
            data = self.recipe.sources[other]
            known_as = f"{other} ({data.hub_id})" if isinstance(data, HubData) else other
            print(
                f"{self.stage}: {name} was never released: {known_as} takes its place", flush=True
            )
        for name, data in self.recipe.sources.items():
            if isinstance(data, OwnText) and (others := other_files(Path(data.path))):
                kinds = ", ".join(f"{kind} {count}" for kind, count in others.most_common(5))
                print(
                    f"{self.stage}: {name}: {others.total():,} files of other kinds are not read "
                    f"({kinds}): txt, md, jsonl, parquet are",
                    flush=True,
                )


def _counts(info: Any) -> dict[str, Any]:
    """Documents of a ShardInfo that were read, and left out and changed, by step."""
    return {"read": info.read, "left_out": info.left_out, "changed": info.changed}


def _pull(jobs: Iterable[Any], tokenizer: TokenizerStage) -> None:
    """Take what is at SHARDS already instead of building it; the tokens stay there."""
    from datatrove_pipelines.shards import shard_folder
    from ground.storage import pull

    for job in jobs if shard_urls() else ():
        pull(shard_folder(job, tokenizer.tokenizer, cache_root()), shard_urls())
