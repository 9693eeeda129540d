"""What one forward pass reads. The loader makes it, the trainer moves it, the model takes it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MicroBatch:
    """B windows of S tokens, tensors [B, S].

    nanotron hands the model the fields by name; on a pipeline rank that does not use a field, a
    TensorPointer takes its place.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor  # of a token in its document
    label_ids: torch.Tensor  # the token after each input
    label_mask: torch.Tensor  # bool, False where the label opens a document
    sources: torch.Tensor | None = None  # [B], the mixture's index; only for the trainer's count
