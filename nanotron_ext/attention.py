"""Causal attention inside each document of a packed micro-batch, with every kernel.

Legend: T tokens of the micro-batch, H query heads, K kv heads, D head dim, N documents.
A backend maps (q_THD, k_TKD, v_TKD, Documents) to o_THD; no token sees another document.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanotron_ext.compat import has_module


@dataclass(frozen=True)
class Documents:
    """Borders of the documents in a flattened micro-batch.

    `cu_seqlens` is int32 [N+1] on the device, `lengths` the same on the host where a backend
    loops over documents (empty otherwise: reading it back would stall a GPU), `max_length` in
    tokens.
    """

    cu_seqlens: torch.Tensor
    lengths: list[int]
    max_length: int


Backend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Documents], torch.Tensor]


def documents_of(cu_seqlens: torch.Tensor, sequence_length: int) -> Documents:
    """The loader's borders; no document is longer than a window of `sequence_length` tokens."""
    lengths = [] if cu_seqlens.is_cuda else cu_seqlens.diff().tolist()
    return Documents(cu_seqlens, lengths, sequence_length)


def sdpa(
    q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, documents: Documents
) -> torch.Tensor:
    """torch's kernel, one document at a time: cost grows with document length, not with S."""
    lengths = documents.lengths or documents.cu_seqlens.diff().tolist()
    groups = q_THD.shape[1] // k_TKD.shape[1]
    # Heads repeated here, and with a batch dimension: else torch takes its slow path on a CPU.
    k_THD, v_THD = (x.repeat_interleave(groups, dim=1) for x in (k_TKD, v_TKD))
    heads_first = [x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q_THD, k_THD, v_THD)]
    parts = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True)
        for q, k, v in zip(*heads_first, strict=True)
    ]
    return torch.cat(parts, dim=2)[0].transpose(0, 1)


def flash(
    q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, documents: Documents
) -> torch.Tensor:
    """FlashAttention's varlen kernel (Dao 2023, arXiv:2307.08691), as published."""
    if q_THD.dtype == torch.float32:  # the kernel supports only 16 bits
        return sdpa(q_THD, k_TKD, v_TKD, documents)
    from flash_attn import flash_attn_varlen_func

    cu, longest = documents.cu_seqlens, documents.max_length
    return flash_attn_varlen_func(q_THD, k_TKD, v_TKD, cu, cu, longest, longest, causal=True)


def varlen(
    q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, documents: Documents
) -> torch.Tensor:
    """The FlashAttention kernel that torch contains; it has no CPU kernel."""
    if q_THD.dtype == torch.float32:
        return sdpa(q_THD, k_TKD, v_TKD, documents)
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = documents.cu_seqlens, documents.max_length
    causal = (-1, 0)  # all tokens to the left, none to the right: torch 2.13 has no is_causal
    out = varlen_attn(
        q_THD, k_TKD, v_TKD, cu, cu, longest, longest, window_size=causal, enable_gqa=True
    )
    assert isinstance(out, torch.Tensor)
    return out


def choose_backend(device: torch.device) -> tuple[str, Backend, str]:
    """The fastest kernel available here: its name, the function, and the reason, for the log."""
    if device.type != "cuda":
        return "sdpa", sdpa, "no GPU; the other kernels have no CPU backward"
    if has_module("flash_attn"):
        return "flash", flash, "flash-attn is installed"
    if has_module("torch.nn.attention.varlen"):
        return "varlen", varlen, "torch's own; flash-attn is not installed"
    return "sdpa", sdpa, "neither flash-attn nor torch's varlen_attn is installed"
