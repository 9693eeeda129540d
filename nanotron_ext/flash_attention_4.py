"""FlashAttention 4 (flash-attn-4, module flash_attn.cute) as an operator that the compiler knows.

Its own autograd function would break the graph of a compiled layer: the kernels are generated from
Python at their first call. Here forward and backward are custom operators, opaque to the compiler,
with the shapes of what they return.

Legend: T tokens of the micro-batch, H query heads, K kv heads, D head dim, N documents.
"""

from typing import Any

import torch


@torch.library.custom_op("smollm3::flash_attention_4", mutates_args=())
def attention(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output [T, H, D], log-sum-exp fp32 [H, T]), causal inside each document, in 16 bits."""
    from flash_attn.cute import flash_attn_varlen_func

    out, logsumexp_HT = flash_attn_varlen_func(
        q_THD,
        k_TKD,
        v_TKD,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_length,
        max_seqlen_k=max_length,
        causal=True,
        return_lse=True,  # else it is kept only where q asks for a gradient: not in an operator
    )
    return out, logsumexp_HT


@attention.register_fake
def _(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, heads, _ = q_THD.shape
    out = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
    return out, q_THD.new_empty(heads, tokens, dtype=torch.float32)


@torch.library.custom_op("smollm3::flash_attention_4_backward", mutates_args=())
def attention_backward(
    gradient_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    out_THD: torch.Tensor,
    logsumexp_HT: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_length: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v."""
    # The package's own backward pass calls this too; it has no public name.
    from flash_attn.cute.interface import _flash_attn_bwd

    dq, dk, dv = _flash_attn_bwd(
        q_THD,
        k_TKD,
        v_TKD,
        out_THD,
        gradient_THD,
        logsumexp_HT,
        causal=True,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_length,
        max_seqlen_k=max_length,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@attention_backward.register_fake
def _(
    gradient_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    contiguous = torch.contiguous_format
    dq, dk, dv = (torch.empty_like(x, memory_format=contiguous) for x in (q_THD, k_TKD, v_TKD))
    return dq, dk, dv


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.max_length = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, gradient_THD: torch.Tensor, _: Any) -> Any:
    q, k, v, cu_seqlens, out, logsumexp = ctx.saved_tensors
    dq, dk, dv = attention_backward(
        gradient_THD, q, k, v, out, logsumexp, cu_seqlens, ctx.max_length
    )
    return dq, dk, dv, None, None


attention.register_autograd(_gradients, setup_context=_save)
