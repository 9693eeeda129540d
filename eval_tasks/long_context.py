"""A set of long-context tasks in RULER's spirit (Hsieh et al. 2024, arXiv:2404.06654), in six languages.

Pure functions of token ids: no download, no task library. Every sample is a choice by
log-likelihood between continuations of equal token count, so that context and answer have exactly
the length asked for and chance is 1 / choices at every length. Tasks: one needle (Kamradt 2023),
one of many needles, a chain of variables, the commonest word of a list, and a sentence of the
user's own text that has to be found and completed as in the text. Its choices are the ends of four
sentences of the text, so likely wording does not help.

`samples` makes all of them; `needles` makes the needles by which the training stages are scored.
"""

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from ground.errors import UserError

Encode = Callable[[str], list[int]]

KEYS = ("Amber", "Basalt", "Cedar", "Dover", "Ember", "Fjord", "Garnet", "Harbor")
NUMBERS = [str(number) for number in range(100, 1000)]
PHRASES: dict[str, dict[str, str]] = yaml.safe_load(
    Path(__file__).with_suffix(".yaml").read_text("utf-8")
)
CHOICES = 4
CHAIN = 3  # assignments from a number to the variable that is asked for
ANSWER_TOKENS = 3  # of a sentence that has to be completed
QUOTED_TOKENS = 80  # at most, so that a short window holds it twice
KEPT_OUT = 10  # every tenth sentence is in no haystack, and can be quoted


@dataclass(frozen=True)
class Sample:
    """`context` plus any of `choices` is exactly `length` tokens; `answer` indexes `choices`.

    `depth` is where the evidence lies, 0 at the start, 1 at the end; for aggregation it is everywhere.
    The last `question` tokens of the context ask, as the beginning of the answer's sentence.
    """

    task: str
    language: str
    length: int
    depth: float
    context: list[int]
    choices: list[list[int]]
    answer: int
    question: int


@dataclass(frozen=True)
class Chat:
    """A chat template's tokens before the user's text, and between it and the assistant's."""

    before: list[int]
    between: list[int]


