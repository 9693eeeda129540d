"""What of TRL 1.16 is mended here, each with its symptom; tests/test_posttrain_compat.py fails once
upstream makes one needless."""

from typing import Any

_LIGHT_HEAD = "_posttrain_light_head"


def head_skips_untrained_tokens() -> None:
    """trl 1.16.0: without Triton the fused head scores every token, masked or not. Idempotent.

    Symptom: on a CPU, where a small model's head is most of its work, a step of SFT takes twice the
    time. The condition is `compact = _use_triton(device)`, the one use of the name in that module.
    """
    from trl.trainer import utils

    utils._use_triton = lambda device: True


def head_without_metrics(model: Any) -> None:
    """trl 1.16.0: the head that SFTTrainer adds computes entropy and top-1 hits at every step.

    Symptom: two further passes over tokens x vocabulary, and no setting that turns them off. The
    same head is put on again for log-probabilities alone.
    """
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model)
