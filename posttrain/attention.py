"""`attn_implementation: varlen`: packed documents on a GPU without a FlashAttention package.

transformers gives documents' lengths to the FlashAttention packages alone; for `sdpa` it makes a mask
of all pairs of tokens. Registered here is torch's own kernel, which reads the lengths that TRL's
collator passes (`cu_seq_lens_q`). All else is SDPA's: causal without a mask where tokens are padded
on the right, as pairs are, and with one where answers are generated.
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ground import packed_attention

NAME = "varlen"


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """[B, T, heads, D] of query, key and value [B, heads, T, D]; documents are counted over the batch."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    # Under autocast RoPE leaves float32; values have the precision of the linears.
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(value.dtype) for x in (query, key, value))
    out = packed_attention.attention(q, k, v, cu_seq_lens_q, max_length_q)
    return out.unflatten(0, (len(query), -1)), None


def mask(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor | None:
    """None where causality is mask enough: no real token comes after padding on the right."""
    is_whole = q_length == kv_length
    if is_whole and (attention_mask is None or bool(attention_mask[:, 0].all())):
        return None
    return sdpa_mask(
        q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **options
    )


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
