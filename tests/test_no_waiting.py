"""Forward and backward pass ask the device for no value, which on a GPU would wait for all before.

Meta tensors have shapes and no values: whatever reads one raises. test_gpu_training.py lets torch
watch whole steps on a GPU.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from in_process import build, single_process, tiny
from torch.func import functional_call

from nanotron_ext import attention, fast_step
from nanotron_ext.job import FastStep

SETTING = fast_step.Setting(
    "cuda", has_c_compiler=True, tp=1, pp=1, accumulates_in_fp32=False, logits_bytes=1
)
STEPS = {
    "plain": FastStep(False, False, False, 9.0, False),
    "fast": FastStep(compile_layer=False, fused_weight_gradients=False),
    "head in chunks": FastStep(
        compile_layer=False, fused_weight_gradients=False, whole_logits_gib=0.0
    ),
}


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    with single_process() as parallel_context:
        yield parallel_context


class Step(torch.nn.Module):
    """Both passes in one call, while the weights are replaced: recomputation reads them again."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **batch: torch.Tensor) -> None:
        self.model(**batch)["loss"].backward()


def on_meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def step(context: Any, options: FastStep, **changes: Any) -> dict[str, torch.Tensor]:
    model = build(tiny(**changes), context, dtype=torch.bfloat16).train()
    fast_step.apply(model, fast_step.choose(options, SETTING), None)
    for module in model.modules():
        if isinstance(module, fast_step.Attention):
            module.backend = attention.varlen()
    both = Step(model)
    weights = {
        name: on_meta(weight.dtype, *weight.shape).requires_grad_()
        for name, weight in both.named_parameters()
    }
    batch = {name: on_meta(torch.int64, 2, 48) for name in ("input_ids", "position_ids")}
    batch |= {"label_ids": on_meta(torch.int64, 2, 48), "label_mask": on_meta(torch.bool, 2, 48)}
    batch |= {"cu_seqlens": on_meta(torch.int32, 7)}
    functional_call(both, weights, kwargs=batch)
    return weights


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_no_value_is_read_in_forward_and_backward(context: Any, name: str, recompute: bool) -> None:
    weights = step(context, STEPS[name], recompute_layer=recompute, z_loss_coefficient=0.1)
    assert all(weight.grad is not None for weight in weights.values())


def test_a_borders_read_back_would_be_seen(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_back(cu_seqlens: torch.Tensor, longest: int) -> attention.Documents:
        return attention.Documents(cu_seqlens, cu_seqlens.diff().tolist(), longest)

    monkeypatch.setattr("nanotron_ext.model.documents_of", read_back)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        step(context, STEPS["plain"])
