"""`make data-check`: what the five mixtures fetch and need at a scale, before anything is fetched."""

import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from ground.errors import Outage, UserError
from ground.hub import answers, is_offline
from launch.machine.needs import TEXT_BYTES_PER_TOKEN
from launch.recipe.book import canonical, load_recipe, sources_of
from launch.recipe.scale import Scale, scale
from launch.recipe.tables import SourceRow, load_pipeline
from launch.report.terminal import print_table_of
from launch.run.folder import cache_root
from launch.stages.budget import drawn
from launch.stages.data import DataStage
from launch.stages.held_out import HeldOutStage
from launch.stages.sources import Data, HubData, StandInData, planned, repositories, source_job
from launch.tools.plan import count, size

MOST_EPOCHS = 4  # a repetition is about as good as new text up to here (Muennighoff et al. 2023)
COLUMNS = (
    "source", "data set", "licence", "cleaned", "files", "size", "tokens", "wanted", "epochs",
    "download", "disk", "hub",
)  # fmt: skip
WIDTH, WIDE = 200, 150  # of the table in a pipe; a narrower terminal gets two
OF_THE_SET = ("source", "data set", "licence", "cleaned", "hub")
ASKED_AT_ONCE = 8
NOT_ASKED = "not asked"
ESTIMATED = (
    "download, disk: estimates, by the sizes of the hub's files, else {} bytes of text a token; a "
    "source whose tokens are not published is taken to have enough"
)


@dataclass
class Source:
    """A source over all data stages of a scale."""

    name: str
    row: SourceRow
    data: Data | None = None  # None: never released, and left out
    wanted: Mapping[str, int] = field(default_factory=dict)  # tokens, by stage that trains
    portions: set[tuple[int, int]] = field(default_factory=set)
    is_whole: bool = False
    files: int = 0
    stored_bytes: int = 0  # of its files on the hub
    tokens_a_byte: float = 0.0  # of these, an estimate where no number of tokens is published
    hub: str = NOT_ASKED

    @property
    def epochs(self) -> float | None:
        """How often it is read over all stages; None where its tokens are not known."""
        return sum(self.wanted.values()) / self.row.tokens if self.row.tokens else None

    @property
    def tokens(self) -> int:
        """Tokens that are read of the hub, and written to shards."""
        parts = [take for _, take in self.portions] + [self.row.tokens or 0] * self.is_whole
        there = round(self.stored_bytes * self.tokens_a_byte) or sum(parts)
        return sum(min(part, there) for part in parts)  # a portion ends where it began

    @property
    def download(self) -> float:
        """Bytes."""
        if self.tokens_a_byte and not self.row.contents:
            return self.tokens / self.tokens_a_byte
        return float(self.tokens * TEXT_BYTES_PER_TOKEN)


def sources_of_scale(at: Scale) -> dict[str, Source]:
    """Every source of the pretraining mixtures, those that were never released included."""
    found: dict[str, Source] = {}
    for row in load_pipeline().values():
        if row.engine != "data":
            continue
        data = DataStage.resolve(row, at).sources
        for stage in row.mixture_of:
            plan, tokens = planned(stage, at), drawn(stage, at)
            for name, of_source in plan.rows.items():
                if name in plan.replaced:
                    continue
                one = found.setdefault(name, Source(name, of_source, data.get(name)))
                one.wanted = {**one.wanted, stage: tokens[name]}
                read = data.get(name)
                if isinstance(read, HubData) and read.portion:
                    one.portions.add(read.portion)
                one.is_whole |= isinstance(read, HubData) and read.portion is None
    return found


