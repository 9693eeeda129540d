"""Data stages that read from the hub with the real client: killed, refused, cut off, and counted."""

import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hub_runs import LARGE, HubCheckout, hub_rows, make_hub_checkout
from hub_sets import write_hub_sets
from loopback_hub import Fault, Hub, loopback_hub
from small_checkout import kill_when, no_process_left

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STAGES = ("data-stage1", "data-stage2")  # the second draws on where the first ended
MIXTURE = {"fineweb-edu": 0.4, "dclm": 0.3, "pes2o": 0.1, "fw2-fra": 0.1, "cosmopedia2": 0.1}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    sizes = LARGE | {"pes2o": 400_000, "fw2-fra": 400_000}
    root = tmp_path_factory.mktemp("sets")
    with loopback_hub(write_hub_sets(root, hub_rows(), sizes), contents=root / "contents") as hub:
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
) -> tuple[HubCheckout, dict[str, set[str]]]:
    """Both data stages, undisturbed, and the shard folders that each made."""
    checkout = begun.copy(tmp_path_factory.mktemp("whole") / "checkout")
    made, before = dict[str, set[str]](), set[str]()
    for stage in STAGES:
        checkout.done("run", stage)
        after = {str(file.parent) for file in checkout.cache.glob("shards/*/info.json")}
        made[stage], before = after - before, after
    return checkout, made


def test_killed_twice_and_a_file_failing_once_ends_in_the_same_bytes(
    hub: Hub, begun: HubCheckout, whole: tuple[HubCheckout, dict[str, set[str]]],
    tmp_path: Path,
) -> None:  # fmt: skip
    undisturbed, made = whole
    checkout, draw = begun.copy(tmp_path / "checkout"), random.Random(0)
    kills = failures = 0
    with no_process_left(checkout):
        for stage in STAGES:
            for _ in range(2):
                units = len(finished(checkout)) + draw.randint(1, 8)
                delay = draw.uniform(0, 0.3)  # into the writing of the next one

                def reached(units: int = units, delay: float = delay) -> bool:
                    is_enough = len(finished(checkout)) >= units
                    time.sleep(delay if is_enough else 0.01)
                    return is_enough

                kills += kill_when(checkout, stage, reached, "group") == -signal.SIGKILL
            file = draw.choice(files_of(undisturbed, made[stage]))
            hub.faults = [Fault(f"/{file}", "short", times=1)]
            failed = checkout.launch("run", stage)
            if hub.faults[0].times == 0:  # of a unit that no killed run had finished
                failures += 1
                assert failed.returncode == 69 and re.search(
                    f"error: source .*{file}", failed.stderr
                ), failed.stderr[-3000:]
            hub.faults = []
            checkout.done("run", stage)
    print(f"{kills} kills and {failures} failures fell into the stages")
    assert checkout.shards() == undisturbed.shards()
    assert kills >= len(STAGES) and failures


LIST = """
from datatrove_pipelines.counts import Counts
from datatrove_pipelines.hub_files import list_files, texts
from datatrove_pipelines.sources import HubSplit
from datatrove_pipelines.units import Unit
from launch.recipe.scale import load_scale
from launch.recipe.tables import load_sources
from launch.stages.sources import data_of
for name, row in load_sources().items():
    if row.hub_id:
        split = HubSplit(**data_of(name, row, load_scale("full"), name).split_values())
        files = list_files(split).files
        whole = Unit(0, files[0].name, 0.0, 1.0, files[0].bytes)
        _, text = next(texts(split, whole, Counts()))
        assert len(text.split()) > 5, (name, text)
        print(name, *(file.name for file in files))
"""


def test_the_files_of_every_row_are_found_and_read(hub: Hub, begun: HubCheckout) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIST], cwd=begun.folder, env=begun.environment,
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    listed = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    for name, row in hub_rows().items():
        files = listed[name].split()
        assert len(files) == 3, (name, files)
        if row.data_files:  # the config has another file
            assert len(list(hub.repositories[f"datasets/{row.hub_id}"].rglob("*.*[!d]"))) > 3


def finished(checkout: HubCheckout) -> list[Path]:
    """Units that are whole, of sources that are not."""
    return list(checkout.cache.glob("shards/*.building/*/unit.json"))


def files_of(checkout: HubCheckout, folders: set[str]) -> list[str]:
    """The files of all units of these shard folders."""
    infos = [info for infos in checkout.infos().values() for info in infos]
    units = [unit for info in infos if info["folder"] in folders for unit in info["units"]]
    return sorted({unit["file"] for unit in units})


# ---- what a hub does not give


