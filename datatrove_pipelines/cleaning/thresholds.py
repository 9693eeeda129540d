"""The table of thresholds.yaml: what Gopher's and FineWeb's filters ask of a language's text."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Thresholds:
    """A row of the table, which says what each is; without a value the rule is left out."""

    line: float
    punctuation: float
    top: tuple[float, ...] = ()
    repeated: tuple[float, ...] = ()
    newlines: float = float("inf")
    length: tuple[int | None, int | None] = (None, None)
    alpha: float | None = None
    stop_words: tuple[str, ...] = ()


@cache
def thresholds() -> dict[str, Thresholds]:
    """By language; English has its own in datatrove."""
    rows = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
    return {language: Thresholds(**row) for language, row in rows.items()}


def thresholds_of(language: str) -> Thresholds:
    return thresholds()[language]
