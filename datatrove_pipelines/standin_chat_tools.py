"""Tool calls of the embedded chats: functions, requests that need one, results, final answers.

The same functions are offered as JSON schemas (called in `<tool_call>`) and as Python signatures
(called from code in `<code>`). What a call returns is computed, or drawn where it would be news.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datatrove_pipelines.standin_chat_words import LANGUAGES, NAMES, PLACES

__all__ = ["FORMATS", "TOOLS", "ToolTask", "call_text", "draw_tool_task", "python_tool", "xml_tool"]

FORMATS = ("xml", "python")
TYPES = {"string": "str", "integer": "int"}
FRENCH = {
    english: french
    for (english, _), (french, _) in zip(
        LANGUAGES["en"].opposites, LANGUAGES["fr"].opposites, strict=True
    )
}


@dataclass(frozen=True)
class Tool:
    name: str
    description: str
    parameters: dict[str, str]  # name: JSON type
    requests: tuple[str, ...]
    draw: Callable[[random.Random], dict[str, Any]]  # arguments
    returns: Callable[[random.Random, dict[str, Any]], str]
    answer: str  # of the arguments and `out`


@dataclass(frozen=True)
class ToolTask:
    question: str
    thought: str
    tool: Tool
    arguments: dict[str, Any]
    offered: tuple[Tool, ...]
    output: str
    answer: str


def _place(rng: random.Random) -> dict[str, Any]:
    return {"city": rng.choice(PLACES)}


def _two_numbers(rng: random.Random) -> dict[str, Any]:
    return {"a": rng.randint(11, 99), "b": rng.randint(11, 99)}


def _weather(rng: random.Random, arguments: dict[str, Any]) -> str:
    return rng.choice(("sunny", "cloudy", "rainy", "windy"))


def _clock(rng: random.Random, arguments: dict[str, Any]) -> str:
    return f"{rng.randint(1, 12)}:{rng.choice(('00', '15', '30', '45'))}"


def _hotel(rng: random.Random, arguments: dict[str, Any]) -> str:
    return rng.choice(("Hotel Central", "Hotel Park", "Hotel Garden", "Hotel Station"))


def _done(rng: random.Random, arguments: dict[str, Any]) -> str:
    return "done"


TOOLS = (
    Tool(
        "get_weather", "Weather of a city", {"city": "string"},
        ("What is the weather in {city}?", "In {city}, how is the weather?"),
        _place, _weather, "It is {out} in {city}.",
    ),
    Tool(
        "get_time", "Time in a city", {"city": "string"},
        ("What time is it in {city}?", "In {city}, what is the time?"),
        _place, _clock, "It is {out} in {city}.",
    ),
    Tool(
        "find_hotel", "Find a hotel", {"city": "string"},
        ("Find a hotel in {city}.", "In {city}, I need a hotel."),
        _place, _hotel, "{out} is in {city}.",
    ),
    Tool(
        "add", "Add two numbers", {"a": "integer", "b": "integer"},
        ("Add {a} and {b}.", "Use a tool to add {a} and {b}."),
        _two_numbers, lambda rng, x: str(x["a"] + x["b"]), "The sum is {out}.",
    ),
    Tool(
        "square", "Square a number", {"number": "integer"},
        ("What is the square of {number}?", "Use a tool to square {number}."),
        lambda rng: {"number": rng.randint(11, 99)},
        lambda rng, x: str(x["number"] ** 2), "The square is {out}.",
    ),
    Tool(
        "set_timer", "Set a timer", {"minutes": "integer"},
        ("Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes."),
        lambda rng: {"minutes": rng.randint(2, 59)}, _done,
        "The timer is set for {minutes} minutes.",
    ),
    Tool(
        "translate", "Translate a word into French", {"word": "string"},
        ("Translate “{word}” into French.", "How do you say “{word}” in French?"),
        lambda rng: {"word": rng.choice(tuple(FRENCH))},
        lambda rng, x: FRENCH[x["word"]], "“{word}” is “{out}” in French.",
    ),
    Tool(
        "play_music", "Play music", {"style": "string"},
        ("Play some {style}.", "I want to hear {style}."),
        lambda rng: {"style": rng.choice(("jazz", "rock", "pop", "folk", "soul", "blues"))},
        _done, "I play {style} for you.",
    ),
)  # fmt: skip


def draw_tool_task(rng: random.Random) -> ToolTask:
    """A request, the tool it needs among two that are offered, and what comes back."""
    tool, other = rng.sample(TOOLS, 2)
    arguments = tool.draw(rng)
    output = tool.returns(rng, arguments)
    offered = (tool, other) if rng.random() < 0.5 else (other, tool)
    return ToolTask(
        question=_opener(rng) + rng.choice(tool.requests).format(**arguments),
        thought=f"Let me see: {tool.name}.",
        tool=tool,
        arguments=arguments,
        offered=offered,
        output=output,
        answer=tool.answer.format(out=output, **arguments),
    )


def _opener(rng: random.Random) -> str:
    return rng.choice(("", "Hello! ", "Quick request: ", "{name} here. ")).format(
        name=rng.choice(NAMES)
    )


def xml_tool(tool: Tool) -> str:
    """The function as a JSON schema, as `xml_tools` lists it."""
    properties = {name: {"type": kind} for name, kind in tool.parameters.items()}
    schema = {
        "name": tool.name,
        "description": tool.description,
        "parameters": {"type": "object", "properties": properties},
    }
    return json.dumps(schema)


def python_tool(tool: Tool) -> str:
    """The function as a Python signature, as `python_tools` lists it."""
    parameters = ", ".join(f"{name}: {TYPES[kind]}" for name, kind in tool.parameters.items())
    return f"def {tool.name}({parameters}) -> str"


def call_text(name: str, arguments: dict[str, Any], form: str) -> str:
    """The assistant's call, as text: JSON as the chat template writes `tool_calls`, or code."""
    if form == "xml":
        # The arguments keep their order and their letters: so does the template's tojson.
        body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        return f"<tool_call>\n{body}\n</tool_call>"
    # JSON's strings are Python's for what occurs here, and have one kind of quotes.
    written = ", ".join(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in arguments.items())
    return f"<code>\nprint({name}({written}))\n</code>"
