"""Weight decay leaves the embedding alone and shrinks all else, norms included."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from in_process import build, randomise_norms, single_process, tiny

from nanotron_ext import compat

EXCLUDE = [".*token_embedding.*"]
LR, DECAY = 0.25, 0.5
EMBEDDING = "model.token_position_embeddings.pp_block.token_embedding.weight"
HEAD = "model.lm_head.pp_block.weight"
STACKS = {
    "plain": {"zero_stage": 0, "accumulate_grad_in_fp32": False},
    "fp32 accumulation": {"zero_stage": 0, "accumulate_grad_in_fp32": True},
    "ZeRO-1": {"zero_stage": 1, "accumulate_grad_in_fp32": False},
    "ZeRO-1, fp32 accumulation": {"zero_stage": 1, "accumulate_grad_in_fp32": True},
}


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    with single_process() as parallel_context:
        yield parallel_context


def optimizer_of(model: Any, context: Any, stack: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """nanotron's optimizer for `model` as the trainer builds it."""
    import nanotron.helpers
    from nanotron.config.config import LRSchedulerArgs, OptimizerArgs

    from nanotron_ext.optimizer import exclude_from_decay

    # exclude_from_decay replaces it for good; this puts it back after the test
    monkeypatch.setattr(nanotron.helpers, "NamedOptimizer", nanotron.helpers.NamedOptimizer)
    exclude_from_decay(EXCLUDE)
    arguments = OptimizerArgs(
        **STACKS[stack],
        weight_decay=DECAY,
        clip_grad=None,
        adam_eps=1e-8,
        adam_beta1=0.9,
        adam_beta2=0.95,
        torch_adam_is_fused=False,
        learning_rate_scheduler=LRSchedulerArgs(learning_rate=LR, lr_warmup_style="linear"),
    )
    return nanotron.helpers.init_optimizer_and_grad_accumulator(model, arguments, context)


def small(context: Any, tied: bool, stack: str = "plain") -> Any:
    """In bf16 where gradients are accumulated in fp32: nanotron refuses the other."""
    dtype = torch.bfloat16 if STACKS[stack]["accumulate_grad_in_fp32"] else torch.float32
    config = tiny(num_hidden_layers=2, tie_word_embeddings=tied)
    # On a GPU where there is one: nanotron's accumulator and fused AdamW are there.
    model = build(config, context, dtype=dtype, device=compat.device())
    randomise_norms(model)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_the_groups_are_all_but_the_embedding_and_the_embedding(context: Any, tied: bool) -> None:
    from nanotron_ext.optimizer import split_by_decay

    model = small(context, tied)
    named = list(model.get_named_params_with_correct_tied())
    decayed, excluded = ([name for name, _ in group] for group in split_by_decay(named, EXCLUDE))
    assert excluded == [EMBEDDING]
    kinds = {name.split(".")[-2] for name in decayed}
    norms = {"input_layernorm", "post_attention_layernorm"}
    assert kinds == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "pp_block"} | norms
    assert (HEAD in decayed) == (not tied)
    assert "model.final_layer_norm.pp_block.weight" in decayed
    assert len(decayed) + len(excluded) == len(named) == len({id(p) for _, p in named})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stack", STACKS)
def test_a_step_without_gradient_shrinks_all_but_the_embedding(
    context: Any, stack: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(context, tied, stack)
    optimizer, accumulator = optimizer_of(model, context, stack, monkeypatch)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    for name, weight in model.get_named_params_with_correct_tied():
        weight.grad = torch.zeros_like(weight)
        if accumulator:
            accumulator.get_grad_buffer(name).zero_()
            half = accumulator.parameters[name]["half"]
            accumulator.get_parameter_for_optimizer(name).grad = torch.zeros_like(half.float())
    optimizer.step()
    for name, weight in model.named_parameters():
        kept = 1.0 if name == EMBEDDING else 1 - LR * DECAY
        wanted = (before[name].float() * kept).to(weight.dtype)
        assert torch.allclose(weight, wanted, rtol=torch.finfo(weight.dtype).eps, atol=0), name


@pytest.mark.parametrize("stack", STACKS)
def test_every_stack_has_one_decayed_and_one_excluded_group(
    context: Any, stack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a rank holds no embedding: the layout of the state is the same on all."""
    optimizer, _ = optimizer_of(small(context, True, stack), context, stack, monkeypatch)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [DECAY, 0.0]
    assert [len(group["params"]) for group in optimizer.param_groups] == [13, 1]


def test_without_the_exclusion_the_embedding_would_shrink(
    context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("test_optimizer.EXCLUDE", [])
    model = small(context, True)
    optimizer, _ = optimizer_of(model, context, "plain", monkeypatch)
    assert [len(group["params"]) for group in optimizer.param_groups] == [14, 0]
