"""Fixes of transformers 5.23, TRL 1.16 and mergekit 0.1.5, each with its symptom; a test in
tests/test_posttrain_compat.py or tests/test_merge.py fails once upstream makes one unnecessary."""

from typing import Any

# Logits of 128 tokens x 8,192 words are 4 MB, a core's cache.
CPU_TOKENS_AT_ONCE = 128


def lean_head_on_cpu() -> None:
    """trl 1.16.0: two habits of the fused head, made for GPUs, cost most of a step on a CPU.

    Without Triton it scores every token, trained or not (`compact = _use_triton(device)`, the one
    use of that name in the module), and it works on tiles of 4,096 tokens, far beyond any cache.
    Idempotent; with CUDA nothing changes.
    """
    import torch
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    if not torch.cuda.is_available():
        utils._use_triton = lambda device: True
        chunked_logprob.TOKEN_CHUNK_SIZE = CPU_TOKENS_AT_ONCE


def head_without_metrics(model: Any) -> None:
    """trl 1.16.0: the head that SFTTrainer adds computes entropy and top-1 hits at every step.

    Symptom: two further passes over tokens x vocabulary, and no setting that turns them off. The
    same head is put on again, for log-probabilities only.
    """
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model)


def no_step_after_the_last(trainer: Any) -> None:
    """transformers 5.23.0: a Trainer that resumes in mid-epoch at `max_steps` trains one step more.

    Symptom: a run that was stopped after its last checkpoint, or whose hf/ is made again, ends in
    other weights. Its loop looks for the end after a step only.
    """
    run_epoch = trainer._run_epoch

    def until_the_last(**options: Any) -> None:
        if trainer.state.global_step < trainer.state.max_steps:
            run_epoch(**options)

    trainer._run_epoch = until_the_last


def forget_merge_inputs() -> None:
    """mergekit 0.1.5: it caches readers of a model's files by path until the process ends.

    Symptom: a folder that was rewritten is merged with its old weights.
    """
    from mergekit.io.tasks import LoaderCache

    LoaderCache().loaders.clear()


def keep_merge_order() -> None:
    """mergekit 0.1.5: the models of a merge are put into a set; its first one gives config.json.

    Symptom: the merged config.json comes from another model in another process (the hash seed
    decides): its end token, padding token and `use_cache`. Idempotent.
    """
    from mergekit.config import MergeConfiguration

    drawn = MergeConfiguration.referenced_models
    if drawn.__name__ == "in_order":
        return

    def in_order(self: Any) -> list[Any]:
        named = [row.model for row in self.models or ()]
        return sorted(drawn(self), key=lambda model: named.index(model) if model in named else -1)

    MergeConfiguration.referenced_models = in_order
