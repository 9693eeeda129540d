"""SFT and APO as they train: losses against their formulas, artifacts, metrics, what is left behind."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from posttrain_jobs import make_folder, run_in_process, write_start

from ground.errors import UserError

SCORES = ["think_well_formed", "no_think_well_formed", "tool_call_parses", "tool_listed"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_start(root / "model")
    return root


@pytest.fixture(scope="module")
def sft(root: Path) -> Path:
    return run_in_process(make_folder(root / "sft", "sft", root / "model"))


@pytest.fixture(scope="module")
def apo(root: Path, sft: Path) -> Path:
    return run_in_process(make_folder(root / "apo", "apo", sft / "hf"))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def trainer_of(folder: Path) -> Any:
    """The stage's trainer at its start."""
    from datasets import load_from_disk

    from posttrain.data import load_tokenizer
    from posttrain.job import Job
    from posttrain.stage import Stage

    job = Job.read(folder)
    return Stage(folder, job, load_tokenizer(job)).trainer(load_from_disk(str(folder / "data")))


# ---- SFT


def test_sft_loss_is_the_mean_over_trained_tokens(sft: Path) -> None:
    trainer = trainer_of(sft)
    batch = next(iter(trainer.get_train_dataloader()))
    trained = (batch["labels"] != -100).sum()
    ours = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=trained)
    ours.backward()
    gradient = trainer.model.model.layers[1].mlp.up_proj.weight.grad.clone()
    trainer.model.zero_grad()
    logits = trainer.model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).logits
    plain = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
    )
    plain.backward()
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
    theirs = trainer.model.model.layers[1].mlp.up_proj.weight.grad
    torch.testing.assert_close(gradient, theirs, rtol=1e-4, atol=1e-7)


def test_accumulated_micro_batches_weigh_each_token_alike(sft: Path) -> None:
    trainer = trainer_of(sft)
    loader = iter(trainer.get_train_dataloader())
    halves = [next(loader), next(loader)]
    both = sum(int((half["labels"] != -100).sum()) for half in halves)
    losses = [
        trainer.compute_loss(trainer.model, dict(half), num_items_in_batch=torch.tensor(both))
        for half in halves
    ]
    alone = [trainer.compute_loss(trainer.model, dict(half)) for half in halves]
    weights = [int((half["labels"] != -100).sum()) / both for half in halves]
    expected = sum(w * loss.item() for w, loss in zip(weights, alone, strict=True))
    assert sum(losses).item() == pytest.approx(expected, rel=1e-5)


def test_metrics_have_a_line_a_step_and_scores_every_few(sft: Path) -> None:
    found = lines(sft)
    assert [line["step"] for line in found] == list(range(1, 9))
    assert all({"loss", "lr", "grad_norm", "tokens_per_second"} <= set(line) for line in found)
    tokens = [line["tokens"] for line in found]
    assert tokens[0] > 1000 and tokens == sorted(set(tokens))
    for line in found:
        assert (set(SCORES) <= set(line)) == (line["step"] == 4)  # the last is scored on more
    assert found[-1]["lr"] == pytest.approx(0.1 * 0.01, rel=0.5)


def test_tokens_count_what_is_trained_on_not_the_padding(sft: Path) -> None:
    counted, found = read(sft / "data.json"), lines(sft)
    # 8 steps of 4 windows; all windows of an epoch hold all tokens
    share = 8 * 4 / counted["windows"]
    assert found[-1]["tokens"] - 1000 == pytest.approx(counted["tokens"] * share, rel=0.15)


def test_results_have_figures_before_and_after(sft: Path, apo: Path) -> None:
    for folder in (sft, apo):
        scores = read(folder / "results.json")["scores"]
        assert read(folder / "machine.json")["peak_memory_bytes"] > 10**8
        for when in ("before", "after"):
            assert set(SCORES) <= set(scores[when])
            assert all(
                0 <= value <= 1 for name, value in scores[when].items() if "margin" not in name
            )
    assert {"reward_accuracy", "reward_margin"} <= set(
        read(apo / "results.json")["scores"]["after"]
    )


