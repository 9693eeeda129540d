"""Test items in training text: found in any dress, counted by task, and nothing else is lost."""

import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, environment

from datatrove_pipelines import decontaminate
from datatrove_pipelines.counts import Counts
from datatrove_pipelines.decontaminate import (
    REPORT,
    build_index,
    leave_out_contaminated,
    tasks_found,
)
from datatrove_pipelines.pipeline import tokenize_source
from datatrove_pipelines.sources import JsonlFile, SourceJob
from ground.errors import UserError

ITEMS = {
    "hellaswag": (
        "A woman is outside with a bucket and a dog. The dog is running around trying to avoid a "
        "bath. She gets the dog wet, then it runs away again."
    ),
    "piqa": "When boiling butter, when it's ready, you can pour it into a jar that stands in ice.",
    "gsm": (
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
        "May. How many clips did Natalia sell altogether in April and May?"
    ),
    "zh": "一名男子坐在屋顶上，他正在用工具把瓦片撬开。他开始把旧的瓦片一块一块地从屋顶上扔下去。",  # noqa: RUF001
}
LICENCE = (
    "Permission is granted to copy, distribute and modify this document under the terms of the "
    "licence that the Foundation published, with no invariant sections. {n}"
)
VOCABULARY = [f"{a}{b}" for a in ("ba", "lo", "mi", "tu", "ser") for b in ("ren", "k", "dal", "post")]


def prose(seed: int, words: int = 200) -> str:
    drawn = random.Random(seed)
    return " ".join(drawn.choice(VOCABULARY) for _ in range(words))


def write_texts(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"task": t, "text": x}) + "\n" for t, x in rows), "utf-8")
    build_index(path)
    decontaminate.read_index.cache_clear()
    decontaminate._rows.cache_clear()
    return path


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts.jsonl", list(ITEMS.items()))


def passed(texts: Path, documents: Sequence[str], only_report: bool = False) -> list[int]:
    """The numbers of the documents that are kept; the report lies beside the texts."""
    from datatrove.data import Document

    counts, report = Counts(), texts.with_name(f"0.{REPORT}")
    report.unlink(missing_ok=True)
    step = leave_out_contaminated(texts, counts, report, only_report)
    data: Iterator[Any] = iter([Document(text, str(n)) for n, text in enumerate(documents)])
    kept = [int(document.id) for document in step(data)]
    lost = 0 if only_report else len(documents) - len(kept)
    assert counts.left_out == ({} if only_report else {"contaminated": lost})
    return kept


def shouted(text: str) -> str:
    return text.upper().replace(" ", "\n- ").replace(".", " !!").replace("，", "、")  # noqa: RUF001


@pytest.mark.parametrize("task", ITEMS)
@pytest.mark.parametrize("dress", [str, shouted, lambda text: f"{prose(1)}\n\n{text} {prose(2)}"])
def test_a_planted_item_is_found_and_counted_by_task(texts: Path, task: str, dress: Any) -> None:
    clean = [prose(n) for n in range(3, 10)]
    assert passed(texts, [*clean[:3], dress(ITEMS[task]), *clean[3:]]) == [0, 1, 2, 4, 5, 6, 7]
    assert tasks_found(texts.parent) == {task: 1}


def test_a_report_says_why_and_keeps_the_documents(texts: Path) -> None:
    planted = f"{prose(1)} {shouted(ITEMS['piqa'])} {prose(2)}"
    assert passed(texts, [planted, prose(3)], only_report=True) == [0, 1]
    (row,) = map(json.loads, texts.with_name(f"0.{REPORT}").read_text("utf-8").splitlines())
    assert (row["document"], row["task"], row["share"]) == ("0", "piqa", 1.0)
    assert row["item"] == ITEMS["piqa"] and row["text"].strip() in planted
    assert row["text"].startswith("WHEN\n- BOILING") and "ICE" in row["text"]


