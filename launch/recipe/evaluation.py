"""What the recipes of evaluation may say: suites, the eval stage, long context, published scores."""

from dataclasses import field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field

from ground.errors import UserError, did_you_mean
from launch.recipe import load
from launch.recipe.load import Layer, parse, read_yaml, short
from launch.recipe.tables import rows_of
from launch.recipe.values import (
    Count,
    Flag,
    Many,
    Name,
    Natural,
    OneOrMore,
    Positive,
    PositiveShare,
    Refused,
    Seed,
    Share,
    Text,
    Window,
    section,
)

Kind = TypeVar("Kind")
OUR_MODEL = "SmolLM3-3B"
RulerTask = Literal[
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2",
    "niah_multikey_3", "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
]  # fmt: skip
NOT_SUITES = (
    "published",
    "peers",
    "eval",
    "longctx",
    "ruler",
)  # files of recipes/eval/ of another form
Percent = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=100)]


@section
class SuiteRow:
    """A benchmark: lighteval tasks (averaged), the metric to show, and what to compare it with."""

    name: Text
    tasks: OneOrMore[Text]
    metric: Text
    shots: Natural = 0
    generative: Flag = False
    chance: Share | None = None
    published: Text | None = None  # a row of published.yaml
    samples: Count = 1  # answers an item, whose mean is its score (avg@n)


@section
class Generation:
    """How a suite's answers are sampled; greedy if nothing is set."""

    temperature: Positive | None = None
    top_p: PositiveShare | None = None
    max_new_tokens: Count | None = None


@section
class Suite:
    chat: Flag
    local: Flag = False  # runs on data from packages wherever it runs
    published: Name | None = None  # the section of published.yaml
    system_prompts: dict[Name, Text] = field(
        default_factory=dict
    )  # section of published.yaml: text
    generation: Generation = field(default_factory=Generation)
    rows: OneOrMore[SuiteRow]

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        for number, name in enumerate(names):
            if names.index(name) != number:
                raise Refused(f"rows.{number}.name", name, "stands twice; give it another name")
            if (count := self.rows[number].samples) > 1 and not self.generation.temperature:
                remedy = "greedy samples are all the same; set generation.temperature"
                raise Refused(f"rows.{number}.samples", count, remedy)


@section
class EvalRun:
    model: Text  # <stage>[/<folder in its run folder>]
    suite: Name


@section
class EvalRecipe:
    stage: Name
    runs: OneOrMore[EvalRun]
    limit: Natural = 0  # items per task; 0: all
    leave_out: Many[Text] = ()  # rows by name


@section
class LongContextSuite:
    """recipes/eval/longctx.yaml."""

    tasks: OneOrMore[Literal["needle", "multi_key", "variables", "aggregation", "quotation"]]
    languages: OneOrMore[Literal["en", "fr", "es", "de", "it", "pt"]]
    lengths: OneOrMore[Window]  # tokens
    depths: OneOrMore[Share]  # 0: the start, 1: the end
    per_cell: Count
    seed: Seed


@section
class RulerSuite:
    """recipes/eval/ruler.yaml."""

    tasks: OneOrMore[RulerTask]
    lengths: OneOrMore[Window]  # tokens
    samples: Count  # per task and length
    seed: Seed


@section
class Published:
    """recipes/eval/published.yaml: {section: {benchmark: {model: percent}}}."""

    win_rate: dict[Name, OneOrMore[Text]]
    scores: dict[Name, dict[Text, dict[Text, Percent]]]

    def __post_init__(self) -> None:
        for name, benchmarks in self.win_rate.items():
            known = self.scores.get(name, {})
            for number, benchmark in enumerate(benchmarks):
                if benchmark not in known:
                    remedy = f"no scores of it; {did_you_mean(benchmark, known)}"
                    raise Refused(f"win_rate.{name}.{number}", benchmark, remedy)


@section
class Peer:
    """A row of recipes/eval/peers.yaml: a released base model, its scores in percent by benchmark."""

    parameters: Count
    source: Text
    scores: dict[Text, Percent] = field(default_factory=dict)  # empty: published.yaml has them


@cache
def load_peers() -> dict[str, Peer]:
    """The rows of peers.yaml with their scores, whichever file has them."""
    rows = rows_of(load.RECIPES / "eval" / "peers.yaml", "peers", Peer)
    base = load_published().scores["base"]
    return {
        name: row
        if row.scores
        else replace(row, scores={task: of[name] for task, of in base.items() if name in of})
        for name, row in rows.items()
    }


def published_file() -> Path:
    return load.RECIPES / "eval" / "published.yaml"


@cache
def load_published() -> Published:
    return _whole(published_file(), Published)


@cache
def load_long_context() -> LongContextSuite:
    return _whole(load.RECIPES / "eval" / "longctx.yaml", LongContextSuite)


@cache
def load_ruler() -> RulerSuite:
    return _whole(load.RECIPES / "eval" / "ruler.yaml", RulerSuite)


def _whole(file: Path, kind: type[Kind]) -> Kind:
    values = read_yaml(file)
    return parse(values, kind, [Layer(file, values)])


def suite_names() -> list[str]:
    files = sorted((load.RECIPES / "eval").glob("*.yaml"))
    return [file.stem for file in files if file.stem not in NOT_SUITES]


@cache
def load_suite(name: str, where: str = "SUITE=") -> Suite:
    """A suite by the name of its file; `where` says who named it."""
    if name not in (names := suite_names()):
        raise UserError(f"{where}{name}: no such suite; {did_you_mean(name, names)}")
    file = load.RECIPES / "eval" / f"{name}.yaml"
    suite = _whole(file, Suite)
    scores = load_published().scores
    sections = list(suite.system_prompts) or ([suite.published] if suite.published else [])
    for section_name in sections:
        if section_name not in scores:
            key = "system_prompts" if suite.system_prompts else "published"
            hint = did_you_mean(section_name, scores)
            raise UserError(f"{short(file)}: {key}: {section_name}: not in published.yaml; {hint}")
    for number, row in enumerate(suite.rows):
        known = {benchmark for section_name in sections for benchmark in scores[section_name]}
        if row.published and row.published not in known:
            hint = did_you_mean(row.published, known)
            key = f"rows.{number}.published"
            raise UserError(f"{short(file)}: {key}: {row.published}: not in published.yaml; {hint}")
    return suite


def published_score(section_name: str | None, row: str | None) -> float | None:
    """Our model's published score as a share; None where there is none."""
    if section_name is None or row is None:
        return None
    value = load_published().scores[section_name].get(row, {}).get(OUR_MODEL)
    return None if value is None else value / 100
