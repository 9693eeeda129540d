"""The layout dial: one pure function from a recipe to the same recipe laid out on given GPUs.

Kept: the windows of a step, and so every token of the run. Set: dp, tp, pp, micro-batch,
accumulation, recomputation, ZeRO stage; every GPU is used. The first of these that fits is taken:

1. As few GPUs a replica as possible: tp and pp cost communication or idle time, so they come only
   where one GPU cannot hold its share; at the same product tp first, since it cuts the logits too.
2. No recomputation: a prototype's 3B ran at 16.7k tokens/s without it and at 10.7k with it.
3. ZeRO stage 0, then 1, which cuts masters and moments by dp: nanotron 0.4 gathers the weights anew
   at each step.
4. Logits whole as far as `fast_step.whole_logits_gib` allows, then always in pieces, which computes
   the head once more.
5. The largest micro-batch that divides the replica's windows and has at most MOST_TOKENS tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, product

from ground.errors import UserError
from launch.machine.gpus import Gpus
from launch.machine.memory import Memory, gib, layers_of_ranks, memory
from launch.recipe.pretrain import FastStep, Nanotron
from launch.recipe.values import Refused

# Larger micro-batches gain next to nothing: a prototype's 135M ran at 276k tokens/s with 32,768
# and at 316k with 65,536 when it also no longer waited for the host, which alone gave 15 %.
MOST_TOKENS = 32_768
CUTS = (1, 2, 4, 8)  # of tp and pp: a node has 8 GPUs
# GPUs and GiB that a message may recommend.
COUNTS = (1, 2, 4, 8, 16, 32, 64)
CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 141)


@dataclass(frozen=True)
class Layout:
    """How a step's windows are spread over GPUs."""

    dp: int
    tp: int
    pp: int
    micro_batch_size: int
    recompute_layer: bool
    zero_stage: int
    whole_logits_gib: float  # of nanotron.fast_step

    def of(self, nanotron: Nanotron) -> Nanotron:
        """The recipe in this layout, with as many windows a step as before.

        Raises Refused where the model cannot be cut so.
        """
        each = nanotron.windows_a_step // self.dp
        parallelism = replace(
            nanotron.parallelism,
            dp=self.dp,
            tp=self.tp,
            pp=self.pp,
            context_parallel_size=1,
            recompute_layer=self.recompute_layer,
        )
        tokens = replace(
            nanotron.tokens,
            micro_batch_size=self.micro_batch_size,
            batch_accumulation_per_replica=each // self.micro_batch_size,
        )
        optimizer = replace(nanotron.optimizer, zero_stage=self.zero_stage)
        fast_step = replace(nanotron.fast_step, whole_logits_gib=self.whole_logits_gib)
        return replace(
            nanotron,
            parallelism=parallelism,
            tokens=tokens,
            optimizer=optimizer,
            fast_step=fast_step,
        )


def unfitted(nanotron: Nanotron) -> Nanotron:
    """The recipe in the layout that a run is known by, whatever it is laid out on: one process."""
    return Layout(1, 1, 1, 1, False, 0, FastStep().whole_logits_gib).of(nanotron)


def fit(nanotron: Nanotron, gpus: Gpus, fast: bool = True) -> Nanotron:
    """The recipe laid out on all of the GPUs.

    UserError where their number does not divide the windows of a step, or nothing fits.
    """
    first = next(_fitting(nanotron, gpus, fast), None)
    if first:
        return first
    windows = nanotron.windows_a_step
    if not any(_laid_out(nanotron, layout) for layout in _layouts(nanotron, gpus.count)):
        raise UserError(
            f"{gpus.count} GPUs do not divide the {windows} windows of a step; set GPUS= to "
            f"{divisors(windows, gpus.count)}"
        )
    raise UserError(_does_not_fit(nanotron, gpus, fast))


def fit_if_possible(nanotron: Nanotron, gpus: Gpus, fast: bool = True) -> Nanotron:
    """The same, or in one process where `fit` raises: who only looks at a recipe is not refused."""
    try:
        return fit(nanotron, gpus, fast)
    except UserError:
        return unfitted(nanotron)


def _fitting(nanotron: Nanotron, gpus: Gpus, fast: bool) -> Iterator[Nanotron]:
    """Layouts that fit, the best first."""
    for layout in _layouts(nanotron, gpus.count):
        laid_out = _laid_out(nanotron, layout)
        if laid_out and memory(laid_out, fast).fits(gpus):
            yield laid_out


