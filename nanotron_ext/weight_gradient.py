"""Weight gradients added to nanotron's fp32 accumulator inside the matrix product that makes them.

The plain way writes each weight's gradient in bf16, reads it back and adds it to the fp32 buffer,
for every micro-batch; here no gradient of a linear layer is ever held in bf16, and none is rounded
to it. Legend: T tokens, C inputs, O outputs of a linear layer.
"""

from typing import Any

import torch
import torch.nn.functional as F


@torch.library.custom_op("smollm3::add_weight_gradient", mutates_args=("into_OC",))
def add_weight_gradient(
    into_OC: torch.Tensor, gradient_TO: torch.Tensor, x_TC: torch.Tensor
) -> None:
    """into += gradient.T @ x, `into` fp32. An operator, so that torch.compile may not take it apart.

    On a CPU, where no product of bf16 matrices ends in fp32, the product is rounded first.
    """
    if into_OC.is_cuda and x_TC.dtype != torch.float32:
        torch.addmm(into_OC, gradient_TO.t(), x_TC, out_dtype=torch.float32, out=into_OC)
    else:
        into_OC += gradient_TO.t() @ x_TC


@add_weight_gradient.register_fake
def _(into_OC: torch.Tensor, gradient_TO: torch.Tensor, x_TC: torch.Tensor) -> None:
    return None


class _AccumulatingLinear(torch.autograd.Function):
    """F.linear without bias; its weight gets no gradient from autograd, `into_OC` gets it all."""

    @staticmethod
    def forward(
        ctx: Any, x_TC: torch.Tensor, weight_OC: torch.Tensor, into_OC: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TC, weight_OC, into_OC)
        return F.linear(x_TC, weight_OC)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x_TC, weight_OC, into_OC = ctx.saved_tensors
        (gradient_TO,) = gradients
        add_weight_gradient(into_OC, gradient_TO, x_TC)
        return gradient_TO @ weight_OC, None, None


def accumulating_linear(
    x_TC: torch.Tensor, weight_OC: torch.Tensor, into_OC: torch.Tensor | None
) -> torch.Tensor:
    """x @ weight.T; the weight's gradient goes to `into_OC`, or through autograd where it is None."""
    if into_OC is None:
        return F.linear(x_TC, weight_OC)
    return _AccumulatingLinear.apply(x_TC, weight_OC, into_OC)
