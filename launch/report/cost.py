"""What the training of a stage took: time, memory, share of the card's peak, energy, money."""

import math
import os
from typing import Any

from ground.errors import UserError
from ground.files import read_json_object
from launch.machine.cards import load_cards, name_of
from launch.machine.gpus import Gpus
from launch.machine.posttrain_memory import Shape
from launch.machine.speed import flops_per_token, mean_keys
from launch.report.document import Cost, Section, Table
from launch.report.results import StageResult

NOTE = (
    "Measured: tokens/s (the median of the steps) and the most memory of one process: on a GPU what torch allocated, "
    "on a CPU the process with its libraries. Counted: MFU, the model's FLOPs of a token over the card's peak "
    "(launch/machine/cards.yaml), and, over the seconds by the clock, kWh with the GPUs at their boards' limit, and money "
    "at PRICE= a GPU-hour. Empty where the machine is not known."
)


def price_given() -> float | None:
    """PRICE=, money for a GPU-hour. Raises UserError."""
    text = os.environ.get("PRICE", "")
    try:
        price = float(text) if text else None
        if price is not None and not (math.isfinite(price) and price >= 0):
            raise ValueError
    except ValueError:
        remedy = "not a sum of money; write a number from 0, or leave it out"
        raise UserError(f"PRICE={text[:100]}: {remedy}") from None
    return price


def cost_of(stage: StageResult, price: float | None) -> Cost | None:
    """None for a stage that does not train."""
    if (rate := stage.median("tokens_per_second")) is None:
        return None
    machine: dict[str, Any] = stage.manifest.get("machine", {})
    gpu, processes = machine.get("gpu", ""), machine.get("processes", 0)
    name = name_of(Gpus(1, 0, gpu)) if gpu else None
    row = load_cards()[name] if name else None
    flops, hours = _flops_per_token(stage), stage.seconds / 3600
    return Cost(
        machine=gpu or ("CPU" if machine else ""),
        processes=processes,
        peak_memory_bytes=machine.get("peak_memory_bytes"),
        tokens_per_second=rate,
        card=name,
        flops_per_token=flops,
        mfu=flops * rate / processes / row.flops if flops and row else None,
        kilowatt_hours=hours * processes * row.power / 1000 if row else None,
        money=hours * processes * price if gpu and price is not None else None,
    )


def _flops_per_token(stage: StageResult) -> float | None:
    """By the sizes in hf/config.json and the recipe's window; None where there are none."""
    file, recipe = stage.folder / "hf" / "config.json", stage.recipe
    if not file.exists():
        return None
    shape = Shape.of(read_json_object(file))
    if nanotron := recipe.get("nanotron"):
        window = nanotron["tokens"]["sequence_length"]
        is_masked = nanotron["model"]["model_config"]["_use_doc_masking"]
    else:
        window, is_masked = recipe["trl"]["max_length"], True
    matrices = sum(a * b for a, b in shape.linears.values())
    weights = shape.layers * matrices + shape.vocab * shape.hidden
    keys, width = mean_keys(window, is_masked), shape.layers * shape.hidden
    return flops_per_token(weights, width, keys, bool(recipe.get("lora")))


def cost_section(costs: list[tuple[str, float, Cost]]) -> Section:
    """A row for each trained stage: its name, seconds and cost."""
    columns = {
        "stage": "", "machine": "", "processes": ",", "hours": ",.3g", "tokens/s": ",.0f",
        "peak memory, GiB": ",.2f", "MFU": ".1%", "kWh": ",.3g", "money": ",.2f",
    }  # fmt: skip
    rows = tuple(
        (
            name, cost.machine, cost.processes or None, seconds / 3600, cost.tokens_per_second,
            cost.peak_memory_bytes and cost.peak_memory_bytes / 2**30, cost.mfu,
            cost.kilowatt_hours, cost.money,
        )
        for name, seconds, cost in costs
    )  # fmt: skip
    table = Table("trained stages", tuple(columns), tuple(columns.values()), rows)
    return Section("cost", "What training took", NOTE, tables=(table,) if rows else ())
