"""`make eval BACKEND=`: whichever answers, a server, several, or several processes, scores are the same."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from completion_server import completion_server
from conftest import ROOT
from openai_server import openai_server
from small_models import make_tokenizer, piqa_data, save_model
from test_eval_run import run_job

from eval_tasks.backends import gpu_environment
from eval_tasks.job import Result
from eval_tasks.package_data import write_dataset
from eval_tasks.sampling import Drawn, seed_of
from eval_tasks.served import Refused, examine
from eval_tasks.suite import of_items, with_score
from ground.errors import Outage, UserError
from launch.recipe.evaluation import Generation, Suite, SuiteRow, load_suite
from launch.tools.backends import check_backend, servers

Row = dict[str, Any]
PIQA = {"name": "PIQA", "tasks": ["piqa_cf"], "metric": "acc_norm", "chance": 0.5}
GSM8K = {"name": "GSM8K", "tasks": ["gsm8k_base"], "metric": "expr_match", "generative": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), 0, window=2048)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = piqa_data(tmp_path_factory.mktemp("data"))
    rows = [{"question": f"{n} + 1?", "answer": f"#### {n % 10}"} for n in range(9)]
    write_dataset(folder / "openai--gsm8k", "main", {"train": rows[:1], "test": rows[1:]})
    return folder


def scored(folder: Path, name: str, model: Path, data: Path, **job: Any) -> list[Row]:
    """The rows of a job in a process of its own, with a generation limit of 8."""
    drawn = {"max_new_tokens": 8, **job.pop("generation", {})}
    done = run_job(folder, name, models=[str(model)], data=str(data), generation=drawn, **job)
    assert done.returncode == 0, done.stderr[-3000:]
    rows: list[Row] = json.loads((folder / f"{name}.json").read_text())
    assert [row for row in rows if "error" in row] == []
    return rows


def answers_of(folder: Path, task: str) -> list[Any]:
    """What lighteval's sample cache holds of a task."""
    from pyarrow import parquet

    (file,) = (folder / "lighteval").rglob(f"{task}*/*/*.parquet")
    return sorted(parquet.read_table(file).to_pylist(), key=lambda row: str(row["sample_id"]))


@pytest.mark.slow
def test_servers_score_as_the_model_in_this_process(
    tmp_path: Path, model: Path, data: Path
) -> None:
    """Choices, and greedy answers, of 200 and of 8 items, by two servers that share them."""
    rows = [PIQA, GSM8K]
    here = scored(tmp_path, "here", model, data, rows=rows)
    with completion_server(model) as one, completion_server(model) as other:
        able = [examine(served.url, str(model), make_tokenizer()) for served in (one, other)]
        assert [a.echo for a in able] == ["", ""] and able[0].server.model == "served-name"
        before = [len(served.requests) for served in (one, other)]
        asked = [{"url": a.server.url, "model": a.server.model, "takes_tokens": True} for a in able]
        there = scored(tmp_path, "there", model, data, rows=rows, servers=asked)
        shares = [len(s.requests) - n for s, n in zip((one, other), before, strict=True)]
    assert there == here
    assert sum(shares) == 2 * 200 + 8 and abs(shares[0] - shares[1]) <= 2


