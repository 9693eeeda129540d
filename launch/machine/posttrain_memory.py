"""Memory of one GPU in a post-training stage, and the layout that fits the GPUs at hand.

Counted for TRL 1.16 on transformers 5.23: what autograd keeps of a decoder layer for the backward
pass (tests/test_posttrain_memory.py counts the same tensors in a real layer), the fused head, which
never holds whole logits, and the weights, gradients and moments that stay. One process trains
float32 masters under autocast, or bf16 weights with adapters; several share all of it by DeepSpeed's
ZeRO-3, counted from its defaults. No part has been compared with a GPU's own count.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ground.errors import UserError
from launch.machine.attention import is_dense
from launch.machine.fit import CARDS, COUNTS, MOST_TOKENS, divisors
from launch.machine.gpus import Gpus
from launch.machine.memory import CONTEXT_BYTES, FRAGMENTATION, NCCL_BYTES, Memory, gib
from launch.recipe.posttrain import DpoRecipe, Lora, PosttrainRecipe

# DeepSpeed's defaults: parameters that are whole at a time, and that one optimizer step works on;
# elements of a bucket of gradients.
LIVE_PARAMETERS, SUB_GROUP, BUCKET = 1e9, 1e9, 5e8
# A prompt that is scored, in tokens: at most 4,000 characters, after the long system text.
PROMPT_TOKENS = 1400
# What a linear reads; o_proj reads the output of attention, which is kept anyway.
READS = {
    "q_proj": "first norm", "k_proj": "first norm", "v_proj": "first norm",
    "gate_proj": "second norm", "up_proj": "second norm", "down_proj": "product",
}  # fmt: skip
# What a message recommends: adapters of a common size, windows that still hold a conversation.
SHORTEST = 512
REMEDY_LORA = Lora(rank=16, alpha=32)


@dataclass(frozen=True)
class Shape:
    """Sizes of a SmolLM3; `kv` is the width of its keys."""

    hidden: int
    inner: int
    kv: int
    heads: int
    layers: int
    vocab: int
    is_tied: bool

    @staticmethod
    def of(config: Mapping[str, Any]) -> "Shape":
        """From transformers' config.json, or the `model_config` of a pretraining recipe."""
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        return Shape(
            hidden=hidden,
            inner=config["intermediate_size"],
            kv=hidden * config["num_key_value_heads"] // heads,
            heads=heads,
            layers=config["num_hidden_layers"],
            vocab=config["vocab_size"],
            is_tied=config.get("tie_word_embeddings", True),
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's linears."""
        h, i, kv = self.hidden, self.inner, self.kv
        attention = {"q_proj": (h, h), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (h, h)}
        return {**attention, "gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h)}

    @property
    def parameters(self) -> int:
        layer = sum(a * b for a, b in self.linears.values()) + 2 * self.hidden
        embeddings = (1 if self.is_tied else 2) * self.vocab * self.hidden
        return self.layers * layer + embeddings + self.hidden

    def adapter_parameters(self, lora: Lora) -> int:
        return self.layers * sum(lora.rank * sum(self.linears[name]) for name in lora.targets)


def posttrain_memory(recipe: PosttrainRecipe, shape: Shape, attention: str) -> Memory:
    """Memory of one GPU of a recipe's layout; `attention` is the kernel that it runs."""
    standing = _standing(recipe, shape)
    fullest = max(_moments(recipe, shape, is_dense(attention)), key=sum)
    gradients, activations, layer_inputs, head = fullest
    known = {
        **standing,
        "gradients": gradients,
        "activations": activations,
        "layer_inputs": layer_inputs,
        "logits_and_loss": head,
        "ddp_buckets": 0.0,
    }
    return Memory(
        **known,
        cuda_context=CONTEXT_BYTES + NCCL_BYTES * (recipe.world_size > 1),
        fragmentation=FRAGMENTATION * sum(known.values()),
    )


def _standing(recipe: PosttrainRecipe, shape: Shape) -> dict[str, float]:
    """Weights and moments, in bytes."""
    count, ranks = shape.parameters, recipe.world_size
    trained = shape.adapter_parameters(recipe.lora) if recipe.lora else count
    if ranks > 1:
        whole = 2 * min(count, LIVE_PARAMETERS)
        frozen = 2 * count / ranks if recipe.lora else 0.0
        return {"weights": whole + frozen + 6 * trained / ranks, "optimizer": 8 * trained / ranks}
    if recipe.lora:
        return {"weights": 2.0 * count + 6 * trained, "optimizer": 8.0 * trained}
    if not recipe.trl.bf16:
        return {"weights": 4.0 * count, "optimizer": 8.0 * count}
    # Masters, and the bf16 copies that autocast keeps until the forward pass is over.
    return {"weights": 6.0 * count, "optimizer": 8.0 * count}


def _moments(
    recipe: PosttrainRecipe, shape: Shape, dense: bool
) -> Iterator[tuple[float, float, float, float]]:
    """(gradients, activations, inputs of layers, head) at the moments that may be the fullest: the
    loss, the first layer of the backward pass, the answers to held-out prompts."""
    trl, size = recipe.trl, residual_bytes(recipe)
    sequences = trl.per_device_train_batch_size * (2 if isinstance(recipe, DpoRecipe) else 1)
    tokens = sequences * trl.max_length
    layer = tokens * layer_bytes(shape, recipe)
    kept, inputs = layer * shape.layers, 0.0
    if trl.gradient_checkpointing:
        kept, inputs = layer, float(tokens * size * shape.hidden * shape.layers)
    if dense:
        # One mask of all pairs as booleans; each layer's kernel keeps it as bf16.
        copies = 1 if trl.gradient_checkpointing else shape.layers
        kept += sequences * trl.max_length**2 * (1 + 2 * copies)
    gradients = _gradients(recipe, shape)
    # Hidden states before and after the last norm, of the trained tokens, and their gradient.
    head = tokens * shape.hidden * (2 * size + 8.0)
    of_head = 0.0 if recipe.lora else 4.0 * shape.vocab * shape.hidden
    during_loss = kept if not trl.gradient_checkpointing else 0.0
    yield gradients, during_loss, inputs, head + of_head
    # Gradients of gate, up and their product, of the residual and of a norm.
    backward = tokens * (6 * shape.inner + 8 * shape.hidden)
    yield gradients, kept + backward, inputs, 0.0
    if recipe.scores.prompts_at_end:
        from posttrain.scores import prompts_at_once

        length = PROMPT_TOKENS + recipe.scores.max_new_tokens
        cache = prompts_at_once(recipe.scores.max_new_tokens) * length * (size + 2) * shape.kv
        whole = 2.0 * shape.parameters if recipe.world_size > 1 else 0.0
        yield 0.0, cache * shape.layers + whole, 0.0, 0.0


def _gradients(recipe: PosttrainRecipe, shape: Shape) -> float:
    ranks = recipe.world_size
    trained = shape.adapter_parameters(recipe.lora) if recipe.lora else shape.parameters
    if ranks == 1:
        return 4.0 * trained
    bucket = 2 * min(trained, BUCKET)
    return 2 * trained / ranks + bucket + 4 * min(trained / ranks, SUB_GROUP)


def residual_bytes(recipe: PosttrainRecipe) -> int:
    """Bytes of an element between layers: autocast leaves the embedding's float32 in place."""
    are_masters = recipe.world_size == 1 and not recipe.lora
    return 4 if are_masters or not recipe.trl.bf16 else 2


def layer_bytes(shape: Shape, recipe: PosttrainRecipe) -> float:
    """Bytes a token that one decoder layer keeps for its backward pass."""
    h, kv, i, of_norms = shape.hidden, shape.kv, shape.inner, 8
    size = 2 if recipe.trl.bf16 else 4
    # Keys, values, queries, log-sum-exp; gate, silu(gate), up.
    both = size * (2 * kv + h + 3 * i) + 4 * shape.heads + of_norms
    if recipe.lora:
        # Of the norms x in float32, of attention the output; a frozen linear needs no input.
        return both + (8 + size) * h + size * _kept_by_adapters(shape, recipe, recipe.lora)
    if recipe.world_size == 1 and recipe.trl.bf16:
        # Two norms keep x and x / rms in float32; autocast copies the input for each linear.
        return both + 16 * h + size * (6 * h + i)
    # Two norms: x in float32 and x / rms; inputs of the linears: two norms', attention's, the product.
    return both + 2 * (4 + size) * h + size * (3 * h + i)


def _kept_by_adapters(shape: Shape, recipe: PosttrainRecipe, lora: Lora) -> int:
    """Elements a token of one layer: inputs of both matrices of each adapter."""
    inner = len(lora.targets) * lora.rank
    if recipe.world_size == 1 and recipe.trl.bf16:  # autocast copies an input for each of them
        return inner + sum(shape.linears[name][0] for name in lora.targets)
    read = {READS[name]: shape.linears[name][0] for name in lora.targets if name != "o_proj"}
    return inner + sum(read.values())


def fit_posttrain(
    recipe: PosttrainRecipe, shape: Shape, gpus: Gpus, attention: str
) -> PosttrainRecipe:
    """The recipe on all of the GPUs, with as many windows or pairs a step as before.

    No recomputation where that fits, and then the largest batch that divides the step. UserError
    where the GPUs do not divide it, or nothing fits.
    """
    if laid_out := next(_fitting(recipe, shape, gpus, attention), None):
        return laid_out
    step, unit = global_batch(recipe), "pairs" if isinstance(recipe, DpoRecipe) else "windows"
    if step % gpus.count:
        raise UserError(
            f"{recipe.stage}: {gpus.count} GPUs do not divide the {step} {unit} of a step; set GPUS= "
            f"to {divisors(step, gpus.count)}"
        )
    least = min(
        (posttrain_memory(one, shape, attention) for one in _layouts(recipe, gpus.count)),
        key=lambda memory: memory.total,
    )
    held = least.weights + least.gradients + least.optimizer
    kept = least.activations + least.layer_inputs + least.logits_and_loss
    raise UserError(
        f"{recipe.stage} does not fit on {gpus}, because the leanest "
        f"layout takes {gib(least.total)} GiB a GPU ({gib(held)} for weights, gradients and optimizer, "
        f"{gib(kept)} for one of the {unit} of {recipe.trl.max_length:,} tokens); "
        f"{_remedy(recipe, shape, gpus, attention)}"
    )


def global_batch(recipe: PosttrainRecipe) -> int:
    """Windows, or pairs, of a step."""
    trl = recipe.trl
    return recipe.world_size * trl.per_device_train_batch_size * trl.gradient_accumulation_steps


def unfitted(recipe: PosttrainRecipe) -> PosttrainRecipe:
    """The recipe in the layout that a run is known by, whatever it is laid out on: one process."""
    return _layout(recipe, 1, 1, recipe.trl.gradient_checkpointing)


def _layout(recipe: PosttrainRecipe, ranks: int, batch: int, recompute: bool) -> PosttrainRecipe:
    trl = replace(
        recipe.trl,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=global_batch(recipe) // ranks // batch,
        gradient_checkpointing=recompute,
    )
    return replace(recipe, world_size=ranks, trl=trl)


def _layouts(recipe: PosttrainRecipe, ranks: int) -> Iterator[PosttrainRecipe]:
    """Every layout on so many GPUs, the best first."""
    if global_batch(recipe) % ranks:
        return
    each = global_batch(recipe) // ranks
    sides = 2 if isinstance(recipe, DpoRecipe) else 1
    most = max(MOST_TOKENS // (sides * recipe.trl.max_length), 1)
    for recompute in (False, True):
        for batch in range(min(each, most), 0, -1):
            if each % batch == 0:
                yield _layout(recipe, ranks, batch, recompute)


def _fitting(
    recipe: PosttrainRecipe, shape: Shape, gpus: Gpus, attention: str
) -> Iterator[PosttrainRecipe]:
    for one in _layouts(recipe, gpus.count):
        if posttrain_memory(one, shape, attention).fits(gpus):
            yield one


def _remedy(recipe: PosttrainRecipe, shape: Shape, gpus: Gpus, attention: str) -> str:
    """What would do, each by itself."""

    def fits(one: PosttrainRecipe, on: Gpus = gpus, kernel: str = attention) -> bool:
        return next(_fitting(one, shape, on, kernel), None) is not None

    def longest(one: PosttrainRecipe) -> int:
        """The halved max_length that fits; 0: none."""
        lengths = (one.trl.max_length // 2**n for n in range(1, 20))
        return next((n for n in lengths if n >= SHORTEST and fits(_of_length(one, n))), 0)

    choices = []
    if is_dense(attention) and fits(recipe, kernel="flash_attention_2"):
        choices.append("flash-attn installed")
    if not recipe.lora:
        adapted, say = replace(recipe, lora=REMEDY_LORA), "LoRA (`lora: {rank: 16, alpha: 32}`)"
        if fits(adapted):
            choices.append(say)
        elif length := longest(adapted):
            choices.append(f"{say} with trl.max_length: {length}")
    if length := longest(recipe):
        choices.append(f"trl.max_length: {length}")
    for cards in (Gpus(count, gpus.gibibytes) for count in COUNTS if count > gpus.count):
        if fits(recipe, cards):
            choices.append(f"GPUS={cards.count}")
            break
    for card in (Gpus(gpus.count, size) for size in CARDS if size > gpus.gibibytes):
        if fits(recipe, card):
            choices.append(f"GPU_GB={card.gibibytes:g}")
            break
    if not choices:
        return "take a smaller model"
    return f"{' or '.join(choices)} would do"


def _of_length(recipe: PosttrainRecipe, length: int) -> PosttrainRecipe:
    return replace(recipe, trl=replace(recipe.trl, max_length=length))
