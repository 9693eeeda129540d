"""Memory of one GPU by part, computed from a recipe: what a layout needs before anyone runs it.

Counted from nanotron_ext/model.py and nanotron 0.4: what autograd keeps of each layer for the
backward pass (tests/test_memory.py counts the same tensors in a real layer), what the loss holds at
its fullest moment, and the weights, accumulators and moments that stay for the whole run.
`benchmarks/fit.py` shows predicted against measured.

Two counts are fitted to a prototype's peaks on one H100, because no source tells them: the compiled
layer keeps the layer's inputs, the inputs of its linears and the attention's tensors, and computes
the rest again; kv heads are kept as often as there are query heads, which the kernels of torch
before 2.13 need and later ones do not.
"""

from dataclasses import dataclass, fields, replace

from launch.machine.gpus import Gpus
from launch.recipe.pretrain import FastStep, Nanotron

# Above what torch allocates: the CUDA context with its kernels, NCCL's channels where there are
# several processes. Ours, from what nvidia-smi usually shows; not measured here.
CONTEXT_BYTES, NCCL_BYTES = 0.5 * 2**30, 0.4 * 2**30
# Of what is allocated. Ours: a prototype's 3B allocated 75.6 GiB on a card of 79.6 and ran.
FRAGMENTATION = 0.03
# nanotron_ext.fast_loss.HEAD_CHUNK_BYTES: of logits, where the head is computed in pieces.
PIECE_BYTES = 2**30
PLAIN = FastStep(
    compile_layer=False, plain_linears=False, in_place_loss=False, fused_weight_gradients=False
)


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the fullest moment of a step, by part."""

    weights: float  # as the layers read them, and fp32 masters
    gradients: float  # fp32 accumulators, and what there is at that moment in the weights' dtype
    optimizer: float  # Adam's two moments
    activations: float  # kept for the backward pass
    layer_inputs: float  # in their place with recomputation
    logits_and_loss: float
    ddp_buckets: float
    cuda_context: float
    fragmentation: float  # a reserve

    @property
    def total(self) -> float:
        return float(sum(getattr(self, part.name) for part in fields(self)))

    def fits(self, gpus: Gpus) -> bool:
        return self.total <= gpus.gibibytes * 2**30

    @property
    def allocated(self) -> float:
        """What torch.cuda.max_memory_allocated() says, in bytes."""
        return self.total - self.cuda_context - self.fragmentation


def memory(nanotron: Nanotron, fast: bool = True) -> Memory:
    """Memory of the fullest GPU of the layout in a recipe's `nanotron:` section.

    `fast`: with what its `fast_step` turns on, as on CUDA; False: the plain step.
    """
    if not fast:
        nanotron = replace(nanotron, fast_step=PLAIN)
    parts = [_of_rank(nanotron, rank) for rank in range(nanotron.parallelism.pp)]
    return max(parts, key=lambda one: one.total)


def _of_rank(nanotron: Nanotron, rank: int) -> Memory:
    """Memory of a GPU of one pipeline rank."""
    layout, optimizer, size = nanotron.parallelism, nanotron.optimizer, _dtype_bytes(nanotron)
    in_fp32, count = optimizer.accumulate_grad_in_fp32, weights(nanotron, rank)
    updated = count / (layout.dp if optimizer.zero_stage else 1)
    gradients, activations, layer_inputs, logits_and_loss = max(_moments(nanotron, rank), key=sum)
    known = {
        "weights": size * count + 4 * updated * in_fp32,
        "gradients": 4 * count * in_fp32 + gradients,
        "optimizer": 8 * updated,
        "activations": activations,
        "layer_inputs": layer_inputs,
        "logits_and_loss": logits_and_loss,
        "ddp_buckets": size * count if _has_ddp(nanotron) else 0,
    }
    return Memory(
        **known,
        cuda_context=CONTEXT_BYTES + NCCL_BYTES * (layout.world_size > 1),
        fragmentation=FRAGMENTATION * sum(known.values()),
    )


def _has_ddp(nanotron: Nanotron) -> bool:
    """nanotron 0.4 goes without it where it reduces the fp32 accumulators itself."""
    optimizer = nanotron.optimizer
    reduces = optimizer.accumulate_grad_in_fp32 and optimizer.zero_stage
    return nanotron.parallelism.dp > 1 and not reduces and not _adds_at_once(nanotron)


def _adds_at_once(nanotron: Nanotron) -> bool:
    """Whether weight gradients go into the accumulators inside the matrix product."""
    in_fp32 = nanotron.optimizer.accumulate_grad_in_fp32
    return in_fp32 and nanotron.fast_step.fuses_gradients and nanotron.parallelism.pp == 1


def _moments(nanotron: Nanotron, rank: int) -> list[tuple[float, float, float, float]]:
    """(gradients, activations, inputs of layers, logits and loss) at each moment that may be the
    fullest: the loss, the first and the last layer of the backward pass, the optimizer's step."""
    layout, model, size = nanotron.parallelism, nanotron.model.model_config, _dtype_bytes(nanotron)
    tokens = nanotron.tokens.micro_batch_size * nanotron.tokens.sequence_length
    layers = layers_of_ranks(nanotron)[rank]
    # 1f1b: the first rank has a micro-batch in flight for each rank behind it.
    in_flight = min(layout.pp - rank, nanotron.tokens.batch_accumulation_per_replica)
    layer = tokens * layer_bytes(nanotron)
    one_input = tokens * size * model.hidden_size / _split(nanotron)
    # Of the embedding, as its look-up and a plain head make it, and of all weights.
    embedding = size * model.vocab_size * model.hidden_size / layout.tp
    at_once = _adds_at_once(nanotron)
    gradients = embedding if at_once else size * weights(nanotron, rank)
    is_last = rank == layout.pp - 1
    of_head = embedding if is_last and not at_once else 0.0
    kept, inputs = layer * layers * in_flight, 0.0
    if layout.recompute_layer:
        kept, inputs = 0.0, one_input * layers * in_flight
    others = (kept + inputs) * (in_flight - 1) / in_flight  # of micro-batches still in flight
    loss = _loss_bytes(nanotron, tokens) if is_last else 0.0
    moments = [(of_head, kept, inputs, loss), (gradients, layer + others, one_input, 0.0)]
    if layout.recompute_layer:
        moments.append((of_head, layer, inputs, 0.0))
    if nanotron.optimizer.zero_stage and layout.dp > 1:
        # nanotron 0.4 gathers the updated weights into one buffer.
        moments.append((size * weights(nanotron, rank) * (1 + 1 / layout.dp), 0.0, 0.0, 0.0))
    return moments


