"""`make chat` answers, keeps the conversation, and says what is wrong in one line."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai_server import openai_server
from small_models import make_tokenizer, random_model

from ground.errors import UserError
from launch.tools.chat import ROUNDS, Display, Talk, chat, command
from launch.tools.chat_models import (
    Asked,
    Endpoint,
    Folder,
    Message,
    Show,
    TooLong,
    as_openai,
    as_text,
)

Said = Callable[[list[Message], Asked], str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = make_tokenizer(short_system=True)
    model = random_model(tokenizer, seed=0, window=600)
    model.generation_config.eos_token_id = list(range(len(tokenizer)))  # answers of one token
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class Scripted:
    """A speaker that says what a test wants, word by word."""

    name = "scripted"

    def __init__(self, says: Said):
        self.says, self.heard = says, list[tuple[list[Message], Asked]]()

    def stream(self, messages: list[Message], asked: Asked, show: Show) -> None:
        self.heard.append(([*messages], asked))
        for word in self.says(messages, asked).split("|"):
            if word == "^C":
                raise KeyboardInterrupt
            show(word)


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    waiting: Iterator[str] = iter(lines)
    monkeypatch.setattr("builtins.input", lambda _: next(waiting))


def roles(messages: list[Message]) -> list[str]:
    return [message["role"] for message in messages]


def call(name: str, **arguments: str) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_each_line_is_answered_with_the_whole_conversation_before_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, "Hi", "And you?", "")
    speaker, seen = Folder(folder), []
    stream = speaker.stream

    def spy(messages: list[Message], asked: Asked, show: Show) -> None:
        seen.append(roles(messages))
        stream(messages, asked, show)

    monkeypatch.setattr(speaker, "stream", spy)
    chat(speaker, "no_think")
    assert seen == [["user"], ["user", "assistant", "user"]]
    assert f"{folder}, /no_think" in capsys.readouterr().out


def test_what_cannot_be_talked_to_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match="MODE=loud: use think or no_think"):
        command("tiny", model=str(folder), mode="loud")
    with pytest.raises(UserError, match="CALLS=xml: use json, code or none"):
        command("tiny", model=str(folder), calls="xml")
    with pytest.raises(UserError, match=r"nowhere: no config\.json there; .*`make release`"):
        Folder(folder / "nowhere")
    with pytest.raises(UserError, match=r"a\.gguf: .*`make serve MODEL=.*a\.gguf`"):
        Folder(folder / "a.gguf")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template, a base model"):
        Folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"does not load \(Error no file named model\.safetensors"):
        Folder(folder)


def test_what_does_not_fit_is_said_and_taken_back(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = Talk(Folder(folder), thinks=False)
    talk.answer("Hi")
    before = [*talk.messages]
    talk.answer("x" * 700)
    assert talk.messages == before and roles(before) == ["user", "assistant"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "window" in line]
    assert "the model's window is 600" in line and "/new" in line
    talk.answer("Hi")
    assert roles(talk.messages) == ["user", "assistant"] * 2


@pytest.mark.parametrize("thinks", [False, True])
def test_earlier_traces_are_read_where_answers_have_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, thinks: bool
) -> None:
    """In /no_think the template opens each answer with an empty trace; a second one is never trained."""
    speaker, read = Folder(folder), []
    generate = speaker.model.generate

    def spy(input_ids: Any, **more: Any) -> Any:
        read.append(speaker.tokenizer.decode(input_ids[0]))
        return generate(input_ids=input_ids, **more)

    monkeypatch.setattr(speaker.model, "generate", spy)
    talk = Talk(speaker, thinks)
    talk.messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nso\n</think>\nYes"},
    ]
    talk.answer("b")
    trace = "<think>\nso\n</think>" if thinks else "<think>\n\n</think>"
    assert f"<|im_start|>assistant\n{trace}\nYes<|im_end|>" in read[0]
    assert talk.messages[1]["content"].startswith("<think>\nso"), "it is kept for /think"


def test_lines_with_a_slash_are_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(
        monkeypatch, "a", "/think", "b", "/calls", "/no_think", "c", "/thnk", "/usr/bin is what?",
        "/new", "/calls", "d", "/help", "",
    )  # fmt: skip
    speaker = Scripted(lambda *_: "yes")
    chat(speaker, "no_think")
    assert [asked.thinks for _, asked in speaker.heard] == [False, True, False, False, False]
    assert [len(messages) for messages, _ in speaker.heard] == [1, 3, 5, 7, 1]
    assert [bool(asked.tools) for _, asked in speaker.heard] == [False, False, True, True, False]
    assert [bool(asked.python_tools) for _, asked in speaker.heard] == [False] * 4 + [True]
    said = capsys.readouterr().out
    assert "/thnk: no such command; did you mean '/think'?" in said and "Ctrl-C stops" in said


@pytest.mark.parametrize("form", ["json", "code"])
def test_a_tool_is_called_and_its_result_is_answered(form: str) -> None:
    calls = {
        "json": call("calculate", expression="6 * 7"),
        "code": '<code>\nprint(calculate("6 * 7"))\n</code>',
    }
    speaker = Scripted(lambda m, _: calls[form] if m[-1]["role"] == "user" else "It is 42.")
    talk = Talk(speaker, thinks=False, calls=form)
    talk.answer("What is 6 times 7?")
    assert roles(talk.messages) == ["user", "assistant", "tool", "assistant"]
    assert talk.messages[2]["content"] == "42"


def test_where_a_result_does_not_fit_the_whole_exchange_is_taken_back() -> None:
    def says(messages: list[Message], _: Asked) -> str:
        if messages[-1]["role"] == "tool":
            raise TooLong("too long")
        return call("calculate", expression="1") if messages[-1]["content"] == "b" else "yes"

    talk = Talk(Scripted(says), thinks=False, calls="json")
    talk.answer("a")
    talk.answer("b")
    assert [one["content"] for one in talk.messages] == ["a", "yes"]


def test_calls_are_not_carried_out_where_no_tool_was_offered() -> None:
    talk = Talk(Scripted(lambda *_: call("calculate", expression="1")), thinks=False)
    talk.answer("What is 1?")
    assert roles(talk.messages) == ["user", "assistant"]


def test_rounds_of_calls_have_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    speaker = Scripted(lambda *_: call("calculate", expression="1"))
    Talk(speaker, thinks=False, calls="json").answer("What is 1?")
    assert len(speaker.heard) == ROUNDS
    assert f"{ROUNDS} rounds of calls, and no answer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("said", "kept"),
    [("Well|^C", ["Well"]), ("<think>|So|^C", ["<think>So\n</think>\n"]), ("^C", [])],
)
def test_an_interrupt_ends_the_answer_and_not_the_chat(said: str, kept: list[str]) -> None:
    talk = Talk(Scripted(lambda m, _: said if m[-1]["content"] == "a" else "yes"), thinks=True)
    talk.answer("a")
    assert [one["content"] for one in talk.messages if one["role"] == "assistant"] == kept
    assert len(talk.messages) == 2 * len(kept)
    talk.answer("b")
    assert talk.messages[-2]["content"] == "b"


def test_thoughts_are_dimmed_whatever_the_pieces_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    display = Display()
    for piece in ("<think>\nso", " it is\n</think>\nYes", " [b]it is[/b]."):
        display.write(piece)
    out = capsys.readouterr().out
    plain, dim = "\x1b[0m", "\x1b[2m"
    assert out.rpartition(plain)[2] == "\nYes [b]it is[/b]."
    assert f"{dim}so{plain}{dim} it is{plain}\n" in out


def test_nothing_that_is_said_moves_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model nor of a tool; line breaks stay."""
    said = iter(["\x1b[2Jyes\n" + call("\x1b[1A", code="1"), "done"])
    talk = Talk(Scripted(lambda *_: next(said)), thinks=False, calls="json")
    talk.answer("a")
    printed = capsys.readouterr().out
    assert printed.startswith("[2Jyes\n<tool_call>") and "\n[1A: error: no tool" in printed
    assert "\x1b" not in printed and "\x1b" in talk.messages[1]["content"]


