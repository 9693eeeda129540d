"""Tokens/s of a training stage on a card, predicted from what a step computes and what it moves.

A roofline: matrix products at a share of the card's peak, everything else at a share of its memory's
bandwidth, a fixed time a layer and micro-batch between the kernels, and what the links between GPUs
carry. The parts are added up, as if nothing but the gradients' all-reduce overlapped. It is a
prediction: no card but one was measured.

That one is an H100 (SXM) under a prototype of the fast step. Its 19 rows, models of 135M to 3B, are
in tests/test_speed.py; the constants below give them back within 9 %, on the mean within 3 %. Each
says what it is from. No row asks for a share of the peak that falls with the width, from 576 to
2,048. One more row is not given back: the plain step with every layer recomputed took 27 % more time
than is predicted. What passes between GPUs is counted, not measured; of it there is one check, the
published run of 384 GPUs with tp 2: predicted are 20.8 days, it took 24.
"""

from dataclasses import dataclass, replace
from math import ceil

from launch.machine.attention import CAPABILITY_OF_4
from launch.machine.cards import GPUS_OF_A_MACHINE, Card
from launch.recipe.pretrain import FastStep, ModelConfig, Nanotron

# Of the peak, in matrix products: 400 ms of the 3B's step of 16,384 tokens say 0.76, all rows 0.80.
MATMUL_SHARE = 0.80
# Of the peak, in FlashAttention 2's products; and keys that each token pays for beyond those that it
# attends: tiles at the borders of documents, and the kernel's own start. One call on 12,288 tokens
# in documents of 1,000 (1.96 ms) and one on 32,768 in documents of 8,000 (10.5 ms).
ATTENTION_SHARE, ATTENTION_MORE_KEYS = 0.42, 1300
# FlashAttention 4's time over FlashAttention 2's: 0.5 to 0.7 in calls of one layer; two rows of steps.
ATTENTION_4 = 0.7
# Of the memory's bandwidth: SwiGLU's 16 bytes a token and inner channel in 40 ms of that step.
BANDWIDTH_SHARE = 0.78
# Bytes a weight and step: AdamW reads and writes 30, norm, clipping and zeroing of fp32 gradients 26:
# 66 ms of the 3B's step.
ADAM_BYTES, GRADIENT_BYTES = 30, 26
# Bytes a weight and micro-batch, where gradients are added to fp32 accumulators in kernels of their
# own: 54 ms of four micro-batches of the 3B.
ADDED_GRADIENT_BYTES = 12
# Seconds a layer and micro-batch: between kernels, at all times; and while the host waits for the
# GPU, as it did to count documents (27 ms of four micro-batches of the 3B's 36 layers).
GAP_SECONDS, WAIT_SECONDS = 6e-4, 2e-4
# Of a link's bandwidth that collectives reach. Ours: no row says it.
LINK_SHARE = 0.7
# Of forward and backward, the part behind which the all-reduce of the gradients can hide.
BACKWARD_SHARE = 2 / 3
# Mean tokens of a document: 1,000 in the prototype's rows of 2,048 to 6,144 tokens a window, a
# quarter of the window in its row of 32,768.
DOCUMENT_TOKENS = 1000


@dataclass(frozen=True)
class Code:
    """How a step is computed: bytes it moves besides its matrix products, and what it waits for."""

    layer_bytes_per_hidden: float  # a token: norms, rotation, residuals, copies
    layer_bytes_per_inner: float  # a token: SwiGLU
    bytes_per_logit: float
    adds_gradients: bool  # in kernels of their own
    host_waits: bool
    attention: float = 1.0  # time, over FlashAttention 2's


# The plugin without its fast step, and transformers' model: 400 and 60 bytes from four rows, 28 from
# eager silu and product.
PLAIN = Code(400, 28, 60, adds_gradients=True, host_waits=True)
# The decoder layer compiled, cross-entropy in place: 80 bytes from eight rows, 16 and 10 counted.
COMPILED = Code(80, 16, 10, adds_gradients=True, host_waits=True)
WEIGHT_GRADIENTS = replace(COMPILED, adds_gradients=False)
FAST = replace(WEIGHT_GRADIENTS, host_waits=False)
FAST_FLASH_4 = replace(FAST, attention=ATTENTION_4)


