"""What `python -m eval_tasks.suite` is given, and what it writes; light to import."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ground.errors import UserError
from ground.files import read_json, read_json_object, write_json


@dataclass(frozen=True)
class SuiteRow:
    """A benchmark: names or patterns of tasks, whose scores are averaged, and the metric shown.

    `chance` and `published` are shares, for people to compare with; a `generative` task gets fewer
    items where the job limits them, and its items' scores are means over `samples` answers (avg@n).
    """

    name: str
    tasks: list[str]
    metric: str
    shots: int = 0
    generative: bool = False
    chance: float | None = None
    published: float | None = None
    samples: int = 1


@dataclass(frozen=True)
class Server:
    """One that speaks the OpenAI protocol and has a job's model."""

    url: str  # without /v1
    model: str  # as the server names it
    takes_tokens: bool  # else the messages of a chat alone


@dataclass(frozen=True)
class Job:
    """`models` (transformers folders or hub ids) on `rows`, written to the file `results`.

    Items are shared between `processes`, each with a model on a GPU of its own, or asked of `servers`.
    """

    models: list[str]
    rows: list[SuiteRow]
    results: str
    limit: int = 0  # items per task, 0: all; a quarter of them where the model writes its answer
    data: str | None = None  # a folder of local datasets, see package_data.py
    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int = 8
    chat: bool = False  # prompts in the chat template, with `system_prompt` before them
    system_prompt: str | None = None
    generation: dict[str, float] = field(default_factory=dict)  # of lighteval's parameters
    processes: int = 1
    servers: list[Server] = field(default_factory=list)

    def write(self, file: Path) -> None:
        write_json(file, asdict(self))

    @classmethod
    def read(cls, file: Path) -> "Job":
        """Raises UserError for a file that is not a job."""
        values = read_json_object(file)
        try:
            rows = [SuiteRow(**row) for row in values.get("rows", ())]
            servers = [Server(**server) for server in values.get("servers", ())]
            return cls(**values | {"rows": rows, "servers": servers})
        except TypeError as error:  # an unknown key, or a missing one
            raise UserError(f"{file}: {error}") from None


@dataclass(frozen=True)
class Result:
    """A model's score on a row of the suite with its 95 % interval, or why there is none."""

    model: str
    name: str
    metric: str
    shots: int
    chance: float | None = None
    published: float | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    items: int | None = None
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        """A scored row has no key `error`; a row without a score has no keys of the score."""
        row = asdict(self)
        absent = ("value", "low", "high", "items") if self.error is not None else ("error",)
        return {key: value for key, value in row.items() if key not in absent}


def write_results(file: Path, results: Sequence[Result]) -> None:
    write_json(file, [result.as_json() for result in results])


def read_results(file: Path) -> list[Result]:
    return [Result(**row) for row in read_json(file)]