def ask_hub(sources: dict[str, Source]) -> list[UserError]:
    """Ask for each source on the hub and list its files; returns what is missing or refused."""
    on_hub = {n: one for n, one in sources.items() if isinstance(one.data, HubData)}
    if is_offline():
        return []
    told: dict[tuple[str, str], UserError | None] = {}
    for repository, error in answers(
        repositories({n: o.data for n, o in on_hub.items() if o.data})
    ):
        told[repository.name, repository.revision] = error
        if len(told) == 1 and isinstance(error, Outage):
            break  # the others would be waited for as long
    left, silence = list[Source](), next(iter(told.values()), None)
    for one in on_hub.values():
        assert isinstance(one.data, HubData)
        error = told.get((one.data.hub_id, one.data.revision), silence)
        one.hub = _said(error)
        left += [] if error else [one]
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        problems = [*told.values(), *pool.map(_list_files, left)]
    return [error for error in problems if error]


def _said(error: UserError | None) -> str:
    if error is None:
        return "reachable"
    return f"{NOT_ASKED}: no answer" if isinstance(error, Outage) else "refused"


def _list_files(one: Source) -> UserError | None:
    from datatrove_pipelines.hub_files import list_files
    from datatrove_pipelines.sources import ratio_of

    assert isinstance(one.data, HubData)
    try:
        split = source_job(one.name, one.data, {}, 0.0).read
        files = list_files(split).files
    except UserError as error:
        one.hub = _said(error)
        return type(error)(f"recipes/sources.yaml: sources.{one.name}: {error}")
    one.files, one.stored_bytes = len(files), sum(file.bytes for file in files)
    one.tokens_a_byte = ratio_of(replace(split, tokens=one.row.tokens), files)
    return None


def check(at: Scale) -> None:
    """Print the table. Raises UserError where a source is missing or refused, Outage where the hub
    does not answer, both after the table."""
    sources = sources_of_scale(at)
    problems = ask_hub(sources)
    _print(sources, at)
    for problem in dict.fromkeys(str(one) for one in problems if not isinstance(one, Outage)):
        print(problem)
    mistakes = [one for one in problems if not isinstance(one, Outage)]
    if mistakes:
        raise UserError(
            f"{len(mistakes)} of {len(sources)} sources are missing or refused; see above"
        )
    if problems:
        raise problems[0]


def _print(sources: dict[str, Source], at: Scale) -> None:
    model = scale(load_recipe("pretrain-stage1"), at).nanotron.model.model_config
    token_bytes = 2 if model.vocab_size <= 2**16 else 4
    ordered = sorted(sources.values(), key=lambda one: (one.row.category, one.name))
    download, tokens = (sum(getattr(one, key) for one in ordered) for key in ("download", "tokens"))
    total = ["all", "", "", "", "", "", "", count(sum(sum(o.wanted.values()) for o in ordered))]
    total += ["", size(download), size(tokens * token_bytes), ""]
    cells = [_cells(one, token_bytes) for one in ordered]
    for columns in _tables():
        places = [COLUMNS.index(column) for column in columns]
        print_table_of(
            columns,
            [[row[place] for place in places] for row in cells],
            f"{at.arguments}: what is read of each source over all stages",
            left=OF_THE_SET,
            total=[total[place] for place in places] if "wanted" in columns else [],
            width=WIDTH,
        )
    rows = [
        [stage, count(drawn(stage, at).total()), f"{lost(stage, at):.1%}"] for stage in _stages()
    ]
    print_table_of(("stage", "tokens", "weight lost"), rows)
    for line in _notes(ordered, at):
        print(line)
    print(ESTIMATED.format(TEXT_BYTES_PER_TOKEN))
    _print_held_out(at)
    _print_room(tokens * token_bytes)


def _tables() -> list[tuple[str, ...]]:
    """The columns of each table."""
    if shutil.get_terminal_size((WIDTH, 0)).columns >= WIDE:
        return [COLUMNS]
    amounts = (column for column in COLUMNS if column not in OF_THE_SET[1:])
    return [OF_THE_SET, tuple(amounts)]


