"""A run that is watched is the same run; its tracker has each step once, whatever stopped it."""

import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, metrics
from posttrain_jobs import make_folder, run_in_process, write_start
from small_checkout import STEPS, Checkout, kill_when, make_checkout, no_process_left

from ground.errors import UserError
from ground.files import cut_back
from ground.tracking import Lines, check, numbers, watched
from nanotron_ext import compat

STAGE = "pretrain-stage1"
SLOW, STALLED, HIGH = range(14, 20), 22, 26


def test_lines_come_as_they_are_written_and_again_after_a_cut(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = Lines(file)
    assert lines.new() == []
    text = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 5)]
    file.write_text(text[0] + text[1][:5])
    assert [line["step"] for line in lines.new()] == [1]
    with file.open("a") as more:
        more.write(text[1][5:] + "damaged\n" + text[2])
    assert [line["step"] for line in lines.new()] == [2, 3] and lines.new() == []
    (tmp_path / "cut").write_text(text[0] + text[3])
    (tmp_path / "cut").replace(file)
    assert [line["step"] for line in lines.new()] == [1, 4]


def test_each_number_of_a_line_has_the_name_that_it_has_there() -> None:
    line = {"step": 3, "loss": 1.5, "batch_hash": "0f", "tokens_per_source": {"a": 2}}
    spike = {"spike": {"windows_per_source": {"a": 1}, "skipped": True}}
    assert numbers(line | spike) == {
        "loss": 1.5, "tokens_per_source/a": 2, "spike/windows_per_source/a": 1, "spike/skipped": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wandbb", "TRACK=wandbb: no such tracker; did you mean 'wandb'?"),
        ("trackio", r"TRACK=trackio: trackio is not installed: pip install -e '\.\[track\]'"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused_before_anything_runs(
    name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch.recipe.scale import load_scale
    from launch.walk import resolve

    monkeypatch.setenv("TRACK", name)
    monkeypatch.setattr("ground.tracking.find_spec", lambda name: None)
    for stage in (STAGE, "sft"):
        with pytest.raises(UserError, match=words):
            resolve(stage, load_scale("tiny")).refuse()


# ---- real runs


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout whose data is there."""
    checkout = make_checkout(tmp_path_factory.mktemp("watch") / "prepared")
    checkout.done("run", "data-stage1")
    return checkout


@pytest.fixture(scope="module")
def untracked(prepared: Checkout) -> Checkout:
    checkout = prepared.copy(prepared.folder.with_name("untracked"))
    checkout.done("run", STAGE)
    return checkout


def outcome(checkout: Checkout) -> Any:
    """What a run leaves, but for its speed and the day."""
    folder = checkout.runs / STAGE
    lines = [{**line, "tokens_per_second": 0} for line in metrics(folder)]
    manifest = json.loads((folder / "manifest.json").read_text())
    kept = {key: manifest[key] for key in ("identity", "recipe_hash", "inputs", "bits_per_byte")}
    return lines, kept, {file.name: file.read_bytes() for file in (folder / "hf").iterdir()}


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (place,) = (one for one in folder.iterdir() if one.is_dir())
    return EventAccumulator(str(place), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def in_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = events(folder)
    return {
        name: [(one.step, one.value) for one in found.Scalars(name)]
        for name in found.Tags()["scalars"]
    }


def in_trackio(folder: Path) -> dict[str, list[tuple[int, float]]]:
    import sqlite3

    (file,) = folder.glob("*.db")
    rows = sqlite3.connect(file).execute("select step, metrics from metrics order by step")
    found: dict[str, list[tuple[int, float]]] = {}
    for step, values in rows:
        for name, value in json.loads(values).items():
            found.setdefault(name, []).append((step, value))
    return found


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for line in metrics(folder):
        for name, value in numbers(line).items():
            found.setdefault(name, []).append((line["step"], pytest.approx(value, rel=1e-6)))
    return found


def has_lines(checkout: Checkout, number: int) -> Callable[[], bool]:
    file = checkout.runs / STAGE / "metrics.jsonl"
    return lambda: file.exists() and file.read_bytes().count(b"\n") >= number


@pytest.mark.slow
def test_a_tracked_run_is_the_same_run_and_goes_on_in_the_same_one(
    prepared: Checkout, untracked: Checkout
) -> None:
    checkout = prepared.copy(prepared.folder.with_name("tracked"))
    with no_process_left(checkout):
        status = kill_when(checkout, STAGE, has_lines(checkout, 18), TRACK="tensorboard")
        assert status is not None
        checkout.done("run", STAGE, TRACK="tensorboard")
    assert outcome(checkout) == outcome(untracked)
    found, ours = in_tensorboard(checkout.runs / "tracking"), logged(checkout.runs / STAGE)
    ours.pop("tokens_per_second")  # of steps that were taken twice: the first
    assert [step for step, _ in found.pop("tokens_per_second")] == [*range(1, STEPS[STAGE] + 1)]
    assert found == ours


# How many lines a run has when it is stopped, how many are left when it goes on, and at its end.
STOPPED, LEFT, ENDED = 8, 6, 12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_each_tracker_has_each_step_once_in_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pytest.importorskip(name)
    compat.activate()  # nanotron, which would start a wandb run of its own: the tracker is not silenced
    monkeypatch.setenv("TRACK", name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # nobody is logged in
    folder, place = tmp_path / "stage", tmp_path / "tracking"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("nanotron: {tokens: {train_steps: 12}}\n")
    file = folder / "metrics.jsonl"
    lines = [f'{{"step": {n}, "loss": {n / 4}, "of": {{"a": {n}}}}}\n' for n in range(1, ENDED + 1)]
    for begin, end in ((0, STOPPED), (LEFT, ENDED)):
        cut_back(file, begin)
        with watched(folder, lambda step: True), file.open("a") as metrics_file:
            metrics_file.writelines(lines[begin:end])
    state = json.loads((folder / "tracking.json").read_text())
    assert state["steps"] == {name: ENDED}
    if name == "wandb":
        assert {one.name for one in place.glob("wandb/*/*.wandb")} == {f"run-{state['run']}.wandb"}
        return
    found = {"tensorboard": in_tensorboard, "trackio": in_trackio}[name](place)
    assert found == logged(folder)


@pytest.mark.slow
def test_a_tracker_without_a_place_costs_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACK", "tensorboard")
    (tmp_path / "stage").mkdir()
    (tmp_path / "tracking").write_text("no folder")
    with watched(tmp_path / "stage", lambda step: True):
        pass
    assert capsys.readouterr().out.startswith("stage: warning: TRACK=tensorboard: ")


FAULT = f"""
import sys, time, types
sys.path.insert(0, {str(ROOT)!r})
import ground.alarms as alarms, nanotron_ext.metrics as metrics
clock = [0.0]  # by which a step takes a second
metrics.time = types.SimpleNamespace(perf_counter=lambda: clock[0])
alarms.LIMITS = alarms.Limits(least_lines=10, stall_steps=2.0, stall_seconds=1.0)
write = metrics.Metrics.write
def faulty(self, step, loss, *rest, **more):
    clock[0] += 5 if step in {tuple(SLOW)} else 1
    time.sleep(5 if step == {STALLED} else 0)
    write(self, step, loss * (3 if step == {HIGH} else 1), *rest, **more)
metrics.Metrics.write = faulty
"""


@pytest.mark.slow
def test_a_stall_a_spike_and_a_slow_run_are_said_in_the_log_and_in_the_tracker(
    prepared: Checkout,
) -> None:
    checkout = prepared.copy(prepared.folder.with_name("faulty")).with_fault(FAULT)
    printed = checkout.done("run", STAGE, TRACK="tensorboard")
    found = events(checkout.runs / "tracking")
    for kind, steps in {"stall": [STALLED - 1], "spike": [HIGH], "throughput": SLOW}.items():
        said = [f"{STAGE}: alarm: {kind}, step {step}: " for step in steps]
        log = (checkout.runs / STAGE / "log.txt").read_text()
        assert any(one in printed and one in log for one in said), (kind, printed)
        assert {one.step for one in found.Tensors(f"alarm/{kind}/text_summary")} & {*steps}


@pytest.mark.slow
def test_a_tracker_that_fails_in_the_middle_costs_a_line_and_not_the_run(
    prepared: Checkout, untracked: Checkout
) -> None:
    checkout = prepared.copy(prepared.folder.with_name("failing"))
    with killer_of_trackers(has_lines(checkout, 10)):
        printed = checkout.done("run", STAGE, TRACK="tensorboard")
    assert "it ended with -9" in printed
    assert printed.count(f"{STAGE}: warning: TRACK=tensorboard: ") == 1
    assert outcome(checkout) == outcome(untracked)


class killer_of_trackers:  # noqa: N801
    """Kills the process that sends lines once `reached`."""

    def __init__(self, reached: Callable[[], bool]):
        self.reached, self.ended = reached, threading.Event()

    def __enter__(self) -> None:
        self.thread = threading.Thread(target=self.kill)
        self.thread.start()

    def kill(self) -> None:
        while not self.ended.wait(0.01):
            if self.reached():
                for child in psutil.Process().children(recursive=True):
                    if "ground.tracking" in child.cmdline():
                        os.kill(child.pid, signal.SIGKILL)
                return

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


@pytest.fixture
def post_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRACK", "tensorboard")
    folder = make_folder(tmp_path / "sft", "sft", write_start(tmp_path / "model"))
    with watched(folder, lambda step: False):
        run_in_process(folder)
    return folder


@pytest.mark.slow
def test_post_training_is_tracked_by_the_names_of_its_lines(post_trained: Path) -> None:
    found = in_tensorboard(post_trained.parent / "tracking")
    assert found == logged(post_trained)
    assert {"loss", "lr", "grad_norm", "tokens", "tokens_per_second"} <= found.keys()
    assert Counter(step for step, _ in found["loss"]) == Counter(range(1, 9))


def test_without_a_tracker_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRACK", raising=False)
    check()
    (tmp_path / "run").mkdir()
    with watched(tmp_path / "run", lambda step: False):
        pass
    assert [*tmp_path.rglob("*")] == [tmp_path / "run"]
