"""`make eval MODEL=...`: any checkpoints on a suite, several in one call."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ground.checksums import verify_if_sealed
from ground.errors import UserError
from ground.files import write_json, write_text
from ground.hub import Repository, ask
from launch.recipe.evaluation import load_published, load_suite
from launch.report.terminal import print_scores
from launch.run.folder import runs_root
from launch.stages.evaluate import Row, check_tasks, evaluate, suite_repositories
from launch.tools.backends import check_backend, processes, servers


def evaluate_models(
    models: Sequence[str],
    suite: str,
    scale: str,
    limit: int,
    backend: str = "transformers",
    endpoint: str = "",
    samples: int = 0,
) -> None:
    """Score them, print the table, write runs/<scale>/evaluation/<suite>-table.json.

    On the GPUs that there are. Only the suite says whether packages or the hub give the data.
    `backend` and `endpoint`: see backends.py; `samples` is the most that an item gets, 0: the suite's.
    """
    if limit < 0:
        raise UserError(f"LIMIT={limit}: below 0; name a number of items, or 0 for all")
    if samples < 0:
        raise UserError(
            f"SAMPLES={samples}: below 0; name a number of answers, or 0 for the suite's"
        )
    check_tasks(suite, load_suite(suite))
    models = [model.strip().rstrip("/") for model in models]
    check_models(models)
    check_backend(backend, endpoint, models)
    ask(
        [
            *(Repository("model", m, "main", f"MODEL={m}") for m in models),
            *suite_repositories(load_suite(suite)),
        ]
    )
    import torch

    folder = runs_root() / scale / "evaluation"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[Row] = []
    # A server has one model.
    for group in [models] if backend == "transformers" else [[model] for model in models]:
        with servers(backend, endpoint, group[0], load_suite(suite), folder, device) as found:
            rows += evaluate(
                group, suite, folder, device=device, local=False, limit=limit, servers=found,
                processes=max(processes(backend, device), 1), samples=samples,
            )  # fmt: skip
    write_json(folder / f"{suite}-table.json", rows)
    _show(rows, models, suite, folder)


def _show(rows: list[Row], models: Sequence[str], suite: str, folder: Path) -> None:
    """Raises UserError where a row has no score."""
    short = short_names(models)
    rows = [row | {"model": short[row["model"]]} for row in rows]
    print_scores(rows)
    print(folder / f"{suite}-table.json")
    _offer_win_rates(rows, suite, folder)
    if left_out := [row for row in rows if "error" in row]:
        first = f"{left_out[0]['name']}: {left_out[0]['error']}"
        raise UserError(f"{len(left_out)} of {len(rows)} scores are left out; the first, {first}")


def check_models(models: Sequence[str]) -> None:
    """Refuse what is neither a model folder nor the hub's `owner/name`, before any import."""
    for model in models:
        is_folder = (Path(model) / "config.json").is_file()
        is_hub_id = model.count("/") <= 1 and not model.startswith((".", "/")) and model != ""
        if not is_folder and (Path(model).exists() or not is_hub_id):
            raise UserError(
                f"MODEL={model}: no config.json there; name a transformers folder or a hub id"
            )
        if is_folder:
            verify_if_sealed(Path(model))


def short_names(models: Sequence[str]) -> dict[str, str]:
    """{model: its path's last parts, as many as tell it from the others}."""

    def ending(model: str, parts: int) -> str:
        return "/".join(model.split("/")[-parts:])

    short = {}
    for model in models:
        others = [other for other in models if other != model]
        parts = 1
        while any(ending(other, parts) == ending(model, parts) for other in others):
            parts += 1
        short[model] = ending(model, parts)
    return short


def _offer_win_rates(rows: Sequence[Row], suite_name: str, folder: Path) -> None:
    """Write the scores for `make win-rate SCORES=`, one file per section of published.yaml.

    Not for suites on data from packages: their items are not the published ones.
    """
    import yaml

    suite, counted = load_suite(suite_name), load_published().win_rate
    if suite.local:
        return
    benchmark = {row.name: row.published for row in suite.rows if row.published}
    sections: list[str | None] = [*suite.system_prompts] or [suite.published]
    for section in sections:
        name = f"{suite_name}-{section}" if suite.system_prompts else suite_name
        scores: dict[str, dict[str, float]] = {}
        for row in rows:
            if row["suite"] == name and "error" not in row and row["name"] in benchmark:
                own: dict[Any, float] = scores.setdefault(f"{row['model']} (own)", {})
                own[benchmark[row["name"]]] = round(100 * row["value"], 2)
        if section in counted and scores:
            file = folder / f"{name}-scores.yaml"
            write_text(file, yaml.safe_dump(scores, sort_keys=False))
            print(f"make win-rate SUITE={section} SCORES={file}")
