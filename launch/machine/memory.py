"""Memory of one GPU by part, computed from a recipe: what a layout needs before anyone runs it.

Counted for this plugin's model on nanotron 0.4: mixed precision with fp32 accumulation, sequence
parallelism between the linears, no fused loss. Kernels' workspaces and fragmentation come on top.
"""

from launch.recipe.pretrain import Nanotron

# fp32: gradient, master weight and Adam's two moments; bf16: weight and gradient.
BYTES_PER_WEIGHT = 4 + 4 + 8 + 2 + 2
# bf16 logits, their fp32 softmax and one fp32 temporary (nanotron_ext/loss.py).
BYTES_PER_LOGIT = 2 + 4 + 4


def memory_bytes(nanotron: Nanotron) -> dict[str, float]:
    """Bytes of the fullest GPU of the layout in a recipe's `nanotron:` section, by part."""
    model, layout, tokens = nanotron.model.model_config, nanotron.parallelism, nanotron.tokens
    tp, pp, hidden, inner = layout.tp, layout.pp, model.hidden_size, model.intermediate_size
    kv = hidden * model.num_key_value_heads // model.num_attention_heads
    layers = -(-model.num_hidden_layers // pp)
    micro_batch = tokens.micro_batch_size * tokens.sequence_length
    weights_per_layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner
    weights = (layers * weights_per_layer + model.vocab_size * hidden) / tp
    # Saved for backward, in bytes per token of one layer: 0.4 keeps the gathered inputs of both
    # column-parallel linears whole; fp32 norms, q, k, v before and after rotation, SwiGLU are cut.
    whole = 4 * hidden
    cut = 24 * hidden + 2 * (hidden + 2 * kv) + 6 * (hidden + kv) + 2 * hidden + 8 * inner
    layer = micro_batch * (whole + cut / tp)
    # The first pipeline rank has a micro-batch in flight for each rank behind it (1f1b).
    in_flight = layers * pp
    layer_inputs = micro_batch * 2 * hidden / tp * in_flight
    recompute = layout.recompute_layer
    return {
        "weights, gradients and optimizer": weights * BYTES_PER_WEIGHT,
        "inputs of the layers": layer_inputs if recompute else 0.0,
        "activations": layer if recompute else layer * in_flight,
        "logits and loss": micro_batch * model.vocab_size / tp * BYTES_PER_LOGIT,
    }