def code_of(chosen: FastStep) -> Code:
    """The step with what a recipe's `fast_step` switches on; the loader keeps the host from waiting."""
    layer = FAST if chosen.compile_layer else PLAIN
    loss = FAST if chosen.in_place_loss else PLAIN
    return replace(
        layer,
        bytes_per_logit=loss.bytes_per_logit,
        adds_gradients=not chosen.fuses_gradients,
        host_waits=False,
    )


def on_card(code: Code, card: Card) -> Code:
    """With the attention that the gpu extra installs: FlashAttention 4 where it runs."""
    runs_4 = card.capability >= CAPABILITY_OF_4[0]
    return replace(code, attention=ATTENTION_4) if runs_4 else code


@dataclass(frozen=True)
class Work:
    """An optimizer step as a layout cuts it."""

    model: ModelConfig
    window: int
    micro_batch_size: int
    accumulation: int
    dp: int = 1
    tp: int = 1
    pp: int = 1
    recompute: bool = False
    zero_stage: int = 0
    document_tokens: float = 0.0  # their mean; 0: as in the prototype's rows
    frozen: bool = False  # adapters alone are trained: no gradients of weights

    @property
    def gpus(self) -> int:
        return self.dp * self.tp * self.pp

    @property
    def layout(self) -> str:
        """In words: `3x4,096 x 2` are two micro-batches of three windows."""
        tp, pp, zero = (
            f" {name}{number}" if number > least else ""
            for name, number, least in (
                ("tp ", self.tp, 1),
                ("pp ", self.pp, 1),
                ("ZeRO-", self.zero_stage, 0),
            )
        )
        cut = f"{self.micro_batch_size}x{self.window:,} x {self.accumulation}"
        return f"dp {self.dp}{tp}{pp} {cut}{' recompute' * self.recompute}{zero}"

    @property
    def micro_batch_tokens(self) -> int:
        return self.micro_batch_size * self.window

    @property
    def tokens(self) -> int:
        """Of a step, all GPUs together."""
        return self.micro_batch_tokens * self.accumulation * self.dp

    @property
    def mean_keys(self) -> float:
        """Keys that a token attends on the mean, in documents of one length, or in whole windows."""
        return mean_keys(self.window, self.model._use_doc_masking, self.document_tokens)

    @property
    def layer_weights(self) -> int:
        """Of one layer's matrices."""
        model, hidden = self.model, self.model.hidden_size
        kv = hidden * model.num_key_value_heads // model.num_attention_heads
        return hidden * (2 * hidden + 2 * kv + 3 * model.intermediate_size)

    @property
    def weights(self) -> int:
        """Of all matrices, the tied head once."""
        head = self.model.vocab_size * self.model.hidden_size
        return self.model.num_hidden_layers * self.layer_weights + head

    @property
    def flops_per_token(self) -> float:
        """Recomputation is not counted."""
        width = self.model.num_hidden_layers * self.model.hidden_size
        return flops_per_token(self.weights, width, self.mean_keys)


