"""Samples with seeds of their own: an answer depends on its prompt and number, on no batch or process.

A draw from a distribution is the greatest of its log-probabilities with Gumbel noise on each (Gumbel
1954; Maddison et al. 2014, arXiv:1411.0030), so a generator for each row is all that it takes.
"""

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def seed_of(prompt: Sequence[int], number: int) -> int:
    """The seed of a prompt's sample, 31 bits: servers refuse more."""
    digest = hashlib.blake2b(repr((list(prompt), number)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


class Drawn:
    """A logits processor after which the greatest is a draw of each row's own generator."""

    def __init__(self, seeds: Sequence[int], device: Any):
        import torch

        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """ids: (B, S) tokens so far, scores: (B, V), logits or log-probabilities."""
        import torch

        noise = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() - noise.clamp_(min=1e-38).log()


def sampled(original: Callable[..., list[Any]], model: Any, batch: Any, count: int, **named: Any) -> list[Any]:  # fmt: skip
    """`count` answers of each prompt, by TransformersModel._generate_padded of one greedy answer."""
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopPLogitsWarper,
    )

    settings = model.generation_config_dict
    prompts = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(batch.input_ids, batch.input_mask, strict=True)
    ]
    rounds = []
    for number in range(count):
        draw = [
            TemperatureLogitsWarper(float(settings["temperature"])),
            TopPLogitsWarper(settings.get("top_p") or 1.0),
            Drawn([seed_of(prompt, number) for prompt in prompts], batch.input_ids.device),
        ]
        greedy = {key: value for key, value in settings.items() if key != "top_p"}
        greedy |= {
            "do_sample": False,
            "temperature": 0,
            "logits_processor": LogitsProcessorList(draw),
        }
        model.generation_config_dict = greedy
        try:
            rounds.append(original(model, batch=copy.copy(batch), num_samples=1, **named))
        finally:
            model.generation_config_dict = settings
    for answers in zip(*rounds, strict=True):
        answers[0].text = [text for answer in answers for text in answer.text]
        answers[0].output_tokens = [ids for answer in answers for ids in answer.output_tokens]
    return rounds[0]