def _layouts(nanotron: Nanotron, count: int) -> Iterator[Layout]:
    """Every layout that uses all GPUs, in the order of this file's header."""
    for dp, tp, pp in _cuts(nanotron, count):
        if nanotron.windows_a_step % dp:
            continue
        stages = (0, 1) if _can_shard(nanotron, dp) else (0,)
        bound = nanotron.fast_step.whole_logits_gib
        bounds = (bound, 0.0) if pp == 1 else (bound,)
        sizes = _micro_batches(nanotron, dp, pp)
        for recompute, stage, bound, size in product((False, True), stages, bounds, sizes):
            yield Layout(dp, tp, pp, size, recompute, stage, bound)


def _cuts(nanotron: Nanotron, count: int) -> Iterator[tuple[int, int, int]]:
    """(dp, tp, pp) whose product is the number of GPUs, and that the model allows."""
    cuts = [(tp, pp) for tp in CUTS for pp in CUTS if count % (tp * pp) == 0]
    for tp, pp in sorted(cuts, key=lambda cut: (cut[0] * cut[1], cut[1])):
        if nanotron.model.model_config.num_key_value_heads % tp == 0:
            yield count // (tp * pp), tp, pp


def _can_shard(nanotron: Nanotron, dp: int) -> bool:
    """Slices of equal length: gloo gathers no others, and nanotron 0.4's own code assumes them."""
    return dp > 1 and nanotron.model.model_config.hidden_size % dp == 0


def _micro_batches(nanotron: Nanotron, dp: int, pp: int) -> list[int]:
    """Windows of a micro-batch, the most first; every pipeline rank has one at a time."""
    each = nanotron.windows_a_step // dp
    most = min(max(MOST_TOKENS // nanotron.tokens.sequence_length, 1), each // pp)
    return [size for size in range(most, 0, -1) if each % size == 0]


def _laid_out(nanotron: Nanotron, layout: Layout) -> Nanotron | None:
    """None where the model cannot be cut so."""
    try:
        laid_out = layout.of(nanotron)
    except Refused:
        return None
    return laid_out if all(layers_of_ranks(laid_out)) else None


def _does_not_fit(nanotron: Nanotron, gpus: Gpus, fast: bool) -> str:
    """Why, and what would do."""
    laid_out = [_laid_out(nanotron, layout) for layout in _layouts(nanotron, gpus.count)]
    least = min((memory(one, fast) for one in laid_out if one), key=lambda one: one.total)
    return (
        f"does not fit on {gpus}, because the leanest layout takes "
        f"{gib(least.total)} GiB a GPU ({_parts(least)}); {_remedy(nanotron, gpus, fast)}"
    )


def _parts(least: Memory) -> str:
    held = least.weights + least.gradients + least.optimizer + least.ddp_buckets
    kept = least.activations + least.layer_inputs + least.logits_and_loss
    return f"{gib(held)} for weights, gradients and optimizer, {gib(kept)} for one window"


def _remedy(nanotron: Nanotron, gpus: Gpus, fast: bool) -> str:
    def fits(other: Gpus) -> bool:
        return next(_fitting(nanotron, other, fast), None) is not None

    larger = (size for size in CARDS if size > gpus.gibibytes)
    card = next((size for size in larger if fits(Gpus(gpus.count, size))), 0)
    more = (count for count in COUNTS if count > gpus.count)
    count = next((count for count in more if fits(Gpus(count, gpus.gibibytes))), 0)
    choices = [f"GPU_GB={card}"] * bool(card) + [f"GPUS={count}"] * bool(count)
    if not choices:
        return "shorten the window or the model"
    return f"{' or '.join(choices)} would do"


def divisors(number: int, count: int) -> str:
    """The divisors of a number, as text: the least, those about `count`, the largest."""
    known = [n for n in range(1, number + 1) if number % n == 0]
    below = max((n for n in known if n < count), default=1)
    above = [n for n in known if n > count][:1]
    shown = sorted({*known[:3], below, *above, known[-1]})
    words = [str(shown[0])]
    for before, after in pairwise(shown):
        is_next = known.index(after) == known.index(before) + 1
        words.append(f", {after}" if is_next else f", ... {after}")
    return "".join(words)
