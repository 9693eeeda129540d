"""LoRA by one key: what is trained, what is stored, and a merge that changes nothing."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit
from posttrain_jobs import make_folder, start, write_start
from small_models import weights

from ground.errors import UserError
from ground.files import checkpoints
from launch.recipe.scale import load_scale
from launch.walk import resolve
from posttrain.data import prepare_data
from posttrain.lora import merged

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": TARGETS}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lora")
    write_start(root / "model")
    return root


def trained(root: Path, name: str, stage: str, **changes: Any) -> Path:
    from posttrain_jobs import run_in_process

    changes = {"lora": LORA, **changes}
    return run_in_process(make_folder(root / name, stage, root / "model", **changes))


@pytest.fixture(scope="module")
def sft(root: Path) -> Path:
    return trained(root, "sft", "sft")


@pytest.fixture(scope="module")
def apo(root: Path) -> Path:
    return trained(root, "apo", "apo")


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 205).view(2, 100)
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return result


@pytest.mark.parametrize("stage", ["sft", "apo"])
def test_the_merged_model_says_what_the_adapter_said(
    stage: str, root: Path, request: pytest.FixtureRequest
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = request.getfixturevalue(stage)
    base = AutoModelForCausalLM.from_pretrained(root / "model")
    before = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, str(folder / "adapter")))
    ours = logits(AutoModelForCausalLM.from_pretrained(folder / "hf"))
    torch.testing.assert_close(ours, adapted, rtol=0, atol=1e-5)
    assert (ours - before).abs().max() > 1e-2, "something was learnt"


@pytest.mark.parametrize("stage", ["sft", "apo"])
def test_adapters_alone_are_trained_and_stored(
    stage: str, root: Path, request: pytest.FixtureRequest
) -> None:
    from safetensors.torch import load_file

    folder = request.getfixturevalue(stage)
    for saved in checkpoints(folder):
        assert not list(saved.glob("model*.safetensors"))
        names = load_file(saved / "adapter_model.safetensors")
        assert len(names) == 4 * len(TARGETS) * 2 and all(".lora_" in name for name in names)
    # The embedding and the norms are the start's.
    before, after = weights(root / "model"), weights(folder / "hf")
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {name for name in before if re.search(r"\.\w+_proj\.weight$", name)}


def test_the_reference_is_the_model_without_its_adapter(root: Path, apo: Path) -> None:
    from safetensors.torch import load_file

    plain = trained(root, "plain", "apo", lora=None)
    ours, theirs = (load_file(f / "reference_log_probs.safetensors") for f in (apo, plain))
    for side in ("chosen", "rejected"):
        torch.testing.assert_close(ours[side], theirs[side])
    first = json.loads((apo / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(1.0, abs=1e-5)
    figures = [json.loads((f / "results.json").read_text())["scores"] for f in (apo, plain)]
    assert figures[0]["before"] == pytest.approx(figures[1]["before"])
    assert figures[0]["after"]["reward_accuracy"] >= 0.5


def test_the_merged_model_carries_template_tokenizer_and_end_token(sft: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sft / "hf")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template
    ends = AutoModelForCausalLM.from_pretrained(sft / "hf").generation_config.eos_token_id
    assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])
    assert {file.name for file in (sft / "hf").iterdir()} <= {
        "chat_template.jinja", "checksums.json", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_recomputed_layers_give_the_adapters_the_same_gradients(root: Path, sft: Path) -> None:
    checkpointed = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }
    again = trained(root, "checkpointed", "sft", trl=checkpointed)
    ours, theirs = weights(again / "hf"), weights(sft / "hf")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)


def test_a_base_in_bf16_is_merged_in_fp32_and_rounded_once(root: Path, sft: Path) -> None:
    model = merged(sft / "adapter", torch.bfloat16)
    exact = weights(sft / "hf")
    found = model.state_dict()
    assert all(found[name].equal(tensor.bfloat16()) for name, tensor in exact.items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "apo"])
def test_killed_and_started_again_it_ends_in_the_same_bits(root: Path, stage: str) -> None:
    from test_posttrain_resume import finish, kill_once, logged

    options = {"lora": {**LORA, "dropout": 0.1}}
    whole, killed = (
        make_folder(root / f"{stage}-{name}", stage, root / "model", **options)
        for name in ("whole", "killed")
    )
    for folder in (whole, killed):
        prepare_data(folder)
    finish(whole)
    kill_once(killed, lambda: logged(killed) >= 2)  # before the first checkpoint, at step 3
    kill_once(killed, lambda: logged(killed) >= 5)
    assert start(killed).wait(200) == 0
    for place in ("hf", "adapter"):
        ours, theirs = weights(killed / place), weights(whole / place)
        assert ours and ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in ours)


MISTAKES = {
    "rank: 4, alpha: 8, targets: [lm_head]": "lora.targets.0: 'lm_head'",
    "rank: 0, alpha: 8": "lora.rank: 0",
    "rank: 4": "lora.alpha: missing",
    "rank: 4, alpha: 8, r: 4": "lora.r: unknown key",
    "rank: 4, alpha: 8, targets: [q_proj, q_proj]": "lora.targets",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_one_line(text: str, recipes: Path) -> None:
    edit(recipes / "posttrain/sft.yaml", "\ntrl:\n", f"\nlora: {{{text}}}\n\ntrl:\n")
    with pytest.raises(UserError) as error:
        resolve("sft", load_scale("tiny"))
    assert MISTAKES[text] in str(error.value) and "\n" not in str(error.value)


def test_the_key_reaches_the_job_and_the_identity(recipes: Path) -> None:
    before = resolve("sft", load_scale("tiny"))
    assert "lora" not in before.recipe_values(), "a finished run stays finished"
    edit(recipes / "posttrain/sft.yaml", "\ntrl:\n", "\nlora: {rank: 4, alpha: 8}\n\ntrl:\n")
    after = resolve("sft", load_scale("tiny"))
    assert after.identity != before.identity
    assert "peft" in after.versions and "peft" not in before.versions
    assert after.recipe_values()["lora"]["targets"] == tuple(TARGETS)


def test_a_soup_takes_checkpoints_of_adapters(root: Path, apo: Path) -> None:
    from posttrain.merge import merge

    saved = checkpoints(apo)[-2:]
    models = [{"model": str(one), "parameters": {"weight": 1.0}} for one in saved]
    config = {"merge_method": "linear", "dtype": "float32", "out_dtype": "float32"}
    merge({**config, "models": models}, root / "soup", apo / "hf")
    one, other = (merged(folder).state_dict() for folder in saved)
    for name, tensor in weights(root / "soup").items():
        torch.testing.assert_close(tensor, (one[name] + other[name]) / 2, rtol=1e-6, atol=1e-7)
    shutil.rmtree(root / "soup")
