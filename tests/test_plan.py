"""`make plan`: what it says adds up, follows the GPUs, and refuses what cannot be planned."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, edit

from ground.errors import UserError
from launch.machine import published
from launch.machine.cards import Card, card, gpus_of, load_cards, name_of
from launch.machine.gpus import Gpus
from launch.machine.memory import memory
from launch.machine.needs import Need, checkpoint_bytes, needs
from launch.machine.posttrain_memory import Shape
from launch.machine.speed import FAST, FAST_FLASH_4, PLAIN, speed
from launch.recipe.book import load_recipe
from launch.recipe.posttrain import Lora, PosttrainRecipe
from launch.recipe.scale import Scale, load_scale, scale
from launch.recipe.tables import load_pipeline, rows_of
from launch.tools import plan

SIZES = ("60m", "135m", "360m", "1b")


def planned(size: str, name: str = "h100-sxm", count: int = 1, origin: str = "") -> list[Need]:
    row = card(name)
    return needs(load_scale(size, "", origin), Gpus(count, row.gibibytes, name), row)


def run(**variables: str) -> subprocess.CompletedProcess[str]:
    known = ("SCALE", "TEXT", "ORIGIN", "GPU", "GPUS", "GPU_GB", "PRICE", "FROM")
    kept = {key: value for key, value in os.environ.items() if key not in known}
    return subprocess.run(
        [sys.executable, "-m", "launch", "plan"],
        cwd=ROOT, env=kept | {"COLUMNS": "180"} | variables,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def refusal(**variables: str) -> str:
    """The one line of a plan that is refused."""
    done = run(**variables)
    assert done.returncode == 2 and done.stdout == "", done.stdout
    (line,) = done.stderr.splitlines()
    return line.removeprefix("error: ")


# ---- the cards


def test_every_card_names_its_source_and_is_a_card() -> None:
    for name, row in load_cards().items():
        assert row.source.startswith("NVIDIA") and name == name.lower()
        assert 16 <= row.memory <= 192 and 50 <= row.power <= 1200
        # No card of these makers does fewer than 60 or more than 450 products a byte.
        assert 60 < row.flops / row.memory_bytes_per_second < 450, name
    assert len(load_cards()) >= 12


def test_flash_attention_4_is_counted_where_it_runs() -> None:
    for name in ("a100-80gb", "h100-sxm"):
        step = next(need.step for need in planned("135m", name) if need.step)
        code = FAST_FLASH_4 if name == "h100-sxm" else FAST
        assert step.attention == speed(step.work, card(name), code).attention


def test_a_driver_knows_its_card() -> None:
    assert name_of(Gpus(1, 79.2, "NVIDIA H100 80GB HBM3")) == "h100-sxm"
    assert name_of(Gpus(8, 23.6, "NVIDIA GeForce RTX 4090")) == "rtx-4090"
    assert name_of(Gpus(1, 15.6, "Tesla T4")) is None


def test_a_mistake_in_the_table_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "cards.yaml"
    file.write_text((ROOT / "launch/machine/cards.yaml").read_text())
    edit(file, "bf16: 165.2", "bf16: fast")
    with pytest.raises(UserError, match=r"cards\.yaml: cards\.rtx-4090\.bf16: 'fast': write"):
        rows_of(file, "cards", Card)


def test_no_card_is_laid_out_on_more_than_its_driver_leaves() -> None:
    for name, row in load_cards().items():
        assert row.gibibytes <= row.memory * (0.93 if name in ("a10", "l4", "l40s") else 0.985)
    assert card("h100-sxm").gibibytes < 79.2 and card("rtx-4090").gibibytes < 23.6
    assert gpus_of("l4").gibibytes == card("l4").gibibytes


def test_gpus_and_memory_may_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPU_GB", raising=False)
    monkeypatch.delenv("GPUS", raising=False)
    assert gpus_of("RTX-4090") == Gpus(1, pytest.approx(23.52), "rtx-4090")
    monkeypatch.setenv("GPUS", "4")
    assert gpus_of("rtx-4090") == Gpus(4, pytest.approx(23.52), "rtx-4090")
    monkeypatch.setenv("GPU_GB", "48")
    assert gpus_of("rtx-4090") == Gpus(4, 48, "rtx-4090")
    monkeypatch.setenv("GPUS", "16")
    with pytest.raises(UserError, match=r"GPUS=16: .* no network .* write at most 8"):
        gpus_of("rtx-4090")
    assert gpus_of("h100-sxm").count == 16


# ---- what it says


@pytest.mark.parametrize("scale", [*SIZES, "full"])
def test_sums(scale: str) -> None:
    """Hours are tokens over tokens/s, kWh watts times hours, money GPU-hours times the price."""
    row, price = card("h100-sxm"), 2.5
    stages = planned(scale, count=8)
    assert [need.stage for need in stages] == list(load_pipeline())
    trained = [need for need in stages if need.step]
    assert len(trained) == 8
    for need in trained:
        assert need.tokens and need.seconds and need.step
        assert need.hours == pytest.approx(need.seconds / 3600)
        assert need.kilowatt_hours(row) == pytest.approx(need.hours * need.gpus * 0.7)
        assert need.money(price) == pytest.approx(need.hours * need.gpus * price)
        if need.stage != "apo":  # whose reference is read as well
            rate = need.step.tokens_per_second
            assert need.seconds == pytest.approx(need.tokens / rate, rel=1e-6)
    assert all(need.hours == 0 for need in stages if not need.step)


@pytest.mark.parametrize("scale", SIZES)
def test_tokens_are_those_of_the_scale(scale: str) -> None:
    at = load_scale(scale)
    stages = {need.stage: need for need in planned(scale)}
    main = [stages[f"pretrain-stage{number}"].tokens or 0 for number in (1, 2, 3)]
    assert sum(main) == pytest.approx(at.values.tokens, rel=1e-3)
    for number in (1, 2, 3):
        assert stages[f"data-stage{number}"].tokens == main[number - 1]
    assert stages["longctx-32k"].tokens == 200 * at.values.batch_tokens


def test_the_published_tokens() -> None:
    stages = {need.stage: need.tokens or 0 for need in planned("full", count=384)}
    assert sum(stages[f"pretrain-stage{n}"] for n in (1, 2, 3)) == 4_720_000 * 2_359_296
    # 4 passes of 35.2B and of 1.89B, and 169,346 pairs whose chosen sides have 255M
    assert stages["midtrain"] == pytest.approx(140.7e9, rel=0.01)
    assert stages["data-chats"] == pytest.approx(35_172e6 + 19_292e6 + 850.6e6, rel=0.001)
    assert stages["sft"] == pytest.approx(7.56e9, rel=0.01)
    assert stages["apo"] == pytest.approx(2 * (168.3e6 / 2 + 682.3e6 / 4), rel=0.01)


@pytest.mark.parametrize("scale", ["135m", "1b"])
def test_more_gpus_take_less_time_but_no_fewer_gpu_hours(scale: str) -> None:
    before = planned(scale, count=1)
    for count in (2, 4, 8):
        after = planned(scale, count=count)
        for one, more in zip(before, after, strict=True):
            if one.step and more.step and one.seconds and more.seconds:
                assert more.gpus == count
                assert more.seconds < one.seconds, one.stage
                if one.step.work.zero_stage == more.step.work.zero_stage == 0:
                    # With ZeRO the optimizer is shared out, and recomputation may be spared.
                    assert more.seconds > one.seconds / 2 * 0.999, one.stage
        before = after


def test_a_larger_card_holds_more_and_a_faster_one_takes_less() -> None:
    def hours(name: str) -> float:
        return sum(need.hours for need in planned("135m", name))

    assert hours("b200") < hours("h200") <= hours("h100-sxm") < hours("h100-pcie")
    assert hours("h100-sxm") < hours("a100-80gb") < hours("l4")
    assert hours("rtx-5090") < hours("rtx-4090") < hours("rtx-3090")


def test_nothing_is_downloaded_for_stand_ins() -> None:
    assert sum(need.download for need in planned("60m")) > 1e9
    assert sum(need.download for need in planned("60m", origin="standin")) == 0


def test_a_layout_that_a_run_would_not_take_is_marked() -> None:
    for count, marked in ((384, False), (8, True)):
        for need in planned("full", count=count):
            if need.stage.startswith("pretrain"):
                assert need.is_refitted == marked


def test_what_does_not_fit_says_what_would() -> None:
    stages = planned("full", "rtx-4090")
    problems = {need.stage: need.problem for need in stages if need.problem}
    assert {"pretrain-stage1", "longctx-64k"} <= problems.keys()
    for problem in problems.values():
        assert "does not fit on 1 x 23.52 GiB" in problem and "would do" in problem
    assert not any(need.step for need in stages if need.stage in problems)


def test_a_posttraining_stage_that_does_not_fit_says_what_would() -> None:
    problems = {need.stage: need.problem for need in planned("full", "rtx-4090")}
    for stage in ("midtrain", "sft", "apo"):
        assert (
            problems[stage].startswith("does not fit on 1 x 23.52 GiB")
            and "would do" in problems[stage]
        )
    assert "LoRA" in problems["midtrain"]
    assert not any(need.problem for need in planned("135m", "rtx-4090"))


def test_gpus_that_do_not_divide_a_step_are_a_problem_of_its_stage() -> None:
    problems = {need.stage: need.problem for need in planned("60m", count=384) if need.problem}
    assert problems["pretrain-stage1"] == (
        "384 GPUs do not divide the 128 windows of a step; set GPUS= to 1, 2, 4, ... 128"
    )
    assert problems["sft"].endswith("of a step; set GPUS= to 1, 2, 4, ... 16")


def test_every_trained_stage_has_its_memory_and_it_fits() -> None:
    for name, count in (("rtx-4090", 1), ("h100-sxm", 8)):
        for need in planned("135m", name, count):
            if need.step:
                assert need.memory and 0 < need.memory.total <= card(name).gibibytes * 2**30


def test_post_training_shares_its_optimizer_out() -> None:
    one, eight = (planned("1b", count=count) for count in (1, 8))
    for alone, shared in zip(one, eight, strict=True):
        if alone.stage in ("midtrain", "sft", "apo"):
            assert alone.memory and shared.memory
            assert shared.memory.optimizer == pytest.approx(alone.memory.optimizer / 8)


def test_a_checkpoint_of_adapters_is_small_and_of_one_process_has_no_second_weights() -> None:
    at = load_scale("60m")
    recipe: PosttrainRecipe = scale(load_recipe("midtrain"), at)
    shape = Shape(512, 1408, 128, 8, 16, 32768, True)
    one, two = (checkpoint_bytes(recipe, shape, Gpus(count, 24)) for count in (1, 2))
    assert (one, two) == (12 * shape.parameters, 14 * shape.parameters)
    lora = Lora(rank=16, alpha=32)
    adapters = checkpoint_bytes(replace(recipe, lora=lora), shape, Gpus(1, 24))
    assert adapters == 12 * shape.adapter_parameters(lora) < one / 10


@pytest.mark.parametrize("scale", SIZES)
def test_a_small_size_keeps_four_checkpoints_of_midtrain(scale: str) -> None:
    stages = {need.stage: need for need in planned(scale)}
    shape = stages["midtrain"].step
    assert shape and stages["midtrain"].disk == pytest.approx(
        (4 * 12 + 2) * shape.work.weights, rel=0.01
    )


# ---- the published run


def test_the_published_run_is_predicted() -> None:
    recipe = published.published()
    assert published.days(recipe, PLAIN) == pytest.approx(24, rel=0.15)
    one = memory(published.unsharded(recipe)).total / 1e9
    assert one == pytest.approx(published.GIGABYTES, rel=0.1)


def test_what_is_quoted_is_what_is_predicted() -> None:
    days = f"{published.days(published.published(), PLAIN):.1f} days"
    for file in ("docs/HOW_TO.md", "launch/machine/speed.py"):
        assert days in " ".join((ROOT / file).read_text().split()), file
    rows = {row[0]: row for row in published.comparison()}
    files = ("docs/LOG.md", "docs/HOW_TO.md")
    log, how_to = (" ".join((ROOT / f).read_text().split()) for f in files)
    for text in (log, how_to):
        assert f"{rows['fast step: dp 192 tp 2 3x4,096 x 1'][1]} days" in text
    assert f"({rows['one window a GPU: dp 384 1x6,144 x 1'][1]} days" in log
    assert f"({rows['the most GPUs without tp: dp 288 1x4,096 x 2'][1]} days" in log


def test_a_better_layout_is_found() -> None:
    rows = published.comparison()
    name, days, *_ = min(rows, key=lambda row: float(row[1]))
    assert float(days) < 0.7 * published.DAYS and name.startswith("fast step")
    assert {len(row) for row in rows} == {6}


# ---- the command


def test_the_command_at_the_published_scale() -> None:
    done = run(SCALE="full", GPU="h100-sxm", GPUS="384", PRICE="2")
    assert done.returncode == 0, done.stderr
    for text in ("14,066", "about 74", "dp 192 tp 2 3x4,096 x 1", "money", "predictions, not"):
        assert text in done.stdout
    assert "a prototype's measurements on one H100" in done.stdout


def test_the_command_without_a_card_lists_all() -> None:
    done = run(SCALE="135m", GPUS="4")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in load_cards())
    assert "SCALE=135m on 4 GPUs" in done.stdout and "┃ money" not in done.stdout


def test_the_gpus_that_are_found_are_planned_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("GPUS", "GPU_GB"):
        monkeypatch.delenv(name, raising=False)
    at = load_scale("60m")
    monkeypatch.setattr(plan, "gpus", lambda: Gpus(2, 23.6, "NVIDIA GeForce RTX 4090"))
    plan.show_plan(at, "", 0.0)
    assert "on 2 x rtx-4090 with 23.6 GiB each" in capsys.readouterr().out
    monkeypatch.setattr(plan, "gpus", lambda: Gpus(1, 15.6, "Tesla T4"))
    with pytest.raises(UserError, match=r"Tesla T4: no row of .*cards\.yaml; GPU= one"):
        plan.show_plan(at, "", 0.0)


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        (
            {"SCALE": "135m", "GPU": "rtx-4900"},
            "GPU=rtx-4900: unknown; did you mean 'rtx-4090'? Or add",
        ),
        (
            {"SCALE": "135m", "GPU": "h100"},
            "GPU=h100: unknown; write h100-pcie or h100-sxm; or add",
        ),
        ({"SCALE": "135m", "GPU": "t4"}, "GPU=t4: unknown; known: a10, "),
        ({"SCALE": "135n", "GPU": "rtx-4090"}, "unknown scale SCALE=135n; did you mean '135m'?"),
        ({"SCALE": "tiny", "GPU": "rtx-4090"}, "SCALE=tiny: trains on the CPU, "),
        ({"SCALE": "135m", "GPU": "h100-sxm", "GPUS": "no"}, "GPUS=no: not a number from 1"),
        ({"SCALE": "135m", "GPU": "l4", "GPUS": "9"}, "GPUS=9: cards.yaml knows no network"),
        ({"SCALE": "135m", "GPU_GB": "24"}, "GPU_GB=24: of which card? "),
        (
            {"SCALE": "135m", "ORIGIN": "stand-in"},
            "ORIGIN=stand-in: unknown; did you mean 'standin'?",
        ),
        ({"SCALE": "135m", "GPU": "l4", "GPUS": "0"}, "GPUS=0: not a number from 1"),
        ({"SCALE": "135m", "GPU": "l4", "GPUS": "²"}, "GPUS=²: not a number from 1"),
        ({"SCALE": "135m", "GPU": "l4", "GPUS": "9" * 5000}, f"GPUS={'9' * 100}: not a number"),
        ({"SCALE": "135m", "GPU": "l4", "GPU_GB": "abc"}, "GPU_GB=abc: not a number from 1"),
        ({"SCALE": "135m", "GPU": "l4", "PRICE": "-1"}, "PRICE=-1: must be "),
        ({"SCALE": "135m", "GPU": "l4", "PRICE": "inf"}, "PRICE=inf: not a sum of money; "),
        ({"SCALE": "135m", "FROM": "mine"}, "FROM=mine: plan counts the scale's own model; leave"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else "",
)
def test_what_cannot_be_planned_is_refused(variables: dict[str, str], line: str) -> None:
    assert refusal(**variables).startswith(line)


def test_a_scale_that_fits_nowhere_says_so(recipes: Path) -> None:
    file = recipes / "scales" / "huge.yaml"
    file.write_text(
        "extends: 1b.yaml\nscale: huge\nnanotron: {model: {model_config: {hidden_size: 16384}}}\n"
    )
    at: Scale = load_scale("huge")
    stages = needs(at, Gpus(1, 180, "b200"), card("b200"))
    problems = [need.problem for need in stages if need.stage.startswith("pretrain")]
    assert len(problems) == 3 and all("does not fit on 1 x 180 GiB" in one for one in problems)
