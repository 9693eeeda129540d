"""The eval-texts stage: what the repository's evaluation tasks score on, for decontamination."""

import fnmatch
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from ground.checksums import seal
from ground.errors import UserError
from ground.files import read_json_object
from ground.hub import Repository
from ground.processes import command
from launch.recipe.evaluation import load_suite, suite_names
from launch.recipe.scale import Scale
from launch.recipe.tables import StageRow
from launch.run.child import run_child
from launch.run.folder import StageRun
from launch.stages.evaluate import check_tasks, local_datasets, repositories_of

TEXTS, INDEX, FOUND, JOB = "eval_texts.jsonl", "eval_texts.npz", "found.json", "job.json"
# A task that makes its own questions.
WITHOUT_TEXTS = ("mode_switch",)


@dataclass(frozen=True)
class EvalTextsRecipe:
    decontaminate: str  # remove | report | off
    tasks: tuple[str, ...] = ()
    may_miss: tuple[str, ...] = ()  # patterns
    local: bool = False  # from packages
    key: str = ""  # `<scale file>: decontaminate`, for messages


@dataclass(frozen=True, kw_only=True)
class EvalTextsStage(StageRun):
    kind: ClassVar = "eval-texts"
    libraries: ClassVar = ()
    small_outputs: ClassVar = True
    recipe: EvalTextsRecipe

    @staticmethod
    def resolve(row: StageRow, at: Scale) -> EvalTextsRecipe:
        """Every task of recipes/eval/; without the hub those of the suites whose data packages carry."""
        from eval_tasks.task_table import expanded, read_tasks

        says, key = at.values, at.named("decontaminate")
        if says.decontaminate == "off":
            return EvalTextsRecipe("off", key=key)
        local = says.origin == "standin"
        suites = {name: load_suite(name) for name in suite_names()}
        tasks = dict[str, None]()
        for name, suite in suites.items():
            check_tasks(name, suite)
            for one in suite.rows if suite.local or not local else ():
                tasks |= dict.fromkeys(expanded(one.tasks, read_tasks()))
        named = tuple(task for task in tasks if task not in WITHOUT_TEXTS)
        return EvalTextsRecipe(says.decontaminate, named, says.decontaminate_without, local, key)

    def recipe_values(self) -> dict[str, Any]:
        """With the rows of the tasks, which say what the texts are."""
        from eval_tasks.task_table import read_tasks

        recipe, known = self.recipe, read_tasks()
        if recipe.decontaminate == "off":
            return {"decontaminate": "off"}
        rows = {name: asdict(known[name]) if name in known else {} for name in recipe.tasks}
        return {"tasks": rows, "may_miss": recipe.may_miss, "local": recipe.local}

    @property
    def shapes_results(self) -> bool:
        return self.recipe.decontaminate == "remove"

    @property
    def texts(self) -> Path:
        """Lines {task, text}, with their index beside."""
        return self.folder / TEXTS

    @property
    def outputs(self) -> Iterable[Path]:
        return () if self.recipe.decontaminate == "off" else [self.folder]

    def needs_of_hub(self) -> Iterable[Repository]:
        if self.recipe.local or self.is_finished():
            return ()
        return repositories_of(task for task in self.recipe.tasks if not self._may_miss(task))

    def _may_miss(self, task: str) -> bool:
        return any(fnmatch.fnmatchcase(task, pattern) for pattern in self.recipe.may_miss)

    def work(self, lock: int) -> dict[str, Any]:
        from datatrove_pipelines.decontaminate import build_index
        from eval_tasks.texts import Found, TextsJob

        recipe = self.recipe
        if recipe.decontaminate == "off":
            print(f"{self.stage}: {recipe.key}: off: training text may hold test items", flush=True)
            return {}
        if not recipe.tasks:
            where = "recipes/eval/ has no task" + " that packages carry" * recipe.local
            raise UserError(f"{recipe.key}: {recipe.decontaminate}: {where}; write off")
        found, job = self.folder / FOUND, self.folder / JOB
        data = str(local_datasets()) if recipe.local else None
        TextsJob(list(recipe.tasks), str(self.texts), str(found), data).write(job)
        log = self.folder / "log.txt"
        run_child(command("eval_tasks.texts", str(job)), log, self.stage, shown="left out: ")
        texts = Found(**read_json_object(found))
        self._check(texts.missing)
        build_index(self.texts)
        seal(self.folder, [TEXTS, INDEX])
        return asdict(texts)

    def _check(self, missing: dict[str, str]) -> None:
        for task, why in missing.items():
            if not self._may_miss(task):
                raise UserError(
                    f"{self.stage} at {self.arguments}: task {task}: its texts cannot be had ({why}); "
                    f"get its data, or name it under {self.recipe.key}_without: training text may "
                    "then hold its items"
                )
            print(f"{self.stage}: {task} is not known to decontamination: {why}", flush=True)
