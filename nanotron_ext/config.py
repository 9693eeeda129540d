"""What a recipe's `nanotron.model.model_config` says, as the plugin reads it. No torch here."""

from dataclasses import dataclass
from typing import Any

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


@dataclass
class SmolLM3Config:
    """SmolLM3's architecture; defaults are the published 3B (released stage-1 config).

    Sizes are in elements, positions in tokens. `no_rope_layer: n` removes RoPE from every n-th
    layer (0: from none).
    """

    # dacite tries each config class of nanotron in turn; an unknown key makes it keep a dict.
    is_smollm3_config: bool = True
    vocab_size: int = 128256
    hidden_size: int = 2048
    intermediate_size: int = 11008
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    max_position_embeddings: int = 4096
    rope_theta: float = 50000.0
    rope_scaling: dict[str, Any] | None = None
    no_rope_layer: int = 4
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 128000
    eos_token_id: int | None = 128001
    pad_token_id: int | None = None
    use_doc_masking: bool = True
    recompute_layer: bool = False
    z_loss_coefficient: float = 0.0  # of the squared log-partition; 0 is off
    loss_mean_over: str = "labels"  # or tokens, of a micro-batch

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model_config.hidden_size {self.hidden_size} must be a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model_config.num_attention_heads {self.num_attention_heads} must be a multiple "
                f"of num_key_value_heads {self.num_key_value_heads}"
            )
        _check_rope_scaling(self.rope_scaling)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def _check_rope_scaling(scaling: dict[str, Any] | None) -> None:
    if scaling is None:
        return
    if scaling.get("rope_type") != "yarn":
        raise ValueError(
            f"model_config.rope_scaling.rope_type: {scaling.get('rope_type')!r} is unknown; set "
            "rope_scaling to null or its rope_type to yarn"
        )
    for key in ("factor", "original_max_position_embeddings"):
        value = scaling.get(key)
        if not isinstance(value, (int, float)) or value < 1:
            raise ValueError(f"model_config.rope_scaling.{key}: {value!r} must be a number from 1")
    known = {"rope_type", "factor", "original_max_position_embeddings"}
    known |= {"beta_fast", "beta_slow", "attention_factor"}
    if unknown := sorted(scaling.keys() - known):
        raise ValueError(
            f"model_config.rope_scaling.{unknown[0]}: no such key; the keys are {sorted(known)}"
        )
