"""The GPUs that `make plan` knows: what their makers' data sheets say of them."""

from dataclasses import replace
from functools import cache
from pathlib import Path

from ground.errors import UserError, did_you_mean
from launch.machine.gpus import Gpus, gpus
from launch.recipe.tables import rows_of
from launch.recipe.values import Natural, Positive, Text, section

GPUS_OF_A_MACHINE = 8  # as in the makers' servers
FILE = Path(__file__).parent / "cards.yaml"


@section
class Card:
    """One row of cards.yaml, in the units of its head."""

    driver: Text
    capability: Positive
    memory: Positive
    left: Positive
    bf16: Positive
    bandwidth: Positive
    power: Positive
    link: Positive
    network: Natural
    source: Text

    @property
    def gibibytes(self) -> float:
        """What the driver leaves of the memory: what a run finds, and is laid out on."""
        return self.memory * self.left

    @property
    def flops(self) -> float:
        """FLOP/s of dense bf16 matrix products."""
        return self.bf16 * 1e12

    @property
    def memory_bytes_per_second(self) -> float:
        return self.bandwidth * 1e9

    @property
    def link_bytes_per_second(self) -> float:
        """To another GPU of the machine, in one direction."""
        return self.link * 1e9 / 2

    @property
    def network_bytes_per_second(self) -> float:
        """To a GPU of another machine, in one direction; 0: no such network is known."""
        return self.network * 1e9 / 8


@cache
def load_cards() -> dict[str, Card]:
    """The rows of cards.yaml by name."""
    return rows_of(FILE, "cards", Card)


def card(name: str) -> Card:
    """The card that GPU= names. Raises UserError for an unknown one."""
    cards = load_cards()
    if name.lower() not in cards:
        begun = [one for one in cards if one.startswith(name.lower())]
        hint = f"write {' or '.join(begun)}" if begun else did_you_mean(name.lower(), cards)
        more = " Or" if hint.endswith("?") else "; or"
        raise UserError(
            f"GPU={name}: unknown; {hint}{more} add a row to "
            "launch/machine/cards.yaml (cards without bf16, such as T4 and V100, train no recipe)"
        )
    return cards[name.lower()]


def name_of(found: Gpus) -> str | None:
    """The row of the GPUs that a driver calls by `found.name`."""
    called = found.name.removeprefix("NVIDIA ")
    return next((name for name, row in load_cards().items() if row.driver == called), None)


def gpus_of(name: str) -> Gpus:
    """The GPUs to plan for: GPU=<card>, GPUS= of them (1), each with GPU_GB= of memory, or what its driver leaves.

    UserError for more of them than a machine holds where no network is known.
    """
    row = card(name)
    found = replace(gpus(Gpus(1, row.gibibytes)), name=name.lower())
    if found.count > GPUS_OF_A_MACHINE and not row.network:
        raise UserError(
            f"GPUS={found.count}: cards.yaml knows no network between machines with {found.name}; "
            f"write at most {GPUS_OF_A_MACHINE}"
        )
    return found
