"""Tool calls of the embedded chats: functions, requests that need one, results, final answers.

The same functions are offered as JSON schemas (called in `<tool_call>`) and as Python signatures
(called from code in `<code>`). What a call returns is computed, or drawn where that is impossible.
"""

import json
import random
from dataclasses import dataclass
from typing import Any

from datatrove_pipelines.standins import words
from datatrove_pipelines.standins.words import LANGUAGES, NAMES

FORMATS = ("xml", "python")
TYPES = {"string": "str", "integer": "int"}
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    name: str
    description: str
    parameters: dict[str, str]  # name: JSON type
    draw: dict[str, tuple[Any, ...]]  # an argument's bounds, if it is an integer, or its choices
    requests: tuple[str, ...]
    answer: str  # of the arguments and `out`
    returns: tuple[str, ...] = ()


@dataclass(frozen=True)
class ToolTask:
    question: str
    thought: str
    tool: Tool
    arguments: Arguments
    offered: tuple[Tool, ...]
    output: str
    answer: str


TOOLS = tuple(Tool(name, **row) for name, row in words.TOOLS.items())


def draw_arguments(rng: random.Random, tool: Tool) -> Arguments:
    return {
        name: rng.randint(*values) if tool.parameters[name] == "integer" else rng.choice(values)
        for name, values in tool.draw.items()
    }


def output_of(rng: random.Random, tool: Tool, arguments: Arguments) -> str:
    match tool.name, arguments:
        case "add", {"a": a, "b": b}:
            return str(a + b)
        case "square", {"number": number}:
            return str(number**2)
        case "translate", {"word": word}:
            english = [first for first, _ in LANGUAGES["en"].opposites]
            return LANGUAGES["fr"].opposites[english.index(word)][0]
        case "get_time", _:
            return f"{rng.randint(1, 12)}:{rng.choice(('00', '15', '30', '45'))}"
    return rng.choice(tool.returns) if tool.returns else "done"


def draw_tool_task(rng: random.Random) -> ToolTask:
    """A request, the tool it needs among two that are offered, and what comes back."""
    tool, other = rng.sample(TOOLS, 2)
    arguments = draw_arguments(rng, tool)
    output = output_of(rng, tool, arguments)
    offered = (tool, other) if rng.random() < 0.5 else (other, tool)
    opener = rng.choice(("", "Hello! ", "Quick request: ", "{name} here. "))
    opener = opener.format(name=rng.choice(NAMES))
    return ToolTask(
        question=opener + rng.choice(tool.requests).format(**arguments),
        thought=f"Let me see: {tool.name}.",
        tool=tool,
        arguments=arguments,
        offered=offered,
        output=output,
        answer=tool.answer.format(out=output, **arguments),
    )


def xml_tool(tool: Tool) -> str:
    """The function as a JSON schema, as `xml_tools` lists it."""
    properties = {name: {"type": kind} for name, kind in tool.parameters.items()}
    parameters = {"type": "object", "properties": properties}
    return json.dumps(
        {"name": tool.name, "description": tool.description, "parameters": parameters}
    )


def python_tool(tool: Tool) -> str:
    """The function as a Python signature, as `python_tools` lists it."""
    parameters = ", ".join(f"{name}: {TYPES[kind]}" for name, kind in tool.parameters.items())
    return f"def {tool.name}({parameters}) -> str"


def call_text(name: str, arguments: Arguments, form: str) -> str:
    """The assistant's call, as text: JSON as the chat template writes `tool_calls`, or code."""
    if form == "xml":
        # The arguments keep their order and their letters: so does the template's tojson.
        body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        return f"<tool_call>\n{body}\n</tool_call>"
    # For what occurs here JSON's strings are valid Python, with one kind of quotes.
    written = ", ".join(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in arguments.items())
    return f"<code>\nprint({name}({written}))\n</code>"
