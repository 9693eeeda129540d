"""All three pretraining stages through the command line, uninterrupted and killed over and over."""

import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import edit, metrics
from small_checkout import (
    INTERVAL,
    MIXTURES,
    STEPS,
    WINDOW,
    WINDOWS_PER_STEP,
    Checkout,
    kill_when,
    make_checkout,
    no_process_left,
)

from ground.errors import SAVED

# One fixture starts the pipeline eight times.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
LAST = "pretrain-stage3"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    """The whole pipeline, run once without a stop."""
    checkout = make_checkout(tmp_path_factory.mktemp("whole") / "checkout")
    with no_process_left(checkout):
        checkout.done("run", LAST)
        yield checkout


def manifest(checkout: Checkout, stage: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((checkout.runs / stage / "manifest.json").read_text())
    return loaded


def trajectory(checkout: Checkout, stage: str) -> list[str]:
    """What must come out the same to the last bit, as text."""
    keys = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_source")
    lines = metrics(checkout.runs / stage)
    return [json.dumps([line.get(key) for key in keys]) for line in lines]


def lines_of(checkout: Checkout, stage: str) -> int:
    file = checkout.runs / stage / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def moments(checkout: Checkout) -> dict[str, Callable[[], bool]]:
    """Where the run is killed, in the order in which it gets there."""
    first, second, third = (checkout.runs / stage for stage in STEPS)
    count = random.randint(INTERVAL + 1, STEPS["pretrain-stage1"] - 3)
    return {
        "tokenising": lambda: (checkout.cache / "shards").exists(),
        "first stage, before a checkpoint": lambda: lines_of(checkout, first.name) >= 3,
        f"first stage, step {count}": lambda: lines_of(checkout, first.name) >= count,
        "first stage, converting": lambda: any(first.glob("hf*")),
        "at the border": lambda: (second / "job.json").exists(),
        "second stage, scoring": lambda: (second / "hf").exists(),
        "third stage": lambda: lines_of(checkout, third.name) >= 1,
    }


@pytest.fixture(scope="module")
def killed(finished: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    """The same pipeline, stopped at each of the moments and started again until done.

    Killed are its runner alone, the runner's group or its workers; or a signal asks it to stop.
    """
    checkout = make_checkout(tmp_path_factory.mktemp("killed") / "checkout")
    ways = [
        ("runner", signal.SIGKILL), ("group", signal.SIGKILL), ("runner", signal.SIGTERM),
        ("group", signal.SIGTERM), ("runner", signal.SIGKILL), ("runner", signal.SIGUSR1),
        ("workers", signal.SIGKILL),
    ]  # fmt: skip
    with no_process_left(checkout):
        for (moment, reached), (target, number) in zip(
            moments(checkout).items(), ways, strict=True
        ):
            status = kill_when(checkout, LAST, reached, target, number)
            assert status is not None, f"ended before '{moment}'"
            if number != signal.SIGKILL:
                assert status == SAVED, moment
        checkout.done("run", LAST)
        yield checkout


@pytest.mark.parametrize("stage", STEPS)
def test_killed_again_and_again_the_run_ends_in_the_same_bits(
    finished: Checkout, killed: Checkout, stage: str
) -> None:
    assert trajectory(killed, stage) == trajectory(finished, stage)
    for name in ("tokens_per_source", "bits_per_byte", "sample", "identity", "tokens", "step"):
        assert manifest(killed, stage)[name] == manifest(finished, stage)[name]
    weights = f"{stage}/hf/model.safetensors"
    assert (killed.runs / weights).read_bytes() == (finished.runs / weights).read_bytes()
    assert not list((killed.runs / stage).glob("*.partial"))


def test_each_step_is_logged_once_and_the_stages_count_on(finished: Checkout) -> None:
    lines = [line for stage in STEPS for line in metrics(finished.runs / stage)]
    assert [line["step"] for line in lines] == list(range(1, STEPS[LAST] + 1))
    per_step = WINDOW * WINDOWS_PER_STEP
    assert [line["tokens"] for line in lines] == [line["step"] * per_step for line in lines]


def test_checkpoints_stand_at_the_interval_and_at_each_end(finished: Checkout) -> None:
    begin = 0
    for stage, end in STEPS.items():
        folder = finished.runs / stage / "checkpoints"
        found = {path.name for path in folder.glob("[!.]*")}
        wanted = {*range(begin // INTERVAL * INTERVAL + INTERVAL, end, INTERVAL), end}
        assert found == {str(step) for step in wanted}
        begin = end


def test_the_manifest_counts_the_mixtures_tokens(finished: Checkout) -> None:
    share: dict[str, float] = {}  # of windows, over all stages so far
    begin = 0
    for number, (stage, end) in enumerate(STEPS.items(), start=1):
        total, windows = sum(MIXTURES[stage].values()), (end - begin) * WINDOWS_PER_STEP
        for name, weight in MIXTURES[stage].items():
            share[name] = share.get(name, 0.0) + weight / total * windows
        begin, found = end, manifest(finished, stage)
        machine = found["machine"]
        assert machine["gpu"] == "" and machine["peak_memory_bytes"] > 10**8
        assert found["tokens"] == sum(found["tokens_per_source"].values())
        assert found["tokens"] == end * WINDOW * WINDOWS_PER_STEP
        assert set(found["tokens_per_source"]) == set(share)
        for name, tokens in found["tokens_per_source"].items():
            assert abs(tokens / WINDOW - share[name]) < number  # a window a stage
        assert metrics(finished.runs / stage)[-1]["tokens_per_source"] == found["tokens_per_source"]


@pytest.mark.parametrize("stage", ["held-out", LAST])
def test_a_finished_stage_is_left_alone_and_says_so(finished: Checkout, stage: str) -> None:
    def state() -> dict[str, tuple[int, int]]:
        files = [path for path in finished.runs.rglob("*") if path.is_file()]
        return {str(f): (f.stat().st_mtime_ns, f.stat().st_ino) for f in files}

    before = state()
    assert finished.done("run", stage) == f"{stage}: up to date, runs/small/{stage}\n"
    assert state() == before


def test_a_finished_stage_needs_none_of_the_earlier_folders(
    finished: Checkout, tmp_path: Path
) -> None:
    mine = finished.copy(tmp_path / "checkout")
    for stage in ("held-out", "data-stage1", "pretrain-stage1"):
        shutil.rmtree(mine.runs / stage)
    assert "up to date" in mine.done("run", LAST)
    assert not (mine.runs / "pretrain-stage1").exists()


def test_hf_loads_in_transformers_and_generates(finished: Checkout) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(finished.runs / LAST / "hf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(model).__name__ == "SmolLM3ForCausalLM"
    prompt = tokenizer("def read(", return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        out = model.generate(**prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert out.shape[1] == prompt["input_ids"].shape[1] + 8
    assert tokenizer.decode(out[0]).startswith("def read(")
    assert out.max() < model.config.vocab_size


def test_a_changed_recipe_is_refused_from_its_stage_on(finished: Checkout, tmp_path: Path) -> None:
    mine = finished.copy(tmp_path / "checkout")
    file = mine.folder / "recipes/pretrain/stage2.yaml"
    edit(file, "train_steps: 4198000", "train_steps: 4100000")
    line = mine.refused("run", LAST)
    assert "runs/small/pretrain-stage2: was made from another recipe" in line
    assert "make pretrain-stage2 SCALE=small FORCE=1" in line
    for stage in STEPS:
        assert manifest(mine, stage) == manifest(finished, stage)
    assert "up to date" in mine.done("run", "pretrain-stage1")
