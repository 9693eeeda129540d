"""The layout that the roofline finds fastest among those that fit, at the same tokens a step."""

from collections.abc import Iterator
from dataclasses import replace

from launch.machine.cards import Card, load_cards
from launch.machine.gpus import Gpus
from launch.machine.memory import memory
from launch.machine.speed import GPUS_OF_A_MACHINE, speed, work_of
from launch.recipe.pretrain import Nanotron
from launch.recipe.values import Refused


def fastest(nanotron: Nanotron, gpus: Gpus, card: Card) -> Nanotron | None:
    """`nanotron` on all of the GPUs, with tensor parallelism inside a machine; None: nothing fits."""
    fitting = (
        one for one in layouts(nanotron, gpus.count) if memory(one).total <= gpus.gibibytes * 2**30
    )
    return min(fitting, key=lambda one: speed(work_of(one), card).seconds, default=None)


def layouts(nanotron: Nanotron, gpus: int) -> Iterator[Nanotron]:
    """Every layout of so many GPUs without pipeline stages that keeps the windows of a step."""
    windows = nanotron.windows_a_step
    for tp in range(1, min(gpus, GPUS_OF_A_MACHINE) + 1):
        dp = gpus // tp
        if gpus % tp or windows % dp:
            continue
        for micro_batch in range(1, windows // dp + 1):
            if windows % (dp * micro_batch):
                continue
            for recompute in (False, True):
                for zero_stage in (0, 1) if dp > 1 else (0,):
                    cut = (dp, tp, micro_batch, windows // dp // micro_batch)
                    try:
                        yield _cut(nanotron, *cut, recompute, zero_stage)
                    except Refused:  # tp does not divide the heads
                        continue


def what_would_fit(nanotron: Nanotron, gpus: Gpus) -> str:
    """How much is missing, and the fewest of the same GPUs or the smallest cards that hold it."""
    least = min(memory(one).total for one in layouts(nanotron, gpus.count))
    more = (Gpus(times * gpus.count, gpus.gibibytes) for times in (2, 4, 8))
    counts = [f"GPUS={one.count}" for one in more if _fits(nanotron, one)]
    cards = sorted(load_cards().items(), key=lambda item: item[1].memory)
    larger = [
        f"{gpus.count} x {name}"
        for name, row in cards
        if row.memory > gpus.gibibytes and _fits(nanotron, Gpus(gpus.count, row.memory))
    ]
    remedies = " or ".join([*counts[:1], *larger[:1]])
    return (
        f"does not fit: at the least {least / 2**30:.0f} GiB of each GPU's {gpus.gibibytes:g}; "
        f"{remedies or 'no eight times as many and no card of cards.yaml'} would hold it"
    )


def _fits(nanotron: Nanotron, gpus: Gpus) -> bool:
    most = gpus.gibibytes * 2**30
    return any(memory(one).total <= most for one in layouts(nanotron, gpus.count))


def flat(nanotron: Nanotron, gpus: int) -> Nanotron | None:
    """The same tokens a step as one window a GPU, documents with their own borders as before; None
    where the GPUs do not divide them."""
    tokens = nanotron.windows_a_step * nanotron.tokens.sequence_length
    if tokens % gpus:
        return None
    window = tokens // gpus
    model = nanotron.model
    config = replace(model.model_config, max_position_embeddings=window)
    wide = replace(
        nanotron,
        model=replace(model, model_config=config),
        tokens=replace(nanotron.tokens, sequence_length=window),
    )
    return _cut(wide, gpus, 1, 1, 1, False, int(gpus > 1))


def _cut(
    nanotron: Nanotron,
    dp: int,
    tp: int,
    micro_batch: int,
    accumulation: int,
    recompute: bool,
    zero_stage: int,
) -> Nanotron:
    layout = replace(
        nanotron.parallelism,
        dp=dp, tp=tp, pp=1, context_parallel_size=1, recompute_layer=recompute,
    )  # fmt: skip
    tokens = replace(
        nanotron.tokens,
        micro_batch_size=micro_batch,
        batch_accumulation_per_replica=accumulation,
    )
    optimizer = replace(nanotron.optimizer, zero_stage=zero_stage)
    return replace(nanotron, parallelism=layout, tokens=tokens, optimizer=optimizer)
