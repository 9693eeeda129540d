"""`make plan`: what a scale takes on a card, before anyone buys or rents it."""

from dataclasses import fields

from ground.errors import UserError
from launch.machine import published
from launch.machine.cards import Card, card, gpus_of, load_cards, name_of
from launch.machine.gpus import Gpus, gpus
from launch.machine.memory import Memory
from launch.machine.needs import Need, needs
from launch.recipe.scale import Scale
from launch.report.terminal import print_table_of
from launch.tools.diff import PUBLISHED

BASIS = (
    "tokens/s, hours, kWh and money are predictions, not measurements: a roofline of the card's data "
    "sheet, calibrated by a prototype on one H100 (launch/machine/speed.py). kWh: the boards at their limit."
)
DISK = (
    "disk: token shards and every checkpoint. download: 4 bytes of text a token drawn, an estimate; a "
    "source is fetched whole, which may be more, and once, however often it is read."
)
MEMORY = "memory: counted from the recipe (launch/machine/memory.py), in GiB of one GPU"


def show_plan(at: Scale, name: str, price: float) -> None:
    """The stages on GPUS= of GPU=; where none is named and none found, every card in a line."""
    if name:
        show_card(at, gpus_of(name), name.lower(), price)
        return
    found = gpus()
    if not found.name:
        show_cards(at, found.count or 1, price)
        return
    if (known := name_of(found)) is None:
        cards = ", ".join(load_cards())
        raise UserError(f"{found.name}: no row of launch/machine/cards.yaml; GPU= one of {cards}")
    show_card(at, found, known, price)


def show_card(at: Scale, found: Gpus, name: str, price: float) -> None:
    """Every stage on equal GPUs."""
    row = card(name)
    stages = needs(at, found, row)
    columns = ["stage", "tokens", "layout", "tokens/s", "hours", "kWh", "disk", "download"]
    columns += ["money"] if price else []
    print_table_of(
        columns,
        [_stage(need, row, price) for need in stages],
        f"{at.arguments} on {found.count} x {name} of {found.gibibytes:g} GB",
        left=("layout",),
        total=_total(stages, row, price),
    )
    _print_memory(stages, found)
    if at.values.scale == PUBLISHED and (found.count, name) == (published.GPUS, published.NAME):
        _print_published()
    for need in stages:
        if need.problem:
            print(need.problem)
        elif need.note:
            print(f"{need.stage}: {need.note}")
    print(BASIS, DISK, MEMORY, sep="\n")


def _stage(need: Need, row: Card, price: float) -> list[str]:
    cells = [need.stage, count(need.tokens), need.layout, "", "", ""]
    if need.step and need.seconds:
        rate = need.tokens / need.seconds if need.tokens else 0.0
        cells[3:] = [f"{rate:,.0f}", duration(need.hours), f"{need.kilowatt_hours(row):,.1f}"]
    cells += [size(need.disk), size(need.download)]
    return cells + ([f"{need.money(price):,.2f}"] if price else [])


def _total(stages: list[Need], row: Card, price: float) -> list[str]:
    hours = sum(need.hours for need in stages)
    power = sum(need.kilowatt_hours(row) for need in stages)
    disk, download = (sum(getattr(need, key) for need in stages) for key in ("disk", "download"))
    known = "of what is predicted" if any(need.problem for need in stages) else ""
    cells = ["all", "", known, "", duration(hours), f"{power:,.1f}", size(disk), size(download)]
    return cells + ([f"{sum(need.money(price) for need in stages):,.2f}"] if price else [])


def _print_memory(stages: list[Need], found: Gpus) -> None:
    known = [need for need in stages if need.memory]
    names = [part.name for part in fields(Memory)]
    rows = []
    for need in known:
        assert need.memory
        parts = [getattr(need.memory, name) for name in names]
        total = f"{need.memory.total / 2**30:.1f} of {found.gibibytes:g}"
        rows.append([need.stage, *(f"{part / 2**30:.1f}" for part in parts), total])
    if rows:
        columns = ["stage", *(name.replace("_", " ") for name in names), "all"]
        print_table_of(columns, rows, "memory of a GPU, GiB")


def _print_published() -> None:
    columns = ["stages 1-3 on 384 H100", "days", "tokens/s a GPU", "GB a GPU", "GB unsharded"]
    print_table_of(columns, published.comparison())


def show_cards(at: Scale, number: int, price: float) -> None:
    """One line for each card, with `number` of it: the whole chain."""
    rows, notes = [], []
    for name, row in load_cards().items():
        found = gpus_of(name)
        stages = needs(at, found, row)
        problems = [need.stage for need in stages if need.problem]
        hours = sum(need.hours for need in stages)
        power = sum(need.kilowatt_hours(row) for need in stages)
        first = next(need for need in stages if need.tokens and (need.step or need.problem))
        rate = f"{first.tokens / first.seconds:,.0f}" if first.tokens and first.seconds else ""
        fullest = max((need.memory.total for need in stages if need.memory), default=0.0)
        cells = [name, f"{found.gibibytes:g}", f"{fullest / 2**30:.1f}", rate]
        whole = [duration(hours), f"{power:,.0f}"]
        if problems:
            whole = ["", ""]
            notes.append(f"{name}: does not fit: {', '.join(problems)}")
        cells += whole
        if price:
            cells.append("" if problems else f"{sum(n.money(price) for n in stages):,.2f}")
        rows.append(cells)
    columns = ["card", "GB", "fullest GiB", "tokens/s, stage 1", "the chain", "kWh"]
    columns += ["money"] if price else []
    print_table_of(columns, rows, f"{at.arguments} on {number} GPU{'s' * (number > 1)}")
    for line in [*notes, BASIS, "GPU=<card> shows its stages, memory by part, disk and download"]:
        print(line)


def count(tokens: float | None) -> str:
    """Tokens in three digits."""
    if not tokens:
        return ""
    unit, name = next((u, n) for u, n in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1, "")) if tokens >= u)
    return f"{tokens / unit:.3g}{name}"


def size(number: float) -> str:
    """Bytes, in the unit that disks are sold by."""
    if not number:
        return ""
    unit, name = next((u, n) for u, n in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1, "B")) if number >= u)
    return f"{number / unit:.3g} {name}"


def duration(hours: float) -> str:
    """Hours, and days from three days on."""
    if not hours:
        return ""
    return f"{hours:.3g} h" if hours < 72 else f"{hours / 24:,.1f} d"
