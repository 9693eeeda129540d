"""What a recipe's `nanotron.model.model_config` says, as the plugin reads it. No torch here."""

from dataclasses import dataclass


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
    no_rope_layer: int = 4
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 128000
    eos_token_id: int | None = 128001
    pad_token_id: int | None = None
    use_doc_masking: bool = True
    recompute_layer: bool = False

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

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads
