"""Chats written by larger models: rows in their mode, nothing lost, nothing asked twice."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, environment
from openai_server import Payload, openai_server

from datatrove_pipelines.synthetic import server as server_module
from datatrove_pipelines.synthetic.chats import Sampling, SyntheticJob, synthesize, written
from datatrove_pipelines.synthetic.server import Server, server
from ground.errors import Outage, UserError
from ground.files import read_json_lines

Row = dict[str, Any]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def write_prompts(folder: Path, rows: list[Row]) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def questions(number: int) -> list[Row]:
    return [{"messages": [user(f"question {n}"), assistant("short")]} for n in range(number)]


def last(payload: Payload) -> str:
    return str(payload["messages"][-1]["content"])


def job(prompts: Path, url: str, rejected: str = "", thinks: bool = True) -> SyntheticJob:
    worse = server(rejected, "worse") if rejected else None
    return SyntheticJob(prompts, thinks, server(url, "large"), worse, Sampling(), source="s")


def test_every_turn_is_answered_anew_with_the_turns_before(tmp_path: Path) -> None:
    turns = [user("one"), assistant("no"), user("two"), assistant("no")]
    row = {"messages": turns, "chat_template_kwargs": {"custom_instructions": "Be brief."}}
    prompts = write_prompts(tmp_path, [row])
    with openai_server(
        lambda p: (200, f"about {last(p)}", "stop"), lambda p: f"why {last(p)}"
    ) as hub:
        counts = synthesize(job(prompts, hub.url), tmp_path / "out.jsonl", tmp_path / "progress")
    (written_row,) = read_json_lines(tmp_path / "out.jsonl")
    answer = "<think>\nwhy {0}\n</think>\n\nabout {0}"
    assert written_row == {
        "messages": [
            user("one"), assistant(answer.format("one")),
            user("two"), assistant(answer.format("two")),
        ],
        "chat_template_kwargs": {"enable_thinking": True, "custom_instructions": "Be brief."},
        "source": "s",
    }  # fmt: skip
    assert counts == {"rows": 1}
    roles = [[m["role"] for m in payload["messages"]] for payload in hub.requests]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"]]
    assert all(p["chat_template_kwargs"] == {"enable_thinking": True} for p in hub.requests)
    assert {p["model"] for p in hub.requests} == {"large"}


def test_what_gives_no_row_is_counted_by_its_reason(tmp_path: Path) -> None:
    rows = [
        *({"messages": [user(text)]} for text in ("good", "long", "plain", "refused", "good")),
        {"messages": [user("call")], "chat_template_kwargs": {"xml_tools": ["{}"]}},
        {"messages": [assistant("nobody asked")]},
    ]
    answers = {
        "good": (200, "<think>\nso\n</think>\nyes", "stop"),
        "long": (200, "<think>\nso", "length"),
        "plain": (200, "yes", "stop"),
        "refused": (400, "", "stop"),
    }
    with openai_server(lambda p: answers[last(p)]) as hub:
        prompts = write_prompts(tmp_path, rows)
        counts = synthesize(job(prompts, hub.url), tmp_path / "out.jsonl", tmp_path / "progress")
    assert counts == {
        "rows": 1, "duplicates": 1, "with_tools": 1, "without_prompt": 1, "cut_off": 1,
        "not_in_its_mode": 1, "refused_by_the_server": 1,
    }  # fmt: skip
    assert sum(counts.values()) == len(rows)


@pytest.mark.parametrize("thinks", [True, False])
def test_pairs_are_of_one_prompt_and_in_the_prompts_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thinks: bool
) -> None:
    """Answers come in any order, and the files of answers hold a few each."""
    monkeypatch.setattr(server_module, "DOCUMENTS_PER_CHUNK", 4)

    def answer(quality: str) -> Any:
        def one(payload: Payload) -> tuple[int, str, str]:
            time.sleep(hash(last(payload)) % 7 / 500)
            same = last(payload) == "question 3"
            trace = "<think>\nso\n</think>\n" if thinks else ""
            return 200, f"{trace}{'same' if same else quality} {last(payload)}", "stop"

        return one

    prompts = write_prompts(tmp_path, questions(10))
    with openai_server(answer("good")) as good, openai_server(answer("bad")) as bad:
        pairs = job(prompts, good.url, bad.url, thinks)
        counts = synthesize(pairs, tmp_path / "out.jsonl", tmp_path / "progress")
    rows = read_json_lines(tmp_path / "out.jsonl")
    assert counts == {"rows": 9, "same_answers": 1}
    assert [row["prompt"] for row in rows] == [[user(f"question {n}")] for n in range(10) if n != 3]
    for row in rows:
        assert row["chosen"][0]["content"].endswith(f"good {row['prompt'][0]['content']}")
        assert row["rejected"][0]["content"].endswith(f"bad {row['prompt'][0]['content']}")
        assert row["chat_template_kwargs"] == {"enable_thinking": thinks}


RUN = """
import sys
from pathlib import Path
from datatrove_pipelines.synthetic import server
from datatrove_pipelines.synthetic.chats import SyntheticJob, Sampling, synthesize
server.DOCUMENTS_PER_CHUNK = 5
prompts, out, progress, url = sys.argv[1:]
one = server.Server(url, "large", requests=2)
synthesize(SyntheticJob(Path(prompts), True, one), Path(out), Path(progress))
"""


def test_a_killed_run_goes_on_without_asking_again(tmp_path: Path) -> None:
    prompts, out = write_prompts(tmp_path, questions(24)), tmp_path / "out.jsonl"

    def answer(payload: Payload) -> tuple[int, str, str]:
        time.sleep(0.05)
        return 200, f"<think>\nso\n</think>\nabout {last(payload)}", "stop"

    with openai_server(answer) as hub:
        words = [sys.executable, "-c", RUN, prompts, out, tmp_path / "progress", hub.url]
        for least in (6, 13, 24):
            child = subprocess.Popen(words, cwd=ROOT, env=environment())
            if least < 24:
                while len(hub.requests) < least and child.poll() is None:
                    time.sleep(0.01)
                child.send_signal(signal.SIGKILL)
                child.wait()
                assert not out.exists()
        assert child.wait(60) == 0
    asked = [last(payload) for payload in hub.requests]
    assert set(asked) == {f"question {n}" for n in range(24)}
    # Those that were under way at a kill, and those whose answer was not on disk yet.
    assert len(asked) <= 24 + 2 * 6
    assert [row["messages"][0] for row in read_json_lines(out)] == [
        user(f"question {n}") for n in range(24)
    ]


def test_a_lost_answer_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner logs a row that it cannot write, and ends as if all were well."""
    from datatrove.pipeline.inference.checkpointing import CheckpointManager

    write = CheckpointManager.write_document

    async def full_disk(self: Any, document: Any, *more: Any) -> None:
        if document.id == "2":
            raise OSError(28, "No space left on device")
        await write(self, document, *more)

    monkeypatch.setattr(CheckpointManager, "write_document", full_disk)
    prompts = write_prompts(tmp_path, questions(3))
    lost = r"prompts\.jsonl, line 2: its answer was lost"
    answer = (200, "<think>\nso\n</think>\nyes", "stop")
    with openai_server(lambda _: answer) as hub, pytest.raises(UserError, match=lost):
        synthesize(job(prompts, hub.url), tmp_path / "out.jsonl", tmp_path / "progress")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_server_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, questions(1))
    with pytest.raises(Outage, match=r"ENDPOINT=http://127\.0\.0\.1:9: no server answers"):
        synthesize(job(prompts, "http://127.0.0.1:9"), tmp_path / "o", tmp_path / "p")
    with pytest.raises(UserError, match=r"ENDPOINT=localhost:8000: .*write http://"):
        synthesize(job(prompts, "localhost:8000"), tmp_path / "o", tmp_path / "p")


