"""The plan of the published run beside what was published of it."""

from dataclasses import replace

from launch.machine.cards import card
from launch.machine.fit import fit
from launch.machine.gpus import Gpus
from launch.machine.memory import memory
from launch.machine.speed import FAST_FLASH_4, PLAIN, Code, speed, work_of
from launch.recipe.book import load_recipe
from launch.recipe.pretrain import Nanotron

# Blog and Training Playbook: stages 1-3 took 24 days of compute; 11.2T tokens in 24 days on 384 GPUs
# are 14,070 tokens/s each. The Playbook's reason for tp 2: one GPU would need about 74 GB.
GPUS, NAME, DAYS, TOKENS, GIGABYTES = 384, "h100-sxm", 24, 11.2e12, 74
LAST = "pretrain-stage3"


def published() -> Nanotron:
    """The layout of stages 1 to 3, the same in all three."""
    nanotron: Nanotron = load_recipe(LAST).published.nanotron
    return nanotron


def days(nanotron: Nanotron, code: Code = FAST_FLASH_4) -> float:
    """Predicted, for the published tokens."""
    return TOKENS / speed(work_of(nanotron), card(NAME), code).tokens_per_second / 86400


def unsharded(nanotron: Nanotron) -> Nanotron:
    """One window on one GPU."""
    layout = replace(nanotron.parallelism, dp=1, tp=1, pp=1)
    return replace(
        nanotron, parallelism=layout, tokens=replace(nanotron.tokens, micro_batch_size=1)
    )


def flat(nanotron: Nanotron, gpus: Gpus) -> Nanotron:
    """The same tokens a step as one window for each GPU, documents with their own borders as before.

    UserError where the GPUs do not divide the tokens.
    """
    tokens = nanotron.windows_a_step * nanotron.tokens.sequence_length
    window = tokens // gpus.count
    config = replace(nanotron.model.model_config, max_position_embeddings=window)
    wide = replace(
        nanotron,
        model=replace(nanotron.model, model_config=config),
        parallelism=replace(nanotron.parallelism, dp=gpus.count, tp=1),
        tokens=replace(nanotron.tokens, sequence_length=window, micro_batch_size=1),
    )
    return fit(wide, gpus)


def comparison() -> list[list[str]]:
    """Rows of a table: what; days of stages 1-3; GPU-days; tokens/s, GB and GB unsharded of a GPU."""
    recipe, on = published(), Gpus(GPUS, card(NAME).gibibytes)
    rate = TOKENS / DAYS / 86400 / GPUS
    rows = [["published", f"{DAYS}", f"{DAYS * GPUS:,}", f"{rate:,.0f}", "", f"about {GIGABYTES}"]]
    rows.append(_row("step not compiled", recipe, PLAIN))
    rows.append(_row("fast step", recipe, FAST_FLASH_4))
    if (best := fit(recipe, on)) != recipe:
        rows.append(_row("laid out by fit", best, FAST_FLASH_4))
    windows = recipe.windows_a_step
    most = max(count for count in range(1, GPUS + 1) if windows % count == 0)
    rows.append(
        _row("the most GPUs without tp", fit(recipe, replace(on, count=most)), FAST_FLASH_4)
    )
    rows.append(_row("one window a GPU", flat(recipe, on), FAST_FLASH_4))
    return rows


def _row(what: str, nanotron: Nanotron, code: Code) -> list[str]:
    work, fast = work_of(nanotron), code is not PLAIN
    step, took = speed(work, card(NAME), code), days(nanotron, code)
    return [
        f"{what}: {work.layout}",
        f"{took:.1f}",
        f"{took * work.gpus:,.0f}",
        f"{step.tokens_per_second / work.gpus:,.0f}",
        f"{memory(nanotron, fast).total / 1e9:.0f}",
        f"{memory(unsharded(nanotron), fast).total / 1e9:.0f}" if work.tp > 1 else "",
    ]
