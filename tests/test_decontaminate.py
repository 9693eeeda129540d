"""Test items in training text: found in any dress, counted by task, and nothing else is lost."""

import gzip
import json
import os
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, edit, environment
from forked import run

from datatrove_pipelines import decontaminate
from datatrove_pipelines.building import tokenize_source
from datatrove_pipelines.counts import Counts
from datatrove_pipelines.decontaminate import (
    REPORT,
    build_index,
    leave_out_contaminated,
    tasks_found,
)
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
VOCABULARY = [
    f"{a}{b}" for a in ("ba", "lo", "mi", "tu", "ser") for b in ("ren", "k", "dal", "post")
]


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


def test_a_phrase_of_a_script_without_spaces_is_no_copy(texts: Path) -> None:
    phrase = ITEMS["zh"][:26]
    assert passed(texts, [f"{prose(1)} {phrase} {prose(2)}"]) == [0]


def test_what_many_items_of_a_task_share_is_a_template(tmp_path: Path) -> None:
    asked = prose(1000, 60)
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

    query = "Answer the question.\n\nQuestion: {}\nPick one.\nA) {}\nB) {}\nDo not guess."
    asked = [(f"{prose(n, 40)}?", prose(100 + n, 2), prose(200 + n, 2)) for n in range(5)]
    found = list(texts_of([Item(query.format(*one), "A") for one in asked]))
    question, one, other = asked[0]
    assert found[:2] == [f"{question}\nA) {one}\nB) {other}", question]
    shared = ("Question", "Pick", "guess")
    assert not any(word in text for text in found for word in shared)


def test_a_short_question_stands_beside_its_answer_and_a_long_answer_alone() -> None:
    from eval_tasks.texts import texts_of

    assert list(texts_of([Item("Why?", " because")])) == ["Why? because", "Why?"]
    solution = prose(1, 60)
    assert list(texts_of([Item(prose(2, 60), solution)])) == [prose(2, 60), solution]
    assert solution in texts_of([Item("def f():", "", {"canonical_solution": solution})])


# ---- the stage


