"""Supervised fine-tuning and mid-training: TRL's SFTTrainer on tokens and labels made by rows.py.

B  windows of a micro-batch    T  tokens of a window
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from trl import SFTTrainer

from posttrain import compat
from posttrain.batches import HashedRows, RecordedBatches
from posttrain.checkpoints import save_whole
from posttrain.lora import whole_model
from posttrain.rows import IGNORED


@dataclass
class WindowCollator:
    """Windows as rows [B, T]; `position_ids` begin at 0 with each document.

    For attention without variable lengths. TRL puts the windows end to end, which flash attention
    needs; a dense mask then costs (B T)^2, here B T^2. From `position_ids` without a mask
    transformers keeps documents apart; padding counts as one more document.
    """

    pad_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        right = partial(pad_sequence, batch_first=True)
        ids = right([torch.tensor(row["input_ids"]) for row in rows], padding_value=self.pad_id)
        labels = right([torch.tensor(row["labels"]) for row in rows], padding_value=IGNORED)
        positions = torch.zeros_like(ids)
        for row, places in zip(rows, positions, strict=True):
            size = len(row["input_ids"])
            lengths = [*row.get("seq_lengths", [size]), len(places) - size]
            places[:] = torch.cat([torch.arange(length) for length in lengths])
        labels[positions == 0] = IGNORED  # no document predicts the next one's first token
        return {"input_ids": ids, "labels": labels, "position_ids": positions}


class MaskedSFTTrainer(RecordedBatches, SFTTrainer):
    """SFTTrainer that computes only the loss: the mean over trained tokens.

    TRL's `compute_loss` also computes entropy and token accuracy at each step.
    """

    def __init__(self, *args: Any, dense_attention: bool, **kwargs: Any):
        compat.lean_head_on_cpu()
        super().__init__(*args, **kwargs)
        compat.head_without_metrics(whole_model(self.model))
        dense = WindowCollator(self.processing_class.pad_token_id)
        self.data_collator = HashedRows(dense if dense_attention else self.data_collator)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scalar in nats per token; `num_items_in_batch` counts the labels of the whole batch."""
        assert not return_outputs
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        trained = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss: torch.Tensor = -outputs.log_probs.sum() / torch.as_tensor(trained).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        save_whole(self, trial)
