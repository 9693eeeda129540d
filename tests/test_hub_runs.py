"""Data stages that read from the hub with the real client: killed, refused, cut off, and counted."""

import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_runs import LARGE, STAGES, HubCheckout, hub_rows, make_hub_checkout
from hub_sets import write_hub_sets
from loopback_hub import Fault, Hub, loopback_hub
from small_checkout import kill_when, no_process_left

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
MIXTURE = {"fineweb-edu": 0.4, "dclm": 0.3, "pes2o": 0.1, "fw2-fra": 0.1, "cosmopedia2": 0.1}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    sizes = LARGE | {"pes2o": 400_000, "fw2-fra": 400_000}
    with loopback_hub(write_hub_sets(tmp_path_factory.mktemp("sets"), hub_rows(), sizes)) as hub:
        yield hub


@pytest.fixture(autouse=True)
def _no_fault(hub: Hub) -> Iterator[None]:
    yield
    hub.faults, hub.gated = [], {}


@pytest.fixture(scope="module")
def begun(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> HubCheckout:
    """With a tokenizer, which is the same for all."""
    checkout = make_hub_checkout(tmp_path_factory.mktemp("begun") / "checkout", hub)
    checkout.done("run", "tokenizer")
    return checkout


@pytest.fixture(scope="module")
def whole(
    begun: HubCheckout, tmp_path_factory: pytest.TempPathFactory
) -> tuple[HubCheckout, dict[str, float], dict[str, set[str]]]:
    """All data stages, undisturbed; the seconds of each, and the shard folders that it made."""
    checkout = begun.copy(tmp_path_factory.mktemp("whole") / "checkout")
    seconds, made, before = {}, {}, set[str]()
    for stage in STAGES:
        begin = time.monotonic()
        checkout.done("run", stage)
        seconds[stage] = time.monotonic() - begin
        after = {str(file.parent) for file in checkout.cache.glob("shards/*/info.json")}
        made[stage], before = after - before, after
    return checkout, seconds, made


def test_killed_twice_and_a_file_failing_once_ends_in_the_same_bytes(
    hub: Hub, begun: HubCheckout, whole: tuple[HubCheckout, dict[str, float], dict[str, set[str]]],
    tmp_path: Path,
) -> None:  # fmt: skip
    undisturbed, seconds, made = whole
    checkout, draw, kills = begun.copy(tmp_path / "checkout"), random.Random(0), 0
    with no_process_left(checkout):
        for stage in STAGES:
            source, file = draw.choice(files_of(undisturbed, made[stage]))
            hub.faults = [Fault(f"/{file}", "short", times=1)]
            line = checkout.failed(stage)
            assert source in line and file in line, line
            for _ in range(2):
                end = time.monotonic() + draw.uniform(0.3, 0.8) * seconds[stage]
                status = kill_when(checkout, stage, lambda: time.monotonic() >= end, "group")
                kills += status == -signal.SIGKILL
            checkout.done("run", stage)
    print(f"{kills} kills fell into the stages")
    assert kills >= len(STAGES)
    assert checkout.shards() == undisturbed.shards()


def files_of(checkout: HubCheckout, folders: set[str]) -> list[tuple[str, str]]:
    """(source, file) of all units of these shard folders."""
    return sorted(
        {
            (name, unit["file"])
            for name, infos in checkout.infos().items()
            for info in infos
            if info["folder"] in folders
            for unit in info["units"]
        }
    )
