"""Needles: exact lengths, right depth, and scores that tell an oracle from a guess."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_tasks.long_context import KEYS, Sample, accuracy, needles
from ground.errors import UserError

HAYSTACK = "It was a quiet day by the sea. " * 400


def encode(text: str) -> list[int]:
    """Bytes as tokens: every length can be counted by hand."""
    return list(text.encode())


def decode(ids: list[int]) -> str:
    return bytes(ids).decode()


@given(st.integers(120, 4000), st.floats(0, 1), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_requested_and_actual_length_agree_exactly(length: int, depth: float, seed: int) -> None:
    (needle,) = needles(encode, HAYSTACK, [length], [depth], 1, seed=seed)
    assert {len(needle.context) + len(choice) for choice in needle.choices} == {length}


def test_the_needle_lies_at_its_depth_once_and_names_the_answer() -> None:
    for needle in needles(encode, HAYSTACK, [2000], [0.0, 0.5, 1.0], 3):
        text, answer = decode(needle.context), decode(needle.choices[needle.answer])
        assert text.count(f"is{answer}.") == 1
        others = [c for i, c in enumerate(needle.choices) if i != needle.answer]
        assert all(f"is{decode(choice)}." not in text for choice in others)
        position = text.index("The secret number") / len(text)
        assert position == pytest.approx(needle.depth, abs=0.05)
        assert any(text.endswith(f"The secret number of {key} is") for key in KEYS)


def test_an_oracle_scores_all_and_a_guess_scores_chance() -> None:
    sample = list(needles(encode, HAYSTACK, [300, 600], [0.2, 0.8], 100))

    def oracle(needle: Sample) -> list[float]:
        text = decode(needle.context)
        return [float(f"is{decode(choice)}." in text) for choice in needle.choices]

    rng = random.Random(0)
    assert set(accuracy(sample, oracle).values()) == {1.0}
    guessed = accuracy(sample, lambda needle: [rng.random() for _ in needle.choices])
    assert sum(guessed.values()) / len(guessed) == pytest.approx(0.1, abs=0.06)


def test_the_same_seed_gives_the_same_needles() -> None:
    one, again, other = (
        list(needles(encode, HAYSTACK, [500], [0.5], 5, seed=seed)) for seed in (1, 1, 2)
    )
    assert one == again
    assert one != other


def test_a_length_that_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"tokens: sentences and question alone take"):
        list(needles(encode, HAYSTACK, [20], [0.5], 1))
    with pytest.raises(UserError, match=r"the haystack has 31 of \d+; give more text"):
        list(needles(encode, HAYSTACK[:31], [500], [0.5], 1))
