"""Anchored preference optimisation: TRL's DPOTrainer on token ids made by rows.py.

P  pairs
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from ground.errors import UserError
from ground.files import written_aside
from posttrain import compat
from posttrain.batches import HashedRows, RecordedBatches
from posttrain.checkpoints import save_whole

TOKENS_OF_LOGITS = 1024  # 1.3 GB of bf16 and float32 logits and their logarithms at 128,256 words
# Held-out pairs that are scored together: so many, and fewer where that is more tokens.
PAIRS, PAIR_TOKENS = 16, 2**15


class PairTrainer(RecordedBatches, DPOTrainer):
    """DPOTrainer that takes `prompt_ids`, `chosen_ids`, `rejected_ids` as they are.

    The reference's log-probabilities are computed once and kept in `reference`, a safetensors file
    of `chosen` and `rejected` [P] float32.
    """

    def __init__(self, *args: Any, reference: Path, **kwargs: Any):
        compat.lean_head_on_cpu()
        self.reference = reference
        super().__init__(*args, **kwargs)
        self.data_collator = HashedRows(self.data_collator)

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if not self.reference.exists():
            columns = super()._precompute_ref_logps(dataset, name, batch_size)
            if self.accelerator.is_main_process:
                sums = {
                    side: torch.tensor(columns[f"ref_{side}_logps"][:])
                    for side in ("chosen", "rejected")
                }
                with written_aside(self.reference) as aside:
                    save_file(sums, aside)
            self.accelerator.wait_for_everyone()
        stored = load_file(self.reference)
        if len(stored["chosen"]) != len(dataset):
            raise UserError(
                f"{self.reference}: {len(stored['chosen'])} pairs, the data has {len(dataset)}: "
                "delete it; it is computed again"
            )
        for side, log_probs in stored.items():
            dataset = dataset.add_column(f"ref_{side}_logps", log_probs.tolist())
        return dataset

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        save_whole(self, trial)


@torch.no_grad()
def completion_log_probs(
    model: Any, pairs: Sequence[dict[str, Any]], pad_id: int, most_pairs: int = PAIRS
) -> torch.Tensor:
    """[P, 2, 2]: for chosen and rejected the summed log-probability and the number of tokens."""
    collate = DataCollatorForPreference(pad_token_id=pad_id)
    batches = []
    for some in _batches(pairs, most_pairs):
        batch = collate(some)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        trained = batch["completion_mask"][:, 1:].bool()
        hidden = model.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state[:, :-1]
        # The head runs only on completions, and on some of their tokens at a time: logits of whole
        # answers would fill the memory.
        parts = zip(
            hidden[trained].split(TOKENS_OF_LOGITS),
            batch["input_ids"][:, 1:][trained].split(TOKENS_OF_LOGITS),
            strict=True,
        )
        each = torch.cat(
            [
                -torch.nn.functional.cross_entropy(
                    model.lm_head(states).float(), labels, reduction="none"
                )
                for states, labels in parts
            ]
        )
        sums = torch.zeros(trained.shape, device=each.device).masked_scatter(trained, each).sum(1)
        both = torch.stack([sums, trained.sum(1).float()], dim=1)
        # The collator puts all chosen sides before all rejected ones.
        batches.append(both.view(2, -1, 2).transpose(0, 1).cpu())
    return torch.cat(batches)


def _batches(pairs: Sequence[dict[str, Any]], most_pairs: int) -> Iterator[list[dict[str, Any]]]:
    """Neighbours whose sequences, padded alike, have PAIR_TOKENS tokens or less; a longer pair alone."""
    batch, longest = list[dict[str, Any]](), 0
    for pair in pairs:
        sides = (len(pair["chosen_ids"]), len(pair["rejected_ids"]))
        length = max(longest, len(pair["prompt_ids"]) + max(sides))
        if batch and (len(batch) == most_pairs or 2 * (len(batch) + 1) * length > PAIR_TOKENS):
            yield batch
            batch, length = [], len(pair["prompt_ids"]) + max(sides)
        batch.append(pair)
        longest = length
    if batch:
        yield batch


def preference_figures(
    policy: torch.Tensor, reference: torch.Tensor, beta: float
) -> dict[str, float]:
    """Figures of [P, 2, 2] log-probabilities: reward accuracy and margin (at the recipe's beta and
    at 0.1, the beta of the published plots), and the share of pairs whose chosen side has the
    higher mean log-probability per token."""
    ratios = policy[..., 0] - reference[..., 0]
    margin = (ratios[:, 0] - ratios[:, 1]).mean().item()
    means = policy[..., 0] / policy[..., 1]
    return {
        "reward_accuracy": (ratios[:, 0] > ratios[:, 1]).float().mean().item(),
        "reward_margin": beta * margin,
        "reward_margin_at_beta_0.1": 0.1 * margin,
        "chosen_more_likely": (means[:, 0] > means[:, 1]).float().mean().item(),
    }
