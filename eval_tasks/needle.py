"""Needle in a haystack with exact token lengths: pure, on token ids, without a task library.

One sentence that names a number is put into a text of `length` tokens at a relative `depth`; the
end asks for the number. The score is a choice between numbers of equal token count by
log-likelihood, so that chance is 1 / choices at every length (Kamradt 2023; RULER, arXiv:2404.06654).
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Encode = Callable[[str], list[int]]

# The sentence up to its number, which is the question too.
SENTENCES = {
    "en": "The secret number of {key} is",
    "fr": "Le nombre secret de {key} est",
    "es": "El número secreto de {key} es",
    "de": "Die geheime Zahl von {key} ist",
    "it": "Il numero segreto di {key} è",
    "pt": "O número secreto de {key} é",
}
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
    language: str = "en",
) -> Iterator[Needle]:
    """`per_cell` needles for every length (tokens) and depth (0 start, 1 end), in that order."""
    hay, rng = encode(haystack), random.Random(seed)
    values = values_of_one_length(encode)
    for length in lengths:
        for depth in depths:
            for _ in range(per_cell):
                chosen = rng.sample(values, choices)
                yield _needle(encode, hay, length, depth, chosen, rng, SENTENCES[language])


def values_of_one_length(encode: Encode) -> list[str]:
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
    sentence: str,
) -> Needle:
    key, answer = rng.choice(KEYS), rng.randrange(len(values))
    question = sentence.format(key=key)
    needle = encode(f"\n{question} {values[answer]}.\n")
    options = [encode(f" {v}") for v in values]
    context = hidden(hay, [(depth, needle)], encode(f"\n{question}"), length - len(options[0]), rng)
    return Needle(length, depth, context, options, answer)


def hidden(
    hay: Sequence[int],
    sentences: Sequence[tuple[float, Sequence[int]]],
    question: Sequence[int],
    length: int,
    rng: random.Random,
) -> list[int]:
    """Exactly `length` tokens: a random stretch of `hay` with each sentence at its depth (ascending),
    and the question at the end. Raises NeedleError where they do not fit."""
    room = length - sum(len(ids) for _, ids in sentences) - len(question)
    if room < 0:
        raise NeedleError(f"{length} tokens: sentences and question alone take {length - room}")
    if room > len(hay):
        raise NeedleError(f"{length} tokens: the haystack has {len(hay)} of {room}; give more text")
    start, context, done = rng.randrange(len(hay) - room + 1), list[int](), 0
    for depth, ids in sentences:
        cut = round(depth * room)
        context += [*hay[start + done : start + cut], *ids]
        done = cut
    return [*context, *hay[start + done : start + room], *question]


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
