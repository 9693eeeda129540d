"""A merge is the weighted average of its inputs to the bit, or is refused before it is written."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, edit
from damaged import DAMAGED, Damage, cut
from small_models import NORM, set_config, shard, spoil, weights, write_model
from stage_runs import PlainStage, plain

from ground.errors import UserError
from launch.recipe.scale import load_scale
from launch.run.folder import StageRun
from launch.stages.merge import MergeStage
from launch.walk import resolve
from posttrain.merge import merge

SHARES = [(1.0, 1.0), (0.9, 0.1), (0.7, 0.0)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("a", "b")):
        write_model(folder / name, seed)
    return folder


@pytest.fixture
def models(made: Path, tmp_path: Path) -> Path:
    """Folders a/ and b/, to be spoilt."""
    shutil.copytree(made, tmp_path / "models")
    return tmp_path / "models"


def config(models: Path, shares: tuple[float, ...], out_dtype: str = "float32") -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "dtype": "float32",
        "out_dtype": out_dtype,
        "models": [
            {"model": str(models / name), "parameters": {"weight": share}}
            for name, share in zip("ab", shares, strict=True)
        ],
    }


def average(tensors: list[np.ndarray], shares: tuple[float, ...], fused: bool) -> np.ndarray:
    """sum(w * x) / sum(w) in fp32, from left to right; `fused` rounds product and sum at once."""
    total = np.zeros_like(tensors[0])
    for tensor, share in zip(tensors, np.float32(shares), strict=True):
        if fused:  # a product of two fp32 is exact in fp64
            exact = tensor.astype(np.float64) * np.float64(share)
            total = (total.astype(np.float64) + exact).astype(np.float32)
        else:
            total = total + tensor * share
    return total / np.float32(shares).sum(dtype=np.float32)


def is_average(merged: Path, inputs: list[Path], shares: tuple[float, ...]) -> bool:
    """Whether every bit is as computed here: a CPU has a fused multiply-add, or has none."""
    found, given = weights(merged), [weights(folder) for folder in inputs]
    assert found.keys() == given[0].keys()
    return any(
        all(
            np.array_equal(
                found[name].numpy(), average([g[name].numpy() for g in given], shares, fused)
            )
            for name in found
        )
        for fused in (True, False)
    )


@pytest.mark.parametrize("shares", SHARES)
def test_merged_weights_are_the_weighted_average_to_the_bit(
    made: Path, tmp_path: Path, shares: tuple[float, float]
) -> None:
    merge(config(made, shares), tmp_path / "out", made / "a")
    assert is_average(tmp_path / "out", [made / "a", made / "b"], shares)


@pytest.mark.parametrize("mended", [False, True])
def test_a_folder_written_anew_is_read_anew(models: Path, tmp_path: Path, mended: bool) -> None:
    """False: mergekit by itself still reads the old weights; if not, compat.py needs no mend."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge as run_mergekit
    from mergekit.options import MergeOptions

    given = config(models, (0.9, 0.1))
    merge(given, tmp_path / "first", models / "a")
    shutil.rmtree(models / "b")
    write_model(models / "b", 11)
    if mended:
        merge(given, tmp_path / "second", models / "a")
    else:
        options = MergeOptions(copy_tokenizer=False, write_model_card=False)
        run_mergekit(MergeConfiguration.model_validate(given), str(tmp_path / "second"), options)
    inputs = [models / "a", models / "b"]
    assert is_average(tmp_path / "second", inputs, (0.9, 0.1)) == mended


