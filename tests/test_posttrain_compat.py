"""Each mend of posttrain/compat.py is still needed: these fail once TRL does without it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from posttrain_jobs import write_start


@pytest.fixture
def model(tmp_path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(write_start(tmp_path / "model"))


@pytest.fixture
def as_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL as it is on disk, whatever other tests have mended in this process."""
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    monkeypatch.setattr(utils, "_use_triton", chunked_logprob._use_triton)
    monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", 4096)


def scored_tokens(model: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens that the fused head works on where 3 of 40 are trained."""
    from trl.trainer import utils

    seen: list[int] = []
    function = utils._ChunkedLogProbFunction

    class Spy(function):  # type: ignore[misc, valid-type]
        @staticmethod
        def forward(ctx: Any, hidden: torch.Tensor, *rest: Any) -> Any:
            seen.append(len(hidden))
            return function.forward(ctx, hidden, *rest)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Spy)
    ids = torch.arange(40)[None]
    labels = torch.full_like(ids, -100)
    labels[:, 10:13] = ids[:, 10:13]
    utils.add_fused_lm_head(model)
    model(input_ids=ids, labels=labels, fused_lm_head=True)
    return seen[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the mend is for CPUs")
def test_the_head_scores_untrained_tokens_on_a_cpu(
    as_shipped: None, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.compat import lean_head_on_cpu

    assert scored_tokens(model, monkeypatch) == 39, "TRL skips them by itself: drop the mend"
    lean_head_on_cpu()
    assert scored_tokens(model, monkeypatch) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="the mend is for CPUs")
def test_the_heads_tiles_are_those_of_a_gpu(as_shipped: None) -> None:
    import importlib

    from trl.kernels import chunked_logprob

    from posttrain.compat import CPU_TOKENS_AT_ONCE, lean_head_on_cpu

    assert importlib.reload(chunked_logprob).TOKEN_CHUNK_SIZE == 4096
    lean_head_on_cpu()
    assert chunked_logprob.TOKEN_CHUNK_SIZE == CPU_TOKENS_AT_ONCE


def test_the_mended_head_gives_the_same_log_probabilities(
    as_shipped: None, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl.kernels import chunked_logprob
    from trl.trainer.utils import add_fused_lm_head

    from posttrain.compat import lean_head_on_cpu

    ids = torch.arange(200)[None]
    labels = torch.where(ids % 3 == 0, -100, ids)
    add_fused_lm_head(model)
    found, gradients = [], []
    for mend in (lambda: None, lean_head_on_cpu):
        mend()
        chunked_logprob.TOKEN_CHUNK_SIZE = min(chunked_logprob.TOKEN_CHUNK_SIZE, 100)
        log_probs = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
        log_probs.sum().backward()
        found.append(log_probs.detach())
        gradients.append(model.model.embed_tokens.weight.grad.clone())
        model.zero_grad()
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


def test_sft_computes_entropy_at_each_step(model: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from posttrain_jobs import tokenizer_with_pad
    from trl import SFTConfig, SFTTrainer

    from posttrain.compat import head_without_metrics

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none"),
        train_dataset=Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]),
        processing_class=tokenizer_with_pad(),
    )
    ids = torch.arange(8)[None]
    shipped = trainer.model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert shipped.entropy is not None, "TRL computes log-probabilities alone: drop the mend"
    head_without_metrics(trainer.model)
    mended = trainer.model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert mended.entropy is None and mended.is_top1 is None
    torch.testing.assert_close(mended.log_probs, shipped.log_probs)


ORDER = """
from mergekit.config import MergeConfiguration
from posttrain.compat import keep_merge_order
names = ["/first", "/second", "/third"]
models = [{"model": name, "parameters": {"weight": 1.0}} for name in names]
config = MergeConfiguration.model_validate({"merge_method": "linear", "models": models})
print(config.referenced_models()[0].model.path)
keep_merge_order()
print(config.referenced_models()[0].model.path)
"""


def first_models(seed: int) -> list[str]:
    """Which model gives config.json in a process with this hash seed, as shipped and mended."""
    done = subprocess.run(
        [sys.executable, "-c", ORDER], check=True, capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return done.stdout.split()


@pytest.mark.slow
def test_the_first_model_gives_the_merged_config() -> None:
    shipped, mended = set[str](), set[str]()
    for seed in range(8):
        for models, first in zip((shipped, mended), first_models(seed), strict=True):
            models.add(first)
        if len(shipped) > 1:
            break
    assert len(shipped) > 1, "mergekit keeps the order: drop the mend"
    assert mended == {"/first"}
