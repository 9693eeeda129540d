"""Continuations scored side by side equal each of them scored alone."""

import random

import pytest
import torch
from small_models import random_model
from transformers import SmolLM3ForCausalLM

from eval_tasks import likelihood
from eval_tasks.likelihood import choice_log_likelihoods


@pytest.fixture(scope="module")
def model() -> SmolLM3ForCausalLM:
    return random_model(range(97), seed=0, window=256, std=0.5).eval()


def alone(model: SmolLM3ForCausalLM, context: list[int], choice: list[int]) -> float:
    ids = torch.tensor([context + choice])
    with torch.no_grad():
        log_p = model(ids, use_cache=False).logits[0].log_softmax(-1)
    at = range(len(context) - 1, ids.shape[1] - 1)
    return sum(float(log_p[i, ids[0, i + 1]]) for i in at)


@pytest.mark.parametrize("chunk", [4096, 7])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 1, 4, 2], [5]])
def test_each_choice_is_scored_as_if_alone(
    model: SmolLM3ForCausalLM, lengths: list[int], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "CHUNK", chunk)
    rng = random.Random(1)
    context = [rng.randrange(97) for _ in range(40)]
    choices = [[rng.randrange(97) for _ in range(n)] for n in lengths]
    expected = [alone(model, context, choice) for choice in choices]
    assert choice_log_likelihoods(model, context, choices) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("context", "choices"), [([], [[1]]), ([1], [[2], []])])
def test_nothing_to_score_is_refused(
    model: SmolLM3ForCausalLM, context: list[int], choices: list[list[int]]
) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        choice_log_likelihoods(model, context, choices)
