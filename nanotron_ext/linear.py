"""nanotron's tensor-parallel linear layers, with a fast way through them (`fast_step.py`).

As built they are nanotron's own. `is_fast` leaves out the autograd functions of a group of one, which
torch.compile would trace for nothing; `accumulated_OC` takes the weight's gradient.

Legend: T tokens (T/tp outside, under sequence parallelism), C inputs, O outputs on this rank.
"""

import torch

from nanotron_ext import compat
from nanotron_ext.weight_gradient import accumulating_linear

compat.activate()

from nanotron.parallel.tensor_parallel.distributed_differentiable_primitives import (  # noqa: E402
    differentiable_all_gather,
    differentiable_all_reduce_sum,
    differentiable_identity,
    differentiable_reduce_scatter_sum,
)
from nanotron.parallel.tensor_parallel.enum import TensorParallelLinearMode  # noqa: E402
from nanotron.parallel.tensor_parallel.nn import (  # noqa: E402
    TensorParallelColumnLinear,
    TensorParallelRowLinear,
)


class ColumnLinear(TensorParallelColumnLinear):
    """Each rank has some of the outputs of all tokens."""

    is_fast = False
    accumulated_OC: torch.Tensor | None = None  # fp32, nanotron's gradient buffer of the weight

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        if not self.is_fast:
            return super().forward(x_TC)
        return accumulating_linear(self.gathered(x_TC), self.weight, self.accumulated_OC)

    def gathered(self, x_TC: torch.Tensor) -> torch.Tensor:
        """The inputs of all tokens; in the backward pass the ranks' gradients are summed."""
        if self.pg.size() == 1:
            return x_TC
        if self.mode is TensorParallelLinearMode.ALL_REDUCE:
            return differentiable_identity(x_TC, group=self.pg)
        return differentiable_all_gather(x_TC, group=self.pg)


class RowLinear(TensorParallelRowLinear):
    """Each rank has some of the inputs; the ranks' outputs are summed."""

    is_fast = False
    accumulated_OC: torch.Tensor | None = None

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        if not self.is_fast:
            return super().forward(x_TC)
        out_TO = accumulating_linear(x_TC, self.weight, self.accumulated_OC)
        if self.pg.size() == 1:
            return out_TO
        if self.mode is TensorParallelLinearMode.ALL_REDUCE:
            return differentiable_all_reduce_sum(out_TO, group=self.pg)
        return differentiable_reduce_scatter_sum(out_TO, group=self.pg)
