"""How long the code may be, by what a reader needs it for: `python tests/test_budgets.py`.

Counted are lines of code: a budget over blank lines, comments and docstrings would be met by
deleting what teaches.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = (
    "ground", "nanotron_ext", "datatrove_pipelines", "posttrain", "eval_tasks", "runtimes",
    "conformance", "launch",
)  # fmt: skip
FILES = sorted(file for name in (*FOLDERS, "benchmarks") for file in (ROOT / name).rglob("*.py"))
# A class: its files. A new file needs a line here, so that somebody asks what it is for.
CLASSES: dict[str, str] = {
    # what someone reads who wants to know the recipe, from YAML to weights and scores
    "reading path": """
        ground/__init__ ground/errors ground/files ground/modes
        launch/__init__ launch/walk launch/run/* launch/stages/*
        launch/recipe/__init__ launch/recipe/load launch/recipe/book launch/recipe/tables
        launch/recipe/scale launch/recipe/changes
        nanotron_ext/__init__ nanotron_ext/attention nanotron_ext/config nanotron_ext/dataloader
        nanotron_ext/job nanotron_ext/loss nanotron_ext/metrics nanotron_ext/micro_batch
        nanotron_ext/mixture nanotron_ext/model nanotron_ext/optimizer nanotron_ext/rope
        nanotron_ext/spikes nanotron_ext/trainer
        datatrove_pipelines/__init__ datatrove_pipelines/chats_hub datatrove_pipelines/duplicates
        datatrove_pipelines/held_out datatrove_pipelines/pipeline
        datatrove_pipelines/shards datatrove_pipelines/sources
        datatrove_pipelines/tokenizer
        posttrain/__init__ posttrain/apo posttrain/batches posttrain/checkpoints posttrain/data posttrain/job
        posttrain/lora posttrain/merge posttrain/metrics posttrain/mixing posttrain/rows posttrain/scores
        posttrain/sft posttrain/stage posttrain/template
        eval_tasks/__init__ eval_tasks/bits_per_byte eval_tasks/intervals eval_tasks/job
        eval_tasks/likelihood eval_tasks/long_context eval_tasks/mode_switch eval_tasks/suite
    """,
    # what each key of a recipe may say: looked up, not read through
    "vocabulary": """
        launch/recipe/values launch/recipe/pretrain launch/recipe/posttrain
        launch/recipe/evaluation launch/recipe/merging launch/recipe/scale_file
    """,
    # what holds libraries and formats together
    "engine room": """
        ground/alarms ground/batch_hash ground/chat ground/checksums ground/host_copy ground/hub
        ground/loopback ground/packed_attention ground/peak_memory ground/processes ground/tool_calls
        ground/trackers ground/tracking ground/weights
        nanotron_ext/adapter nanotron_ext/checkpoint nanotron_ext/compat nanotron_ext/convert
        nanotron_ext/fast_loss nanotron_ext/fast_step nanotron_ext/flash_attention_4 nanotron_ext/fork_server
        nanotron_ext/linear nanotron_ext/recut nanotron_ext/reduction nanotron_ext/weight_gradient
        nanotron_ext/weight_table
        posttrain/attention posttrain/compat posttrain/start
        eval_tasks/__main__ eval_tasks/call_scores eval_tasks/compat eval_tasks/contest
        eval_tasks/package_data eval_tasks/ruler eval_tasks/ruler_sources eval_tasks/sampling
        eval_tasks/smollm3 eval_tasks/task_table eval_tasks/tasks eval_tasks/sandbox/*
    """,
    "tools and report": """
        launch/__main__ launch/machine/* launch/report/* launch/tools/*
        nanotron_ext/trace posttrain/template_lab eval_tasks/win_rate
    """,
    # what makes shards of the published sets, at any budget
    "data at size": """
        datatrove_pipelines/building datatrove_pipelines/clusters datatrove_pipelines/counts
        datatrove_pipelines/decontaminate datatrove_pipelines/executors
        datatrove_pipelines/fast_tokenizer datatrove_pipelines/hub_files datatrove_pipelines/lookup
        datatrove_pipelines/progress datatrove_pipelines/software_heritage
        datatrove_pipelines/stored_files
        datatrove_pipelines/table_pages datatrove_pipelines/text_files
        datatrove_pipelines/token_writer datatrove_pipelines/units
        datatrove_pipelines/cleaning/* datatrove_pipelines/synthetic/*
        eval_tasks/texts ground/storage
    """,
    # what a release needs to run, prove itself and be found elsewhere
    "anywhere": """
        runtimes/* conformance/*
        eval_tasks/backends eval_tasks/endpoint eval_tasks/served
    """,
    "stand-ins": "datatrove_pipelines/standins/*",
    "benchmarks": "benchmarks/*",
}
MOST_LINES = {"reading path": 8_450, "all": 27_500}
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 400, 40


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def lines_of(file: Path) -> int:
    return len(file.read_text().splitlines())


@cache
def code_lines_of(file: Path) -> int:
    """Lines that are neither blank nor a comment nor part of a docstring."""
    text = file.read_text()
    docstrings = set[int]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            first = node.body[0]
            docstrings |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in docstrings
        for number, line in enumerate(text.splitlines(), start=1)
    )


def classes_of(file: Path) -> list[str]:
    module = file.relative_to(ROOT).with_suffix("")
    return [
        name
        for name, patterns in CLASSES.items()
        if any(module.match(pattern) for pattern in patterns.split())
    ]


def table() -> dict[str, int]:
    """Lines of code of each class, and of all."""
    lines = Counter[str]()
    for file in FILES:
        for name in [*classes_of(file), "all"]:
            lines[name] += code_lines_of(file)
    return {name: lines[name] for name in (*CLASSES, "all")}


def functions(file: Path) -> Iterator[tuple[str, int]]:
    """Each function and the lines of its body, docstring included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or 0) - node.body[0].lineno + 1


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_file_is_of_one_class_and_short(file: Path) -> None:
    assert len(classes_of(file)) == 1, f"{name_of(file)}: give it a line in CLASSES"
    assert lines_of(file) <= MOST_LINES_OF_A_FILE
    long = {name: size for name, size in functions(file) if size > MOST_LINES_OF_A_FUNCTION}
    assert not long


def test_every_pattern_has_a_file() -> None:
    modules = [file.relative_to(ROOT).with_suffix("") for file in FILES]
    for pattern in " ".join(CLASSES.values()).split():
        assert any(module.match(pattern) for module in modules), pattern


@pytest.mark.parametrize("name", MOST_LINES)
def test_a_class_stays_within_its_budget(name: str) -> None:
    print(shown())
    assert table()[name] <= MOST_LINES[name]


def shown() -> str:
    """The table, for people."""
    rows = [f"{'class':18} {'lines':>6}  at most"]
    for name, lines in table().items():
        most = f"{MOST_LINES[name]:,}" if name in MOST_LINES else ""
        rows.append(f"{name:18} {lines:>6,} {most:>8}")
    return "\n".join(rows)


if __name__ == "__main__":
    print(shown())