def mean_keys(window: int, is_masked: bool, document_tokens: float = 0.0) -> float:
    """Keys that a token attends on the mean; `document_tokens` 0: as in the prototype's rows."""
    document = document_tokens or max(DOCUMENT_TOKENS, window // 4)
    return min(document if is_masked else window, window) / 2


def flops_per_token(weights: int, width: int, keys: float, is_frozen: bool = False) -> float:
    """6 a weight, 4 where adapters alone are trained, and 12 a layer, channel (`width`: both
    multiplied) and attended key."""
    return (4 if is_frozen else 6) * weights + 12 * width * keys


def work_of(nanotron: Nanotron) -> Work:
    """The step of a recipe's `nanotron:` section."""
    layout, tokens = nanotron.parallelism, nanotron.tokens
    return Work(
        nanotron.model.model_config,
        tokens.sequence_length,
        tokens.micro_batch_size,
        tokens.batch_accumulation_per_replica,
        layout.dp,
        layout.tp,
        layout.pp,
        layout.recompute_layer,
        nanotron.optimizer.zero_stage,
    )


@dataclass(frozen=True)
class Speed:
    """Seconds of one step, by part, and what follows from them."""

    work: Work
    matmul: float
    attention: float
    memory: float  # norms, SwiGLU, loss: bound by the memory's bandwidth
    gaps: float  # between kernels
    optimizer: float
    tensor_parallel: float
    data_parallel: float  # what the backward pass does not hide
    pipeline: float  # GPUs that have nothing to do at a step's beginning and end

    @property
    def seconds(self) -> float:
        parts = (self.matmul, self.attention, self.memory, self.gaps, self.optimizer)
        return sum(parts) + self.tensor_parallel + self.data_parallel + self.pipeline

    @property
    def tokens_per_second(self) -> float:
        """All GPUs together."""
        return self.work.tokens / self.seconds

    def mfu(self, card: Card) -> float:
        """Share of the peak, by Work.flops_per_token: attended keys within documents alone."""
        return self.work.flops_per_token * self.tokens_per_second / self.work.gpus / card.flops


def speed(work: Work, card: Card, code: Code = FAST) -> Speed:
    """A step's time on `card`s."""
    model, tokens, steps = work.model, work.micro_batch_tokens, work.accumulation
    layers, again = ceil(model.num_hidden_layers / work.pp), 4 / 3 if work.recompute else 1.0
    hidden, vocab = model.hidden_size, model.vocab_size
    bandwidth = BANDWIDTH_SHARE * card.memory_bytes_per_second
    layer_bytes = code.layer_bytes_per_hidden * hidden
    layer_bytes += code.layer_bytes_per_inner * model.intermediate_size
    weights = (layers * work.layer_weights + vocab * hidden) / work.tp
    # Forward, gradients of inputs and of weights; forward again where layers are recomputed.
    passes = 4 if work.frozen else 6
    of_layers = (passes + 2 * work.recompute) * layers * work.layer_weights
    matmul = tokens / work.tp * (of_layers + passes * vocab * hidden)
    keys = work.mean_keys + ATTENTION_MORE_KEYS
    attention = code.attention * again * 12 * tokens * layers * hidden / work.tp * keys
    moved = tokens * (again * layers * layer_bytes + code.bytes_per_logit * vocab) / work.tp
    moved += (code.adds_gradients and not work.frozen) * ADDED_GRADIENT_BYTES * weights
    gap = layers * (GAP_SECONDS + code.host_waits * WAIT_SECONDS)
    matmul /= MATMUL_SHARE * card.flops
    attention /= ATTENTION_SHARE * card.flops
    tensor_parallel = _tensor_parallel_seconds(work, card)
    micro_batch = matmul + attention + moved / bandwidth + gap + tensor_parallel
    updated = ADAM_BYTES / (work.dp if work.zero_stage else 1)
    updated += GRADIENT_BYTES / (work.dp if work.zero_stage == 3 else 1)
    return Speed(
        work,
        steps * matmul,
        steps * attention,
        steps * moved / bandwidth,
        steps * gap,
        (not work.frozen) * updated * weights / bandwidth,
        steps * tensor_parallel,
        _data_parallel_seconds(work, card, weights, micro_batch),
        (work.pp - 1) * micro_batch,
    )


def _tensor_parallel_seconds(work: Work, card: Card) -> float:
    """Of one micro-batch: four collectives a layer forward, as many backward, and two more where the
    inputs of the linears are gathered again; recomputation runs the forward ones twice."""
    if work.tp == 1:
        return 0.0
    collectives = 4 + 6 + 4 * work.recompute
    bytes_each = 2 * work.micro_batch_tokens * work.model.hidden_size * (1 - 1 / work.tp)
    layers = ceil(work.model.num_hidden_layers / work.pp)
    return layers * collectives * bytes_each / (LINK_SHARE * card.link_bytes_per_second)


def _data_parallel_seconds(work: Work, card: Card, weights: float, micro_batch: float) -> float:
    """Of one step, what computation does not hide.

    The ring all-reduce of fp32 gradients hides behind the last backward pass; with ZeRO-1 the updated
    bf16 weights are gathered after it; with ZeRO-3 each micro-batch gathers them twice and scatters
    bf16 gradients, behind all of its computation.
    """
    if work.dp == 1:
        return 0.0
    link, share = card.link_bytes_per_second, 1 - 1 / work.dp
    if work.gpus > GPUS_OF_A_MACHINE:  # the tp rings of a machine share its adapters
        link = min(link, GPUS_OF_A_MACHINE / work.tp * card.network_bytes_per_second)
    bf16 = share * 2 * weights / (LINK_SHARE * link)  # seconds to gather or scatter once
    if work.zero_stage == 3:
        return work.accumulation * max(0.0, 3 * bf16 - micro_batch)
    return max(0.0, 4 * bf16 - BACKWARD_SHARE * micro_batch) + work.zero_stage * bf16
