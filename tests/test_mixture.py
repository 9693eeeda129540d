"""The order of sources and windows."""

from math import isclose
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.recipe.book import load_recipe
from nanotron_ext.mixture import MAX_PERIOD, build_mixture, draws_of, permuted_window, quotas

PERIODS = {"pretrain-stage1": 20_000, "pretrain-stage2": 100_005, "pretrain-stage3": 20_113}
weights = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=4), st.integers(1, 40), min_size=1, max_size=12
)


def worst_prefix_error(weights: dict[str, float]) -> float:
    """max over prefixes n and sources i of |count_i(n) - w_i n|, by counting."""
    mixture = build_mixture(weights)
    counts = np.zeros((mixture.period, len(mixture.names)))
    counts[np.arange(mixture.period), mixture.order] = 1
    counts = counts.cumsum(axis=0)
    share = mixture.quota / mixture.period
    return float(np.abs(counts - np.arange(1, mixture.period + 1)[:, None] * share).max())


@pytest.mark.parametrize("stage", PERIODS)
def test_every_prefix_of_a_stage_is_within_one_window_of_its_share(stage: str) -> None:
    mixture = load_recipe(stage).recipe.mixture
    assert build_mixture(mixture).period == PERIODS[stage]
    assert worst_prefix_error(mixture) < 1


@given(weights)
@settings(max_examples=50, deadline=None)
def test_every_prefix_of_any_mixture_is_within_one_window_of_its_share(
    weights: dict[str, int],
) -> None:
    assert worst_prefix_error({name: float(w) for name, w in weights.items()}) < 1


@pytest.mark.parametrize("stage", PERIODS)
def test_shares_are_the_recipes_weights_exactly(stage: str) -> None:
    weights = load_recipe(stage).recipe.mixture
    total, counts = sum(weights.values()), quotas(weights)
    for name, weight in weights.items():
        assert isclose(counts[name] / sum(counts.values()), weight / total, rel_tol=1e-12), name


def test_a_period_too_long_is_rounded_by_largest_remainder() -> None:
    counts = quotas({"a": 0.3333331, "b": 0.6666667, "c": 0.0000002})
    assert sum(counts.values()) == MAX_PERIOD
    assert abs(counts["a"] - 0.3333331 * MAX_PERIOD) < 1


@given(weights, st.integers(0, 5000))
@settings(max_examples=50, deadline=None)
def test_counts_in_closed_form_equal_counting(weights: dict[str, int], samples: int) -> None:
    mixture = build_mixture({name: float(w) for name, w in weights.items()})
    source, draw = mixture.locate(np.arange(samples))
    counted = np.bincount(source, minlength=len(mixture.names)).tolist()
    assert list(mixture.counts(samples).values()) == counted
    for index in range(len(mixture.names)):
        if counted[index]:
            back = mixture.samples(index, draw[source == index])
            assert back.tolist() == np.flatnonzero(source == index).tolist()
        # The k-th draw of a source is numbered k: no window is skipped or taken twice.
        assert draw[source == index].tolist() == list(range(counted[index]))


def test_the_order_of_lines_in_a_recipe_does_not_matter() -> None:
    one, other = build_mixture({"b": 0.4, "a": 0.6}), build_mixture({"a": 0.6, "b": 0.4})
    assert one.names == other.names
    assert (one.order == other.order).all()


def test_tables_come_back_from_the_cache_unchanged(tmp_path: Path) -> None:
    built = build_mixture({"a": 0.25, "b": 0.75}, tmp_path)
    read = build_mixture({"a": 0.25, "b": 0.75}, tmp_path)
    assert [path.suffix for path in (tmp_path / "mixtures").iterdir()] == [".npy"]
    assert (built.order == read.order).all() and (built.rank == read.rank).all()


@pytest.mark.parametrize("at", [0, 6, 9, 60, -1, *range(128, 512, 31)])
def test_a_damaged_table_is_made_again(
    tmp_path: Path, at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {"a": 0.25, "b": 0.35, "c": 0.4}
    built = build_mixture(weights, tmp_path)
    (file,) = (tmp_path / "mixtures").iterdir()
    content = file.read_bytes()
    assert len(content) > 128 + 32, "a header, and slots"
    at %= len(content)
    for damaged in (content[:at], content[:at] + bytes([content[at] ^ 2]) + content[at + 1 :]):
        file.write_bytes(damaged)
        assert (build_mixture(weights, tmp_path).order == built.order).all()
        assert file.read_bytes() == content
        assert capsys.readouterr().out == f"{file}: damaged, made again\n"


@given(st.integers(1, 3000), st.integers(0, 5), st.text(max_size=8))
@settings(max_examples=60, deadline=None)
def test_each_epoch_visits_every_window_once(windows: int, epoch: int, key: str) -> None:
    draws = np.arange(windows) + epoch * windows
    assert sorted(permuted_window(draws, windows, key)) == list(range(windows))


@given(st.integers(1, 1 << 40), st.lists(st.integers(0, 1 << 42), min_size=1), st.text(max_size=8))
@settings(max_examples=100, deadline=None)
def test_the_draw_of_a_window_is_found_from_the_window(
    windows: int, numbers: list[int], key: str
) -> None:
    draws = np.array(numbers)
    index = permuted_window(draws, windows, key)
    assert draws_of(index, draws // windows, windows, key).tolist() == numbers


def test_epochs_sources_and_seeds_have_permutations_of_their_own() -> None:
    draws = np.arange(500)
    orders = [
        permuted_window(draws, 500, "6/a/257"),
        permuted_window(draws + 500, 500, "6/a/257"),
        permuted_window(draws, 500, "6/b/257"),
        permuted_window(draws, 500, "7/a/257"),
        permuted_window(draws, 500, "6/a/2049"),
        draws,
    ]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # Two random permutations agree at about one place.
            assert (one == other).sum() < 10
