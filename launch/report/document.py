"""What a report says, as typed values: report.json is this, and report.html shows nothing else.

docs/report.schema.json is its JSON schema: `python -m launch.report.document > docs/report.schema.json`.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, Literal

from ground.errors import UserError
from ground.files import read_json

VERSION = 1
MOST_POINTS = 1000  # of a curve: a long run's steps are drawn as medians of neighbours

Cell = str | int | float | None


@dataclass(frozen=True)
class Series:
    """Points of a chart; a `y` that is no finite number is null."""

    name: str
    x: tuple[str | float, ...]
    y: tuple[float | None, ...]
    low: tuple[float, ...] = ()  # 95 % interval, where there is one
    high: tuple[float, ...] = ()
    dotted: bool = False  # in the colour of the series before it


@dataclass(frozen=True)
class Chart:
    """`lines` over x; `bars`: shares by name; `grid`: a row a series; `intervals`: points by name."""

    kind: Literal["lines", "bars", "grid", "intervals"]
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    are_shares: bool = False  # values are 0 to 1


@dataclass(frozen=True)
class Table:
    """`formats` are Python's format specifications, one a column; empty: as it is."""

    title: str
    columns: tuple[str, ...]
    formats: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    is_open: bool = True

    def cells(self) -> list[list[str]]:
        """The rows as the page shows them."""
        return [
            [shown(cell, form) for cell, form in zip(row, self.formats, strict=True)]
            for row in self.rows
        ]


@dataclass(frozen=True)
class Sample:
    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    id: str
    title: str
    note: str = ""
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    samples: tuple[Sample, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not (self.charts or self.tables or self.samples)


@dataclass(frozen=True)
class Score:
    """A benchmark's share with its 95 % interval."""

    model: str
    task: str
    metric: str
    value: float
    low: float
    high: float
    items: int
    suite: str = ""
    chance: float | None = None
    published: float | None = None


@dataclass(frozen=True)
class Cost:
    """What training took. Measured: processes, peak, tokens/s. Counted: MFU (from the model's FLOPs
    and the card's peak), energy (the boards' limit) and money (PRICE=), over the seconds by the clock."""

    machine: str  # the GPU's name, or CPU
    processes: int
    peak_memory_bytes: int | None
    tokens_per_second: float | None
    card: str | None  # its row of cards.yaml
    flops_per_token: float | None
    mfu: float | None
    kilowatt_hours: float | None
    money: float | None


@dataclass(frozen=True)
class StageFigures:
    """A finished stage; `tokens` over all stages so far, `seconds` by the clock, loss in nats."""

    name: str
    seconds: float
    tokens: int | None
    tokens_per_second: float | None
    loss: float | None
    bits_per_byte: float | None
    unigram: float | None
    before: dict[str, float]  # scores of post-training
    after: dict[str, float]
    recipe: dict[str, Any]  # dotted keys
    cost: Cost | None


@dataclass(frozen=True)
class Report:
    version: Literal[1]
    name: str  # the model's
    arguments: str  # SCALE=... and what belongs to it
    commit: str | None
    versions: dict[str, str]
    trained_on: tuple[str, ...]
    price: float | None  # of a GPU-hour
    parameters: int | None
    stages: tuple[StageFigures, ...]
    scores: tuple[Score, ...]
    sections: tuple[Section, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def shown(cell: Cell, form: str) -> str:
    return "" if cell is None else format(cell, form) if form and cell != "" else str(cell)


def series(
    name: str, x: Sequence[Any], y: Iterable[Any], most: int = MOST_POINTS, **more: Any
) -> Series:
    """A series; more than `most` points are thinned to medians of neighbours."""
    values = [float(v) if v is not None and math.isfinite(v) else None for v in y]
    places = [one if isinstance(one, str) else float(one) for one in x]
    width = math.ceil(len(values) / most)
    if width > 1:
        starts = range(0, len(values), width)
        groups = [[v for v in values[i : i + width] if v is not None] for i in starts]
        values = [median(group) if group else None for group in groups]
        places = [places[min(i + width, len(places)) - 1] for i in starts]
    return Series(name, tuple(places), tuple(values), **more)


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Report)


def schema() -> dict[str, Any]:
    """JSON schema of report.json."""
    found: dict[str, Any] = _adapter().json_schema()
    return found


def read_report(file: Path, remedy: str = "`make report` writes it again") -> Report:
    """Raises UserError, in one line, for a file that is no report."""
    from pydantic import ValidationError

    values = read_json(file, remedy)
    try:
        report: Report = _adapter().validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        problem = f"{where}: {first['msg'].lower()}" if where else "not a report"
        raise UserError(f"{file}: {problem}; {remedy}") from None
    return report


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1))
