"""`make win-rate`: the published models' win rates, with the user's own models among them."""

from pathlib import Path
from typing import Any

from eval_tasks.win_rate import Scores, win_rates
from ground.errors import UserError, did_you_mean
from launch.recipe.evaluation import load_published
from launch.recipe.load import read_yaml
from launch.report.terminal import print_table_of


def with_own(published: Scores, own: Any, where: str) -> Scores:
    """`published` with the scores of `own`, {model: {benchmark: percent}}, added.

    Raises UserError for any other value, an unknown benchmark, a published model's name, or
    a score outside 0 to 100.
    """
    if not isinstance(own, dict) or not all(isinstance(row, dict) and row for row in own.values()):
        raise UserError(f"{where}: not a mapping of model: {{benchmark: percent}}")
    scores = {benchmark: dict(row) for benchmark, row in published.items()}
    taken = {model for row in published.values() for model in row}
    for model, row in own.items():
        if model in taken:
            raise UserError(f"{where}: {model} has published scores; give yours another name")
        for benchmark, score in row.items():
            if benchmark not in scores:
                raise UserError(
                    f"{where}: {model}: no benchmark {benchmark!r} here; "
                    f"{did_you_mean(str(benchmark), scores)}"
                )
            if isinstance(score, bool) or not isinstance(score, int | float):
                raise UserError(f"{where}: {model}: {benchmark}: {score!r} is not a number")
            if not 0 <= score <= 100:
                raise UserError(f"{where}: {model}: {benchmark}: {score} is not a percentage")
            scores[benchmark][model] = score
    return scores


def show_win_rates(suite: str, own_file: Path | None) -> None:
    """Print the table of `suite`, a key of published.yaml's `win_rate`."""
    published = load_published()
    if suite not in published.win_rate:
        raise UserError(
            f"SUITE={suite}: no win rate of it; {did_you_mean(suite, published.win_rate)}"
        )
    scores: Scores = published.scores[suite]
    benchmarks = list(published.win_rate[suite])
    if own_file:
        scores = with_own(scores, read_yaml(own_file), f"SCORES={own_file}")
    try:
        rates = win_rates(scores, benchmarks)
    except ValueError as error:
        raise UserError(f"SUITE={suite}: {error}") from None
    rows = [
        [model, f"{100 * rate:.1f}", str(sum(model in scores[name] for name in benchmarks))]
        for model, rate in rates.items()
    ]
    title = f"win rate over {len(benchmarks)} benchmarks, {suite}"
    print_table_of(("model", "win rate", "benchmarks"), rows, title)
