"""Rotary tables and YaRN are transformers', and its long configuration is what it reads."""

import itertools
import math

import pytest
import torch
from in_process import tiny, transformers_model

from nanotron_ext.config import SmolLM3Config
from nanotron_ext.convert import hf_config
from nanotron_ext.rope import layer_uses_rope, rope_tables, rotate, yarn_config

YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 65536}
RELEASED = SmolLM3Config(max_position_embeddings=65536, rope_theta=5e6)


def their_tables(config: SmolLM3Config, positions: torch.Tensor) -> list[torch.Tensor]:
    from transformers.models.smollm3.modeling_smollm3 import SmolLM3RotaryEmbedding

    hf = transformers_model(tiny()).config.from_dict(hf_config(config, "float32"))
    tables = SmolLM3RotaryEmbedding(hf)(torch.zeros(1), positions[None])
    return [table[0][:, None] for table in tables]


@pytest.mark.parametrize("theta", [50_000.0, 2_000_000.0, 5_000_000.0])
def test_tables_equal_transformers_bit_for_bit(theta: float) -> None:
    positions = torch.tensor([0, 1, 2, 1000, 4095, 32767, 65535])
    config = SmolLM3Config(rope_theta=theta)
    for mine, other in zip(
        rope_tables(positions, 128, theta), their_tables(config, positions), strict=True
    ):
        assert torch.equal(mine, other)


def test_yarn_tables_equal_transformers_bit_for_bit() -> None:
    positions = torch.tensor([0, 1, 1000, 65535, 65536, 131071])
    config = SmolLM3Config(max_position_embeddings=131072, rope_theta=5e6, rope_scaling=YARN)
    for mine, other in zip(
        rope_tables(positions, 128, 5e6, YARN), their_tables(config, positions), strict=True
    ):
        assert torch.equal(mine, other)


def test_yarn_keeps_the_fast_pairs_halves_the_slow_and_scales_both_tables() -> None:
    """Of 64 pairs at theta 5M the first 25 stay, 13 are a ramp, the rest turn half as fast."""
    one = torch.tensor([1])
    plain = _angles(one, None)
    scaled = _angles(one, YARN)
    ratio = [a / b for a, b in zip(scaled, plain, strict=True)]
    assert ratio[:25] == pytest.approx([1.0] * 25, rel=1e-5)
    assert ratio[39:] == pytest.approx([0.5] * 25, rel=1e-5)
    assert all(a > b for a, b in itertools.pairwise(ratio[24:40]))
    cos, sin = rope_tables(torch.tensor([0, 7]), 128, 5e6, YARN)
    factor = 0.1 * math.log(2) + 1
    assert (cos**2 + sin**2).sqrt().flatten().tolist() == pytest.approx([factor] * 256)


def _angles(positions: torch.Tensor, scaling: dict[str, object] | None) -> list[float]:
    cos, sin = rope_tables(positions, 128, 5e6, scaling)
    return torch.atan2(sin, cos)[0, 0, :64].double().tolist()


def test_the_yarn_configuration_is_the_released_one_at_twice_the_length() -> None:
    from transformers import SmolLM3Config as TheirConfig

    released = hf_config(RELEASED, "bfloat16")
    long = yarn_config(released, 2)
    changed = {key for key in long if long[key] != released[key]}
    assert changed == {"max_position_embeddings", "rope_parameters"}
    assert long["max_position_embeddings"] == 131072
    assert long["rope_parameters"] == {**YARN, "rope_theta": 5e6}
    read = TheirConfig.from_dict(long)
    assert {**YARN, "rope_theta": 5e6}.items() <= read.rope_parameters.items()
    with pytest.raises(ValueError, match="rope_type: 'yarn' is scaled already"):
        yarn_config(long, 2)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "linear", "factor": 2}, "rope_type: 'linear' is unknown"),
        ({"rope_type": "yarn", "factor": 2}, "original_max_position_embeddings: None"),
        ({**YARN, "factor": 0.5}, "factor: 0.5 must be a number from 1"),
        ({**YARN, "mscale": 1}, "mscale: no such key"),
    ],
)
def test_a_scaling_that_is_not_yarn_is_refused(scaling: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SmolLM3Config(rope_scaling=scaling)


def test_scores_depend_on_distance_alone() -> None:
    """Why positions may start anew in each document: a shift of both changes nothing."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 5, 1, 16, generator=generator, dtype=torch.float64)

    def scores(shift: int) -> torch.Tensor:
        tables = rope_tables(torch.arange(5) + shift, 16, 50_000.0)
        return torch.einsum("qhd,khd->qk", rotate(q, *tables), rotate(k, *tables))

    assert torch.allclose(scores(0), scores(3000), atol=1e-3)
    assert not torch.allclose(scores(0), torch.einsum("qhd,khd->qk", q, k), atol=1e-2)


def test_nope_layers_are_every_fourth_of_36() -> None:
    found = [layer for layer in range(36) if not layer_uses_rope(layer, 4)]
    assert found == [3, 7, 11, 15, 19, 23, 27, 31, 35]
    assert all(layer_uses_rope(layer, 0) for layer in range(36))
