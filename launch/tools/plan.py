"""`make plan`: what a scale takes on a card, before anyone buys or rents it."""

import os

from ground.errors import UserError
from launch.machine import published
from launch.machine.cards import GPUS_OF_A_MACHINE, Card, card, gpus_of, load_cards, name_of
from launch.machine.gpus import Gpus, gpus
from launch.machine.memory import gib
from launch.machine.needs import Need, needs
from launch.recipe.scale import Scale
from launch.report.terminal import print_table_of
from launch.tools.diff import PUBLISHED

BASIS = (
    "tokens/s, time, kWh and money are predictions, not measurements: a roofline of the card's data "
    "sheet, calibrated by a prototype's measurements on one H100 (launch/machine/speed.py), for the steps "
    "alone: starting, compiling, scoring and saving come on top. kWh: the boards at their limit."
)
MEMORY = "memory: counted from the recipe, in GiB (launch/machine/memory.py)."
DISK = (
    "disk: token shards and every checkpoint. download: an estimate, 4 bytes of text a token that is "
    "drawn; `make data-check` asks the hub for more."
)
OWN_LAYOUT = "its recipes' layout, unless its scale file says `layout: fit`"
# Columns of the memory table: the fields of Memory that each sums up.
PARTS = {
    "weights": ("weights",),
    "gradients": ("gradients", "ddp_buckets"),
    "optimizer": ("optimizer",),
    "activations": ("activations", "layer_inputs"),
    "logits, loss": ("logits_and_loss",),
    "CUDA, reserve": ("cuda_context", "fragmentation"),
}


def show_plan(at: Scale, name: str, price: float) -> None:
    """The stages on GPUS= of GPU=; where none is named and none found, every card in a line."""
    if name:
        show_card(at, gpus_of(name), name.lower(), price)
        return
    if memory := os.environ.get("GPU_GB"):
        raise UserError(f"GPU_GB={memory}: of which card? give GPU=<card> too, or leave it out")
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
    columns = ["stage", "tokens", "GPUs", "layout", "tokens/s", "time", "kWh", "disk", "download"]
    columns += ["money"] if price else []
    print_table_of(
        columns,
        [_stage(need, row, price) for need in stages],
        f"{at.arguments} on {found.count} x {name} with {found.gibibytes:.4g} GiB each",
        left=("layout",),
        total=_total(stages, row, price),
    )
    _print_memory(stages, found)
    if at.values.scale == PUBLISHED and (found.count, name) == (published.GPUS, published.NAME):
        _print_published()
    for problem in dict.fromkeys(need.problem for need in stages if need.problem):
        print(f"{', '.join(n.stage for n in stages if n.problem == problem)}: {problem}")
    if refitted := [need.stage for need in stages if need.is_refitted]:
        print(
            f"{', '.join(refitted)}: laid out anew; a run of {at.arguments} keeps to {OWN_LAYOUT}"
        )
    if hours := sum(need.core_hours for need in stages):
        unit = f"core-hour{'s' * (f'{hours:,.0f}' != '1')}"
        print(f"tokenisation: about {hours:,.0f} {unit} of CPUs, by a prototype's rate")
    rest = [need.stage for need in stages if not (need.step or need.problem)]
    print("time not predicted:", ", ".join(rest))
    print(BASIS, MEMORY, DISK, sep="\n")


def _stage(need: Need, row: Card, price: float) -> list[str]:
    cells = [need.stage, count(need.tokens), "", need.layout, "", "", ""]
    if need.step and need.tokens and need.seconds:
        cells[2] = str(need.gpus)
        cells[4:] = [f"{need.tokens / need.seconds:,.0f}", duration(need.hours)]
        cells.append(number(need.kilowatt_hours(row)))
    cells += [size(need.disk), size(need.download)]
    return cells + ([number(need.money(price))] if price else [])


def _total(stages: list[Need], row: Card, price: float) -> list[str]:
    hours = sum(need.hours for need in stages)
    power = sum(need.kilowatt_hours(row) for need in stages)
    disk, download = (sum(getattr(need, key) for need in stages) for key in ("disk", "download"))
    known = "of what fits" if any(need.problem for need in stages) else ""
    cells = ["all", "", "", known, "", duration(hours), number(power), size(disk), size(download)]
    return cells + ([number(sum(need.money(price) for need in stages))] if price else [])


def _print_memory(stages: list[Need], found: Gpus) -> None:
    known = [(need.stage, need.memory) for need in stages if need.memory]
    rows = []
    for stage, memory in known:
        parts = [sum(getattr(memory, name) for name in names) for names in PARTS.values()]
        total = f"{gib(memory.total)} of {found.gibibytes:.4g}"
        rows.append([stage, *(gib(part) for part in parts), total])
    if rows:
        print_table_of(["stage", *PARTS, "all"], rows, "memory of a GPU, GiB")


def _print_published() -> None:
    columns = ["11.2T tokens on H100", "days", "GPU-days", "tokens/s a GPU", "GB", "GB unsharded"]
    print_table_of(columns, published.comparison())


def show_cards(at: Scale, each: int, price: float) -> None:
    """One line for each card, with `each` of it: the whole chain."""
    rows, notes = [], []
    for name, row in load_cards().items():
        if each > GPUS_OF_A_MACHINE and not row.network:
            notes.append(f"{name}: left out, no network between machines is known")
            continue
        found = Gpus(each, row.gibibytes, name)
        stages = needs(at, found, row)
        problems = [need.stage for need in stages if need.problem]
        hours = sum(need.hours for need in stages)
        power = sum(need.kilowatt_hours(row) for need in stages)
        first = next(need for need in stages if need.tokens and (need.step or need.problem))
        rate = f"{first.tokens / first.seconds:,.0f}" if first.tokens and first.seconds else ""
        fullest = max((need.memory.total for need in stages if need.memory), default=0.0)
        cells = [name, f"{row.memory:g}", f"{found.gibibytes:.4g}"]
        cells += [gib(fullest) if fullest else "", rate]
        whole = [duration(hours), number(power)]
        if problems:
            whole = ["", ""]
            notes.append(f"{name}: does not fit: {', '.join(problems)}")
        cells += whole
        if price:
            cells.append("" if problems else number(sum(need.money(price) for need in stages)))
        rows.append(cells)
    columns = ["card", "GB", "left, GiB", "fullest GiB", "tokens/s, stage 1", "the chain", "kWh"]
    columns += ["money"] if price else []
    print_table_of(columns, rows, f"{at.arguments} on {each} GPU{'s' * (each > 1)}")
    for line in [*notes, BASIS, "GPU=<card> shows its stages, memory by part, disk and download"]:
        print(line)


def count(tokens: float | None) -> str:
    """Tokens in three digits."""
    return _in_units(tokens or 0.0, {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3, "": 1})


def size(number: float) -> str:
    """Bytes, in the units that disks are sold by."""
    return _in_units(number, {" TB": 1e12, " GB": 1e9, " MB": 1e6, " kB": 1e3, " B": 1})


def _in_units(number: float, units: dict[str, float]) -> str:
    for name, unit in units.items():
        if number >= unit:
            digits = f"{number / unit:.3g}"
            return f"{digits}{name}"
    return ""


def duration(hours: float) -> str:
    """Minutes below an hour, days from three days on."""
    if not hours:
        return ""
    if hours < 1:
        return f"{60 * hours:.2g} min"
    return f"{hours:.3g} h" if hours < 72 else f"{hours / 24:,.1f} d"


def number(value: float) -> str:
    """A sum with at least three digits."""
    return "" if not value else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
