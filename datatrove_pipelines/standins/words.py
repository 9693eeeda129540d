"""The words and sentences of the embedded chats in six languages, as words.yaml has them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


def read_table(name: str) -> Any:
    """A YAML file of this folder, with tuples for lists."""
    return _frozen(yaml.safe_load(Path(__file__).with_name(name).read_text("utf-8")))


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _frozen(part) for key, part in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


_TABLE = read_table("words.yaml")

NAMES: tuple[str, ...] = _TABLE["names"]
PLACES: tuple[str, ...] = _TABLE["places"]
RULES: tuple[tuple[str, str], ...] = _TABLE["rules"]
REPEATED: tuple[str, ...] = _TABLE["repeated"]
DEEDS: tuple[tuple[str, str], ...] = _TABLE["deeds"]
ROOMS: tuple[str, ...] = _TABLE["rooms"]
UNITS: tuple[tuple[str, str, int], ...] = _TABLE["units"]
TOOLS: dict[str, dict[str, Any]] = _TABLE["tools"]


@dataclass(frozen=True)
class Language:
    """What a task says in one language; tasks.py fills the fields in braces."""

    trace: str  # how reasoning begins
    openers: tuple[str, ...]  # before a question: the same fact is asked in several wordings
    things: tuple[str, ...]
    gain: str
    loss: str
    owns: str
    plain_sum: str
    sum_is: str
    largest: str
    smallest: str
    largest_is: str
    smallest_is: str
    capital: str
    capital_is: str
    capitals: tuple[tuple[str, str], ...]
    opposite: str
    opposite_is: str
    opposites: tuple[tuple[str, str], ...]
    day: str
    day_is: str
    days: tuple[str, ...]
    greetings: tuple[str, ...]
    introduction: str
    welcome: str
    lives: str
    where: str


LANGUAGES = {name: Language(**row) for name, row in _TABLE["languages"].items()}
