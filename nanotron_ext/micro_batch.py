"""What one forward pass reads. The loader makes it, the trainer moves it, the model takes it."""

from dataclasses import dataclass, fields, replace

import torch

from nanotron_ext import compat


@dataclass(frozen=True)
class MicroBatch:
    """B windows of S tokens, tensors [B, S], with N documents in all.

    nanotron hands the model the fields by name; on a pipeline rank that does not use a field, a
    TensorPointer takes its place.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor  # of a token in its document
    cu_seqlens: torch.Tensor  # int32 [N+1], where each document starts in the B*S tokens; then B*S
    label_ids: torch.Tensor  # the token after each input
    label_mask: torch.Tensor  # bool, False where the label opens a document
    # For the trainer alone, [B]: the mixture's index, and ground/batch_hash.py of each window.
    sources: torch.Tensor | None = None
    hashes: torch.Tensor | None = None

    def pinned(self) -> "MicroBatch":
        """The same in page-locked memory where there is a GPU, so that no copy there waits."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self, **{name: compat.pin(x) for name, x in tensors.items() if x is not None}
        )