def test_bfloat16_rounds_the_fp32_average_once(made: Path, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        merge(config(made, (0.9, 0.1), dtype), tmp_path / dtype, made / "a")
    exact, rounded = weights(tmp_path / "float32"), weights(tmp_path / "bfloat16")
    for name, tensor in rounded.items():
        assert torch.equal(tensor, exact[name].bfloat16())
    assert json.loads((tmp_path / "bfloat16/config.json").read_text())["dtype"] == "bfloat16"


def test_bfloat16_inputs_are_averaged_in_fp32(made: Path, models: Path, tmp_path: Path) -> None:
    for name in "ab":
        write_model(models / name, ord(name), torch.bfloat16)
        single = weights(models / name)
        spoil(models / name, {key: tensor.float() for key, tensor in single.items()})
        shutil.move(models / name, models / f"{name}32")
        write_model(models / name, ord(name), torch.bfloat16)
    merge(config(models, (0.9, 0.1)), tmp_path / "out", models / "a")
    assert is_average(tmp_path / "out", [models / "a32", models / "b32"], (0.9, 0.1))


def test_shards_are_read_as_one_model(models: Path, tmp_path: Path) -> None:
    merge(config(models, (0.9, 0.1)), tmp_path / "whole", models / "a")
    shard(models / "b")
    merge(config(models, (0.9, 0.1)), tmp_path / "shards", models / "a")
    whole, shards = weights(tmp_path / "whole"), weights(tmp_path / "shards")
    assert whole.keys() == shards.keys()
    assert all(torch.equal(whole[name], shards[name]) for name in whole)


def test_tokenizer_template_and_generation_config_are_the_lenders_bytes(
    made: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merge(config(made, (0.9, 0.1)), tmp_path / "out", made / "b")
    lent = {file.name for file in (made / "b").iterdir()} - {"config.json", "model.safetensors"}
    assert {"generation_config.json", "chat_template.jinja", "tokenizer.json"} <= lent
    for name in lent:
        assert (tmp_path / "out" / name).read_bytes() == (made / "b" / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.no_rope_layers[3] == 0


def swap_tokens(folder: Path) -> None:
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    file.write_text(json.dumps(values))


# Whole folders that are not of the first one's model.
OTHERS: dict[str, tuple[Damage, str]] = {
    "shape": (lambda b: spoil(b, {NORM: torch.ones(16)}),
        r"model\.safetensors: 'model\.norm\.weight' has shape \(16,\), \(32,\) in"),
    "a tensor missing": (lambda b: spoil(b, {NORM: None}),
        r"b: no tensor 'model\.norm\.weight' \(1 missing\), which"),
    "a tensor too many": (lambda b: spoil(b, {"extra": torch.ones(1)}),
        "b: tensor 'extra' is not of"),
    "no config": (lambda b: (b / "config.json").unlink(), "config.json: no such file; name a"),
    "broken config": (lambda b: cut(b / "config.json"), "config.json: not JSON"),
    "heads of another width": (
        lambda b: set_config(b, '"num_attention_heads": 4', '"num_attention_heads": 2'),
        "num_attention_heads: 2, 4 in"),
    "another layer without positions": (
        lambda b: set_config(b, '"no_rope_layers": [\n    1', '"no_rope_layers": [\n    0'),
        "no_rope_layers"),
    "another vocabulary": (swap_tokens, r"tokenizer\.json: token '[AB]' is \d+, \d+ in"),
}  # fmt: skip
BAD = DAMAGED | OTHERS


@pytest.mark.parametrize("name", BAD)
def test_inputs_that_mergekit_would_merge_silently_are_named(
    models: Path, tmp_path: Path, name: str
) -> None:
    damage, words = BAD[name]
    target = tmp_path / "out"
    merge(config(models, (1.0, 1.0)), target, models / "a")
    before = (target / "model.safetensors").read_bytes()
    damage(models / "b")
    with pytest.raises(UserError, match=words) as caught:
        merge(config(models, (0.9, 0.1)), target, models / "a")
    assert str(models / "b") in str(caught.value) and "\n" not in str(caught.value)
    assert (target / "model.safetensors").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"models", "out"}


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ((0.0, 0.0), "every weight is 0"),
        ((1.0, -0.5), r"models\[1\].*at least 0"),
        ((float("nan"), 1.0), r"models\[0\].*weight: nan"),
    ],
)
def test_weights_without_an_average_are_refused(
    made: Path, tmp_path: Path, shares: tuple[float, float], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        merge(config(made, shares), tmp_path / "out", made / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_merge_that_fails_half_way_leaves_the_old_folder(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    merge(config(made, (1.0, 1.0)), target, made / "a")
    before = {file.name: file.read_bytes() for file in target.iterdir()}

    def fail(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("posttrain.merge.check_merged", fail)
    with pytest.raises(OSError, match="No space left"):
        merge(config(made, (0.9, 0.1)), target, made / "a")
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import json, os, signal, sys
from pathlib import Path
from posttrain import merge
merge.check_merged = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
config, target, lender = json.loads(sys.argv[1])
merge.merge(config, Path(target), Path(lender))
"""


@pytest.mark.slow
def test_a_merge_that_was_killed_is_made_again_to_the_same_bits(made: Path, tmp_path: Path) -> None:
    target, whole = tmp_path / "out", tmp_path / "whole"
    given = [config(made, (0.9, 0.1)), str(target), str(made / "a")]
    command = [sys.executable, "-c", KILLED, json.dumps(given)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists() and (tmp_path / "out.partial/model.safetensors").exists()
    merge(config(made, (0.9, 0.1)), target, made / "a")
    merge(config(made, (0.9, 0.1)), whole, made / "a")
    for file in whole.iterdir():
        assert (target / file.name).read_bytes() == file.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}


# ---- the stages


def merging(name: str, *takes: StageRun) -> MergeStage:
    """A merging stage of the pipeline with these stages in place of those that it takes."""
    stage = resolve(name, load_scale("tiny"))
    assert isinstance(stage, MergeStage)
    return replace(stage, inputs={run.stage: run for run in takes})


@pytest.fixture
def apo(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlainStage:
    """A finished APO stage whose last checkpoints are a and b, and an older one that is neither."""
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    run = plain("apo")
    for step, name in (("checkpoint-9", "a"), ("checkpoint-10", "b")):
        shutil.copytree(made / name, run.folder / "checkpoints" / step)
    write_model(run.folder / "checkpoints" / "checkpoint-2", 7)
    shutil.copytree(made / "b", run.folder / "hf")
    return run


def test_checkpoints_are_counted_from_the_last_step(apo: PlainStage) -> None:
    (apo.folder / "checkpoints" / "checkpoint-11.partial").mkdir()
    soup = plain("soup", takes=[apo])
    found = [soup.model_folder(f"apo/checkpoints/-{n}").name for n in (1, 2, 3)]
    assert found == ["checkpoint-10", "checkpoint-9", "checkpoint-2"]
    assert soup.model_folder("apo/hf") == apo.folder / "hf"
    with pytest.raises(UserError, match=r"apo/checkpoints/-4: .* has 3 checkpoints"):
        soup.model_folder("apo/checkpoints/-4")


def test_soup_then_merge_is_nine_tenths_of_the_mean_and_a_tenth_of_the_partner(
    apo: PlainStage, made: Path, tmp_path: Path
) -> None:
    partner = plain("longctx-64k")
    write_model(partner.folder / "hf", 5)
    soup = merging("soup", apo)
    soup.work(0)
    assert is_average(soup.folder / "hf", [made / "a", made / "b"], (1.0, 1.0))
    merged = merging("merge", soup, partner)
    results = merged.work(0)
    assert [(row["model"], row["weight"]) for row in results["merged"]] == [
        ("soup/hf", 0.9),
        ("longctx-64k/hf", 0.1),
    ]
    inputs = [weights(run.folder / "hf") for run in (soup, partner)]
    for name, tensor in weights(merged.folder / "hf").items():
        exact = [average([w[name].numpy() for w in inputs], (0.9, 0.1), f) for f in (True, False)]
        assert any(torch.equal(tensor, torch.from_numpy(x).bfloat16()) for x in exact)
    for name in ("chat_template.jinja", "generation_config.json"):
        lent = (apo.folder / "hf" / name).read_bytes()
        assert (merged.folder / "hf" / name).read_bytes() == lent


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "dtype: float32  ",
            "dtype: bfloat16  ",
            r"soup\.yaml: dtype: 'bfloat16': write 'float32'",
        ),
        ("merge_method: linear", "merge_method: ties", "merge_method: 'ties': write 'linear'"),
        ("weight: 1.0", "weight: -1.0", r"models\.0\.parameters\.weight: -1\.0: write at least"),
        (
            "apo/checkpoints/-2",
            "sft/hf",
            "models.0.model: sft/hf: soup takes no stage 'sft' .*known: apo",
        ),
        ("merge_method", "method", "method: unknown key"),
    ],
)
def test_a_recipe_that_cannot_be_merged_is_refused(
    recipes: Path, old: str, new: str, words: str
) -> None:
    edit(recipes / "merge/soup.yaml", old, new)
    with pytest.raises(UserError, match=words):
        resolve("soup", load_scale("tiny")).refuse()
