"""The cross-entropy of a GPU's step: the plain one of `loss.py` in two forms that keep less.

Legend: T tokens, C hidden, V vocabulary entries of this rank. Each form gives (loss, logsumexp) of
each token, fp32 [T] in nats, the same on every rank of `group`; both outputs have gradients (z-loss
needs the second), labels are masked by their loss' gradient of 0.

                         bytes from forward to backward           held for a moment
    ShardedCrossEntropy  T*V * (4 + logits' 2 or 4)               T*V * 4
    InPlaceCrossEntropy  T*V * logits' 2 or 4                     CHUNK_BYTES * 3; compiled: 0
    HeadCrossEntropy     T*C * hidden states' 2 or 4 (no logits)  HEAD_CHUNK_BYTES, the same as above,
                                                                  V*C * 4 without a gradient buffer
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from nanotron_ext.loss import all_reduce
from nanotron_ext.weight_gradient import add_weight_gradient

# fp32 copies of the logits that a kernel of its own makes: 261 tokens of the published vocabulary.
CHUNK_BYTES = 2**27
# bf16 logits of one chunk of the head: 4,096 tokens of the published vocabulary, enough rows for a
# matrix product to run at full rate.
HEAD_CHUNK_BYTES = 2**30


class InPlaceCrossEntropy(torch.autograd.Function):
    """Keeps the logits as they are and, in the backward pass, turns them into their own gradient.

    Nothing else may read the logits afterwards. `compiled` makes one kernel of each pass, which
    holds no fp32 copy; otherwise they go in chunks of CHUNK_BYTES.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_TV: torch.Tensor, labels_T: torch.Tensor, group: Any, compiled: bool
    ) -> Any:
        labels_T = _labels_here(labels_T, logits_TV.shape[1], group)
        logsumexp_T, target_T = _statistics(logits_TV, labels_T, compiled)
        logsumexp_T, target_T = _over_ranks(logsumexp_T, target_T, group)
        ctx.save_for_backward(logits_TV, labels_T, logsumexp_T)
        ctx.compiled = compiled
        return logsumexp_T - target_T, logsumexp_T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits_TV, labels_T, logsumexp_T = ctx.saved_tensors
        _turn_into_gradient(logits_TV, labels_T, logsumexp_T, *gradients, compiled=ctx.compiled)
        return logits_TV, None, None, None


