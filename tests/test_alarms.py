"""Alarms from lines and a clock that the test gives."""

import random
from typing import Any

import pytest

from ground.alarms import Alarm, Alarms, Limits

LIMITS = Limits()


def line(step: int, **more: Any) -> dict[str, Any]:
    """A second a step at 1,000 tokens each, with noise of a tenth."""
    noise = random.Random(step).gauss(0, 0.1)
    usual = {"tokens": 1000 * step, "loss": 3 + noise, "tokens_per_second": 1000 * (1 + noise / 2)}
    return {"step": step, **usual, **more}


def run(lines: list[dict[str, Any]], alarms: Alarms | None = None) -> list[Alarm]:
    alarms = alarms or Alarms()
    return [alarm for one in lines for alarm in alarms.see(one, float(one["step"]))]


def kinds(alarms: list[Alarm]) -> list[tuple[str, int]]:
    return [(alarm.kind, alarm.step) for alarm in alarms]


def test_a_usual_run_alarms_nobody() -> None:
    falling = [
        line(step, loss=10 - step / 500 + line(step)["loss"] / 10) for step in range(1, 2000)
    ]
    assert run(falling) == []


def test_a_throughput_that_stays_below_half_is_said_once_until_it_recovers() -> None:
    lines = [line(step) for step in range(1, 200)]
    slow = {*range(50, 60), *range(100, 108), *range(150, 154)}  # the last: too short
    lines = [one | {"tokens_per_second": 400} if one["step"] in slow else one for one in lines]
    assert kinds(run(lines)) == [("throughput", 54), ("throughput", 104)]
    assert "400 tokens/s over 5 lines, median 9" in run(lines)[0].text.replace("1,0", "9")


def test_a_loss_far_above_the_recent_ones_is_a_spike() -> None:
    high = {30: 3.9, 60: 9.0, 61: 8.0, 62: 7.0, 90: float("nan")}
    lines = [line(step, **({"loss": high[step]} if step in high else {})) for step in range(1, 120)]
    assert kinds(run(lines)) == [("spike", 60), ("spike", 90)]


def test_what_is_no_number_hides_and_raises_nothing_later() -> None:
    high = {1: float("nan"), 60: float("nan"), 151: 9.0}
    lines = [line(step, **({"loss": high[step]} if step in high else {})) for step in range(1, 200)]
    assert kinds(run(lines)) == [("spike", 1), ("spike", 60), ("spike", 151)]


def test_where_losses_hardly_differ_a_small_rise_is_none() -> None:
    lines = [
        line(step, loss=0.69 + (step == 40) * 0.05 + (step == 60) * 0.2) for step in range(1, 80)
    ]
    assert kinds(run(lines)) == [("spike", 60)]


def test_a_gradient_spike_of_the_trainer_is_one_too() -> None:
    spike = {"grad_norm": 7.0, "spike": {"median_grad_norm": 0.5}}
    (alarm,) = run([line(1), line(2, **spike)])
    assert (alarm.kind, alarm.step) == ("spike", 2) and "gradient norm 7, median 0.5" in alarm.text


@pytest.mark.parametrize(
    ("step_seconds", "limit"), [(1.0, LIMITS.stall_seconds), (30.0, 30.0 * LIMITS.stall_steps)]
)
def test_a_stall_is_said_once_and_again_after_another_step(
    step_seconds: float, limit: float
) -> None:
    alarms = Alarms()
    assert alarms.late(1e9) is None, "nothing runs yet"
    speed = {"tokens_per_second": 1000 / step_seconds}
    for step in (1, 2, 3):
        alarms.see(line(step, **speed), step * step_seconds)
    begin = 3 * step_seconds
    assert alarms.late(begin + limit - 1) is None
    late = alarms.late(begin + limit + 1)
    assert late and kinds([late]) == [("stall", 3)]
    assert f"{limit + 1:.0f} s after 3; one takes {step_seconds:g} s" in late.text
    assert alarms.late(begin + 9 * limit) is None
    alarms.see(line(4, **speed), begin + 9 * limit)
    assert alarms.late(begin + 9 * limit + 1) is None
    assert alarms.late(begin + 11 * limit + 1) is not None


def test_a_resumed_run_knows_what_is_usual_and_stalls_only_once_it_runs() -> None:
    alarms = Alarms()
    for step in range(1, 60):
        alarms.remember(line(step))
    assert alarms.late(1e9) is None
    assert run([line(step, loss=9.0) for step in range(50, 60)], alarms) == [], "seen before"
    assert kinds(run([line(60, loss=9.0)], alarms)) == [("spike", 60)]
