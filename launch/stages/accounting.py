"""What pretraining stages draw from their sources, in closed form, without running a step."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launch.run.folder import cache_root

if TYPE_CHECKING:
    from launch.stages.pretrain import PretrainStage


def drawn_windows(run: "PretrainStage") -> dict[str, int]:
    """Windows of each source that this stage takes, without earlier stages."""
    from nanotron_ext.mixture import build_mixture

    samples = (run.steps - run.first_step) * run.recipe.nanotron.windows_a_step
    return build_mixture(run.recipe.mixture, cache_root()).counts(samples)


def windows_before(run: "PretrainStage") -> dict[str, int]:
    """Windows of the stage's own length that earlier stages took of the same text of each source.

    A new window length starts a new pass over it; a portion that no earlier stage has read has
    another text.
    """
    drawn: Counter[str] = Counter()
    for earlier in run.earlier:
        shared = _sources_shared(run, earlier)
        if earlier.window == run.window and shared:
            drawn.update({n: w for n, w in drawn_windows(earlier).items() if n in shared})
    return dict(drawn)


def _sources_shared(run: "PretrainStage", other: "PretrainStage") -> set[str]:
    """Sources of which both stages read the same text: the whole source, or one portion."""
    here, there = run.data.recipe.sources, other.data.recipe.sources
    return {n for n in here.keys() & there.keys() if here[n].values() == there[n].values()}


def tokens_per_source(runs: "Sequence[PretrainStage]") -> dict[str, int]:
    """Tokens of each source over whole stages."""
    total: dict[str, int] = {}
    for run in runs:
        for name, windows in drawn_windows(run).items():
            total[name] = total.get(name, 0) + windows * run.window
    return total


def epochs(run: "PretrainStage", tokens: dict[str, int]) -> dict[str, float]:
    """How often each source will have been read by the end of the stage; `tokens` are the shards'."""
    seen: Counter[str] = Counter()
    for one in [*run.earlier, run]:
        if shared := _sources_shared(run, one):
            seen.update({n: t for n, t in tokens_per_source([one]).items() if n in shared})
    return {
        name: seen[name] / max(size // (run.window + 1) * run.window, 1)
        for name, size in tokens.items()
    }


def report_mixture(run: "PretrainStage") -> None:
    """Print what is renormalised, and which sources repeat."""
    total = sum(run.recipe.mixture.values())
    if abs(total - 1) > 1e-9:
        print(f"{run.stage}: weights sum to {total:.8g}: renormalised to 1", flush=True)
    tokens = {name: run.data.shards[name]["tokens"] for name in run.recipe.mixture}
    repeated = {name: times for name, times in epochs(run, tokens).items() if times > 1}
    if repeated:
        most = sorted(repeated, key=lambda name: -repeated[name])[:4]
        print(
            f"{run.stage}: {len(repeated)} of {len(tokens)} sources are read more than once by "
            f"the end of the stage: {', '.join(f'{n} {repeated[n]:.1f}x' for n in most)}",
            flush=True,
        )