def layer_bytes(nanotron: Nanotron) -> float:
    """Bytes a token that one layer keeps for its backward pass, the mean over the layers."""
    model, tp, size = nanotron.model.model_config, nanotron.parallelism.tp, _dtype_bytes(nanotron)
    hidden, inner, heads = model.hidden_size, model.intermediate_size, model.num_attention_heads
    split = _split(nanotron)
    inputs_of_linears = 2 * size * hidden  # gathered, where sequence parallelism had cut them
    attention = 4.0 * size * hidden + 4 * heads  # q, k, v, output, log-sum-exp in fp32
    if nanotron.fast_step.compile_layer:
        inputs_of_norms = 2 * size * hidden
        mlp = 3 * size * inner  # gate, up, their product
        return inputs_of_linears + inputs_of_norms / split + (attention + mlp) / tp
    norms = 2 * ((4 + size) * hidden + 4)  # fp32 x, 1 / rms, x / rms
    mlp = 4 * size * inner  # gate, up, silu(gate), the product
    without = 1 / model.no_rope_layer if model.no_rope_layer else 0.0
    kv = 2 * size * hidden * model.num_key_value_heads / heads
    # Without rotation q is a view of qkv, all of which stays; with it the tables are cast for each.
    attention += without * kv
    tables = (1 - without) * 4 * size * hidden / heads if size < 4 else 0.0
    return inputs_of_linears + norms / split + (attention + mlp) / tp + tables


def _loss_bytes(nanotron: Nanotron, tokens: int) -> float:
    """Bytes of the last norm, the logits and the cross-entropy."""
    model, tp, size = nanotron.model.model_config, nanotron.parallelism.tp, _dtype_bytes(nanotron)
    step, logits = nanotron.fast_step, tokens * model.vocab_size / tp
    norm = tokens * model.hidden_size * ((4 + size) / _split(nanotron) + size)
    if not step.in_place_loss:
        copies = 4 + 4 * (size < 4)  # in fp32: the logits, and they less their largest
        return (size + copies) * logits + norm
    gradient = tokens * size * model.hidden_size
    in_pieces = size * logits > step.whole_logits_gib * 2**30 and nanotron.parallelism.pp == 1
    return (min(size * logits, PIECE_BYTES) if in_pieces else size * logits) + norm + gradient


def weights(nanotron: Nanotron, rank: int = 0) -> int:
    """Weights on a GPU of one pipeline rank; a tied head is held by the first and the last."""
    model, layout = nanotron.model.model_config, nanotron.parallelism
    hidden, inner = model.hidden_size, model.intermediate_size
    kv = hidden * model.num_key_value_heads // model.num_attention_heads
    of_layer = (
        2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner
    ) // layout.tp + 2 * hidden
    matrices = 1 if rank in (0, layout.pp - 1) else 0
    if not model.tie_word_embeddings and layout.pp == 1:
        matrices = 2
    embedding = matrices * model.vocab_size * hidden // layout.tp
    of_last = hidden if rank == layout.pp - 1 else 0
    return layers_of_ranks(nanotron)[rank] * of_layer + embedding + of_last


def layers_of_ranks(nanotron: Nanotron) -> list[int]:
    """Layers of each pipeline rank: nanotron 0.4 evens out the multiply-adds, the head included."""
    model, ranks = nanotron.model.model_config, nanotron.parallelism.pp
    hidden, heads = model.hidden_size, model.num_attention_heads
    kv = hidden * model.num_key_value_heads // heads
    cost = 2 * hidden * (hidden + kv) + 3 * hidden * model.intermediate_size
    whole = model.num_hidden_layers * cost + hidden * model.vocab_size
    counts, rank = [0] * ranks, 0
    for layer in range(1, model.num_hidden_layers + 1):
        counts[rank] += 1
        rank += layer * cost > whole * (rank + 1) / ranks
    return counts


def _split(nanotron: Nanotron) -> int:
    """How many GPUs share what lies between the linears."""
    layout = nanotron.parallelism
    return layout.tp if layout.tp_mode == "REDUCE_SCATTER" else 1


def _dtype_bytes(nanotron: Nanotron) -> int:
    return 2 if nanotron.model.dtype == "bfloat16" else 4


def gib(number_of_bytes: float) -> str:
    """As messages and tables show it."""
    return f"{number_of_bytes / 2**30:.1f}"
