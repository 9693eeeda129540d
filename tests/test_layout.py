"""The repository's shape: which way imports run, where libraries are patched, what `make` offers."""

import ast
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest
from conftest import ROOT, kept_environment

from launch.recipe import tables
from launch.recipe.tables import load_pipeline
from launch.stages import STAGE_CLASSES, kind_of

ENGINES = (
    "nanotron_ext", "datatrove_pipelines", "posttrain", "eval_tasks", "runtimes", "conformance",
)  # fmt: skip
PACKAGES = ("ground", *ENGINES, "launch")
OURS = (*PACKAGES, "benchmarks")
MODULES = sorted(file for folder in OURS for file in (ROOT / folder).rglob("*.py"))
LIBRARIES = ("nanotron", "torch", "datatrove", "transformers", "trl", "lighteval", "tokenizers")


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """import-linter with the contracts of pyproject.toml on the packages of a checkout."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_imports_run_one_way() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout


# A contract's id, and a wrong import that it must see: the file, the line.
WRONG_IMPORTS = {
    "folders": ("posttrain/rows.py", "from launch import walk"),
    "launch": ("launch/run/child.py", "from launch.stages import kind_of"),
    "recipe": ("launch/recipe/values.py", "import eval_tasks.task_table"),
    "jobs": ("nanotron_ext/job.py", "import torch"),
    "scorers": ("eval_tasks/intervals.py", "import nanotron"),
    "circles": ("ground/errors.py", "from ground import files"),
}


def test_a_wrong_import_breaks_its_contract(tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, line in WRONG_IMPORTS.values():
        (tmp_path / name).write_text(f"{(tmp_path / name).read_text()}\n\n{line}\n")
    done = lint_imports(tmp_path)
    contracts = re.findall(r"^id = \"(.*)\"$", (ROOT / "pyproject.toml").read_text(), re.M)
    assert set(contracts) == set(WRONG_IMPORTS) and done.returncode == 1
    assert f"0 kept, {len(contracts)} broken" in done.stdout, done.stdout


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engines_folder_does_not_read_recipes(engine: str) -> None:
    for file in (ROOT / engine).rglob("*.py"):
        assert not re.search(r"\bRECIPES\b|\"recipes\"", file.read_text()), name_of(file)


def test_no_module_of_ours_imports_the_tests_or_by_a_relative_path() -> None:
    for file in MODULES:
        pattern = r"^\s*(from|import) (tests|conftest)\b|^\s*from \."
        assert not re.search(pattern, file.read_text(), re.M), name_of(file)


def library_names(tree: ast.AST) -> set[str]:
    """Names that a module binds to a library, or to something of one."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [(alias.name, alias.asname or alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [(str(node.module), alias.asname or alias.name) for alias in node.names]
        else:
            continue
        names |= {
            bound.partition(".")[0] for name, bound in found if name.partition(".")[0] in LIBRARIES
        }
    return names


def patches(tree: ast.AST) -> Iterator[str]:
    """Assignments to an attribute of something imported from a library."""
    names = library_names(tree)

    def is_library(target: ast.expr) -> bool:
        while isinstance(target, (ast.Attribute, ast.Subscript)):
            target = target.value
        return isinstance(target, ast.Name) and target.id in names

    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            targets = [ast.Attribute(node.args[0], "", ast.Store())]
        yield from (
            ast.unparse(node)
            for target in targets
            if isinstance(target, (ast.Attribute, ast.Subscript)) and is_library(target)
        )


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_libraries_are_patched_in_compat_alone(file: Path) -> None:
    if file.name != "compat.py" or len(file.relative_to(ROOT).parts) != 2:
        assert list(patches(ast.parse(file.read_text()))) == []


def test_a_patch_is_seen_in_each_spelling() -> None:
    for line in ("nanotron.helpers.X = 1", "setattr(helpers, 'X', 1)", "helpers.X += 1"):
        source = f"import nanotron.helpers\nfrom nanotron import helpers\n{line}\n"
        assert len(list(patches(ast.parse(source)))) == 1


