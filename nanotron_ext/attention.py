"""Causal attention inside each document of a packed micro-batch, whatever the kernel.

Legend: T tokens of the micro-batch, H query heads, K kv heads, D head dim, N documents.
A backend maps (q_THD, k_TKD, v_TKD, Documents) to o_THD; no token sees another document.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


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


def documents_of(position_ids_BS: torch.Tensor, doc_masking: bool = True) -> Documents:
    """Borders from positions: a document starts where the position is 0; windows never join.

    Without `doc_masking` each window of S tokens is one document.
    """
    batch, sequence = position_ids_BS.shape
    starts_BS = position_ids_BS == 0
    if not doc_masking:
        starts_BS = torch.zeros_like(starts_BS)
        starts_BS[:, 0] = True
    starts = torch.where(starts_BS.reshape(-1))[0]
    cu_seqlens = torch.cat([starts, starts.new_tensor([batch * sequence])]).to(torch.int32)
    lengths = [] if position_ids_BS.is_cuda else cu_seqlens.diff().tolist()
    return Documents(cu_seqlens, lengths, sequence)


def sdpa(
    q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, documents: Documents
) -> torch.Tensor:
    """torch's kernel, one document at a time: cost grows with document length, not with S."""
    lengths = documents.lengths or documents.cu_seqlens.diff().tolist()
    groups = q_THD.shape[1] // k_TKD.shape[1]
    # Repeated by hand, and with a batch dimension: else torch takes its slow path on a CPU.
    k_THD, v_THD = (x.repeat_interleave(groups, dim=1) for x in (k_TKD, v_TKD))
    parts = [
        F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True
        )
        for q, k, v in zip(
            q_THD.split(lengths), k_THD.split(lengths), v_THD.split(lengths), strict=True
        )
    ]
    return torch.cat(parts, dim=2)[0].transpose(0, 1)


def flash(
    q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, documents: Documents
) -> torch.Tensor:
    """FlashAttention's varlen kernel (Dao 2023, arXiv:2307.08691), as published."""
    from flash_attn import flash_attn_varlen_func

    cu, longest = documents.cu_seqlens, documents.max_length
    return flash_attn_varlen_func(q_THD, k_TKD, v_TKD, cu, cu, longest, longest, causal=True)


def choose_backend(device: torch.device) -> tuple[str, Backend]:
    """The fastest kernel that exists here, and its name for the log."""
    if device.type == "cuda" and importlib.util.find_spec("flash_attn"):
        return "flash", flash
    return "sdpa", sdpa