@dataclass(frozen=True)
class Corpus:
    """The user's own texts: one stretch of tokens, and sentences (tokens) kept out of it, each with
    its own end."""

    encode: Encode
    hay: list[int]
    sentences: list[list[int]]

    @classmethod
    def of(cls, encode: Encode, texts: Sequence[str]) -> "Corpus":
        # Sentences and what separates them, in turn.
        parts = re.split(r"((?<=[.!?])\s+|\n)", "\n".join(texts))
        sentences = list(dict.fromkeys(part for part in parts[::2] if len(part.split()) >= 8))
        by_end: dict[tuple[int, ...], tuple[str, list[int]]] = {}
        for sentence in sentences[:: max(min(KEPT_OUT, len(sentences) // CHOICES), 1)]:
            ids = encode(" " + sentence.strip())
            if len(ids) <= QUOTED_TOKENS:
                by_end[tuple(ids[-ANSWER_TOKENS:])] = sentence, ids
        kept_out = {sentence for sentence, _ in by_end.values()}
        hay = (f"{part}{gap}" for part, gap in zip(parts[::2], [*parts[1::2], ""], strict=True)
               if part not in kept_out)  # fmt: skip
        return cls(encode, encode("".join(hay)), [ids for _, ids in by_end.values()])


@dataclass(frozen=True)
class Draft:
    """A sample in parts; `samples` takes the first choice for the right one."""

    text: list[int]
    question: list[int]
    choices: list[list[int]]


Task = Callable[[Corpus, int, float, str, random.Random], Draft]


def samples(
    corpus: Corpus,
    tasks: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    per_cell: int,
    languages: Sequence[str] = ("en",),
    seed: int = 0,
    chat: Chat | None = None,
) -> Iterator[Sample]:
    """`per_cell` samples for every task, language, length (tokens) and depth, in that order.

    The same arguments give the same samples; those of a cell do not depend on the other cells.
    With `chat` the text is the user's turn and the question begins the assistant's; the template's
    tokens count in the length.
    Raises UserError for an unknown task or language and where a sample does not fit its length.
    """
    for kind, names, known in (("task", tasks, TASKS), ("language", languages, PHRASES)):
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"{kind} {unknown[0]!r}: use some of {', '.join(known)}")
    if outside := [depth for depth in depths if not 0 <= depth <= 1]:
        raise UserError(f"depth {outside[0]}: not in 0 (the start) to 1 (the end)")
    before, between = (chat.before, chat.between) if chat else ([], [])
    cells = itertools.product(tasks, languages, lengths, depths, range(per_cell))
    for task, language, length, depth, index in cells:
        rng = random.Random(f"{seed}/{task}/{language}/{length}/{depth}/{index}")
        room = length - len(before) - len(between)
        draft = TASKS[task](corpus, room, depth, language, rng)
        order = rng.sample(range(len(draft.choices)), len(draft.choices))
        context = [*before, *draft.text, *between, *draft.question]
        choices, question = [draft.choices[choice] for choice in order], len(draft.question)
        yield Sample(task, language, length, depth, context, choices, order.index(0), question)


def needle(
    corpus: Corpus, length: int, depth: float, language: str, rng: random.Random, hidden_keys: int
) -> Draft:
    """`hidden_keys` sentences name a number each, and one is asked for: with as many as choices, the
    wrong choices are in the text, with one they are not in it."""
    keys = rng.sample(KEYS, CHOICES)
    numbers = rng.sample(_of_one_length(corpus.encode, NUMBERS), CHOICES)
    depths = [depth, *(rng.random() for _ in range(hidden_keys - 1))]
    placed = sorted(zip(depths, keys, numbers, strict=False))
    return _needle_draft(corpus.encode, corpus.hay, length, language, rng, placed, keys[0], numbers)


def _needle_draft(
    encode: Encode, hay: Sequence[int], length: int, language: str, rng: random.Random,
    placed: Sequence[tuple[float, str, str]], key: str, numbers: Sequence[str],
) -> Draft:  # fmt: skip
    """A sentence for each (depth, key, number) of `placed`; the question is the number of `key`."""
    phrase = PHRASES[language]["needle"]
    sentences = [
        (depth, encode(f"\n{phrase.format(key=name)} {number}.\n"))
        for depth, name, number in placed
    ]
    question = encode("\n" + phrase.format(key=key))
    return hide(hay, sentences, question, [encode(f" {n}") for n in numbers], length, rng)


def variables(
    corpus: Corpus, length: int, depth: float, language: str, rng: random.Random
) -> Draft:
    """A number is handed from variable to variable from `depth` on; other chains hold the others."""
    encode = corpus.encode
    names = [f"X{n}" for n in rng.sample(range(10, 100), CHOICES * CHAIN)]
    numbers = rng.sample(_of_one_length(encode, NUMBERS), CHOICES)
    sentences = []
    for chain in range(CHOICES):
        linked = names[chain * CHAIN : (chain + 1) * CHAIN]
        start = depth if chain == 0 else rng.random()
        steps = sorted([start, *(rng.uniform(start, 1) for _ in linked[1:])])
        for at, name, source in zip(steps, linked, [numbers[chain], *linked], strict=False):
            sentences.append((at, encode(f"\nVAR {name} = {source}.\n")))
    sentences.sort(key=lambda sentence: sentence[0])
    question = encode("\n" + PHRASES[language]["variables"].format(name=names[CHAIN - 1]))
    return hide(corpus.hay, sentences, question, [encode(f" {n}") for n in numbers], length, rng)


def aggregation(
    corpus: Corpus, length: int, depth: float, language: str, rng: random.Random
) -> Draft:
    """A list of words from end to end; one comes twice as often as any other."""
    same = _of_one_length(corpus.encode, KEYS)
    words = rng.sample(same, min(CHOICES, len(same)))
    options = [corpus.encode(f" {word}") for word in words]
    question = corpus.encode("\n" + PHRASES[language]["aggregation"])
    room = length - len(question) - len(options[0])
    count = room // len(options[0])
    others = count // (len(words) + 1)
    if others < 1:
        raise UserError(f"length {length}: a list of {len(words)} words does not fit")
    listed = [index for index in range(1, len(words)) for _ in range(others)]
    listed += [0] * (count - len(listed))
    rng.shuffle(listed)
    left = room - count * len(options[0])  # fewer tokens than a word has
    if left > len(corpus.hay):
        raise UserError(f"length {length}: the corpus has no {left} tokens; give more text")
    text = [*corpus.hay[:left], *(token for index in listed for token in options[index])]
    return Draft(text, question, options)


def quotation(
    corpus: Corpus, length: int, depth: float, language: str, rng: random.Random
) -> Draft:
    """A sentence of the user's own text is hidden in the rest; its beginning asks for its end there,
    which is its own or that of one of three others: only the text decides."""
    if len(corpus.sentences) < CHOICES:
        raise UserError(
            f"the corpus has {len(corpus.sentences)} sentences of 8 words to {QUOTED_TOKENS} tokens with "
            f"an end of their own, {CHOICES} are needed; give more text"
        )
    parts = rng.sample(corpus.sentences, CHOICES)
    ends = [ids[-ANSWER_TOKENS:] for ids in parts]
    told, beginning = ends.pop(rng.randrange(CHOICES)), parts[0][:-ANSWER_TOKENS]
    sentence = [*corpus.encode("\n"), *beginning, *told, *corpus.encode("\n")]
    question = [*corpus.encode("\n" + PHRASES[language]["quotation"]), *beginning]
    return hide(corpus.hay, [(depth, sentence)], question, [told, *ends], length, rng)


TASKS: dict[str, Task] = {
    "needle": partial(needle, hidden_keys=1),
    "multi_key": partial(needle, hidden_keys=CHOICES),
    "variables": variables,
    "aggregation": aggregation,
    "quotation": quotation,
}


def needles(
    encode: Encode,
    haystack: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    per_cell: int,
    choices: int = 10,
    seed: int = 0,
    language: str = "en",
) -> Iterator[Sample]:
    """`per_cell` needles for every length (tokens) and depth, in that order; the training stages' own.

    Unlike those of `samples`, all are drawn from one stream of random numbers.
    """
    hay, rng = encode(haystack), random.Random(seed)
    numbers = _of_one_length(encode, NUMBERS)
    for length, depth, _ in itertools.product(lengths, depths, range(per_cell)):
        offered = rng.sample(numbers, choices)
        key, answer = rng.choice(KEYS), rng.randrange(choices)
        placed = [(depth, key, offered[answer])]
        draft = _needle_draft(encode, hay, length, language, rng, placed, key, offered)
        context, question = [*draft.text, *draft.question], len(draft.question)
        yield Sample("needle", language, length, depth, context, draft.choices, answer, question)


def accuracy(
    samples: Iterable[Sample], log_likelihoods: Callable[[Sample], Sequence[float]]
) -> dict[tuple[int, float], float]:
    """Share of samples whose answer is the likeliest choice, per (length, depth)."""
    hits: dict[tuple[int, float], list[bool]] = {}
    for sample in samples:
        scores = list(log_likelihoods(sample))
        best = max(range(len(scores)), key=scores.__getitem__)
        hits.setdefault((sample.length, sample.depth), []).append(best == sample.answer)
    return {cell: sum(right) / len(right) for cell, right in hits.items()}


def _of_one_length(encode: Encode, words: Sequence[str]) -> list[str]:
    """Those of `words` that take the commonest number of tokens after a space."""
    by_count: dict[int, list[str]] = {}
    for word in words:
        by_count.setdefault(len(encode(f" {word}")), []).append(word)
    return max(by_count.values(), key=len)


def hide(
    hay: Sequence[int], sentences: Sequence[tuple[float, Sequence[int]]], question: list[int],
    choices: list[list[int]], length: int, rng: random.Random,
) -> Draft:  # fmt: skip
    """A random stretch of `hay` with each sentence at its depth (ascending), so long that it is
    `length` tokens with the question and a choice. Raises UserError where they do not fit."""
    length -= len(choices[0])
    room = length - sum(len(ids) for _, ids in sentences) - len(question)
    if room < 0:
        raise UserError(f"{length} tokens: sentences and question alone take {length - room}")
    if room > len(hay):
        raise UserError(f"{length} tokens: the haystack has {len(hay)} of {room}; give more text")
    start, text, done = rng.randrange(len(hay) - room + 1), list[int](), 0
    for depth, ids in sentences:
        cut = round(depth * room)
        text += [*hay[start + done : start + cut], *ids]
        done = cut
    return Draft([*text, *hay[start + done : start + room]], question, choices)
