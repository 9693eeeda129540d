"""The weights of the model: their names and shapes in nanotron and in transformers. No torch here."""

from dataclasses import dataclass

from nanotron_ext.config import SmolLM3Config

EMBEDDING = "model.token_position_embeddings.pp_block.token_embedding.weight"
HEAD = "model.lm_head.pp_block.weight"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """One tensor of nanotron.

    `parts` are the names and shapes of the tensors of transformers that are stacked in it, in
    order. `split_dim` is the dimension that tensor parallelism cuts, None if it cuts none
    (norms).
    """

    name: str
    parts: dict[str, Shape]
    split_dim: int | None

    @property
    def shape(self) -> Shape:
        first, *others = self.parts.values()
        return (first[0] + sum(shape[0] for shape in others), *first[1:])


def weights_of(config: SmolLM3Config) -> list[Weight]:
    """Every tensor of the model, in the order in which files are written."""
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    kv = config.num_key_value_heads * config.head_dim
    layer: dict[str, tuple[dict[str, Shape], int | None]] = {
        "attn.qkv_proj": (
            {
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (kv, hidden),
                "self_attn.v_proj": (kv, hidden),
            },
            0,
        ),
        "mlp.gate_up_proj": ({"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}, 0),
        "attn.o_proj": ({"self_attn.o_proj": (hidden, hidden)}, 1),
        "mlp.down_proj": ({"mlp.down_proj": (hidden, inner)}, 1),
        "input_layernorm": ({"input_layernorm": (hidden,)}, None),
        "post_attention_layernorm": ({"post_attention_layernorm": (hidden,)}, None),
    }
    table = [Weight(EMBEDDING, {"model.embed_tokens.weight": (vocab, hidden)}, 0)]
    for index in range(config.num_hidden_layers):
        for name, (parts, split_dim) in layer.items():
            shapes = {f"model.layers.{index}.{part}.weight": shape for part, shape in parts.items()}
            table.append(Weight(f"model.decoder.{index}.pp_block.{name}.weight", shapes, split_dim))
    norm = "model.final_layer_norm.pp_block.weight"
    table.append(Weight(norm, {"model.norm.weight": (hidden,)}, None))
    if not config.tie_word_embeddings:
        table.append(Weight(HEAD, {"lm_head.weight": (vocab, hidden)}, 0))
    return table
