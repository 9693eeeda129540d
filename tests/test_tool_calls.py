"""What an assistant's text says: reasoning, content and calls; what is no whole call stays text."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ground.tool_calls import END, Calls, Parsed, Thought, ToolCall, parse, signatures_of

ADD = ToolCall("add", {"a": 1, "b": [2, None]})
JSON = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, null]}}\n</tool_call>'
CODE = "<code>\nprint(add(a=1, b=[2, None]))\n</code>"
HOSTILE = "{} }</tool_call> <code>f()</code> <think> \"' {"


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

PARTS = [
    *AS_TEXT[:12], *(text for text, _ in CASES.values()), "<think>", "</think>", "<tool_call>", "<code>", "\n", " ",
    "</code>", "</tool_call>", "<", "A.", JSON.replace("null", json.dumps(HOSTILE)), f"<code>f(x={HOSTILE!r})</code>",
    f"<code>f(x={JSON!r})</code>",
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


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(st.sampled_from(PARTS), max_size=6),
    cuts=st.lists(st.integers(0, 400), max_size=12),
)
def test_in_any_parts_a_text_says_the_same(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts).replace(END, "")
    cuts = sorted({0, *(min(cut, len(text)) for cut in cuts), len(text)})
    thought, calls = Thought(), Calls()
    said: tuple[str, str, list[ToolCall]] = ("", "", [])
    for start, end in zip(cuts, [*cuts[1:], None], strict=True):
        reasoning, rest = thought.feed(text[start:end], last=end is None)
        content, more = calls.feed(rest, last=end is None)
        said = said[0] + reasoning, said[1] + content, said[2] + more
    assert Parsed(said[0] or None, said[1] or None, tuple(said[2])) == parse(text)


def test_what_is_certain_is_not_held_back() -> None:
    thought, calls = Thought(), Calls()
    assert [thought.feed(part) for part in ("<thi", "nk>\nSo", " it ", "is</", "think>\nYe")] == [
        ("", ""), ("So", ""), (" it", ""), (" is", ""), ("", "Ye"),
    ]  # fmt: skip
    assert [calls.feed(part) for part in ("Ye", "s. <", "b> ", JSON[:40], JSON[40:], "\nSo")] == [
        ("Ye", []), ("s.", []), (" <b>", []), ("", []), ("", [ADD]), ("\nSo", []),
    ]  # fmt: skip


def test_tools_are_known_by_their_signatures_in_every_form() -> None:
    schema = {"name": "f", "parameters": {"properties": {"x": {}, "y": {}}}}
    for tool in (
        schema,
        {"type": "function", "function": schema},
        "def f(x: int, y: str = ')') -> str",
        "def f(x: int, y: str) -> str: ...",
        'def f(x, y):\n    """Adds."""',
    ):
        assert signatures_of([tool]) == {"f": ["x", "y"]}
    assert signatures_of([{"name": "f"}, "no Python"]) == {"f": []}
