"""Checks plain values against a dataclass of schema.py; what is wrong is said by key and value."""

import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any

import omegaconf

from launch.errors import did_you_mean

NOUNS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


class BadValue(ValueError):
    """A value that the schema does not allow: its dotted key, and what is wrong with the remedy."""

    def __init__(self, key: str, problem: str):
        super().__init__(f"{key}: {problem}")
        self.key, self.problem = key, problem


def check(value: Any, expected: Any, key: str = "") -> Any:
    """`value` with the schema's defaults filled in; `expected` is a type or a dataclass."""
    if is_dataclass(expected):
        return _check_fields(_expect(dict, value, key, "a section `key: value`"), expected, key)
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is types.UnionType:  # X | None
        return None if value is None else check(value, arguments[0], key)
    if origin is typing.Annotated:  # Count
        number = check(value, arguments[0], key)
        if number < arguments[1]:
            raise BadValue(key, f"{value}: write at least {arguments[1]}")
        return number
    if origin is dict:
        items = _expect(dict, value, key, "one `name: value` a line").items()
        return {str(name): check(item, arguments[1], f"{key}.{name}") for name, item in items}
    if origin is list:
        items = _expect(list, value, key, "a list, one `- value` a line")
        return [check(item, arguments[0], f"{key}.{n}") for n, item in enumerate(items)]
    if expected is Any:
        return value
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:  # exactly: to Python true is an int
        raise BadValue(key, f"{_shown(value)}: write {NOUNS[expected]}")
    return value


def _expect(form: type, value: Any, key: str, noun: str) -> Any:
    if not isinstance(value, form):
        raise BadValue(key, f"{_shown(value)}: write {noun}")
    return value


def _shown(value: Any) -> str:
    return "empty" if value is None else repr(value)


@cache
def _types(schema: Any) -> dict[str, Any]:
    return typing.get_type_hints(schema, include_extras=True)


def _check_fields(values: dict[str, Any], schema: Any, where: str) -> dict[str, Any]:
    prefix = f"{where}." if where else ""
    expected = _types(schema)
    for name in values:
        if name not in expected:
            raise BadValue(f"{prefix}{name}", f"unknown key; {did_you_mean(str(name), expected)}")
    checked = {}
    for field in fields(schema):
        key = f"{prefix}{field.name}"
        if field.name in values:
            checked[field.name] = check(values[field.name], expected[field.name], key)
        elif is_dataclass(expected[field.name]):
            checked[field.name] = _check_fields({}, expected[field.name], key)
        elif field.default_factory is not MISSING:
            checked[field.name] = field.default_factory()
        elif field.default is MISSING or field.default == omegaconf.MISSING:
            raise BadValue(key, "missing; add it")
        else:
            checked[field.name] = field.default
    return checked
