"""`make seen`: the documents that hold a text, and the steps at which a model is shown it."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ground.checksums import verify
from ground.errors import UserError
from launch import walk
from launch.recipe.scale import Scale
from launch.recipe.tables import load_pipeline
from launch.run.folder import StageRun
from launch.tools.chat_order import PosttrainOrder
from launch.tools.order import PretrainOrder
from launch.tools.replay import on_a_line, order_of, place_of

if TYPE_CHECKING:
    from datatrove_pipelines.lookup import TextSearch

MOST_FOUND, MOST_PRINTED, MOST_STEPS = 1000, 10, 20


@dataclass(frozen=True)
class Showing:
    """A window of a stage's step that holds the text, or a part of it."""

    step: int
    place: int  # in the step's batch
    window: int
    epoch: int  # from 0


@dataclass
class Found:
    """One place of the text."""

    source: str  # or split
    file: str
    row: int | None  # of the file, from 1
    inside: str  # which document of which shard, or which row of a token dataset
    first_token: int  # of the document; of the row, for chats
    tokens: int
    text: str  # of those tokens
    shown: dict[str, list[Showing]] = field(default_factory=dict)  # by stage
    never: dict[str, str] = field(default_factory=dict)  # stages that never show it, and why


def trained_stages(at: Scale) -> list[StageRun]:
    """The stages of the pipeline that train a model."""
    names = [
        name for name, row in load_pipeline().items() if row.engine in ("pretrain", "posttrain")
    ]
    return [walk.resolve(name, at) for name in names]


def seen(text: str, runs: Sequence[StageRun], shows_all: bool, as_json: bool) -> None:
    """Print where the text is and when it is shown, over these stages."""
    if not text:
        raise UserError('TEXT is missing: make seen TEXT="<a text>"')
    begin, orders = time.perf_counter(), list[PretrainOrder | PosttrainOrder]()
    for run in runs:
        try:
            orders.append(order_of(run))
        except UserError as error:
            if len(runs) == 1:
                raise
            if not as_json:
                print(f"left out: {error}")
    search = Search(text, orders)
    found = list(islice(search.places(), None if shows_all else MOST_FOUND))
    if as_json:
        print(json.dumps([asdict(one) for one in found], ensure_ascii=False))
        return
    for one in found if shows_all else found[:MOST_PRINTED]:
        _print(one, shows_all)
    for line in search.summary(found, shows_all, time.perf_counter() - begin):
        print(line)


class Search:
    """A text in what some stages train on; a folder of shards that several share is read once."""

    def __init__(self, text: str, orders: Sequence[PretrainOrder | PosttrainOrder]):
        self.text, self.orders = text, orders
        self.searches: dict[Path, TextSearch] = {}  # by tokenizer
        self.bytes_read = 0

    def places(self) -> Iterator[Found]:
        """Each place of the text, by source, then by stage of post-training."""
        from datatrove_pipelines.shards import REBUILD

        by_folder = dict[Path, list[tuple[PretrainOrder, str]]]()
        for order in self.orders:
            if isinstance(order, PretrainOrder):
                for name, source in order.sources.items():
                    by_folder.setdefault(source.folder, []).append((order, name))
        for (order, name), *others in by_folder.values():
            source = order.sources[name]
            verify(source.folder, REBUILD)  # where documents end, and their rows
            self.bytes_read += int(source.starts[-1]) * source.token_bytes
            for start, stop in self._search_of(order.run.tokenizer).find(source):
                found = _found(order, name, start, stop)
                for each, its_name in [(order, name), *others]:
                    _add_steps(found, each, its_name, start, stop)
                yield found
        for order in self.orders:
            if isinstance(order, PosttrainOrder):
                self.bytes_read += order.order.data.data.nbytes
                yield from _in_chats(order, self._search_of(order.run.tokenizer))

    def _search_of(self, tokenizer: Path) -> "TextSearch":
        from datatrove_pipelines.lookup import text_search

        if tokenizer not in self.searches:
            self.searches[tokenizer] = text_search(self.text, tokenizer)
        return self.searches[tokenizer]

    def summary(self, found: Sequence[Found], shows_all: bool, seconds: float) -> Iterator[str]:
        if len(found) > MOST_PRINTED and not shows_all:
            most = "at least " * (len(found) == MOST_FOUND)
            yield f"\n... and {most}{len(found) - MOST_PRINTED:,} places more; ALL=1 prints them"
        where = ", ".join(order.run.stage for order in self.orders) or "no stage"
        yield (
            f"{len(found):,} place{'s' * (len(found) != 1)} of {on_a_line(self.text)!r} in what {where} "
            f"trains on ({self.bytes_read / 1e6:,.1f} MB of tokens, {seconds:.1f} s)"
        )


def _in_chats(order: PosttrainOrder, search: "TextSearch") -> Iterator[Found]:
    places = list(islice(order.places(search), MOST_FOUND))
    steps: dict[int, list[Showing]] = {}
    for row, step, place in order.order.steps_of({one.row for one in places}):
        steps.setdefault(row, []).append(Showing(step, place, row, order.order.epoch_of(step)))
    for one in places:
        inside = f"row {one.row:,} of {order.run.folder / 'data'}" + f", {one.column}" * bool(
            one.column
        )
        found = Found(
            one.split, one.file, one.line, inside, one.start, one.stop - one.start,
            order.text(order.ids(one)),
        )  # fmt: skip
        if shown := steps.get(one.row):
            found.shown[order.run.stage] = shown
        else:
            found.never[order.run.stage] = "its steps end before they come to it"
        yield found


def _found(order: PretrainOrder, name: str, start: int, stop: int) -> Found:
    source = order.sources[name]
    (part,) = source.parts(start, stop)  # no text goes over a document's end
    file, row = order.origin(name, part)
    return Found(
        name, file, row, f"{part.shard.name}, document {part.number:,}", part.start,
        part.stop - part.start,
        order.text(source.read(start, stop)),
    )  # fmt: skip


def _add_steps(found: Found, order: PretrainOrder, name: str, start: int, stop: int) -> None:
    """When a stage shows tokens [start, stop) of a source."""
    import numpy as np

    trace, stage = order.trace, order.run.stage
    size = trace.sequence_length + 1
    windows, count = np.arange(start // size, (stop - 1) // size + 1), trace.count(name)
    kept = windows[windows < count]
    if shown := trace.shown(name, kept):
        found.shown[stage] = [Showing(s.step, s.place, s.window, s.epoch) for s in shown]
    elif len(kept) < len(windows):
        found.never[stage] = f"it lies in the tail after {count:,} windows, which is dropped"
    else:
        found.never[stage] = "its steps do not draw it"


def _print(found: Found, shows_all: bool) -> None:
    at = place_of(found.file, found.row, found.inside)
    print(f"\n{found.source}: {at}, {found.tokens:,} tokens from token {found.first_token:,}")
    print(f"  {on_a_line(found.text, shows_all)}")
    for stage, shown in found.shown.items():
        windows = len({one.window for one in shown})
        steps = [
            f"{one.step:,} [{one.place}]" + f" (epoch {one.epoch + 1})" * (one.epoch > 0)
            for one in (shown if shows_all else shown[:MOST_STEPS])
        ]
        more = f" and {len(shown) - len(steps):,} more" * (len(shown) > len(steps))
        split = f" ({windows} windows)" * (windows > 1)
        print(f"  {stage}{split}: step {', '.join(steps)}{more}")
    for stage, reason in found.never.items():
        print(f"  {stage}: never: {reason}")
