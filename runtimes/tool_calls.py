"""What an assistant's text says: its reasoning, its tool calls, and the rest, its content.

    <think>…</think>                                    reasoning, at the beginning of the text alone
    <tool_call>{"name": …, "arguments": {…}}</tool_call>    a call as JSON
    <code>…</code>                                      Python: calls, or a program (`python_calls`)

A call is what can be carried out. What is malformed or was cut off stays in the content, as it was
written: nothing is lost, and no client runs half a call. Blanks around the tags are no content.
"""

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

END = "<|im_end|>"
# What a program is called as; `code` is its argument.
PYTHON = "python"
OPENING = re.compile(r"<tool_call>\s*|<code>")
# A string in the code may spell `</code>`: so many are tried until the code is whole.
CLOSINGS_TRIED = 8

Arguments = dict[str, Any]
# A function's parameters, in order: what gives arguments without a keyword their names.
Signatures = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: Arguments


@dataclass(frozen=True)
class Parsed:
    reasoning: str | None
    content: str | None
    calls: tuple[ToolCall, ...]


def parse(text: str, signatures: Signatures | None = None) -> Parsed:
    """The parts of what a model wrote after the opening of an answer.

    `signatures` are the functions that code may call, None for any.
    """
    reasoning, rest = split_reasoning(text.removesuffix("\n").removesuffix(END))
    content, calls = "", list[ToolCall]()
    for piece in pieces(rest, signatures):
        if isinstance(piece, str):
            content += piece
        else:
            calls += piece
    return Parsed(reasoning or None, content.rstrip() or None, tuple(calls))


def split_reasoning(text: str) -> tuple[str | None, str]:
    """The reasoning, and what follows it; all is reasoning where it was cut off."""
    opened = re.match(r"\s*<think>\s*", text)
    if opened is None:
        return None, text
    reasoning, closed, rest = text[opened.end() :].partition("</think>")
    return reasoning.rstrip(), rest.lstrip() if closed else ""


def pieces(text: str, signatures: Signatures | None = None) -> Iterator[str | list[ToolCall]]:
    """Text and calls in their order; a text ends where calls or the next tag begin."""
    start = 0
    while opened := OPENING.search(text, start):
        found = call_at(text, opened, signatures)
        before = text[start : opened.start()]
        if found is None:  # the tag is text
            yield before + opened[0]
            start = opened.end()
        else:
            yield before.rstrip()
            yield found[0]
            start = found[1]
    yield text[start:]


def call_at(
    text: str, opened: re.Match[str], signatures: Signatures | None = None
) -> tuple[list[ToolCall], int] | None:
    """The calls behind an opening tag and where their closing tag ends; None where it opens none."""
    if opened[0].startswith("<tool_call>"):
        return _json_call_at(text, opened.end())
    return _code_at(text, opened.end(), signatures)


def _json_call_at(text: str, start: int) -> tuple[list[ToolCall], int] | None:
    # The decoder, and no search for the closing tag: a string among the arguments may spell it.
    try:
        value, end = _DECODER.raw_decode(text, start)
        call = _call_of(value)
    except (ValueError, RecursionError):
        return None
    closed = _CLOSED.match(text, end)
    return ([call], closed.end()) if call and closed else None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_CLOSED = re.compile(r"\s*</tool_call>")
_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _call_of(value: Any) -> ToolCall | None:
    if not isinstance(value, dict) or value.keys() != {"name", "arguments"}:
        return None
    name, arguments = value["name"], value["arguments"]
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    json.dumps(value, ensure_ascii=False).encode()  # or ValueError: half a surrogate pair
    return ToolCall(name, arguments)


def _code_at(
    text: str, start: int, signatures: Signatures | None
) -> tuple[list[ToolCall], int] | None:
    end = start
    for _ in range(CLOSINGS_TRIED):
        end = text.find("</code>", end)
        if end < 0:
            return None
        calls = python_calls(text[start:end], signatures)
        end += len("</code>")
        if calls:
            return calls, end
    return None


def python_calls(code: str, signatures: Signatures | None = None) -> list[ToolCall]:
    """The calls of Python code; none where it is no Python or calls nothing.

    Where each line is one call with literal arguments, `f(x=1)` or `print(f(x=1))`, they are calls
    as JSON makes them: a client that knows of no Python carries them out. Any other code is a
    program, one call of `python` with the argument `code`, and not content: a client that gets
    content shows it and stops, one that gets a call runs it and goes on.
    """
    code = code.strip("\n")
    try:
        body = ast.parse(code).body
        if not any(isinstance(node, ast.Call) for line in body for node in ast.walk(line)):
            return []
        calls = [_simple_call(line, signatures) for line in body]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    simple = [call for call in calls if call is not None]
    return simple if len(simple) == len(calls) else [ToolCall(PYTHON, {"code": code})]


def _simple_call(line: ast.stmt, signatures: Signatures | None) -> ToolCall | None:
    match line:
        case ast.Expr(ast.Call(ast.Name("print"), [ast.Call() as call], [])):
            pass
        case ast.Expr(ast.Call() as call):
            pass
        case _:
            return None
    if not isinstance(call.func, ast.Name):
        return None
    name = call.func.id
    if signatures is not None and name not in signatures:
        return None
    names = [*(signatures or {}).get(name, ())][: len(call.args)]
    names += [key.arg or "" for key in call.keywords]
    values = [*call.args, *(key.value for key in call.keywords)]
    # "" is of `**more`, which names nothing.
    if "" in names or len(set(names)) != len(values):
        return None
    try:
        arguments = {key: ast.literal_eval(value) for key, value in zip(names, values, strict=True)}
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        written.encode()
    except (ValueError, TypeError, SyntaxError):
        return None
    # Not so for tuples, and for keys that are numbers.
    return ToolCall(name, arguments) if json.loads(written) == arguments else None