def test_off_changes_no_other_stage_and_costs_nothing(
    recipes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from launch.recipe.scale import load_scale
    from launch.walk import resolve, run_stage

    monkeypatch.setenv("RUNS", str(tmp_path))
    data = resolve("data-stage1", load_scale("tiny"))
    texts = data.inputs["eval-texts"]
    assert replace(data, inputs={"tokenizer": data.inputs["tokenizer"]}).identity == data.identity
    before = set(sys.modules)
    assert run_stage(texts)
    assert "tiny.yaml: decontaminate: off: training text may hold" in capsys.readouterr().out
    assert not any("lighteval" in name for name in set(sys.modules) - before)
    others = resolve("data-stage1", load_scale("60m")), resolve("data-stage1", load_scale("full"))
    for stage in others:
        assert stage.inputs["eval-texts"].shapes_results
        assert stage.inputs["eval-texts"].recipe.tasks[:1] == ("hellaswag_cf",)
        assert stage.recipe_values()["decontaminate"] == "remove"
    edit(recipes / "scales/tiny.yaml", "decontaminate: off", "decontaminate: remove")
    removed = resolve("data-stage1", load_scale("tiny"))
    assert removed.identity != data.identity
    assert "boolq_cf" in removed.inputs["eval-texts"].recipe.tasks


def test_a_task_whose_data_is_missing_is_an_error_unless_the_scale_says_that_it_may() -> None:
    from launch.recipe.scale import load_scale
    from launch.stages.eval_texts import EvalTextsStage
    from launch.walk import resolve

    stage = resolve("eval-texts", load_scale("full"))
    assert isinstance(stage, EvalTextsStage)
    stage._check({"gpqa_diamond": "gated", "flores200_base:fra_Latn-eng_Latn": "a script"})
    said = r"task piqa_cf: .*\(offline\); .*full\.yaml: decontaminate_without"
    with pytest.raises(UserError, match=said):
        stage._check({"piqa_cf": "offline"})
    asked = {one.name for one in stage.needs_of_hub()}
    assert "ybisk/piqa" in asked and "Idavidrein/gpqa" not in asked


def test_shards_that_were_not_decontaminated_are_not_trained_on(
    texts: Path, tmp_path: Path, recipes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datatrove_pipelines.shards import ShardInfo, content_hash, write_info
    from launch.recipe.scale import load_scale
    from launch.stages.data import DataStage
    from launch.stages.eval_texts import EvalTextsStage
    from launch.walk import resolve

    def data(says: str) -> DataStage:
        file = recipes / "scales/tiny.yaml"
        edit(
            file, re.findall("decontaminate: [a-z]+", file.read_text())[0], f"decontaminate: {says}"
        )
        run = resolve("data-stage1", load_scale("tiny"))
        assert isinstance(run, DataStage)
        return run

    monkeypatch.setattr(EvalTextsStage, "texts", texts)
    made = {name: tmp_path / name for name in ("plain", "other", "right")}
    marks = {"plain": "", "other": "0123", "right": content_hash(texts)}
    for name, folder in made.items():
        folder.mkdir()
        write_info(ShardInfo("web", folder, 9, 1, 9, 2, 1, decontaminated=marks[name]))
    monkeypatch.setenv("CACHE", str(tmp_path))
    for name in made:
        monkeypatch.setattr(DataStage, "shards", {"web": {"folder": name}})
        data("report").shards_to_train_on()
        data("off").shards_to_train_on()
        if name == "right":
            data("remove").shards_to_train_on()
        else:
            with pytest.raises(UserError, match=r"source web: .*FORCE=1` builds it without them"):
                data("remove").shards_to_train_on()


@pytest.mark.slow
def test_of_real_documents_none_is_lost_and_real_items_are_found(tmp_path: Path) -> None:
    """Texts of the tasks that packages carry, against the embedded corpus: 4,000 documents."""
    from eval_tasks.texts import TextsJob
    from launch.recipe.tables import load_standins
    from launch.stages.evaluate import local_datasets
    from launch.stages.sources import build_standins

    names = ("pubmed-abstracts", "web-narratives", "code-python", "code-c", "math-web", "lang-cmn")
    rows = {name: load_standins()[name] for name in (*names, "boolq-passages", "code-markdown")}
    documents = []
    for name, file in build_standins(rows).items():
        if name != "boolq-passages":
            with gzip.open(file, "rt", encoding="utf-8") as lines:
                documents += [json.loads(line)["text"] for line in lines]
    tasks = ["hellaswag_cf", "piqa_cf", "openbookqa_cf", "boolq_cf", "gsm8k_base", "humaneval"]
    job, texts = tmp_path / "job.json", tmp_path / "texts.jsonl"
    found = str(tmp_path / "found.json")
    TextsJob(tasks, str(texts), found, str(local_datasets())).write(job)
    offline = environment(HF_HUB_OFFLINE="1")
    run("scores", "-m", "eval_tasks.texts", str(job), env=offline, cwd=ROOT).check_returncode()
    build_index(texts)
    decontaminate.read_index.cache_clear()
    assert len(documents) > 2000 and passed(texts, documents) == list(range(len(documents)))
    items = [json.loads(line) for line in texts.read_text("utf-8").splitlines()]
    long = [row for row in items if len(decontaminate.words_of(row["text"])) >= 12]
    planted = random.Random(0).sample(long, 300)
    dressed = [f"{documents[n]}\n\n{shouted(row['text'])}" for n, row in enumerate(planted)]
    assert passed(texts, [*dressed, *documents]) == list(range(300, 300 + len(documents)))


@pytest.mark.slow
def test_every_task_of_every_suite_has_its_texts(tmp_path: Path) -> None:
    """From rows in the hub's columns; a task without data is named."""
    from score_suites import SUITES, suites

    from eval_tasks.task_table import expanded, read_tasks
    from eval_tasks.texts import TextsJob

    data, found, output = tmp_path / "data", tmp_path / "found.json", tmp_path / "texts.jsonl"
    paths = environment(PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}", HF_HUB_OFFLINE="1")
    script = str(ROOT / "tests/score_suites.py")
    run("scores", script, "write", str(data), env=paths, cwd=ROOT).check_returncode()
    rows = [row for name in SUITES for row in suites()[name].rows if row.name != "IFEval"]
    tasks = list(dict.fromkeys(task for row in rows for task in expanded(row.tasks, read_tasks())))
    TextsJob([*tasks, "humaneval"], str(output), str(found), str(data)).write(tmp_path / "job.json")
    job = str(tmp_path / "job.json")
    run("scores", "-m", "eval_tasks.texts", job, env=paths, cwd=ROOT).check_returncode()
    says = json.loads(found.read_text())
    assert list(says["missing"]) == ["humaneval"] and list(says["texts"]) == tasks
    lines = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert {row["task"] for row in lines} >= {"hellaswag_cf", "gsm8k_base", "gpqa_diamond"}
    assert len({row["text"] for row in lines}) == len(lines)
