"""Needle in a haystack with exact token lengths: pure, on token ids, without a task library.

One sentence that names a number is put into a text of `length` tokens at a relative `depth`; the
end asks for the number. The score is a choice between numbers of equal token count by
log-likelihood, so that chance is 1 / choices at every length (Kamradt 2023; RULER, arXiv:2404.06654).
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Encode = Callable[[str], list[int]]

NEEDLE = "\nThe secret number of {key} is {value}.\n"
QUESTION = "\nThe secret number of {key} is"
KEYS = ("Amber", "Basalt", "Cedar", "Dover", "Ember", "Fjord", "Garnet", "Harbor")


class NeedleError(ValueError):
    """A haystack or length that no needle fits: value and remedy in one line."""


@dataclass(frozen=True)
class Needle:
    """`context` plus any of `choices` is exactly `length` tokens; `answer` indexes `choices`."""

    length: int
    depth: float
    context: list[int]
    choices: list[list[int]]
    answer: int


def needles(
    encode: Encode,
    haystack: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    per_cell: int,
    choices: int = 10,
    seed: int = 0,
) -> Iterator[Needle]:
    """`per_cell` needles for every length (tokens) and depth (0 start, 1 end), in that order."""
    hay, rng = encode(haystack), random.Random(seed)
    values = _values_of_one_length(encode)
    for length in lengths:
        for depth in depths:
            for _ in range(per_cell):
                yield _needle(encode, hay, length, depth, rng.sample(values, choices), rng)


def _values_of_one_length(encode: Encode) -> list[str]:
    """Three-digit numbers that take the commonest number of tokens after a space."""
    by_count: dict[int, list[str]] = {}
    for number in range(100, 1000):
        by_count.setdefault(len(encode(f" {number}")), []).append(str(number))
    return max(by_count.values(), key=len)


def _needle(
    encode: Encode,
    hay: list[int],
    length: int,
    depth: float,
    values: list[str],
    rng: random.Random,
) -> Needle:
    key, answer = rng.choice(KEYS), rng.randrange(len(values))
    sentence = encode(NEEDLE.format(key=key, value=values[answer]))
    question, options = encode(QUESTION.format(key=key)), [encode(f" {v}") for v in values]
    room = length - len(sentence) - len(question) - len(options[0])
    if room < 0:
        raise NeedleError(f"length {length}: the needle alone takes {length - room} tokens")
    if room > len(hay):
        raise NeedleError(f"length {length}: the haystack has {len(hay)} tokens of {room}")
    start = rng.randrange(len(hay) - room + 1)
    text, cut = hay[start : start + room], round(depth * room)
    context = text[:cut] + sentence + text[cut:] + question
    return Needle(length, depth, context, options, answer)


def accuracy(
    needles: Sequence[Needle], log_likelihoods: Callable[[Needle], Sequence[float]]
) -> dict[tuple[int, float], float]:
    """Share of needles whose answer is the likeliest choice, per (length, depth)."""
    hits: dict[tuple[int, float], list[bool]] = {}
    for needle in needles:
        scores = list(log_likelihoods(needle))
        best = max(range(len(scores)), key=scores.__getitem__)
        hits.setdefault((needle.length, needle.depth), []).append(best == needle.answer)
    return {cell: sum(found) / len(found) for cell, found in hits.items()}