def test_the_model_carries_template_tokenizer_and_end_token(sft: Path, apo: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for folder in (sft / "hf", apo / "hf"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert tokenizer.eos_token == "<|im_end|>" and "short_system" in tokenizer.chat_template
        ends = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
        assert end in (ends if isinstance(ends, list) else [ends])
        assert not list(folder.glob("*.bin")) and not list(folder.parent.glob("*.partial"))


def test_training_changes_the_model_and_lowers_the_loss(sft: Path) -> None:
    found = lines(sft)
    assert found[-1]["loss"] < 0.9 * found[0]["loss"]


def test_the_world_is_asserted(root: Path) -> None:
    from posttrain.stage import train

    folder = make_folder(root / "world", "sft", root / "model", world_size=2)
    with pytest.raises(UserError, match="made up of 2 processes, 1 are running"):
        train(folder)


def test_a_checkpoint_of_other_processes_is_refused(sft: Path, tmp_path: Path) -> None:
    from posttrain.stage import train

    folder = shutil.copytree(sft, tmp_path / "sft")
    last = folder / "checkpoints" / "8"
    shutil.copy(last / "rng_state.pth", last / "rng_state_1.pth")
    with pytest.raises(
        UserError, match="8: written by 2 processes, 1 are running: go on with GPUS=2"
    ):
        train(folder)


def test_a_diverged_loss_ends_the_run(root: Path) -> None:
    from posttrain.data import prepare_data
    from posttrain.stage import train

    folder = make_folder(
        root / "nan", "sft", root / "model", held_out="", trl={"learning_rate": 1e30}
    )
    prepare_data(folder)
    with pytest.raises(UserError, match=r"the loss is nan at step \d: lower trl.learning_rate"):
        train(folder)
    assert not (folder / "hf").exists()


# ---- APO


def random_pairs(seed: int = 0, pairs: int = 5) -> dict[str, Any]:
    """A batch of random tokens and random reference log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 250, (2 * pairs, 12), generator=generator)
    completion = torch.zeros_like(ids)
    completion[:, 5:] = 1
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": completion,
        "ref_chosen_logps": -40 + 10 * torch.randn(pairs, generator=generator),
        "ref_rejected_logps": -40 + 10 * torch.randn(pairs, generator=generator),
    }


def log_probs(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    each = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (each * batch["completion_mask"][:, 1:]).sum(1)


@pytest.mark.parametrize("seed", range(3))
def test_apo_zero_is_its_formula(apo: Path, seed: int) -> None:
    """[1 - sigmoid(beta r_w)] + sigmoid(beta r_l), r the log-ratio to the reference (APO paper, 7)."""
    trainer = trainer_of(apo)
    batch = random_pairs(seed)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    chosen, rejected = log_probs(trainer.model, batch).chunk(2)
    r_w, r_l = chosen - batch["ref_chosen_logps"], rejected - batch["ref_rejected_logps"]
    expected = ((1 - torch.sigmoid(0.05 * r_w)) + torch.sigmoid(0.05 * r_l)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_gradients_raise_the_chosen_and_lower_the_rejected(apo: Path) -> None:
    trainer = trainer_of(apo)
    batch = random_pairs(pairs=1)
    before = log_probs(trainer.model, batch).detach()
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    for side, sign in ((0, 1.0), (1, -1.0)):
        log_probs(trainer.model, batch)[side].backward()
        along = sum(
            (gradients[name] * parameter.grad).sum().item()
            for name, parameter in trainer.model.named_parameters()
        )
        trainer.model.zero_grad()
        assert along * sign < 0  # a step against the gradient raises or lowers it
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            parameter -= 0.1 * gradients[name]
    after = log_probs(trainer.model, batch).detach()
    assert after[0] > before[0] and after[1] < before[1]


def test_the_loss_is_one_at_the_first_step(apo: Path) -> None:
    assert lines(apo)[0]["loss"] == pytest.approx(1.0, abs=1e-5)


def test_reference_log_probs_are_those_of_the_start(sft: Path, apo: Path) -> None:
    from datasets import load_from_disk
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(sft / "hf")
    stored = load_file(apo / "reference_log_probs.safetensors")
    data = load_from_disk(str(apo / "data"))
    assert len(stored["chosen"]) == len(data) == 24 + 20
    for index in (0, 7, 43):
        row = data[index]
        for side in ("chosen", "rejected"):
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            mask = torch.zeros_like(ids)
            mask[:, len(row["prompt_ids"]) :] = 1
            batch = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "completion_mask": mask,
            }
            expected = log_probs(model, batch).item()
            assert stored[side][index].item() == pytest.approx(expected, rel=1e-4)


def test_a_second_start_takes_the_stored_reference(apo: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "apo"
    shutil.copytree(apo, folder)
    file = folder / "reference_log_probs.safetensors"
    marked = {side: torch.full_like(sums, -7.0) for side, sums in load_file(file).items()}
    save_file(marked, file)
    assert set(trainer_of(folder).train_dataset["ref_chosen_logps"]) == {-7.0}
    save_file({side: sums[:-1].clone() for side, sums in marked.items()}, file)
    with pytest.raises(UserError, match="43 pairs, the data has 44: delete it"):
        trainer_of(folder)


def test_preference_figures_are_those_of_their_definitions() -> None:
    from posttrain.apo import preference_figures

    #                       chosen: sum, tokens   rejected: sum, tokens
    reference = torch.tensor([[[-8.0, 4], [-9.0, 3]], [[-8.0, 4], [-4.0, 4]]])
    policy = torch.tensor([[[-4.0, 4], [-9.0, 3]], [[-12.0, 4], [-6.0, 4]]])
    figures = preference_figures(policy, reference, 0.05)
    assert figures["reward_accuracy"] == 0.5  # ratios 4 > 0, and -4 < -2
    assert figures["reward_margin"] == pytest.approx(0.05 * ((4 - 0) + (-4 + 2)) / 2)
    assert figures["reward_margin_at_beta_0.1"] == pytest.approx(0.1)
    assert figures["chosen_more_likely"] == 0.5  # means -1 > -3, and -3 < -1.5


def test_a_figure_that_is_no_number_ends_the_run_before_its_weights_are_written(
    apo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.stage import train

    folder = tmp_path / "apo"
    shutil.copytree(apo, folder)
    shutil.rmtree(folder / "hf")
    (folder / "after.json").unlink()
    monkeypatch.setattr("posttrain.apo.preference_figures", lambda *_: {"reward_margin": math.nan})
    with pytest.raises(UserError, match=r"apo: reward_margin is nan: lower trl\.learning"):
        train(folder)
    assert not (folder / "hf").exists()


def test_completion_log_probs_do_not_depend_on_the_batch(sft: Path, apo: Path) -> None:
    from datasets import load_from_disk
    from transformers import AutoModelForCausalLM

    from posttrain.apo import completion_log_probs

    model = AutoModelForCausalLM.from_pretrained(sft / "hf")
    pairs = list(load_from_disk(str(apo / "data")))[:7]
    together, alone = (completion_log_probs(model, pairs, 0, size) for size in (7, 1))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert together[3, 1, 1] == len(pairs[3]["rejected_ids"])
    assert all(math.isfinite(value) for value in together.flatten().tolist())
