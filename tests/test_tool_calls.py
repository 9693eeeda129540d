"""What an assistant's text says: reasoning, content and calls; what is no whole call stays text."""

import json
from typing import Any

import pytest

from runtimes.tool_calls import Parsed, ToolCall, parse

ADD = ToolCall("add", {"a": 1, "b": [2, None]})
JSON = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, null]}}\n</tool_call>'
CODE = "<code>\nprint(add(a=1, b=[2, None]))\n</code>"
HOSTILE = "</tool_call> }</code> <think> \"' {"


def program(code: str) -> ToolCall:
    return ToolCall("python", {"code": code})


CASES: dict[str, tuple[str, Parsed]] = {
    "empty": ("", Parsed(None, None, ())),
    "text": ("Hello.\n", Parsed(None, "Hello.", ())),
    "no_think": ("<think>\n\n</think>\nHello.<|im_end|>\n", Parsed(None, "Hello.", ())),
    "think": ("<think>\nSo.\n</think>\nHello.<|im_end|>", Parsed("So.", "Hello.", ())),
    "thought cut off": ("<think>\nSo. <tool_call>", Parsed("So. <tool_call>", None, ())),
    "a tag in the middle": ("Use <think> so.", Parsed(None, "Use <think> so.", ())),
    "call": (JSON, Parsed(None, None, (ADD,))),
    "call after a thought": (f"<think>\nSo.\n</think>\n{JSON}", Parsed("So.", None, (ADD,))),
    "a call that was only thought of": (f"<think>{JSON}</think>No.", Parsed(JSON, "No.", ())),
    "text and calls": (f"Yes.\n{JSON}\n{JSON}\nSo.", Parsed(None, "Yes.\nSo.", (ADD, ADD))),
    "code and JSON": (f"{CODE}\n{JSON}", Parsed(None, None, (ADD, ADD))),
    "two lines": ("<code>add(a=1, b=[2, None])\nf()</code>", Parsed(None, None, (ADD, ToolCall("f", {})))),
    "program": ("<code>\nx = f(1)\nprint(x)\n</code>", Parsed(None, None, (program("x = f(1)\nprint(x)"),))),
    "a call of a call": ("<code>f(x=g())</code>", Parsed(None, None, (program("f(x=g())"),))),
    "a value without JSON": ("<code>f(x={1, 2})</code>", Parsed(None, None, (program("f(x={1, 2})"),))),
    "no name": ("<code>f(1)</code>", Parsed(None, None, (program("f(1)"),))),
}  # fmt: skip
AS_TEXT = [
    JSON[:-5], CODE[:-3], JSON.replace("null]}}", "null]}"), JSON.replace("null", "NaN"),
    JSON.replace('"name"', '"nom"'), JSON.replace('"add"', '""'), JSON.replace('"add"', "7"),
    JSON.replace("null", '"\\ud800"'), "<tool_call></tool_call>", "<tool_call>[1]</tool_call>",
    '<tool_call>{"name": "f"}</tool_call>', '<tool_call>{"name": "f", "arguments": "x"}</tool_call>',
    f"<tool_call>{'[' * 100_000}</tool_call>", "<code>f(</code>", "<code>x</code>", "<code>\0f()</code>",
    f"<code>{'f(' * 2_000}</code>", "</tool_call>", "<tool_call><tool_call>",
]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_text_is_taken_apart(name: str) -> None:
    text, expected = CASES[name]
    assert parse(text) == expected


@pytest.mark.parametrize("text", AS_TEXT, ids=lambda text: text[:40])
def test_what_is_no_whole_call_stays_in_the_content(text: str) -> None:
    assert parse(text) == Parsed(None, text, ())
    # Nor does it hide the call after it, where it is not open.
    if "</" in text:
        assert parse(f"{text}\n{JSON}") == Parsed(None, text, (ADD,))


@pytest.mark.parametrize(
    "value", [HOSTILE, {"x": HOSTILE}, "Köln 👩‍🚀\u2028\x00", -1.5, True, 2**70]
)
def test_any_argument_comes_back(value: Any) -> None:
    call = ToolCall("f", {"v": value})
    body = json.dumps({"name": "f", "arguments": call.arguments}, ensure_ascii=False)
    assert parse(f"A. <tool_call>{body}</tool_call>") == Parsed(None, "A.", (call,))
    assert parse(f"<code>f(v={value!r})</code>").calls == (call,)


def test_known_signatures_name_arguments_and_leave_other_functions_to_python() -> None:
    text = "<code>\nprint(add(1, b=2))\n</code>"
    assert parse(text, {"add": ["a", "b"]}).calls == (ToolCall("add", {"a": 1, "b": 2}),)
    assert parse(text, {"sub": ["a", "b"]}).calls == (program("print(add(1, b=2))"),)
    for wrong in ("add(1, a=2)", "add(1, 2, 3)", "add(*[1, 2])", "add(**{'a': 1})", "add(1).b"):
        assert parse(f"<code>{wrong}</code>", {"add": ["a", "b"]}).calls == (program(wrong),)