def test_less_than_half_of_an_item_is_no_copy_of_it(texts: Path) -> None:
    words = ITEMS["gsm"].split()
    few, most = " ".join(words[: len(words) // 2]), " ".join(words[: 3 * len(words) // 4])
    assert passed(texts, [f"{few} {prose(1)}", f"{most} {prose(1)}"]) == [0]


def test_what_many_items_of_a_task_share_is_a_template(tmp_path: Path) -> None:
    asked = "Answer the following question and explain your answer step by step in a few words."
    rows = [("quiz", f"{asked} {prose(n, 30)}") for n in range(20)]
    texts = write_texts(tmp_path / "texts.jsonl", rows)
    assert passed(texts, [f"{asked} {prose(99)}", f"Well: {prose(7, 30)}"]) == [0]


def test_an_item_that_quotes_a_licence_drops_no_source_with_that_licence(tmp_path: Path) -> None:
    rows = [("pages", LICENCE.format(n="Who may copy it?")), ("gsm", ITEMS["gsm"])]
    texts = write_texts(tmp_path / "texts.jsonl", rows)
    pages = [f"{prose(n)} {LICENCE.format(n=n)}" for n in range(300)]
    kept = passed(texts, [*pages, ITEMS["gsm"]])
    assert kept == list(range(300))
    # A few such pages are copies of the item.
    assert passed(texts, [*(prose(n) for n in range(300)), *pages[:3]]) == list(range(300))


def test_a_text_of_a_few_words_finds_nothing(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts.jsonl", [("short", "What do people aim to do at work?")])
    assert passed(texts, ["What do people aim to do at work?"]) == [0]


def test_shards_are_without_items_and_say_so(texts: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from datatrove_pipelines.shards import content_hash, read_info, shard_folder
    from datatrove_pipelines.tokenizer import train_bpe

    documents = [*(prose(n) for n in range(30)), *ITEMS.values()]
    tokenizer = tmp_path / "bpe"
    train_bpe(documents, 320, tokenizer)
    file = tmp_path / "web.jsonl.gz"
    with gzip.open(file, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    plain = SourceJob("web", JsonlFile(file))
    jobs = [plain, replace(plain, decontaminate=texts, only_report=True)]
    jobs.append(replace(plain, decontaminate=texts))
    infos = [tokenize_source(job, tokenizer, tmp_path) for job in jobs]
    assert [info.documents for info in infos] == [34, 34, 30]
    assert [info.left_out.get("contaminated") for info in infos] == [None, None, 4]
    assert [tasks_found(info.folder) for info in infos] == [{}, *[dict.fromkeys(ITEMS, 1)] * 2]
    marks = [read_info(info.folder).decontaminated for info in infos]
    assert marks == ["", "", content_hash(texts)]
    # Another text of the evaluation makes other shards.
    write_texts(texts, [*ITEMS.items(), ("more", prose(5))])
    assert shard_folder(jobs[2], tokenizer, tmp_path) != infos[2].folder
    assert shard_folder(plain, tokenizer, tmp_path) == infos[0].folder


def test_an_index_that_is_damaged_is_one_line(texts: Path) -> None:
    texts.with_suffix(".npz").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"texts\.npz: not an index"):
        passed(texts, [prose(1)])


# ---- the texts of the tasks


class Item:
    """As lighteval's Doc."""

    instruction = None

    def __init__(self, query: str, answer: str, row: dict[str, str] | None = None):
        self.query, self.answer, self.specific = query, answer, {"row": row or {}}

    def get_golds(self) -> list[str]:
        return [self.answer]


def test_a_question_is_without_its_template_and_its_options_stand_beside() -> None:
    from eval_tasks.texts import texts_of

    query = "Answer the question.\n\nQuestion: {}\nA) {}\nB) none\nDo not guess."
    items = [Item(query.format(f"{prose(n, 40)}?", prose(-n, 2)), "A") for n in range(5)]
    found = list(texts_of(items))
    assert found[:2] == [f"{prose(0, 40)}?\nA) {prose(0, 2)}\nB) none", f"{prose(0, 40)}?"]
    assert not any("Question" in text or "guess" in text for text in found)


def test_a_short_question_stands_beside_its_answer_and_a_long_answer_alone() -> None:
    from eval_tasks.texts import texts_of

    assert list(texts_of([Item("Why?", " because")])) == ["Why? because", "Why?"]
    solution = prose(1, 60)
    assert list(texts_of([Item(prose(2, 60), solution)])) == [prose(2, 60), solution]
    assert solution in texts_of([Item("def f():", "", {"canonical_solution": solution})])


@pytest.mark.slow
def test_every_task_of_every_suite_has_its_texts(tmp_path: Path) -> None:
    """From rows in the hub's columns; a task without data is named."""
    from score_suites import SUITES, suites

    from eval_tasks.task_table import expanded, read_tasks
    from eval_tasks.texts import TextsJob

    data, found, output = tmp_path / "data", tmp_path / "found.json", tmp_path / "texts.jsonl"
    paths = environment(PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}", HF_HUB_OFFLINE="1")
    child = [sys.executable, str(ROOT / "tests/score_suites.py"), "write", str(data)]
    subprocess.run(child, env=paths, check=True, cwd=ROOT)
    rows = [row for name in SUITES for row in suites()[name].rows if row.name != "IFEval"]
    tasks = [task for row in rows for task in expanded(row.tasks, read_tasks())]
    TextsJob([*tasks, "humaneval"], str(output), str(found), str(data)).write(tmp_path / "job.json")
    words = [sys.executable, "-m", "eval_tasks.texts", str(tmp_path / "job.json")]
    subprocess.run(words, env=paths, check=True, cwd=ROOT)
    says = json.loads(found.read_text())
    assert list(says["missing"]) == ["humaneval"] and list(says["texts"]) == tasks
    lines = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert {row["task"] for row in lines} >= {"hellaswag_cf", "gsm8k_base", "gpqa_diamond"}
    assert len({row["text"] for row in lines}) == len(lines)