def test_a_request_that_the_server_refuses_ends_in_one_line(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, questions(2))
    refusal = pytest.raises(UserError, match="large: status 404")
    with openai_server(lambda _: (404, "", "stop")) as hub, refusal:
        synthesize(job(prompts, hub.url), tmp_path / "o", tmp_path / "p")


@pytest.mark.parametrize(
    ("text", "reasoning", "thinks", "content"),
    [
        ("yes", "so", True, "<think>\nso\n</think>\n\nyes"),
        ("<think>\nso\n</think>\n\nyes", "", True, "<think>\nso\n</think>\n\nyes"),
        ("so\n</think>\n\nyes", "", True, "<think>\nso\n</think>\n\nyes"),  # opened by the prompt
        ("<think>\n\n</think>\n\nyes", "", False, "yes"),  # Qwen3 without reasoning
        ("yes", "", False, "yes"),
        ("yes", "", True, ""),
        ("<think>\nso\n</think>\n\nyes", "", False, ""),
        ("<think>\nso", "", True, ""),
        ("", "so", True, ""),
    ],
)
def test_an_answer_is_written_as_the_chats_write_one_or_not_at_all(
    text: str, reasoning: str, thinks: bool, content: str
) -> None:
    assert written(text, reasoning, thinks) == content


def test_a_key_goes_with_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert server("http://a:1/v1/", "m") == Server("http://a:1", "m", key="secret")
    assert server("http://a:1", "m").headers == {"Authorization": "Bearer secret"}


def test_no_row_at_all_is_an_error_in_the_servers_words(tmp_path: Path) -> None:
    """`transformers serve` answers so to the name of another model."""
    prompts = write_prompts(tmp_path, questions(2))
    problem = (
        r"no prompt of 2 gave a row \(0 rows, 2 refused by the server\); .*said: .* 400: .*MODEL="
    )
    refusal = pytest.raises(UserError, match=problem)
    with openai_server(lambda _: (400, "", "stop")) as hub, refusal:
        synthesize(job(prompts, hub.url), tmp_path / "out.jsonl", tmp_path / "progress")
    assert not (tmp_path / "out.jsonl").exists()
