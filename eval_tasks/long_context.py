"""A set of long-context tasks in RULER's spirit (Hsieh et al. 2024, arXiv:2404.06654), in six languages.

Pure, on token ids: no download, no task library. Every sample is a choice by log-likelihood between
continuations of equal token count, so that context and answer have exactly the length asked for and
chance is 1 / choices at every length. Tasks: one needle, one of many needles, a chain of variables,
the commonest word of a list, and a sentence of the user's own text that has to be found and
completed as it stands there: with the end of any of four, so that what sounds likely is no help.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from eval_tasks.needle import KEYS, SENTENCES, Encode, NeedleError, hidden, values_of_one_length

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
    Raises NeedleError for an unknown task or language and where a sample does not fit its length.
    """
    for kind, names, known in (("task", tasks, TASKS), ("language", languages, SENTENCES)):
        if unknown := [name for name in names if name not in known]:
            raise NeedleError(f"{kind} {unknown[0]!r}: use some of {', '.join(known)}")
    if outside := [depth for depth in depths if not 0 <= depth <= 1]:
        raise NeedleError(f"depth {outside[0]}: not in 0 (the start) to 1 (the end)")
    for task in tasks:
        for language in languages:
            for length in lengths:
                for depth in depths:
                    for index in range(per_cell):
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
    sentences = [
        (at, corpus.encode(f"\n{SENTENCES[language].format(key=key)} {value}.\n"))
        for at, key, value in placed
    ]
    question = corpus.encode("\n" + SENTENCES[language].format(key=keys[0]))
    return _sample(task, corpus, length, depth, language, rng, sentences, question, values)


def variables(
    corpus: Corpus, length: int, depth: float, language: str, rng: random.Random
) -> Sample:
    """A number is handed from variable to variable from `depth` on; other chains hold the others."""
    names = [f"X{n}" for n in rng.sample(range(10, 100), CHOICES * CHAIN)]
    values = rng.sample(values_of_one_length(corpus.encode), CHOICES)
    sentences = []
    for chain in range(CHOICES):
        own = names[chain * CHAIN : (chain + 1) * CHAIN]
        start = depth if chain == 0 else rng.random()
        steps = sorted([start, *(rng.uniform(start, 1) for _ in own[1:])])
        for at, name, source in zip(steps, own, [values[chain], *own], strict=False):
            sentences.append((at, corpus.encode(f"\nVAR {name} = {source}.\n")))
    sentences.sort(key=lambda sentence: sentence[0])
    question = corpus.encode("\n" + VALUE[language].format(name=names[CHAIN - 1]))
    return _sample("variables", corpus, length, depth, language, rng, sentences, question, values)


def aggregation(
    corpus: Corpus, length: int, depth: float, language: str, rng: random.Random
) -> Sample:
    """A list of words from end to end; one comes twice as often as any other."""
    by_count: dict[int, list[str]] = {}
    for key in KEYS:
        by_count.setdefault(len(corpus.encode(f" {key}")), []).append(key)
    same = max(by_count.values(), key=len)
    words = rng.sample(same, min(CHOICES, len(same)))
    options = [corpus.encode(f" {word}") for word in words]
    question = corpus.encode("\n" + COMMONEST[language])
    room = length - len(question) - len(options[0])
    count = room // len(options[0])
    others = count // (len(words) + 1)
    if others < 1:
        raise NeedleError(f"length {length}: a list of {len(words)} words does not fit")
    listed = [index for index in range(1, len(words)) for _ in range(others)]
    listed += [0] * (count - len(listed))
    rng.shuffle(listed)
    left = room - count * len(options[0])  # fewer tokens than a word has
    if left > len(corpus.hay):
        raise NeedleError(f"length {length}: the corpus has no {left} tokens; give more text")
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
        raise NeedleError(
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
