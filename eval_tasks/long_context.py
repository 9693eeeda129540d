"""A set of long-context tasks in RULER's spirit (Hsieh et al. 2024, arXiv:2404.06654), in six languages.

Pure, on token ids: no download, no task library. Every sample is a choice by log-likelihood between
continuations of equal token count, so that context and answer have exactly the length asked for and
chance is 1 / choices at every length. Tasks: one needle (Kamradt 2023), one of many needles, a chain
of variables, the commonest word of a list, and a sentence of the user's own text that has to be found
and completed as it stands there: with the end of any of four, so that what sounds likely is no help.

`samples` makes all of them; `needles` makes the needles by which the training stages are scored.
"""

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ground.errors import UserError

Encode = Callable[[str], list[int]]

KEYS = ("Amber", "Basalt", "Cedar", "Dover", "Ember", "Fjord", "Garnet", "Harbor")
# A needle up to its number, which is the question too.
SENTENCES = {
    "en": "The secret number of {key} is",
    "fr": "Le nombre secret de {key} est",
    "es": "El número secreto de {key} es",
    "de": "Die geheime Zahl von {key} ist",
    "it": "Il numero segreto di {key} è",
    "pt": "O número secreto de {key} é",
}
COMMONEST = {
    "en": "The commonest word of the list is",
    "fr": "Le mot le plus fréquent de la liste est",
    "es": "La palabra más frecuente de la lista es",
    "de": "Das häufigste Wort der Liste ist",
    "it": "La parola più frequente della lista è",
    "pt": "A palavra mais frequente da lista é",
}
VALUE = {
    "en": "The value of {name} is",
    "fr": "La valeur de {name} est",
    "es": "El valor de {name} es",
    "de": "Der Wert von {name} ist",
    "it": "Il valore di {name} è",
    "pt": "O valor de {name} é",
}
COMPLETE = {
    "en": "The text above says:",
    "fr": "Le texte ci-dessus dit :",
    "es": "El texto de arriba dice:",
    "de": "Im Text oben steht:",
    "it": "Il testo qui sopra dice:",
    "pt": "O texto acima diz:",
}
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
    an end of its own."""

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


Task = Callable[[Corpus, int, float, str, random.Random], Sample]


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
    for kind, names, known in (("task", tasks, TASKS), ("language", languages, SENTENCES)):
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"{kind} {unknown[0]!r}: use some of {', '.join(known)}")
    if outside := [depth for depth in depths if not 0 <= depth <= 1]:
        raise UserError(f"depth {outside[0]}: not in 0 (the start) to 1 (the end)")
    cells = itertools.product(tasks, languages, lengths, depths, range(per_cell))
    for task, language, length, depth, index in cells:
        rng = random.Random(f"{seed}/{task}/{language}/{length}/{depth}/{index}")
        yield _sample_of(task, corpus, length, depth, language, rng, chat)


def _sample_of(
    task: str, corpus: Corpus, length: int, depth: float, language: str, rng: random.Random,
    chat: Chat | None,
) -> Sample:  # fmt: skip
    if chat is None:
        return TASKS[task](corpus, length, depth, language, rng)
    room = length - len(chat.before) - len(chat.between)
    sample = TASKS[task](corpus, room, depth, language, rng)
    text, question = sample.context[: -sample.question], sample.context[-sample.question :]
    context = [*chat.before, *text, *chat.between, *question]
    return replace(sample, length=length, context=context)


def needle(corpus: Corpus, length: int, depth: float, language: str, rng: random.Random) -> Sample:
    """One sentence that names a number; the wrong choices stand nowhere in the text."""
    return _needles(corpus, length, depth, language, rng, hidden_keys=1, task="needle")


def multi_key(
    corpus: Corpus, length: int, depth: float, language: str, rng: random.Random
) -> Sample:
    """As many sentences as choices, each with a key of its own: the wrong choices are in the text."""
    return _needles(corpus, length, depth, language, rng, hidden_keys=CHOICES, task="multi_key")


def _needles(
    corpus: Corpus, length: int, depth: float, language: str, rng: random.Random,
    hidden_keys: int, task: str,
) -> Sample:  # fmt: skip
    keys = rng.sample(KEYS, CHOICES)
    values = rng.sample(values_of_one_length(corpus.encode), CHOICES)
    depths = [depth, *(rng.random() for _ in range(hidden_keys - 1))]
    placed = sorted(zip(depths, keys, values, strict=False))
    sentences, question = _needle_texts(corpus.encode, placed, keys[0], language)
    return _sample(task, corpus, length, depth, language, rng, sentences, question, values)


def _needle_texts(
    encode: Encode, placed: Sequence[tuple[float, str, str]], key: str, language: str
) -> tuple[list[tuple[float, list[int]]], list[int]]:
    """A sentence for each (depth, key, number) of `placed`, and the question for the number of `key`."""
    sentences = [
        (depth, encode(f"\n{SENTENCES[language].format(key=name)} {number}.\n"))
        for depth, name, number in placed
    ]
    return sentences, encode("\n" + SENTENCES[language].format(key=key))


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

    Unlike the samples of `samples`, all are drawn from one stream of random numbers.
    """
    hay, rng = encode(haystack), random.Random(seed)
    values = values_of_one_length(encode)
    for length, depth, _ in itertools.product(lengths, depths, range(per_cell)):
        numbers = rng.sample(values, choices)
        key, answer = rng.choice(KEYS), rng.randrange(choices)
        sentences, question = _needle_texts(encode, [(depth, key, numbers[answer])], key, language)
        options = [encode(f" {number}") for number in numbers]
        context = hidden(hay, sentences, question, length - len(options[0]), rng)
        yield Sample("needle", language, length, depth, context, options, answer, len(question))


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


