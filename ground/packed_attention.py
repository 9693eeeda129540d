"""Causal attention inside each document of packed tokens, with kernels of torch alone.

Legend: T tokens, H query heads, K kv heads, D head dim, N documents.
"""

from collections.abc import Callable, Sequence
from functools import cache
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F

# (q [T, H, D], k and v [T, K, D], cu_seqlens int32 [N+1], the longest document) -> [T, H, D]
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


def attention(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_length: int,
) -> torch.Tensor:
    """[T, H, D], by `varlen` on a GPU in 16 bits, which is all that it supports."""
    if q_THD.is_cuda and q_THD.dtype != torch.float32:
        return _varlen()(q_THD, k_TKD, v_TKD, cu_seqlens, max_length)
    return by_document(q_THD, k_TKD, v_TKD, cu_seqlens.diff().tolist())


def by_document(
    q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, lengths: Sequence[int]
) -> torch.Tensor:
    """[T, H, D], one document at a time: cost grows with document length, not with T."""
    # Heads repeated here, and with a batch dimension: else torch takes its slow path on a CPU.
    k_THD, v_THD = _repeated(q_THD, k_TKD, v_TKD)
    heads_first = [x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q_THD, k_THD, v_THD)]
    parts = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True)
        for q, k, v in zip(*heads_first, strict=True)
    ]
    return torch.cat(parts, dim=2)[0].transpose(0, 1)


def varlen() -> Kernel:
    """The FlashAttention 2 that torch contains, from Ampere on; it has no CPU kernel."""
    from torch.nn.attention.varlen import varlen_attn

    takes = signature(varlen_attn).parameters
    # torch 2.10 has is_causal; later all tokens to the left, none to the right.
    options: dict[str, Any] = (
        {"is_causal": True} if "is_causal" in takes else {"window_size": (-1, 0)}
    )
    shares_heads = "enable_gqa" in takes  # from 2.12 on; before, kv heads are repeated
    if shares_heads:
        options["enable_gqa"] = True

    def kernel(
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        cu: torch.Tensor,
        longest: int,
    ) -> torch.Tensor:
        if not shares_heads:
            k_TKD, v_TKD = _repeated(q_THD, k_TKD, v_TKD)
        out = varlen_attn(q_THD, k_TKD, v_TKD, cu, cu, longest, longest, **options)
        assert isinstance(out, torch.Tensor)
        return out

    return kernel


_varlen = cache(varlen)  # looked up once, not in each layer of each step


def _repeated(
    q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v [T, H, D], each kv head as often as it has query heads."""
    groups = q_THD.shape[1] // k_TKD.shape[1]
    return k_TKD.repeat_interleave(groups, dim=1), v_TKD.repeat_interleave(groups, dim=1)
