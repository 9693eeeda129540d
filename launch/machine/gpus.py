"""The GPUs that a run is laid out for: those of this machine, or what GPUS= and GPU_GB= say."""

import os
from dataclasses import dataclass, replace
from math import inf

from ground.errors import UserError


@dataclass(frozen=True)
class Gpus:
    """`count` equal GPUs with `gibibytes` of memory each: what the driver leaves (an RTX 4090 of 24: 23.5)."""

    count: int
    gibibytes: float
    name: str = ""  # as the driver calls it; empty where GPUS= and GPU_GB= say what there is

    def __str__(self) -> str:
        if self.gibibytes < inf:
            return f"{self.count} x {self.gibibytes:.4g} GiB"
        return f"{'one GPU' if self.count == 1 else f'{self.count} GPUs'} of any size"


def given() -> str:
    """GPUS= and GPU_GB= of the command line, as they would be typed after others."""
    names = [name for name in ("GPUS", "GPU_GB") if os.environ.get(name)]
    return "".join(f" {name}={os.environ[name][:100]}" for name in names)


def gpus(otherwise: Gpus | None = None) -> Gpus:
    """GPUS= and GPU_GB= where they are given, else `otherwise` or what torch finds; Gpus(0, 0) where
    nothing is."""
    count, memory = os.environ.get("GPUS", ""), os.environ.get("GPU_GB", "")
    found = otherwise or (_found() if not (count and memory) else Gpus(0, 0))
    return Gpus(
        _number("GPUS", count) if count else found.count,
        _number("GPU_GB", memory) if memory else found.gibibytes,
        "" if memory else found.name,
    )


def gpus_for(device: str) -> Gpus:
    """What a run on a device (gpu | cpu) is laid out on, its memory infinite where it is not known.

    On a CPU as many processes as GPUS= says. Where there is no GPU, one: who resolves a recipe there
    only looks at it, and the run itself is refused.
    """
    if device == "cpu":
        count = os.environ.get("GPUS", "")
        return Gpus(_number("GPUS", count) if count else 1, inf)
    at_hand = gpus()
    return replace(at_hand, count=at_hand.count or 1, gibibytes=at_hand.gibibytes or inf)


def _found() -> Gpus:
    import torch

    if not torch.cuda.is_available():
        return Gpus(0, 0)
    properties = torch.cuda.get_device_properties(0)
    return Gpus(torch.cuda.device_count(), properties.total_memory / 2**30, properties.name)


def _number(variable: str, value: str) -> int:
    if not (value.isdecimal() and len(value) < 10 and int(value)):
        remedy = "not a number from 1; write one, or leave it out"
        raise UserError(f"{variable}={value[:100]}: {remedy}")
    return int(value)
