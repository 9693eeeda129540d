"""Released models of about the same size beside the scores."""

from collections.abc import Sequence
from math import log

from launch.recipe.evaluation import Peer, load_peers, load_suite, suite_names
from launch.report.document import Cell, Score, Section, Table

FACTOR = 2.0  # models of half to twice the parameters
MOST = 4
NOTE = (
    "Base models of half to twice the size, or the nearest in size where there is none, with what their cards "
    "publish of all items; this one's scores are of the items that its suite has."
)


def peers_of(parameters: int) -> dict[str, Peer]:
    """The models nearest in size, nearest first; at least one."""
    rows = load_peers()

    def ratio(name: str) -> float:
        return abs(log(rows[name].parameters / parameters))

    nearest = sorted(rows, key=ratio)
    same = [name for name in nearest if ratio(name) <= log(FACTOR) + 1e-9]
    return {name: rows[name] for name in (same or nearest[:1])[:MOST]}


def peer_section(scores: Sequence[Score], parameters: int | None) -> Section:
    """A row for each base model that was scored, and one for each released model."""
    own: dict[str, dict[str, float]] = {}
    for score in scores:
        if benchmark := _benchmark(score):
            own.setdefault(score.model, {})[benchmark] = score.value
    if not own or not parameters:
        return Section("peers", "Models of the same size")
    found = peers_of(parameters)
    known = {name for peer in found.values() for name in peer.scores}
    columns = [
        name for name in dict.fromkeys(n for of in own.values() for n in of) if name in known
    ]
    rows = list[tuple[Cell, ...]]()
    for model, of in own.items():
        rows.append((model, parameters, *(of.get(name) for name in columns), "this run"))
    for name, peer in found.items():
        shares = [None if one not in peer.scores else peer.scores[one] / 100 for one in columns]
        rows.append((name, peer.parameters, *shares, peer.source))
    table = Table(
        "by size", ("model", "parameters", *columns, "source"),
        ("", ",", *[".1%"] * len(columns), ""), tuple(rows),
    )  # fmt: skip
    return Section("peers", "Models of the same size", NOTE, tables=(table,))


def _benchmark(score: Score) -> str | None:
    """The name in published.yaml of a base suite's row; None for another's."""
    if score.suite not in suite_names():
        return None
    suite = load_suite(score.suite)
    rows = {row.name: row.published for row in suite.rows}
    return rows.get(score.task) if suite.published == "base" else None