def test_a_server_reads_calls_and_reasoning_beside_the_content() -> None:
    said = f"<think>\nso\n</think>\nLook: {call('f', x='1')}{call('g')}"
    conversation = [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": said},
        {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"},
    ]  # fmt: skip
    _, answer, first, second = as_openai(conversation)
    assert answer["content"] == "Look:" and answer["reasoning_content"] == "so"
    assert [one["function"] for one in answer["tool_calls"]] == [
        {"name": "f", "arguments": '{"x": "1"}'}, {"name": "g", "arguments": "{}"},
    ]  # fmt: skip
    ids = [one["id"] for one in answer["tool_calls"]]
    assert [first["tool_call_id"], second["tool_call_id"]] == ids and ids[0] != ids[1]


def test_a_servers_parts_become_the_text_again() -> None:
    from openai.types.chat.chat_completion_chunk import ChoiceDelta

    parts = [
        {"role": "assistant", "content": ""}, {"reasoning_content": "so "},
        {"reasoning_content": "it is"}, {"content": "Look"}, {"content": ": "},
        {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": '{"x": '}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"1"}'}}]},
        {"tool_calls": [{"index": 1, "function": {"name": "g"}}]},
    ]  # fmt: skip
    text = "".join(as_text(ChoiceDelta.model_validate(part) for part in parts))
    head = "<think>\nso it is\n</think>\nLook: "
    assert text == f"{head}\n{call('f', x='1')}\n{call('g')}"


def test_a_server_that_is_none_is_named() -> None:
    with pytest.raises(
        UserError, match=r"ENDPOINT=http://127.0.0.1:9: no server answers .*make serve"
    ):
        Endpoint("http://127.0.0.1:9", "")
    for address in ("nowhere", "127.0.0.1:8000", "ftp://a", "http://", "http://a:port"):
        with pytest.raises(
            UserError, match=r"(no address|Invalid port).*; write http://<host>:<port>"
        ):
            Endpoint(address, "")
    with openai_server(lambda _: (400, "", "stop")) as served:
        talk = Talk(Endpoint(served.url, "some"), thinks=False)
        talk.answer("a")
        assert talk.messages == [] and served.requests[0]["model"] == "some"