def variables(
    corpus: Corpus, length: int, depth: float, language: str, rng: random.Random
) -> Sample:
    """A number is handed from variable to variable from `depth` on; other chains hold the others."""
    names = [f"X{n}" for n in rng.sample(range(10, 100), CHOICES * CHAIN)]
    values = rng.sample(values_of_one_length(corpus.encode), CHOICES)
    sentences = []
    for chain in range(CHOICES):
        linked = names[chain * CHAIN : (chain + 1) * CHAIN]
        start = depth if chain == 0 else rng.random()
        steps = sorted([start, *(rng.uniform(start, 1) for _ in linked[1:])])
        for at, name, source in zip(steps, linked, [values[chain], *linked], strict=False):
            sentences.append((at, corpus.encode(f"\nVAR {name} = {source}.\n")))
    sentences.sort(key=lambda sentence: sentence[0])
    question = corpus.encode("\n" + VALUE[language].format(name=names[CHAIN - 1]))
    return _sample("variables", corpus, length, depth, language, rng, sentences, question, values)


def aggregation(
    corpus: Corpus, length: int, depth: float, language: str, rng: random.Random
) -> Sample:
    """A list of words from end to end; one comes twice as often as any other."""
    same = _of_one_length(corpus.encode, KEYS)
    words = rng.sample(same, min(CHOICES, len(same)))
    options = [corpus.encode(f" {word}") for word in words]
    question = corpus.encode("\n" + COMMONEST[language])
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
    rest = corpus.hay[:left]
    context = [*rest, *(token for index in listed for token in options[index]), *question]
    order = rng.sample(range(len(words)), len(words))
    shuffled = [options[index] for index in order]
    return Sample(
        "aggregation", language, length, depth, context, shuffled, order.index(0), len(question)
    )


def quotation(
    corpus: Corpus, length: int, depth: float, language: str, rng: random.Random
) -> Sample:
    """A sentence of the user's own text is hidden in the rest; its beginning asks for its end there,
    which is its own or that of one of three others: the text alone decides."""
    if len(corpus.sentences) < CHOICES:
        raise UserError(
            f"the corpus has {len(corpus.sentences)} sentences of 8 words to {QUOTED_TOKENS} tokens with "
            f"an end of their own, {CHOICES} are needed; give more text"
        )
    parts = rng.sample(corpus.sentences, CHOICES)
    ends = [ids[-ANSWER_TOKENS:] for ids in parts]
    told, beginning = ends.pop(rng.randrange(CHOICES)), parts[0][:-ANSWER_TOKENS]
    sentence = [*corpus.encode("\n"), *beginning, *told, *corpus.encode("\n")]
    question = [*corpus.encode("\n" + COMPLETE[language]), *beginning]
    context = hidden(corpus.hay, [(depth, sentence)], question, length - ANSWER_TOKENS, rng)
    options = [told, *ends]
    return _shuffled("quotation", language, length, depth, context, options, rng, len(question))


def values_of_one_length(encode: Encode) -> list[str]:
    """The three-digit numbers that take the commonest number of tokens."""
    return _of_one_length(encode, map(str, range(100, 1000)))


def _of_one_length(encode: Encode, words: Iterable[str]) -> list[str]:
    """Those of `words` that take the commonest number of tokens after a space."""
    by_count: dict[int, list[str]] = {}
    for word in words:
        by_count.setdefault(len(encode(f" {word}")), []).append(word)
    return max(by_count.values(), key=len)


def hidden(
    hay: Sequence[int],
    sentences: Sequence[tuple[float, Sequence[int]]],
    question: Sequence[int],
    length: int,
    rng: random.Random,
) -> list[int]:
    """Exactly `length` tokens: a random stretch of `hay` with each sentence at its depth (ascending),
    and the question at the end. Raises UserError where they do not fit."""
    room = length - sum(len(ids) for _, ids in sentences) - len(question)
    if room < 0:
        raise UserError(f"{length} tokens: sentences and question alone take {length - room}")
    if room > len(hay):
        raise UserError(f"{length} tokens: the haystack has {len(hay)} of {room}; give more text")
    start, context, done = rng.randrange(len(hay) - room + 1), list[int](), 0
    for depth, ids in sentences:
        cut = round(depth * room)
        context += [*hay[start + done : start + cut], *ids]
        done = cut
    return [*context, *hay[start + done : start + room], *question]


def _sample(
    task: str, corpus: Corpus, length: int, depth: float, language: str, rng: random.Random,
    sentences: Sequence[tuple[float, Sequence[int]]], question: Sequence[int], values: Sequence[str],
) -> Sample:  # fmt: skip
    options = [corpus.encode(f" {value}") for value in values]
    context = hidden(corpus.hay, sentences, question, length - len(options[0]), rng)
    return _shuffled(task, language, length, depth, context, options, rng, len(question))


def _shuffled(
    task: str, language: str, length: int, depth: float, context: list[int],
    options: Sequence[list[int]], rng: random.Random, question: int,
) -> Sample:  # fmt: skip
    """The first option is the right one, and comes anywhere."""
    order = rng.sample(range(len(options)), len(options))
    choices = [options[index] for index in order]
    return Sample(task, language, length, depth, context, choices, order.index(0), question)


TASKS: dict[str, Task] = {
    "needle": needle,
    "multi_key": multi_key,
    "variables": variables,
    "aggregation": aggregation,
    "quotation": quotation,
}