def _cells(one: Source, token_bytes: int) -> list[str]:
    row, epochs = one.row, one.epochs
    is_hub = isinstance(one.data, HubData)
    return [
        one.name,
        _data_set(one),
        f"{row.licence or ''}{', gated' if row.gated else ''}" if is_hub else "",
        (row.clean if isinstance(row.clean, str) else ", ".join(row.clean or ())) if is_hub else "",
        f"{one.files:,}" if one.files else "",
        size(one.stored_bytes),
        count(row.tokens) if is_hub else "",
        count(sum(one.wanted.values())),
        "" if epochs is None or not is_hub else _times(epochs),
        size(one.download),
        size(one.tokens * token_bytes),
        one.hub if is_hub else "",
    ]


def _times(epochs: float) -> str:
    return "< 0.01" if epochs < 0.01 else f"{epochs:.2g}{' !' * (epochs > MOST_EPOCHS)}"


def _data_set(one: Source) -> str:
    match one.data:
        case HubData(hub_id=hub_id, config=config, revision=revision, data_files=files):
            first = files if isinstance(files, str) else (files or ("",))[0]
            return f"{hub_id}@{revision[:12]} {config or first}".strip()
        case StandInData(name=name):
            return f"stand-in {name}"
        case None:
            return "never released"
    return "text of your own"


def _stages() -> list[str]:
    return [
        name for row in load_pipeline().values() if row.engine == "data" for name in row.mixture_of
    ]


def lost(stage: str, at: Scale) -> float:
    """The share of a mixture's weight that is not to be had."""
    return sum(_share(name, stage, at) for name in planned(stage, at).unreleased)


def _share(name: str, stage: str, at: Scale) -> float:
    """Of a source in a mixture as it is written."""
    recipe = scale(load_recipe(stage), at)
    sources = sources_of(recipe)
    weight = sum(w for n, w in recipe.mixture.items() if canonical(n, sources) == name)
    return weight / sum(recipe.mixture.values())


def _notes(sources: list[Source], at: Scale) -> Iterator[str]:
    """What is lost, what is read in its place, and what is read too often."""
    by_name, replaced = {one.name: one for one in sources}, dict[str, str]()
    for stage in _stages():
        replaced |= planned(stage, at).replaced
    for name, other in replaced.items():
        yield f"{name}: never released: {other} ({_data_set(by_name[other])}) is read in its place"
    for one in sources:
        if one.data is None:
            known = one.row.replaced_by
            remedy = f"; SUBSTITUTES=1 reads {known} in its place" if known else ""
            what = one.row.substitute or "nothing is known of it"
            shares = (f"{stage} ({_share(one.name, stage, at):.1%})" for stage in one.wanted)
            yield f"{one.name}: never released, left out of {', '.join(shares)}: {what}{remedy}"
        if one.epochs and one.epochs > MOST_EPOCHS and isinstance(one.data, HubData):
            yield f"{one.name}: read {one.epochs:.1f} times, more than {MOST_EPOCHS}"


def _print_held_out(at: Scale) -> None:
    """What is read of the hub to find the held-out text, which is a small share of the documents."""
    for row in load_pipeline().values():
        if row.engine == "held-out":
            recipe = HeldOutStage.resolve(row, at)
            on_hub = [isinstance(one, HubData) for one in recipe.sources.values()]
            if any(on_hub) and recipe.fraction:
                wanted = recipe.bytes_per_category * len({*recipe.categories.values()})
                print(
                    f"held-out text: {size(wanted)}, for which up to {size(wanted / recipe.fraction)} "
                    "of text are read besides"
                )


def _print_room(wanted: float) -> None:
    """Whether the shards have room where they are written."""
    folder = Path(cache_root()).resolve()
    while not folder.exists():
        folder = folder.parent
    if wanted > (free := shutil.disk_usage(folder).free):
        print(
            f"disk: {size(wanted)} of shards, {size(free)} are free at CACHE={cache_root()}: name another"
        )