class HeadCrossEntropy(torch.autograd.Function):
    """The output head and its loss in chunks of tokens, whose logits are computed again in backward.

    For windows whose logits do not fit: 65,536 tokens of the published vocabulary are 16.8 GB. It
    costs one more matrix product of the head. `accumulated_VC` is the head's fp32 gradient buffer
    (`weight_gradient.py`) or None, where the head's gradient goes through autograd.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_TC: torch.Tensor,
        weight_VC: torch.Tensor,
        accumulated_VC: torch.Tensor | None,
        labels_T: torch.Tensor,
        group: Any,
        compiled: bool,
    ) -> Any:
        labels_T = _labels_here(labels_T, weight_VC.shape[0], group)
        parts = [
            _statistics(h_TC[part] @ weight_VC.t(), labels_T[part], compiled)
            for part in head_chunks(len(h_TC), weight_VC)
        ]
        logsumexp_T, target_T = map(torch.cat, zip(*parts, strict=True))
        logsumexp_T, target_T = _over_ranks(logsumexp_T, target_T, group)
        ctx.save_for_backward(h_TC, weight_VC, labels_T, logsumexp_T)
        ctx.accumulated_VC, ctx.compiled = accumulated_VC, compiled
        return logsumexp_T - target_T, logsumexp_T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        h_TC, weight_VC, labels_T, logsumexp_T = ctx.saved_tensors
        into_VC = ctx.accumulated_VC
        if into_VC is None:
            into_VC = torch.zeros_like(weight_VC, dtype=torch.float32)
        gradient_TC = torch.empty_like(h_TC)
        for part in head_chunks(len(h_TC), weight_VC):
            logits_TV = h_TC[part] @ weight_VC.t()
            of_part = (x[part] for x in (labels_T, logsumexp_T, *gradients))
            _turn_into_gradient(logits_TV, *of_part, compiled=ctx.compiled)
            torch.mm(logits_TV, weight_VC, out=gradient_TC[part])
            add_weight_gradient(into_VC, logits_TV, h_TC[part])
            del logits_TV  # before the next chunk's are there
        of_weight = into_VC.to(weight_VC.dtype) if ctx.accumulated_VC is None else None
        return gradient_TC, of_weight, None, None, None, None


def head_chunks(tokens: int, weight_VC: torch.Tensor) -> Iterator[slice]:
    """Slices of a power of two of tokens, so that a window's are all of one shape."""
    fitting = max(HEAD_CHUNK_BYTES // (weight_VC.shape[0] * weight_VC.element_size()), 1)
    return _chunks(tokens, 2 ** (fitting.bit_length() - 1))


def _chunks(tokens: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def _labels_here(labels_T: torch.Tensor, vocab: int, group: Any) -> torch.Tensor:
    """Indices into this rank's part of the vocabulary; -1 where another rank has the label."""
    local_T = labels_T - group.rank() * vocab
    return local_T.where((local_T >= 0) & (local_T < vocab), -1)


def _statistics(
    logits_TV: torch.Tensor, labels_T: torch.Tensor, compiled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logsumexp, label's logit or 0) of each token over this rank's vocabulary, fp32 [T]."""
    kernel, parts = _kernel(_local_statistics, compiled), _fp32_chunks(logits_TV, compiled)
    logsumexp_T, target_T = zip(*(kernel(logits_TV[p], labels_T[p]) for p in parts), strict=True)
    return torch.cat(logsumexp_T), torch.cat(target_T)


def _turn_into_gradient(
    logits_TV: torch.Tensor, *per_token_T: torch.Tensor, compiled: bool
) -> None:
    kernel = _kernel(_local_gradient, compiled)
    for part in _fp32_chunks(logits_TV, compiled):
        kernel(logits_TV[part], *(x[part] for x in per_token_T))


def _fp32_chunks(logits_TV: torch.Tensor, compiled: bool) -> Iterator[slice]:
    tokens, vocab = logits_TV.shape
    return _chunks(tokens, tokens if compiled else max(CHUNK_BYTES // (4 * vocab), 1))


@cache
def _kernel(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    # Shapes are those of the run: a window's, or a chunk's and that of the last chunk.
    return torch.compile(function, dynamic=False) if compiled else function


def _local_statistics(
    logits_TV: torch.Tensor, labels_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    x = logits_TV.float()
    largest_T1 = x.amax(-1, keepdim=True)
    logsumexp_T = (x - largest_T1).exp().sum(-1).log() + largest_T1[:, 0]
    target_T = x.gather(1, labels_T.clamp(min=0)[:, None])[:, 0]
    return logsumexp_T, target_T * (labels_T >= 0)


def _local_gradient(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    logsumexp_T: torch.Tensor,
    loss_gradient_T: torch.Tensor,
    logsumexp_gradient_T: torch.Tensor,
) -> None:
    softmax = (logits_TV.float() - logsumexp_T[:, None]).exp()
    index_V = torch.arange(logits_TV.shape[1], device=logits_TV.device)
    of_label = (index_V == labels_T[:, None]) * loss_gradient_T[:, None]
    logits_TV.copy_(softmax * (loss_gradient_T + logsumexp_gradient_T)[:, None] - of_label)


def _over_ranks(
    logsumexp_T: torch.Tensor, target_T: torch.Tensor, group: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    if group.size() == 1:
        return logsumexp_T, target_T
    largest_T = logsumexp_T.clone()
    all_reduce(largest_T, dist.ReduceOp.MAX, group)
    total_T = (logsumexp_T - largest_T).exp_()
    all_reduce(total_T, dist.ReduceOp.SUM, group)
    all_reduce(target_T, dist.ReduceOp.SUM, group)
    return total_T.log_() + largest_T, target_T
