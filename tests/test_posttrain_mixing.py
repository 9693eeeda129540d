"""The mixture's rows: the published meaning of `weight`."""

import math

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from ground.errors import UserError
from posttrain.mixing import mixed_rows

COUNTS = {"a": 50, "b": 31, "c": 7}
WEIGHTS = {"a": 0.3, "b": 1.0, "c": 0.5}


def test_rows_are_those_that_the_datasets_library_takes() -> None:
    """shuffle, select the first floor(n * weight), concatenate, shuffle: alignment-handbook's order."""
    parts = []
    for index, (split, weight) in enumerate(WEIGHTS.items()):
        rows = Dataset.from_dict({"at": [[index, row] for row in range(COUNTS[split])]})
        parts.append(rows.shuffle(seed=3).select(range(int(COUNTS[split] * weight))))
    expected = concatenate_datasets(parts).shuffle(seed=3)["at"][:]
    assert mixed_rows(COUNTS, WEIGHTS, seed=3).tolist() == expected


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 400), st.floats(0.01, 1), st.integers(0, 99))
def test_each_split_gives_floor_of_its_share_each_row_once(
    rows: int, weight: float, seed: int
) -> None:
    if math.floor(rows * weight) == 0:
        return
    taken = mixed_rows({"a": rows, "b": 5}, {"a": weight, "b": 1.0}, seed)
    of_a = taken[taken[:, 0] == 0][:, 1]
    assert len(of_a) == math.floor(rows * weight)
    assert len(set(of_a.tolist())) == len(of_a) and of_a.max() < rows
    assert sorted(taken[taken[:, 0] == 1][:, 1].tolist()) == [0, 1, 2, 3, 4]


def test_the_seed_decides_and_splits_are_interleaved() -> None:
    first, again, other = (mixed_rows(COUNTS, WEIGHTS, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert (np.diff(first[:, 0]) != 0).sum() > 10


@pytest.mark.parametrize("weight", [0.0, -1.0, 1.5, math.nan])
def test_a_weight_that_is_no_share_is_refused(weight: float) -> None:
    with pytest.raises(UserError, match=r"mixture\.a: weight .* at most 1"):
        mixed_rows({"a": 3}, {"a": weight}, 0)


def test_a_split_that_leaves_no_row_is_not_dropped_silently() -> None:
    with pytest.raises(UserError, match=r"mixture\.a: 3 rows at weight 0\.1 leave none"):
        mixed_rows({"a": 3}, {"a": 0.1}, 0)