@pytest.mark.slow
def test_two_processes_score_as_one(tmp_path: Path, model: Path, data: Path) -> None:
    """The same answers too, which are drawn: each sample has a seed of its own."""
    drawn = {"temperature": 1.0}
    rows = [PIQA, GSM8K | {"samples": 3}]
    found = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        job = {"rows": rows, "processes": processes, "generation": drawn, "batch_size": 3}
        found[processes] = scored(folder, "out", model, data, **job)
    assert found[1] == found[2]
    texts = [
        [row["sample"]["text"] for row in answers_of(tmp_path / n, "gsm8k_base")] for n in "12"
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 8
    assert found[1][1]["metric"] == "expr_match, avg@3"
    assert all(len({*answers}) == 3 for answers in texts[0]), "each sample is another"


@pytest.mark.slow
def test_a_server_of_texts_gets_a_chats_messages(tmp_path: Path, model: Path, data: Path) -> None:
    """The system prompt sets the mode, samples have seeds, a trace that comes apart is put back."""
    rows = [GSM8K | {"samples": 2}, {"name": "mode", "tasks": ["mode_switch"], "metric": "kept"}]
    with completion_server(model, "texts") as served:
        server = {"url": served.url, "model": "served-name", "takes_tokens": False}
        job = {"rows": rows, "servers": [server], "chat": True, "system_prompt": "/think"}
        found = scored(tmp_path, "out", model, data, generation={"temperature": 0.6}, **job)
    asked = [request for request in served.requests if request["temperature"]]
    assert len(asked) == 2 * 8 and len({request["seed"] for request in asked}) == 16
    assert all(
        request["messages"][0] == {"role": "system", "content": "/think"} for request in asked
    )
    assert all("stop" not in request and request["max_tokens"] == 8 for request in asked)
    kept = found[1]
    assert kept["items"] == 16 and kept["value"] == 0.5, "every answer thinks, half of them should"


def test_a_draw_is_of_the_distribution_and_of_its_rows_seed_alone() -> None:
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]).log()
    rows = 20_000
    seeds = [seed_of([1, 2], number) for number in range(rows)]
    drawn = Drawn(seeds, "cpu")(torch.zeros(rows, 1), scores.expand(rows, -1)).argmax(-1)
    shares = torch.bincount(drawn, minlength=5) / rows
    assert shares.tolist() == pytest.approx(scores.exp().tolist(), abs=0.012)
    again = Drawn(seeds[7:9], "cpu")(torch.zeros(2, 1), scores.expand(2, -1)).argmax(-1)
    assert again.tolist() == drawn[7:9].tolist()
    assert seed_of([1, 2], 0) != seed_of([1, 3], 0) and max(seeds) < 2**31


# ---- what is refused, in one line, before anything is asked of a model


def small(name: str, **changes: Any) -> Suite:
    return replace(load_suite(name), **changes)


@pytest.mark.parametrize(
    ("fault", "suite", "words"),
    [
        ("no echo", "local", "it does not echo a prompt's log-probabilities, which HellaSwag, Comm"),
        ("next token", "local", "the log-probabilities that it echoes belong to other tokens"),
        ("texts", "local", "it takes texts, not tokens, which HellaSwag, .*, HumanEval need"),
        ("no echo", "modes", ""),
        ("texts", "modes", ""),
        ("", "local", ""),
    ],
)  # fmt: skip
def test_a_server_that_cannot_do_a_suite_is_refused_with_the_rows_that_need_it(
    tmp_path: Path, model: Path, fault: str, suite: str, words: str
) -> None:
    with completion_server(model, fault) as served:
        arguments = ("endpoint", served.url, str(model), load_suite(suite), tmp_path, "cpu")
        if words:
            with (
                pytest.raises(UserError, match=f"ENDPOINT={served.url}: {words}"),
                servers(*arguments),
            ):
                pytest.fail("not refused")
            return
        with servers(*arguments) as found:
            assert [server.takes_tokens for server in found] == [fault != "texts"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (("vlm", "", ["a"]), "BACKEND=vlm: did you mean 'vllm'"),
        (("endpoint", "", ["a"]), "ENDPOINT is missing: BACKEND=endpoint ENDPOINT=http://"),
        (("transformers", "http://x", ["a"]), "BACKEND=transformers asks no server"),
        (("endpoint", "http://x", ["a", "b"]), "MODEL=a,b: a server has one model"),
        (("vllm", "", ["a"]), "BACKEND=vllm: no `vllm` here; install it"),
    ],
)
def test_values_that_do_not_go_together_are_one_line(
    monkeypatch: pytest.MonkeyPatch, values: tuple[str, str, list[str]], words: str
) -> None:
    monkeypatch.setattr("launch.tools.backends.vllm", lambda: None)
    with pytest.raises(UserError, match=words):
        check_backend(*values)


