"""A gradient far above the recent ones is seen, survives a restart, and can be skipped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import metrics, train

from ground.errors import UserError
from nanotron_ext.job import SpikeOptions
from nanotron_ext.spikes import SpikeDetector

MakeJob = Callable[..., Path]
CPU = torch.device("cpu")


def quiet_norms(count: int, seed: int = 0) -> torch.Tensor:
    return 1 + 0.1 * torch.randn(count, generator=torch.Generator().manual_seed(seed))


def flags(detector: SpikeDetector, norms: torch.Tensor) -> list[bool]:
    return [bool(detector(norm)) for norm in norms]


def test_normal_noise_is_no_spike_and_a_tenfold_norm_is() -> None:
    detector = SpikeDetector(SpikeOptions(), CPU)
    assert not any(flags(detector, quiet_norms(2000)))
    assert flags(detector, torch.tensor([10.0, 1.0])) == [True, False]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_a_spike_from_the_first_step_and_spoils_nothing(value: float) -> None:
    detector = SpikeDetector(SpikeOptions(window_steps=8), CPU)
    assert flags(detector, torch.tensor([value])) == [True]
    assert not any(flags(detector, quiet_norms(30)))
    assert torch.isfinite(detector.limit())


def test_the_limit_is_the_median_and_a_robust_deviation() -> None:
    """1.4826 * MAD estimates sigma: a third of outliers moves it little, unlike mean and std."""
    detector = SpikeDetector(SpikeOptions(window_steps=999, threshold=5.0), CPU)
    norms = quiet_norms(999)
    flags(detector, norms)
    assert detector.limit().item() == pytest.approx(1 + 5 * 0.1, rel=0.05)
    norms[::4] = 100.0
    detector = SpikeDetector(SpikeOptions(window_steps=999, threshold=5.0), CPU)
    flags(detector, norms)
    assert detector.limit().item() < 3


def test_only_the_last_norms_count() -> None:
    detector = SpikeDetector(SpikeOptions(window_steps=16), CPU)
    flags(detector, 50 * quiet_norms(16))
    flags(detector, quiet_norms(16))
    assert flags(detector, torch.tensor([50.0])) == [True]


@pytest.mark.parametrize("steps", [5, 16, 100])
def test_a_restored_detector_goes_on_as_if_never_stopped(steps: int, tmp_path: Path) -> None:
    options = SpikeOptions(window_steps=16, threshold=3.0)
    norms = torch.cat([quiet_norms(steps), quiet_norms(80, seed=1) * torch.linspace(1, 2, 80)])
    whole = SpikeDetector(options, CPU)
    expected = flags(whole, norms)
    lines = [json.dumps({"step": i, "grad_norm": norm.item()}) for i, norm in enumerate(norms)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines[:steps]))
    restored = SpikeDetector(options, CPU)
    restored.restore(tmp_path / "metrics.jsonl")
    assert flags(restored, norms[steps:]) == expected[steps:]
    assert any(expected[steps:])


def test_the_host_is_never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each of these would wait for all kernels before it."""
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(name))
    detector = SpikeDetector(SpikeOptions(window_steps=4), CPU)
    found = [detector(norm) for norm in torch.ones(20).unbind()]
    monkeypatch.undo()
    assert not any(found)


SPIKY = {"optimizer.gradient_spikes": {"window_steps": 2, "threshold": 0.01, "skip_batch": True}}


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    from nanotron_ext.checkpoint import Checkpoint
    from nanotron_ext.weight_table import weights_of

    checkpoint = Checkpoint(folder / "checkpoints" / str(step))
    return {weight.name: checkpoint.tensor(weight) for weight in weights_of(checkpoint.config)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_skipped_batch_leaves_the_weights_and_is_logged_with_its_sources(
    make_job: MakeJob,
) -> None:
    """A threshold near 0 makes about every second step a spike, so both kinds occur."""
    every = {"checkpoints.checkpoint_interval": 1, "checkpoints.save_initial_state": True}
    folder = make_job("spiky", {**SPIKY, **every}, steps=10)
    train(folder)
    lines = metrics(folder)
    spikes = [line["step"] for line in lines if "spike" in line]
    assert 0 < len(spikes) < 10
    for line in lines:
        step = line["step"]
        is_same = same(weights(folder, step - 1), weights(folder, step))
        # the first step is taken at rate 0
        assert is_same == ("spike" in line or line["lr"] == 0), step
        if "spike" in line:
            assert line["spike"]["skipped"] is True
            assert sum(line["spike"]["windows_per_source"].values()) == 4
            assert line["grad_norm"] > line["spike"]["median_grad_norm"]


@pytest.mark.slow
def test_layout_and_restart_change_no_skipped_step(make_job: MakeJob) -> None:
    layouts: dict[str, tuple[int, dict[str, Any]]] = {
        "one": (1, {}),
        "dp 2": (2, {"parallelism.dp": 2, "tokens.batch_accumulation_per_replica": 2}),
    }
    found = {}
    for name, (processes, overlay) in layouts.items():
        folder = make_job(name, {**SPIKY, **overlay}, steps=10)
        train(folder, processes)
        found[name] = [(line["step"], "spike" in line) for line in metrics(folder)]
    assert found["one"] == found["dp 2"] and any(spike for _, spike in found["one"])
    again = make_job("again", SPIKY, steps=10, resume=folder.parent / "one" / "checkpoints" / "6")
    kept = (folder.parent / "one" / "metrics.jsonl").read_text().splitlines()[:6]
    (again / "metrics.jsonl").write_text("".join(f"{line}\n" for line in kept))
    train(again)
    assert same(weights(again, 10), weights(folder.parent / "one", 10))


@pytest.mark.slow
def test_a_gradient_that_is_no_number_stops_the_run_before_it_saves(make_job: MakeJob) -> None:
    rate = {"optimizer.learning_rate_scheduler.learning_rate": 1e30}
    # As published: else nanotron's own checks end the run with a traceback.
    folder = make_job("diverged", {**rate, "general.ignore_sanity_checks": True}, steps=10)
    with pytest.raises(UserError, match=r"step 3: loss [\d.]+, gradient norm nan: .*skip_batch"):
        train(folder)
    assert list((folder / "checkpoints").glob("*")) == []  # no weights that are nan
