"""Win rate: the share of (other model, benchmark) pairs in which a model scores higher.

No formula was published; this pairwise one gives the ranking of the published tables. A tie is half
a win. Pairs in which either score is missing do not count.
"""

from collections.abc import Mapping, Sequence

Scores = Mapping[str, Mapping[str, float]]  # benchmark: {model: score}


def win_rates(scores: Scores, benchmarks: Sequence[str]) -> dict[str, float]:
    """{model: win rate in [0, 1]} over `benchmarks`, best first.

    Raises KeyError for a benchmark without scores, ValueError for a model compared with no other.
    """
    models = list(dict.fromkeys(model for name in benchmarks for model in scores[name]))
    rates = {
        model: _win_rate(model, models, [scores[name] for name in benchmarks]) for model in models
    }
    return dict(sorted(rates.items(), key=lambda item: -item[1]))


def _win_rate(model: str, models: Sequence[str], rows: Sequence[Mapping[str, float]]) -> float:
    won = met = 0.0
    for row in rows:
        for other in models:
            if other != model and model in row and other in row:
                won += (row[model] > row[other]) + 0.5 * (row[model] == row[other])
                met += 1
    if not met:
        raise ValueError(
            f"{model}: no other model has a score on the same benchmark; name one that has"
        )
    return won / met