def test_a_server_that_does_not_answer_is_an_outage(tmp_path: Path, model: Path) -> None:
    with openai_server(lambda _: (200, "", "stop")) as gone:
        pass
    arguments = ("endpoint", gone.url, str(model), load_suite("local"), tmp_path, "cpu")
    with (
        pytest.raises(Outage, match=f"ENDPOINT={gone.url}: no server answers"),
        servers(*arguments),
    ):
        pytest.fail("not refused")


# ---- vLLM's servers


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a program `vllm` on the PATH; without text the server of these tests."""

    def program(text: str = "") -> Path:
        serve = f'exec {sys.executable} {ROOT / "tests/completion_server.py"} "$@"'
        file = tmp_path / "bin/vllm"
        file.parent.mkdir()
        file.write_text(f"#!/bin/sh\n{text or serve}\n")
        file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{file.parent}{os.pathsep}{os.environ['PATH']}")
        return file

    return program


@pytest.mark.slow
def test_vllm_has_a_server_for_each_gpu_and_none_is_left(
    tmp_path: Path, model: Path, vllm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm()
    monkeypatch.setenv("GPUS", "2")
    with servers("vllm", "", str(model), load_suite("local"), tmp_path, "cpu") as found:
        urls = [server.url for server in found]
        assert len({*urls}) == 2
    for url in urls:
        with pytest.raises(Outage):
            examine(url, str(model), make_tokenizer())


def test_a_process_gets_a_gpu_that_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert gpu_environment(1) == {"CUDA_VISIBLE_DEVICES": "6"}
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=4,6: not so many GPUs as GPUS= says"):
        gpu_environment(2)


def test_a_vllm_that_ends_says_why(tmp_path: Path, model: Path, vllm: Callable[..., Path]) -> None:
    vllm("echo 'ValueError: no room for the cache' >&2; exit 1")
    arguments = ("vllm", "", str(model), load_suite("local"), tmp_path, "cpu")
    words = (
        r"BACKEND=vllm: it ended: ValueError: no room for the cache; all of it is in .*vllm-0.log"
    )
    with pytest.raises(UserError, match=words), servers(*arguments):
        pytest.fail("not refused")


def test_a_refusal_is_the_servers_own_words(model: Path) -> None:
    from eval_tasks.served import http_client, post

    with completion_server(model) as served, http_client("") as client:
        server = examine(served.url, "x", make_tokenizer()).server
        with pytest.raises(Refused, match=r"400 .*stop: too long"):
            post(
                client, server, "completions", {"prompt": [1], "max_tokens": 1, "stop": [*"abcde"]}
            )


def test_an_answer_that_is_a_page_is_one_line() -> None:
    from eval_tasks.job import Server
    from eval_tasks.served import post

    for status, said in {200: "no JSON: 200 <html> no", 404: "404 <html> no"}.items():
        page = httpx.Response(status, text="<html>\nno\n</html>")
        with httpx.Client(transport=httpx.MockTransport(lambda _, page=page: page)) as client:
            with pytest.raises(Refused, match=f"http://a: {said}") as refused:
                post(client, Server("http://a", "m", takes_tokens=True), "completions", {})
            assert "\n" not in str(refused.value)


# ---- avg@n


def test_the_interval_of_samples_is_over_problems() -> None:
    """Three problems with 48, 16 and 0 of 64 right: their spread counts, not that of 192 answers."""
    found = with_score(Result("m", "AIME", "math_match, avg@64", 0), [of_items([0.75, 0.25, 0.0])])
    half = 1.959964 * (((5 / 12) ** 2 + (1 / 12) ** 2 + (1 / 3) ** 2) / 2 / 3) ** 0.5
    assert found.value == pytest.approx(1 / 3) and found.items == 3
    assert (found.low, found.high) == pytest.approx((max(1 / 3 - half, 0), 1 / 3 + half))


def test_greedy_samples_are_refused() -> None:
    row = SuiteRow(name="AIME", tasks=("aime_2025",), metric="math_match", samples=64)
    with pytest.raises(ValueError, match=r"rows\.0\.samples: 64: greedy samples are all the same"):
        Suite(chat=True, rows=(row,))
    drawn = Suite(chat=True, rows=(row,), generation=Generation(temperature=0.6))
    assert drawn.rows[0].samples == 64
