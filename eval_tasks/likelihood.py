"""Log-likelihoods of several continuations of one context, which is read once."""

from collections.abc import Sequence
from typing import Any

import torch

# Tokens of the context read at a time: bounds the attention scores of a long one.
CHUNK = 4096


@torch.no_grad()
def choice_log_likelihoods(
    model: Any, context: Sequence[int], choices: Sequence[Sequence[int]]
) -> list[float]:
    """Sum of log p(token) in nats over each of `choices`, given `context`; none may be empty.

    `model` is a transformers causal LM. The choices share the context's key-value cache, side by
    side in one row: each sees the context and itself, at the positions that follow the context.
    """
    if not (context and all(choices)):
        raise ValueError("context and choices: each needs at least one token")
    device = model.device
    cache, logits = None, None
    for start in range(0, len(context), CHUNK):
        chunk = torch.tensor([context[start : start + CHUNK]], device=device)
        read = model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = read.past_key_values, read.logits
    assert logits is not None
    first_log_p = logits[0, -1].float().log_softmax(-1)
    scores = [float(first_log_p[choice[0]]) for choice in choices]
    # The last token of a choice predicts nothing that is asked for.
    fed = [list(choice[:-1]) for choice in choices]
    if not any(fed):
        return scores
    row = torch.tensor([[token for ids in fed for token in ids]], device=device)
    positions = torch.tensor([[len(context) + i for ids in fed for i in range(len(ids))]])
    out = model(
        row,
        past_key_values=cache,
        use_cache=True,
        position_ids=positions.to(device),
        attention_mask=_side_by_side(len(context), [len(ids) for ids in fed], model),
    )
    log_p = out.logits[0].float().log_softmax(-1)
    at = 0
    for index, choice in enumerate(choices):
        for token in choice[1:]:
            scores[index] += float(log_p[at, token])
            at += 1
    return scores


def _side_by_side(context: int, lengths: Sequence[int], model: Any) -> torch.Tensor:
    """Additive mask [1, 1, sum(lengths), context + sum(lengths)] of the choices' row."""
    total = sum(lengths)
    own = torch.block_diag(*[torch.ones(n, n).tril() for n in lengths if n]).bool()
    seen = torch.cat([torch.ones(total, context, dtype=torch.bool), own], dim=1)
    mask = torch.zeros(seen.shape, dtype=model.dtype)
    mask.masked_fill_(~seen, torch.finfo(model.dtype).min)
    return mask[None, None].to(model.device)
