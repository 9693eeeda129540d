"""Whether an answer's tool calls are right, by the rules of the Berkeley Function Calling Leaderboard.

After the AST checker of bfcl-eval 2026.3.23 (Apache-2.0) for Python functions. For each call that is
due there is a list of values that each argument may have; `""` among them lets it be left out. Calls
may come in any order. Of a text, case, spaces and the marks `,./-_*^` do not count. Where that
checker raises on an answer of an odd shape, the answer is wrong here.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ground.tool_calls import ToolCall, json_call_at, split_reasoning

TYPES: Mapping[str, type[Any]] = {
    "string": str, "integer": int, "float": float, "boolean": bool, "array": list, "tuple": list,
    "dict": dict, "any": str,
}  # fmt: skip
# As a JSON schema names them, which is what a chat template is given.
OF_SCHEMA = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
OPENED = re.compile(r"<tool_call>\s*")
Function = Mapping[str, Any]  # name, description, parameters


def calls_of(answer: str) -> list[ToolCall] | None:
    """The calls behind the think trace, as servers read them; None where one is no whole call."""
    said, calls, end = split_reasoning(answer)[1], list[ToolCall](), 0
    while opened := OPENED.search(said, end):
        if (found := json_call_at(said, opened.end())) is None:
            return None
        end = found[1]
        calls += found[0]
    return calls


def is_right(answer: str, functions: Sequence[Function], due: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an answer makes the calls that are due, {name: {argument: values}} each, and no other;
    where none is due, what is no whole call does not count."""
    calls = calls_of(answer)
    return are_right(calls or [], functions, due) if due or calls else True


def are_right(
    calls: Sequence[ToolCall], functions: Sequence[Function], due: Sequence[Mapping[str, Any]]
) -> bool:
    if len(calls) != len(due):
        return False
    described, left = {function["name"]: function for function in functions}, list(calls)
    for wanted in due:
        ((name, values),) = wanted.items()
        fits = (at for at, call in enumerate(left) if _is_call(call, described[name], values))
        if (at := next(fits, None)) is None:
            return False
        del left[at]
    return True


def _is_call(call: ToolCall, function: Function, values: Mapping[str, Any]) -> bool:
    given, schemas = call.arguments, function["parameters"]["properties"]
    return (
        call.name == function["name"]
        and all(name in given for name in function["parameters"]["required"])
        and all(
            name in schemas and name in values and _fits(value, schemas[name], values[name])
            for name, value in given.items()
        )
        and all(name in given or "" in possible for name, possible in values.items())
    )


def _fits(value: Any, schema: Mapping[str, Any], possible: Sequence[Any]) -> bool:
    """A value of the schema's type, or of that of the possible values, is one of them."""
    kind: Any = TYPES[schema["type"]]
    inner = TYPES[schema["items"]["type"]] if kind is list else None
    if schema["type"] == "float" and type(value) is int:
        value = float(value)
    other = _type_of(possible) not in (None, kind)  # such as the name of a variable
    if type(value) is not kind:
        return type(value) is _type_of(possible) and value in possible
    if inner and not any(_items_fit(value, one, inner) for one in possible):
        return False
    if other or kind in (int, float, bool):
        return value in possible
    if kind is dict:
        return any(_is_dict(value, one) for one in possible)
    if inner is dict:
        return any(_are_dicts(value, one) for one in possible)
    if kind is str:
        return _plain(value) in [_plain(one) for one in possible if type(one) is str]
    plain = [_plain(item) for item in value]
    return plain in [[*map(_plain, one)] for one in possible if isinstance(one, list | str)]


def _type_of(possible: Iterable[Any]) -> type | None:
    return next((type(one) for one in possible if one != ""), None)


def _items_fit(value: list[Any], possible: Any, inner: type) -> bool:
    if type(possible) is not list:
        return True
    return all(type(item) in (inner, _type_of(possible)) for item in value)


def _are_dicts(value: list[Any], possible: Any) -> bool:
    return len(value) == len(possible) and all(map(_is_dict, value, possible))


def _is_dict(value: Any, possible: Any) -> bool:
    if not (type(value) is type(possible) is dict):
        return False
    return all(
        key in possible and _plain(item) in [_plain(one) for one in possible[key]]
        for key, item in value.items()
    ) and all(key in value or "" in values for key, values in possible.items())


def _plain(value: Any) -> Any:
    if type(value) is not str:
        return value
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"')


def tools_of(functions: Iterable[Function]) -> list[dict[str, Any]]:
    """The functions as a chat template takes them: JSON schemas, with the leaderboard's hint."""
    hint = " Note that the provided function is in Python 3 syntax."
    return [
        {**_schema(function), "description": function["description"] + hint}
        for function in functions
    ]


def _schema(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    named = {key: _schema(item) for key, item in value.items()}
    kind = named.get("type")  # of an argument with that name it is no text
    return named | {"type": OF_SCHEMA.get(kind, kind)} if isinstance(kind, str) else named


def written(functions: Sequence[Function], due: Iterable[Mapping[str, Any]]) -> str:
    """An answer that makes the calls that are due, without what may be left out."""
    required = {f["name"]: f["parameters"]["required"] for f in functions}
    calls = []
    for wanted in due:
        ((name, values),) = wanted.items()
        arguments = {
            key: _first(next((one for one in possible if one != ""), possible[0]))
            for key, possible in values.items()
            if possible and (key in required[name] or "" not in possible)
        }
        call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        calls.append(f"<tool_call>\n{call}\n</tool_call>")
    return "\n".join(calls)


def _first(value: Any) -> Any:
    """A possible value as it is given: of a dictionary each key has its list of values."""
    if isinstance(value, Mapping):
        return {key: values[0] for key, values in value.items() if values[0] != ""}
    return [_first(item) for item in value] if isinstance(value, list) else value