@pytest.fixture(scope="module")
def few(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> HubCheckout:
    """Stage 1 of five sources, with a tokenizer."""
    folder = tmp_path_factory.mktemp("few") / "checkout"
    checkout = make_hub_checkout(folder, hub, MIXTURE)
    checkout.done("run", "tokenizer")
    return checkout


@pytest.fixture(scope="module")
def right(few: HubCheckout, tmp_path_factory: pytest.TempPathFactory) -> HubCheckout:
    checkout = few.copy(tmp_path_factory.mktemp("right") / "checkout")
    checkout.done("run", "data-stage1")
    return checkout


def test_one_process_and_two_give_the_same_bytes(
    few: HubCheckout, right: HubCheckout, tmp_path: Path
) -> None:
    checkout = few.copy(tmp_path / "checkout")
    one = checkout.with_fault("import os\nos.cpu_count = lambda: 1\n")
    one.done("run", "data-stage1")
    assert one.shards() and one.shards() == right.shards()


def last_file(checkout: HubCheckout, source: str) -> str:
    """A file that is not the one that is looked into before anything is built."""
    (info,) = checkout.infos()[source]
    files = [unit["file"] for unit in info["units"]]
    assert files[-1] != files[0], files
    return str(files[-1])


FAULTS = {
    "missing": (Fault("", status=404), r"no such file|404", 2),
    "rate limit": (Fault("", status=429, retry_after=1), r"the hub answers 429; run the same", 69),
    "outage": (Fault("", status=503), r"the hub answers 503; run the same command again", 69),
    "cut": (Fault("", "cut"), r"the hub does not answer|run the (same )?command again", 69),
    "short": (Fault("", "short"), r"ends after .*; run the command again", 69),
}


# Statuses are read before what a file holds; a connection that ends early ends tables and lines
# in different readers.
CASES = [("missing", "fineweb-edu"), ("rate limit", "dclm"), ("outage", "fineweb-edu")]
CASES += [(name, source) for name in ("cut", "short") for source in ("fineweb-edu", "dclm")]


@pytest.mark.parametrize(("name", "source"), CASES)
def test_a_file_that_is_not_given_is_named_and_costs_no_other_source(
    name: str, source: str, hub: Hub, few: HubCheckout, right: HubCheckout, tmp_path: Path
) -> None:
    fault, words, status = FAULTS[name]
    file = last_file(right, source)
    hub.faults = [replace(fault, of=f"/{file}")]
    checkout = few.copy(tmp_path / "checkout")
    line = checkout.failed("data-stage1", status)
    assert line.startswith(f"error: source {source}: ") and file in line, line
    assert re.search(words, line), line
    kept = {one: infos for one, infos in checkout.infos().items() if one != source}
    kept_units = list(checkout.cache.glob(f"shards/{source}-*.building/*/unit.json"))
    assert kept.keys() == MIXTURE.keys() - {source} and kept_units
    hub.faults = []
    hub.forget()
    checkout.done("run", "data-stage1")
    assert checkout.shards() == right.shards()
    fetched = {name for name in hub.sent if not name.endswith("README.md")}
    repo = f"datasets/{hub_rows()[source].hub_id}"
    assert fetched and all(one.startswith(f"{repo}/") for one in fetched), fetched


def test_a_gated_set_is_refused_before_anything_is_fetched(
    hub: Hub, few: HubCheckout, tmp_path: Path
) -> None:
    hub.gated = {"datasets/allenai/dolmino-mix-1124": {"hf_right"}}
    checkout = few.copy(tmp_path / "checkout")
    for token in ("", "hf_other"):
        hub.forget()
        line = replace(checkout, variables=hub.variables(tmp_path / "hf", token)).failed(
            "data-stage1"
        )
        assert re.search(r"dolmino.*licence is not accepted; accept it .* `hf auth login`", line), (
            line
        )
        assert not hub.sent
    right = replace(checkout, variables=hub.variables(tmp_path / "hf", "hf_right"))
    right.done("run", "data-stage1")


def test_a_stored_file_that_is_broken_is_named(
    hub: Hub, few: HubCheckout, right: HubCheckout, tmp_path: Path
) -> None:
    """Damaged in the store itself, at its size: another size would mean other units."""
    for source in ("fineweb-edu", "dclm", "pes2o"):
        repo = f"datasets/{hub_rows()[source].hub_id}"
        name = last_file(right, source)
        file = hub.repositories[repo] / name
        content = file.read_bytes()
        file.write_bytes(content[:64] + bytes(len(content) - 64))
        try:
            checkout = few.copy(tmp_path / f"{source}-checkout")
            line = checkout.failed("data-stage1", 2)
        finally:
            file.write_bytes(content)
        assert line.startswith(f"error: source {source}: ") and name in line, line


def test_few_bytes_are_fetched_that_are_not_used(tmp_path: Path) -> None:
    """What was sent of a source's files is at most 1.2 times the stored bytes of its shards' units."""
    rows = {name: row for name, row in hub_rows().items() if name in MIXTURE}
    # Files of a megabyte and units of a tenth of one: a table's end is 64 kB at each opening.
    sizes = {name: round(30_000_000 * weight) for name, weight in MIXTURE.items()}
    with loopback_hub(write_hub_sets(tmp_path / "sets", rows, sizes)) as hub:
        checkout = make_hub_checkout(tmp_path / "checkout", hub, MIXTURE, tokens=5_000_000)
        checkout.done("run", "tokenizer")
        hub.forget()
        checkout.done("run", "data-stage1")
    print(f"\n{'source':14}{'stored':>12}{'used':>12}{'fetched':>12}{'share':>8}")
    for source, (info,) in checkout.infos().items():
        repo = f"datasets/{rows[source].hub_id}"
        stored = {
            str(file.relative_to(hub.repositories[repo])): file.stat().st_size
            for file in hub.repositories[repo].rglob("*.*[!d]")
        }
        used = sum((one["stop"] - one["start"]) * stored[one["file"]] for one in info["units"])
        sent = sum(hub.sent[f"{repo}/{file}"] for file in stored)
        whole = sum(stored.values())
        print(f"{source:14}{whole:12,}{used:12,.0f}{sent:12,}{sent / used:8.2f}")
        assert sent <= 1.2 * used < whole
