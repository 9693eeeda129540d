"""Random conversations as clients send them: both modes, tools of both kinds, results, odd texts."""

import json
import random
from dataclasses import dataclass
from typing import Any

from ground.tool_calls import Parsed, ToolCall

Message = dict[str, Any]
# What templates, tokenizers and parsers trip over.
ODD = (
    "<|im_end|>", "<|im_start|>user\n", "<think>", "</think>", "<tool_call>", "</tool_call>", "<code>", "</code>",
    "{{ messages }}", "{% endfor %}", "{# no #}", '"quoted"', "it's", "back\\slash", "\\n", "\t", "\r\n", "\n\n",
    " two  blanks ", "&lt;b&gt;", "<b>", "}", "]", "{", "Köln", "naïve", "你好", "안녕", "مرحبا", "שלום", "🙂", "👩‍🚀",
    "e\u0301", "\u200b", "\u2028", "\u00a0", "\ufdd0", "\x7f", "%d %B", "/thinks", "None", "null", "true", "1e3", "$x^2$",
)  # fmt: skip
WORDS = ("please", "add", "the", "weather", "in", "three", "files", "why", "sum", "and", "then")
SYSTEMS = ("", "/think", "/no_think", "/think /no_think", "/system_override")
NAMES = ("add", "get_weather", "search_files")


@dataclass(frozen=True)
class Conversation:
    messages: list[Message]
    tools: list[dict[str, Any]]
    variables: dict[str, Any]  # of the template
    said: list[Parsed]  # by each turn of the assistant


def text(rng: random.Random, least: int = 1) -> str:
    parts = [rng.choice(ODD if rng.random() < 0.4 else WORDS) for _ in range(rng.randint(least, 8))]
    return rng.choice((" ", "", "\n")).join(parts)


def value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(8 if depth < 2 else 6)
    if kind == 6:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return {text(rng): value(rng, depth + 1) for _ in range(rng.randrange(3))}
    return (text(rng, 0), text(rng), rng.randint(-(10**6), 10**6), rng.random() < 0.5, None, rng.randrange(99) + 0.25)[kind]  # fmt: skip


def schema(name: str, rng: random.Random) -> dict[str, Any]:
    properties = {key: {"type": "string", "description": text(rng)} for key in ("x", "y", "z")}
    return {
        "name": name,
        "description": text(rng),
        "parameters": {"type": "object", "properties": properties, "required": ["x"]},
    }


def turn(rng: random.Random, thinks: bool, python: bool) -> tuple[Message, Parsed]:
    """An assistant's turn, and what it says."""
    calls = tuple(
        ToolCall(rng.choice(NAMES), {key: value(rng) for key in "xyz"[: rng.randrange(4)]})
        for _ in range(rng.choice((0, 1, 1, 2, 3)))
    )
    content = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(4))) if calls else "Yes."
    thought = text(rng).replace("</think>", "").strip() if thinks and rng.random() < 0.7 else ""
    said = Parsed(thought or None, content or None, calls)
    trace = f"<think>\n{thought}\n</think>\n" if thought else ""
    if python and calls:
        code = f"<code>\n{chr(10).join(map(_code, calls))}\n</code>"
        content = f"{content}\n{code}" if content else code
    message: Message = {"role": "assistant", "content": trace + content or None}
    if calls and not python:
        message["tool_calls"] = [
            {"id": f"call{n}", "type": "function", "function": _function(call)}
            for n, call in enumerate(calls)
        ]
    return message, said


def _code(call: ToolCall) -> str:
    arguments = ", ".join(f"{key}={value!r}" for key, value in call.arguments.items())
    return f"print({call.name}({arguments}))"


def _function(call: ToolCall) -> dict[str, str]:
    return {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}


def conversation(seed: int) -> Conversation:
    rng = random.Random(seed)
    kind = rng.choice(("none", "tools", "xml", "python", "both"))
    variables: dict[str, Any] = {"enable_thinking": rng.random() < 0.5}
    tools = [schema(name, rng) for name in NAMES]
    if kind in ("xml", "both"):
        variables["xml_tools"] = [*tools[:2], json.dumps(tools[2])]
    if kind in ("python", "both"):
        variables["python_tools"] = [f"def {name}(x: str, y: str, z: str) -> str" for name in NAMES]
    if rng.random() < 0.2:
        variables["custom_instructions"] = text(rng)
    if rng.random() < 0.2:
        variables["date_string"] = "01 January 2025"
    messages: list[Message] = []
    if rng.random() < 0.6:
        content = text(rng, 0) + rng.choice((" ", "", "\n")) + rng.choice(SYSTEMS) + text(rng, 0)
        messages.append({"role": "system", "content": content})
    said = []
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": text(rng)})
        message, says = turn(rng, thinking(messages, variables), python=kind == "python")
        messages.append(message)
        said.append(says)
        for number, _ in enumerate(says.calls):
            messages.append({"role": "tool", "tool_call_id": f"call{number}", "content": text(rng)})
    listed = [{"type": "function", "function": tool} for tool in tools] if kind == "tools" else []
    return Conversation(messages, listed, variables, said)


def thinking(messages: list[Message], variables: dict[str, Any]) -> bool:
    """The mode by the template's rules."""
    given = messages[0]["content"] if messages[0]["role"] == "system" else ""
    if "/no_think" in given:
        return False
    return "/think" in given.replace("/think>", "") or bool(variables["enable_thinking"])
