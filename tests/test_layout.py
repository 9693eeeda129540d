"""The repository's shape: which way imports run, what stands where, how long it may be."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from launch.recipe import load_pipeline

ENGINES = ("nanotron_ext", "datatrove_pipelines", "posttrain", "eval_tasks")
OURS = (*ENGINES, "launch", "benchmarks")
MODULES = sorted(file for folder in OURS for file in (ROOT / folder).rglob("*.py"))
LIBRARIES = ("nanotron", "torch", "datatrove", "transformers", "trl", "lighteval", "tokenizers")


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def imported(file: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}: relative import"
            yield str(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_imports_run_one_way(file: Path) -> None:
    folder = file.relative_to(ROOT).parts[0]
    roots = {module.partition(".")[0] for module in imported(file)}
    assert "tests" not in roots
    if folder in ENGINES:
        assert roots & set(OURS) <= {folder}


@pytest.mark.parametrize("file", sorted((ROOT / "eval_tasks").rglob("*.py")), ids=name_of)
def test_scorers_do_without_the_training_engine(file: Path) -> None:
    assert "nanotron" not in {module.partition(".")[0] for module in imported(file)}


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engines_folder_does_not_read_recipes(engine: str) -> None:
    for file in (ROOT / engine).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Name):
                assert node.id != "RECIPES", name_of(file)


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
    if file.name != "compat.py":
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


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_files_and_functions_stay_readable(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= 60, node.name


# ---- the Makefile

MAKEFILE = (ROOT / "Makefile").read_text()
STAGES = re.search(r"^STAGES := ((?:.*\\\n)*.*)$", MAKEFILE, re.MULTILINE)


def targets() -> set[str]:
    """Every target but files and groups."""
    phony = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    named = {word for line in phony for word in line.split() if not word.startswith("$")}
    return named | stage_targets()


def stage_targets() -> set[str]:
    assert STAGES
    return set(STAGES[1].replace("\\", "").split())


def test_each_stage_of_the_pipeline_is_a_target_and_no_other_is() -> None:
    assert stage_targets() == set(load_pipeline())


def test_make_help_lists_every_target() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = {line.split()[0] for line in done.stdout.splitlines() if re.match(r"  [a-z]", line)}
    assert targets() <= listed


def test_every_target_with_a_recipe_is_declared_phony() -> None:
    rules = set(re.findall(r"^([a-z0-9-]+):(?!=)", MAKEFILE, re.MULTILINE))
    assert rules <= targets()
