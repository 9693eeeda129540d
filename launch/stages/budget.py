"""How much of a source on the hub is read: what the stages draw of it, or all of it.

A pass over the sources is a chain of stages that go on from one another (stages 1-3); a stage that
starts afresh, with another window, starts a new one. In a pass a stage has a portion of its own of
each source, and the portions never meet. A source that does not clearly hold so much is read whole,
once, by all stages of the pass, and the loader goes on through its epochs.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import ceil

from launch.recipe.book import load_recipe
from launch.recipe.scale import Scale, scale
from launch.recipe.tables import load_pipeline, stage_row
from launch.stages.sources import Data, HubData, planned

# Tokens to read of a source for each that is drawn: some documents are held out, and some windows
# are cut off at the ends of shards.
MARGIN = 1.05
# Where a portion begins is an estimate, from bytes and from the published number of tokens.
CLEARLY_MORE = 1.5


@dataclass(frozen=True)
class Wanted:
    """Tokens of each source that the stages of a pass draw."""

    earlier: Counter[str]
    here: Counter[str]
    later: Counter[str]

    def portion(self, source: str, tokens: int | None) -> tuple[int, int] | None:
        """(tokens to leave to earlier stages, tokens to read) of a source that has `tokens`.

        None: the whole source. One whose tokens are not known is taken to have enough.
        """
        earlier, here = self.earlier[source], self.here[source]
        if tokens and tokens < CLEARLY_MORE * (earlier + here + self.later[source]):
            return None
        return ceil(CLEARLY_MORE * earlier), here


def within_budget(sources: dict[str, Data], recipes: tuple[str, ...], at: Scale) -> dict[str, Data]:
    """The sources, those of the hub cut to what the stages of these recipes draw."""
    if not any(isinstance(data, HubData) for data in sources.values()):
        return sources
    return portioned(sources, wanted(recipes, at))


def portioned(sources: Mapping[str, Data], wanted: Wanted) -> dict[str, Data]:
    """The sources, those of the hub cut to their portions."""
    return {
        name: replace(data, portion=wanted.portion(name, data.tokens))
        if isinstance(data, HubData)
        else data
        for name, data in sources.items()
    }


def wanted(recipes: tuple[str, ...], at: Scale) -> Wanted:
    """What the recipes' stages draw, and the other stages of their passes.

    A recipe of one's own takes the place of the stage that it extends.
    """
    stages = {load_recipe(recipe).stage for recipe in recipes}
    earlier = [one for recipe in recipes for one in stages_before(recipe, at)]
    later = [
        name
        for name, row in load_pipeline().items()
        if row.engine == "pretrain" and stages & set(stages_before(name, at)) and name not in stages
    ]
    between = [name for name in dict.fromkeys(earlier) if name not in stages]
    return Wanted(_all_drawn(between, at), _all_drawn(recipes, at), _all_drawn(later, at))


def _all_drawn(recipes: Iterable[str], at: Scale) -> Counter[str]:
    return sum((drawn(recipe, at) for recipe in recipes), Counter[str]())


@cache
def drawn(recipe: str, at: Scale) -> Counter[str]:
    """Tokens that a stage draws of each source, with the margin."""
    nanotron, before = scale(load_recipe(recipe), at).nanotron, stages_before(recipe, at)
    tokens, steps = nanotron.tokens, nanotron.tokens.train_steps
    if before:
        steps -= scale(load_recipe(before[-1]), at).nanotron.tokens.train_steps
    return with_margin(
        planned(recipe, at).weights, steps * nanotron.windows_a_step, tokens.sequence_length
    )


def with_margin(weights: Mapping[str, float], windows: int, window: int) -> Counter[str]:
    """Tokens to read of each source of a mixture of which so many windows of `window` are drawn."""
    tokens = MARGIN * windows * window / sum(weights.values())
    return Counter(
        {name: round(weight * tokens) + 2 * (window + 1) for name, weight in weights.items()}
    )


def stages_before(recipe: str, at: Scale) -> list[str]:
    """The earlier stages of a recipe's pass, first to last."""
    loaded = load_recipe(recipe)
    takes = stage_row(loaded.stage).takes
    before = next((name for name in takes if load_pipeline()[name].engine == "pretrain"), None)
    if before is None or scale(loaded, at).nanotron.starts_afresh:
        return []
    return [*stages_before(before, at), before]
