"""Whatever a recipe file says wrongly is one line: the file, the key, the value, the remedy."""

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import mutants
import pytest
import torch
from conftest import ROOT, forget_recipes
from mutants import Mutant

from ground.errors import UserError
from launch.recipe import load
from launch.recipe.evaluation import NOT_SUITES, load_long_context, load_suite
from launch.recipe.scale import load_scale
from launch.recipe.tables import load_ablations, load_pipeline
from launch.run.folder import StageRun
from launch.stages.evaluate import check_tasks
from launch.tools.ablation import ablation_runs
from launch.walk import resolve, unfinished

SEED, EACH = 20261126, 16
SCALES = ("tiny", "full")


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of recipes/ that launch reads, on a machine with all GPUs and two cores."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "recipes", root / "recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "RECIPES", root / "recipes")
        patch.setattr(torch.cuda, "device_count", lambda: 10**6)
        patch.setattr("os.cpu_count", lambda: 2)
        patch.setenv("RUNS", str(root / "runs"))
        patch.chdir(root)
        yield root / "recipes"
    forget_recipes()


def everything() -> None:
    """All that `make` checks of recipes/ before it starts a process."""
    for name in SCALES:
        at = load_scale(name)
        left: dict[str, StageRun] = {}
        for stage in reversed(load_pipeline()):
            if stage not in left:
                left |= {run.stage: run for run in unfinished(resolve(stage, at))}
        for run in left.values():
            run.refuse()
        for ablation in load_ablations():
            ablation_runs(ablation, at)
    load_long_context()
    for file in sorted((load.RECIPES / "eval").glob("*.yaml")):
        if file.stem not in NOT_SUITES:
            check_tasks(file.stem, load_suite(file.stem))


def outcome(recipes: Path, mutant: Mutant) -> Exception | None:
    file = recipes / mutant.file
    before = file.read_text("utf-8")
    file.write_text(mutant.write(), "utf-8")
    forget_recipes()
    try:
        everything()
    except Exception as error:
        return error
    finally:
        file.write_text(before, "utf-8")
    return None


def problem(mutant: Mutant, error: Exception | None) -> str:
    """What is wrong with the outcome; empty where all is well."""
    if error is None:
        return "taken" if mutant.fate == "refused" else ""
    if not isinstance(error, UserError):
        return f"{type(error).__name__}: {error}"
    text = str(error)
    if mutant.fate == "harmless":
        return f"refused: {text}"
    if "\n" in text or not text.isprintable():
        return f"not one line: {text!r}"
    if not re.match(rf"recipes/{re.escape(mutant.file)}( line \d+| at SCALE=\w+)?: ", text):
        return f"another file is blamed: {text}"
    if mutant.fate == "valid":  # what it does not fit may be named in its place
        last = re.sub(r"\.\d+$", "", mutant.key).rpartition(".")[2]
        return "" if last in text else f"the key is not named: {text}"
    if mutant.key and f": {mutant.key}: " not in text and f": {mutant.key}." not in text:
        return f"another key is blamed: {text}"
    if mutant.key and mutant.value is not ... and shown(mutant.value) not in text:
        return f"the value is not shown: {text}"
    return "" if REMEDY.search(text) else f"no remedy: {text}"


REMEDY = re.compile(
    r"\b(write|did you mean|known|name|add|give|drop|lower|take|say|divide|not valid YAML|"
    r"one of|correct|has|expected|takes)\b"
)


def shown(value: object) -> str:
    return "nan" if isinstance(value, float) and math.isnan(value) else f"{value}"


@pytest.mark.parametrize("file", mutants.files())
def test_a_mistake_anywhere_is_refused_by_name_and_what_is_none_passes(
    recipes: Path, file: str
) -> None:
    drawn = [mutant for mutant in mutants.drawn(SEED, EACH) if mutant.file == file]
    assert len(drawn) == EACH
    problems = [f"{m}: {p}" for m in drawn if (p := problem(m, outcome(recipes, m)))]
    assert not problems, "\n".join(problems)
