"""Weight gradients over data-parallel ranks, layer by layer while the backward pass goes on.

nanotron leaves this overlap to DDP, whose bf16 buckets would hold nothing but zeros where
`weight_gradient.py` adds to the fp32 buffer; without DDP it reduces that buffer after the last
backward pass. Here a layer's linear layers, nearly all of the buffer, are on their way as soon as
the layer is done.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from nanotron_ext import compat
from nanotron_ext.linear import ColumnLinear, RowLinear

compat.activate()

from nanotron import distributed as dist  # noqa: E402


class OverlappedReduction:
    """Takes the place of two methods of nanotron's FP32GradientAccumulator."""

    def __init__(
        self, accumulator: Any, layers: Iterable[nn.Module], dp_pg: Any, micro_batches: int
    ):
        """`micro_batches` of each rank make one step."""
        self.dp_pg, self.micro_batches = dp_pg, micro_batches
        self.left = micro_batches
        self.handles: list[Any] = []
        early = {buffer.data_ptr() for layer in layers for buffer in _buffers(layer)}
        buffers = [entry["fp32_grad"] for entry in accumulator.fp32_grad_buffers.values()]
        self.late = [buffer for buffer in buffers if buffer.data_ptr() not in early]
        for layer in layers:
            layer.register_forward_pre_hook(self._watch, with_kwargs=True)
        self._backward = accumulator.backward
        accumulator.backward = self.backward
        accumulator.sync_gradients_across_dp = self.sync_gradients_across_dp

    def backward(self, loss: torch.Tensor) -> Any:
        self.left -= 1
        return self._backward(loss)

    def _watch(self, layer: nn.Module, _: Any, inputs: dict[str, torch.Tensor]) -> None:
        """Reduce the layer once the gradient of its input is there: it is the last to come."""
        hidden_states = inputs["hidden_states"]
        if hidden_states.requires_grad:
            hidden_states.register_hook(lambda _: self._reduce(layer))

    def _reduce(self, layer: nn.Module) -> None:
        if self.left == 0:
            self.handles += [
                dist.all_reduce(buffer, dist.ReduceOp.AVG, group=self.dp_pg, async_op=True)
                for buffer in _buffers(layer)
            ]

    def sync_gradients_across_dp(self, **_: Any) -> None:  # nanotron calls this once a step
        dist.all_reduce_coalesced(self.late, op=dist.ReduceOp.AVG, group=self.dp_pg)
        for handle in self.handles:
            handle.wait()
        self.handles, self.left = [], self.micro_batches


def _buffers(layer: nn.Module) -> list[torch.Tensor]:
    return [
        linear.accumulated_OC
        for linear in layer.modules()
        if isinstance(linear, ColumnLinear | RowLinear) and linear.accumulated_OC is not None
    ]