def test_no_code_knows_a_scale_by_name() -> None:
    files = [*MODULES, *(ROOT / "launch").glob("*.slurm"), *(ROOT / "launch").glob("*.yaml")]
    found = [
        f"{name_of(file)}:{number}"
        for file in files
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if re.search(r"\btiny\b", line, re.IGNORECASE)
    ]
    assert found == []


def test_every_engine_of_the_pipeline_has_its_kind_of_stage() -> None:
    assert set(STAGE_CLASSES) == set(tables.ENGINES)
    assert all(kind_of(engine).kind == engine for engine in tables.ENGINES)


RECIPE_MODULES = [f"launch.recipe.{file.stem}" for file in (ROOT / "launch/recipe").glob("*.py")]


@pytest.mark.parametrize(
    "module", [*RECIPE_MODULES, "nanotron_ext.job", "posttrain.job", "eval_tasks.job"]
)
def test_recipes_and_jobs_say_the_type_of_each_value(module: str) -> None:
    for name, value in vars(import_module(module)).items():
        if dataclasses.is_dataclass(value) and value.__module__.startswith(PACKAGES):
            hints = get_type_hints(value)
            untyped = {key for key, hint in hints.items() if "Any" in str(hint)}
            assert untyped <= {"trl"}, name  # TRL's own keyword arguments, typed in the recipe


# ---- the Makefile

MAKEFILE = (ROOT / "Makefile").read_text()


def words_of(variable: str) -> set[str]:
    """A list that the Makefile defines, over several lines where they end in a backslash."""
    found = re.search(rf"^{variable} := ((?:.*\\\n)*.*)$", MAKEFILE, re.MULTILINE)
    assert found, variable
    return set(found[1].replace("\\", "").split())


def targets() -> set[str]:
    """Every target but files and groups."""
    phony = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    named = {word for line in phony for word in line.split() if not word.startswith("$")}
    return named | words_of("CHAIN") | words_of("TOOLS")


def test_each_stage_of_the_pipeline_is_a_target_and_no_other_is() -> None:
    assert words_of("CHAIN") == set(load_pipeline())


def test_make_help_lists_every_target() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = {line.split()[0] for line in done.stdout.splitlines() if re.match(r"  [a-z]", line)}
    assert targets() <= listed


def test_make_help_names_every_variable() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    commands = [ROOT / "launch/__main__.py", *(ROOT / "launch/tools").glob("*.py")]
    code = "".join(file.read_text("utf-8") for file in commands)
    options = re.findall(r'envvar="(\w+)"', code)
    exported = re.findall(r"^export (.*)$", MAKEFILE, re.MULTILINE)
    variables = {*options, *" ".join(exported).split(), "LID", "SOFTWARE_HERITAGE", "TORCH_INDEX"}
    inner = {name for name in variables if name.startswith(("MALLOC_", "OMP_"))} | {"SOUGHT"}
    assert {name for name in variables - inner if f"{name}=" not in done.stdout} == set()


def test_every_target_with_a_recipe_is_declared_phony() -> None:
    rules = set(re.findall(r"^([a-z0-9-]+):(?!=)", MAKEFILE, re.MULTILINE))
    assert rules <= targets()


@pytest.mark.parametrize("is_replaced", [False, True])
def test_what_a_test_leaves_in_the_environment_is_gone(is_replaced: bool) -> None:
    show = [sys.executable, "-c", "import os; print(os.getenv('NEW'), os.getenv('OLD'))"]
    environ = os.environ
    environ["OLD"] = "1"
    keeps = kept_environment()
    next(keeps)
    if is_replaced:  # as datasets.map does
        os.environ = deepcopy(environ)  # noqa: B003
    os.environ["NEW"], os.environ["OLD"] = "2", "2"
    assert next(keeps, None) is None and os.environ is environ
    assert "NEW" not in environ and environ["OLD"] == "1"
    # A child sees what the process itself has.
    assert subprocess.check_output(show, text=True) == "None 1\n"
