"""What an assistant's text says: its reasoning, its tool calls, and the rest, its content.

    <think>…</think>                                        reasoning, where the text begins with it
    <tool_call>{"name": …, "arguments": {…}}</tool_call>    a call as JSON
    <code>…</code>                                          calls as Python, see `python_calls`

A call is what can be carried out. What is malformed or was cut off stays in the content, as it was
written: nothing is lost, and no client runs half a call. Blanks around the tags are no content;
text before and after calls is one line of it each.
"""

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE, END = "<think>", "</think>", "<|im_end|>"
OPENING = re.compile(r"<tool_call>\s*|<code>")
# What a program is called as; `code` is its argument.
PYTHON = "python"
# A string in the code may spell `</code>`: so many are tried until the code is whole.
CLOSINGS_TRIED = 8

Arguments = dict[str, Any]
# A function's parameters, in order: what gives arguments without a keyword their names.
Signatures = Mapping[str, Sequence[str]]


def _unsure(*tags: str) -> re.Pattern[str]:
    """Blanks and the beginning of a tag, at the end of a text that goes on."""
    starts = {re.escape(tag[:length]) for tag in tags for length in range(1, len(tag))}
    return re.compile(rf"\s*(?:{'|'.join(sorted(starts))})?\Z")


UNSURE_THOUGHT, UNSURE_CONTENT = _unsure(CLOSE), _unsure("<tool_call>", "<code>")


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
    content, calls = Calls(signatures).feed(rest, last=True)
    return Parsed(reasoning, content or None, tuple(calls))


def split_reasoning(text: str) -> tuple[str | None, str]:
    """The reasoning, and what follows it; all is reasoning where it was cut off."""
    reasoning, rest = Thought().feed(text, last=True)
    return reasoning or None, rest


class Thought:
    """Takes the reasoning off a text that arrives in parts; where none closes it, it was cut off."""

    def __init__(self) -> None:
        self.held = ""
        self.began = self.wrote = self.ended = False

    def feed(self, delta: str, last: bool = False) -> tuple[str, str]:
        """What is certain by now of the reasoning, and of the text after it."""
        if self.ended:
            return "", delta
        text, self.held = self.held + delta, ""
        if not self.began:
            start = text.lstrip()
            if not start.startswith(OPEN):
                self.ended = last or not OPEN.startswith(start)
                self.held = "" if self.ended else text
                return "", text if self.ended and start else ""
            self.began, text = True, start.removeprefix(OPEN)
        before, closed, rest = text.partition(CLOSE)
        self.ended = bool(closed)
        certain = before[: _end(before, UNSURE_THOUGHT, last or self.ended)]
        self.held = "" if self.ended else before[len(certain) :]
        certain = certain if self.wrote else certain.lstrip()
        self.wrote = self.wrote or bool(certain)
        return certain, rest.lstrip()


class Calls:
    """Takes the calls out of a text that arrives in parts; a call comes when it is whole."""

    def __init__(self, signatures: Signatures | None = None):
        self.signatures = signatures
        self.held = ""
        self.wrote, self.new_line = False, True

    def feed(self, delta: str, last: bool = False) -> tuple[str, list[ToolCall]]:
        """What is certain by now of the content, and the calls that became whole."""
        self.held += delta
        content, calls = "", list[ToolCall]()
        while (last or ">" in delta) and (found := self._next(last)):
            start, more, end = found
            content += self._written(self.held[:start].rstrip())
            calls += more
            self.held, self.new_line = self.held[end:], True
        opened = None if last else OPENING.search(self.held)
        text = self.held[: opened.start()] if opened else self.held
        certain = text[: _end(text, UNSURE_CONTENT, last)]
        self.held = self.held[len(certain) :]
        return content + self._written(certain), calls

    def _next(self, last: bool) -> tuple[int, list[ToolCall], int] | None:
        """Where a tag opens calls, the calls, and where their closing tag ends."""
        searched = 0
        while opened := OPENING.search(self.held, searched):
            if found := call_at(self.held, opened, self.signatures):
                return opened.start(), *found
            if not last:  # it may become a call, and what seems to open another be an argument
                return None
            searched = opened.end()
        return None

    def _written(self, text: str) -> str:
        text = text.lstrip() if self.new_line else text
        if not text:
            return ""
        line = "\n" if self.new_line and self.wrote else ""
        self.wrote, self.new_line = True, False
        return line + text


def _end(text: str, unsure: re.Pattern[str], last: bool) -> int:
    """Where the certain part of a text ends: the last of it is certain but for its blanks."""
    found = None if last else unsure.search(text)
    return found.start() if found else len(text.rstrip())


def signatures_of(tools: Iterable[Mapping[str, Any] | str]) -> dict[str, list[str]]:
    """Names and parameters of tools, as JSON schemas or as Python signatures; others are left out."""
    found = dict[str, list[str]]()
    for tool in tools:
        if isinstance(tool, str):
            found |= _python_signature(tool)
            continue
        function = tool.get("function") or tool
        parameters = function.get("parameters") or {}
        found[str(function.get("name"))] = [*(parameters.get("properties") or {})]
    return found


def _python_signature(text: str) -> dict[str, list[str]]:
    for code in (text, text.strip().removesuffix(":") + ": ..."):
        try:
            functions = [node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
        except (SyntaxError, ValueError):
            continue
        return {f.name: [a.arg for a in (*f.args.posonlyargs, *f.args.args)] for f in functions}
    return {}


def call_at(
    text: str, opened: re.Match[str], signatures: Signatures | None = None
) -> tuple[list[ToolCall], int] | None:
    """The calls behind an opening tag and where their closing tag ends; None where it opens none."""
    if opened[0].startswith("<tool_call>"):
        return json_call_at(text, opened.end())
    return _code_at(text, opened.end(), signatures)


def json_call_at(text: str, start: int) -> tuple[list[ToolCall], int] | None:
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
