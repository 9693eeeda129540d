"""A tool list, a call, its result and an answer over HTTP, by the openai package, in both modes."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import talking_model as talking
from conftest import ROOT, environment
from processes import free_port, is_alive
from talking_model import write_talking_model

from ground.tool_calls import ToolCall
from launch.tools.chat import Talk
from launch.tools.chat_models import Endpoint, Folder, Message
from launch.tools.chat_tools import AS_JSON, Session
from runtimes.gguf_file import write_gguf
from runtimes.servers import vllm

pytestmark = pytest.mark.slow
SECONDS = 300


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A name with an @, which transformers serve takes for a revision."""
    folder = write_talking_model(tmp_path_factory.mktemp("talking@home") / "release")
    write_gguf(folder, folder.parent / "release.gguf", "f32")
    return folder


@contextmanager
def served(model: Path, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`launch serve`, once it says that the model is ready."""
    command = [sys.executable, "-m", "launch", "serve", "--scale", "tiny", "--model", str(model)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port)], env=environment(), cwd=ROOT, stdout=out, stderr=out
        )
    try:
        until = time.monotonic() + SECONDS
        while "ready: " not in log.read_text():
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@pytest.fixture(scope="module", params=["folder", "gguf"])
def server(request: pytest.FixtureRequest, release: Path) -> Iterator[str]:
    """The address of a server of the folder, vLLM's where `vllm` is on PATH, and of llama.cpp's with
    its GGUF file."""
    model = release if request.param == "folder" else release.parent / "release.gguf"
    port, log = free_port(), release.parent / f"{request.param}.log"
    with served(model, port, log) as process:
        children = psutil.Process(process.pid).children(recursive=True)
        yield f"http://127.0.0.1:{port}"
    assert process.returncode == 0 and log.read_text().endswith("served, and stopped\n")
    assert children and not any(is_alive(child.pid) for child in children)


def ask(
    server: str, messages: list[Any], streams: bool, thinks: bool, **more: Any
) -> dict[str, Any]:
    """The assistant's message, as the client has it: whole, or put together from its deltas."""
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    options: dict[str, Any] = {
        "model": "release" if vllm() else "any name", "messages": messages, "temperature": 0,
        "extra_body": {"chat_template_kwargs": {"enable_thinking": thinks}}, **more,
    }  # fmt: skip
    if not streams:
        choice = client.chat.completions.create(**options).choices[0]
        assert choice.finish_reason == ("tool_calls" if choice.message.tool_calls else "stop")
        return choice.message.model_dump(exclude_none=True)
    whole: dict[str, Any] = {"role": "assistant", "content": "", "reasoning_content": ""}
    vllms = {"reasoning": "reasoning_content"}
    for chunk in client.chat.completions.create(stream=True, **options):
        for delta in (choice.delta.model_dump(exclude_none=True) for choice in chunk.choices):
            for key in ("content", "reasoning_content", "reasoning"):
                whole[vllms.get(key, key)] += delta.get(key, "")
            for part in delta.get("tool_calls", []):
                calls = whole.setdefault("tool_calls", [])
                if part["index"] == len(calls):
                    calls.append({**part, "function": {"name": "", "arguments": ""}})
                for key, value in part["function"].items():
                    calls[part["index"]]["function"][key] += value
    return whole


def thought(message: dict[str, Any]) -> str:
    return str(message.get("reasoning_content") or message.get("reasoning") or "").strip()


@pytest.mark.parametrize("thinks", [False, True], ids=["no_think", "think"])
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
def test_a_tool_is_listed_called_and_its_result_answered(
    server: str, streams: bool, thinks: bool
) -> None:
    conversation: list[dict[str, Any]] = [{"role": "user", "content": talking.QUESTION}]
    called = ask(server, conversation, streams, thinks, tools=AS_JSON)
    (call,) = called["tool_calls"]
    function = call["function"]
    arguments = json.loads(function["arguments"])
    assert {"name": function["name"], "arguments": arguments} == talking.CALL
    assert not (called.get("content") or "").strip()
    assert thought(called) == (talking.THOUGHT if thinks else "")

    result = Session().result(ToolCall(function["name"], arguments))
    assert result == talking.RESULT
    conversation += [called, {"role": "tool", "tool_call_id": call["id"], "content": result}]
    answered = ask(server, conversation, streams, thinks, tools=AS_JSON)
    assert answered["content"].strip() == talking.ANSWER and "tool_calls" not in answered
    assert thought(answered) == (talking.READ if thinks else "")


def test_without_tools_it_answers(server: str) -> None:
    greeting = [{"role": "user", "content": talking.GREETING}]
    answers = [
        ask(server, greeting, streams, thinks)
        for streams in (False, True)
        for thinks in (False, True)
    ]
    assert {answer["content"].strip() for answer in answers} == {talking.GREETED}


def test_models_are_listed_and_a_conversation_that_does_not_fit_is_refused(
    server: str, release: Path
) -> None:
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    listed = [model.id for model in client.models.list()]  # vLLM's has its folder as a second name
    assert listed[0] == "release" and len(listed) == (2 if str(release) in listed else 1)
    long = [{"role": "user", "content": "word " * talking.WINDOW}]
    for streams in (False, True):
        with pytest.raises(openai.BadRequestError, match=str(talking.WINDOW)):
            ask(server, long, streams, False)


@pytest.mark.parametrize("calls", ["json", "code"])
@pytest.mark.parametrize("thinks", [False, True], ids=["no_think", "think"])
def test_the_chat_says_the_same_of_a_folder_and_of_its_server(
    server: str, release: Path, thinks: bool, calls: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[list[Message]] = []
    for speaker in (Folder(release), Endpoint(server, "")):
        talk = Talk(speaker, thinks, calls)
        talk.answer(talking.QUESTION)
        said.append(
            [
                {**one, "content": re.sub(r"\s+", " ", one["content"]).strip()}
                for one in talk.messages
            ]
        )
    assert said[0] == said[1]
    assert [one["role"] for one in said[0]] == ["user", "assistant", "tool", "assistant"]
    assert said[0][2]["content"] == talking.RESULT and talking.ANSWER in said[0][3]["content"]
    assert capsys.readouterr().out.count("<think>") == (4 if thinks else 0)
