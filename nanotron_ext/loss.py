"""Cross-entropy over a vocabulary that may be sharded over tensor-parallel ranks.

Legend: T tokens, V vocabulary entries of this rank. A GPU's forms, which keep less, are in
`fast_loss.py`.
"""

from typing import Any

import torch
import torch.distributed as dist


class ShardedCrossEntropy(torch.autograd.Function):
    """(loss, logsumexp) of each token, fp32 [T] in nats, the same on every rank of `group`.

    Keeps one fp32 [T, V] buffer, the softmax, which the backward pass turns into the gradient in
    place: torch's own loss makes three such buffers, a fifth of a small model's step on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, logits_TV: torch.Tensor, labels_T: torch.Tensor, group: Any) -> Any:
        vocab, first = logits_TV.shape[1], group.rank() * logits_TV.shape[1]
        local = labels_T - first
        is_here = (local >= 0) & (local < vocab)
        local = local.clamp(0, vocab - 1)[:, None]
        largest = logits_TV.amax(-1).float()
        all_reduce(largest, dist.ReduceOp.MAX, group)
        softmax = (logits_TV.float() - largest[:, None]).exp_()
        total, target = softmax.sum(-1), logits_TV.gather(1, local)[:, 0].float() * is_here
        all_reduce(total, dist.ReduceOp.SUM, group)
        all_reduce(target, dist.ReduceOp.SUM, group)
        softmax /= total[:, None]
        logsumexp = total.log_() + largest
        ctx.save_for_backward(softmax, local, is_here)
        ctx.dtype = logits_TV.dtype
        return logsumexp - target, logsumexp

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        softmax, local, is_here = ctx.saved_tensors
        loss_gradient, logsumexp_gradient = gradients
        softmax *= (loss_gradient + logsumexp_gradient)[:, None]
        softmax.scatter_add_(1, local, -(loss_gradient * is_here)[:, None])
        return softmax.to(ctx.dtype), None, None


def all_reduce(tensor: torch.Tensor, op: Any, group: Any) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
