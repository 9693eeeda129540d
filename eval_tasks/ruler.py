"""RULER's own 13 tasks (Hsieh et al. 2024, arXiv:2404.06654) by the rules of their published generator.

After the scripts of NVIDIA/RULER at commit c3f5e3b (Apache-2.0). The draws come in their order: from
the same seed, words and texts come the same prompts, byte for byte, as long as the tokenizer counts
the same. A length counts the prompt, the beginning of the answer and the answer's room; a task is
filled up to it in whole lines, sentences or documents and is never longer, so prompts fall short of
it by a few tokens (those of long_context.py are exact). What differs: essays are split into
sentences at their marks instead of by nltk's model, a task that fits at no size is refused instead of
tried for ever, and the words of `cwe` end with the 8,166 of wonderwords: from about 64k tokens on, where
sizes above that are tried, RULER takes another list.
"""

import math
import random
import re
import string
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from eval_tasks.ruler_sources import QUESTIONS, Question, Sources, pairs, word_lists
from ground.errors import UserError

DATA: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
TASKS = (*DATA["needles"], "vt", "cwe", "fwe", *QUESTIONS)
SHORT = 4096  # below it steps and examples are smaller
HOPS = 4
COMMON = 10  # words that `cwe` asks for
DEPTHS = [int(depth) for depth in np.round(np.linspace(0, 100, num=40))]  # percent

Count = Callable[[str], int]  # of a text's tokens
Text = tuple[str, list[str]]  # prompt with the beginning of the answer, and the answers
Make = Callable[[int], Text]  # by its number of lines, sentences, words or documents


@dataclass(frozen=True)
class Item:
    """`prefix` begins the model's answer; `length` are the tokens of both and `new_tokens`."""

    task: str
    prompt: str
    prefix: str
    answers: list[str]
    length: int
    new_tokens: int


def items(
    task: str, length: int, number: int, count: Count, sources: Sources, seed: int, taken: int = 0
) -> Iterator[Item]:
    """The first `number` items of a task at `length` tokens, of which a chat template has `taken`.

    Raises UserError for an unknown task, sources that it lacks, and a length that is too short.
    """
    if task not in TASKS:
        raise UserError(f"task {task!r}: use some of {', '.join(TASKS)}")
    maker = Maker(task, length, length - taken, count, sources, seed)
    yield from maker.items(number)


@dataclass
class Maker:
    """Makes one task at one length; `room` are the length's tokens without a chat template's."""

    task: str
    length: int
    room: int
    count: Count
    sources: Sources
    seed: int
    rng: random.Random = field(init=False)
    numbers: np.random.RandomState = field(init=False)

    def __post_init__(self) -> None:
        self.rng, self.numbers = random.Random(self.seed), np.random.RandomState(self.seed)
        kind = DATA["kinds"]["niah" if self.task in DATA["needles"] else self.task.split("_")[0]]
        self.template, self.prefix = kind["template"], kind["prefix"]
        self.new_tokens: int = kind["new_tokens"]

    def items(self, number: int) -> Iterator[Item]:
        made = {"vt": self.chains, "cwe": self.common, "fwe": self.frequent}
        make = made.get(self.task, self.asked if self.task in QUESTIONS else self.needles)
        for text, answers in make(number):
            at = text.rfind(self.prefix[:10])
            length = self.count(text) + self.new_tokens + self.length - self.room
            yield Item(self.task, text[:at], text[at:], answers, length, self.new_tokens)

    def filled(self, text: str) -> str:
        return f"{self.template}{self.prefix}".format(context=text, query="")

    # ---- how much fits

    def largest(self, make: Make, step: int, most: int, more: int = 0) -> int:
        """The largest size that fits with `more` tokens, found by halving; at least a step."""
        low, high, best = step, max(most, step * 2), step
        while low <= high:
            size = (low + high) // 2
            try:
                fits = self.count(make(size)[0]) + more <= self.room
            except ValueError:  # more words than there are
                fits = False
            best, low, high = (size, size + 1, high) if fits else (best, low, size - 1)
        return best

    def estimated(self, make: Make, step: int) -> int:
        """Three times the size that the tokens of a step let expect."""
        return int((self.room / (self.count(make(step)[0]) / step)) * 3)

    def fitting(self, make: Make, size: int, step: int, more: int) -> Text:
        """A text of `size` or, where it comes out too long, of some steps fewer."""
        while True:
            with suppress(ValueError):  # fewer lines than needles
                text = make(size)
                if self.count(text[0]) + more <= self.room:
                    return text
            if size <= step:
                raise self.too_short()
            size -= step

    def too_short(self) -> UserError:
        return UserError(f"{self.task} does not fit in {self.length} tokens; take a longer length")

    # ---- the tasks

    def needles(self, number: int) -> Iterator[Text]:
        """Sentences that name a number, word or uuid each, in the haystack."""
        what = DATA["needles"][self.task]
        step = 500 if what["haystack"] == "essay" else 25 if self.length >= SHORT else 5

        def make(size: int) -> Text:
            return self.haystack(what, size)

        most = self.estimated(make, step)
        size = self.largest(make, step, most, self.new_tokens)
        for _ in range(number):
            yield self.fitting(make, size, step, self.new_tokens)

    def drawn(self, kind: str) -> str:
        if kind == "numbers":
            return str(self.rng.randint(10**6, 10**7 - 1))
        if kind == "words":
            return str(self.rng.choice(pairs()))
        return str(uuid.UUID(int=self.rng.getrandbits(128), version=4))

    def haystack(self, what: dict[str, Any], size: int) -> Text:
        kind, values = what["values"], dict[int, list[str]]()
        keys, needles = list[str](), list[str]()
        for at in range(what["hidden"]):
            keys.append(self.drawn(what["keys"]))
            values[at] = [self.drawn(kind) for _ in range(what["each"])]
            needles += [self.needle(kind, keys[at], value) for value in values[at]]
        random.Random(self.seed).shuffle(needles)
        if what["haystack"] == "essay":
            text = self.in_essay(needles, size)
        else:
            hides = what["haystack"] == "needle"
            lines = [
                self.needle(kind, self.drawn(what["keys"]), self.drawn(kind)) if hides else DATA["noise"]
                for _ in range(size)
            ]  # fmt: skip
            places = sorted(self.rng.sample(range(size), len(needles)), reverse=True)
            for place, needle in zip(places, needles, strict=True):
                lines.insert(place, needle)
            text = "\n".join(lines)
        asked = self.rng.sample(range(what["hidden"]), what["asked"])
        *first, last = [keys[at] for at in asked]
        query = f"{', '.join(first)}, and {last}" if first else last
        template = self.template + self.prefix
        if what["asked"] * what["each"] == 1:
            for many, one in {"Some": "A", "are all": "is", "are": "is"}.items():
                template = template.replace(many, one)
            kind = kind[:-1]
        answers = [value for at in asked for value in values[at]]
        return template.format(type_needle_v=kind, context=text, query=query), answers

    def needle(self, kind: str, key: str, value: str) -> str:
        return str(DATA["needle"].format(type_needle_v=kind, key=key, value=value))

    @cached_property
    def essay(self) -> list[str]:
        if not self.sources.essay.strip():
            raise UserError(f"{self.task}: its haystack is an essay; give texts")
        return re.sub(r"\s+", " ", self.sources.essay).split(" ")

    def in_essay(self, needles: list[str], size: int) -> str:
        words = (self.essay * math.ceil(size / len(self.essay)))[:size]
        sentences = sentences_of(" ".join(words).strip())
        depths = self.rng.sample(DEPTHS, len(needles))
        places = sorted(int(len(sentences) * (depth / 100)) for depth in depths)
        borders = [0, *places, len(sentences)]
        parts = list[str]()
        for at, (start, end) in enumerate(pairwise(borders)):
            parts += [" ".join(sentences[start:end]), *needles[at : at + 1]]
        return " ".join(parts)

    def chains(self, number: int) -> Iterator[Text]:
        """Variables that get one value after another, with a worked example before them."""
        room = self.room
        self.room -= self.length - 500  # the example's, and no room for an answer
        size = self.largest(self.example, 5, self.estimated(self.example, 5))
        try:
            text, names = self.fitting(self.example, size, 5, 0)
        except UserError:
            raise UserError(f"{self.task}: its worked example is too long for 500 tokens") from None
        example, self.room = f"{text} {' '.join(names)}\n", room
        step = 10 if self.length >= SHORT else 5
        more, most = self.count(example) + self.new_tokens, self.estimated(self.chain, step)
        size = self.largest(self.chain, step, most, more)

        def make(size: int) -> Text:
            text, names = self.chain(size)
            return f"{self.renamed(example)}\n{text}", names

        for _ in range(number):
            yield self.fitting(make, size, step, self.new_tokens)

    def example(self, size: int) -> Text:
        return self.chain(size, letters=3, value="12345")

    def letters(self, number: int, alphabet: str = string.ascii_uppercase) -> str:
        return "".join(self.rng.choices(alphabet, k=number))

    def chain(self, size: int, letters: int = 5, value: str = "") -> Text:
        names = [self.letters(letters) for _ in range(HOPS + 1)]
        while len({*names}) < HOPS + 1:
            names.append(self.letters(letters))
        names = list(dict.fromkeys(names))
        value = value or str(self.numbers.randint(10000, 99999))
        links = [f"VAR {names[0]} = {value}"]
        links += [f"VAR {name} = VAR {given} " for given, name in pairwise(names)]
        lines = [DATA["noise"]] * size
        places = sorted(self.rng.sample(range(size), len(links)))
        for at, (place, link) in enumerate(zip(places, links, strict=True)):
            lines.insert(place + at, link)
        text = "\n".join(lines).replace(". \n", ".\n")
        filled = f"{self.template}{self.prefix}".format(context=text, query=value, num_v=HOPS + 1)
        return filled, names

    def renamed(self, example: str) -> str:
        """The example with other names and another value."""
        for name in example.strip().split()[-HOPS - 1 :]:
            example = example.replace(name, self.letters(len(name)))
        return example.replace("12345", str(self.numbers.randint(10000, 99999)))

    def common(self, number: int) -> Iterator[Text]:
        """A numbered list in which ten words come more often than others, after a shorter one."""
        step, words = 10, sorted({word for words in word_lists() for word in words})
        random.Random(self.seed).shuffle(words)

        def listed(size: int, often: int, rarely: int) -> Text:
            drawn = self.rng.sample(words, size)
            all_words = drawn[:COMMON] * often + drawn[COMMON:] * rarely
            random.Random(self.seed).shuffle(all_words)
            return self.filled(numbered(all_words)), drawn[:COMMON]

        def make(size: int) -> Text:
            example, own = ((20, 3, 1), (6, 1)) if self.length < SHORT else ((40, 10, 3), (30, 3))
            shot, answers = listed(*example)
            text, common = listed(size, *own)
            return f"{shot} {numbered(answers)}\n{text}", common

        per_word = self.count(make(SHORT)[0]) / SHORT
        size = self.largest(make, step, int(self.room // per_word) * 2, self.new_tokens)
        for _ in range(number):
            yield self.fitting(make, size, step, self.new_tokens)

    def frequent(self, number: int) -> Iterator[Text]:
        """Made-up words, as often as a zeta distribution says; the commonest is dots."""
        room = self.room - self.new_tokens
        step, size = room // 32, room // 6  # letters of a word
        names = self.coded_words(room)
        while self.count(self.coded(names, size)) < room:
            size += step
        size -= step
        for _ in range(number):
            names, left = self.coded_words(room), size
            while self.count(text := self.coded(names, left)) > room:
                left -= step
                if left < 1:
                    raise self.too_short()
            yield text, names[1:4]

    def coded_words(self, room: int) -> list[str]:
        number = room // 50
        names = [self.letters(6, string.ascii_lowercase) for _ in range(number)]
        while len({*names}) < number:
            names.append(self.letters(6, string.ascii_lowercase))
        names = sorted({*names})
        if len(names) < 4:
            raise self.too_short()
        random.Random(self.seed).shuffle(names)
        return ["...", *names[1:]]

    def coded(self, names: list[str], size: int) -> str:
        shares = size * np.arange(1, len(names) + 1) ** -2.0 / (math.pi**2 / 6)
        words = np.repeat(names, shares.astype(int)).tolist()
        random.Random(self.seed).shuffle(words)
        return self.filled(" ".join(words))

    def asked(self, number: int) -> Iterator[Text]:
        """A question on documents, of which all but a few are there to distract."""
        if self.sources.questions is None:
            raise UserError(f"{self.task}: needs the rows of {QUESTIONS[self.task].repo}")
        questions, documents = self.sources.questions(self.task)
        step = 10

        def among(asked: Question, size: int) -> Text:
            kept, room = [*asked.own], size - len(asked.own)
            if size >= len(documents):
                texts = (documents * math.ceil(size / len(documents)))[:size]
            else:
                if room > len(asked.near):
                    known = {*asked.own, *asked.near}
                    others = [at for at in range(len(documents)) if at not in known]
                    kept += [*asked.near, *self.rng.sample(others, room - len(asked.near))]
                else:
                    kept += self.rng.sample(asked.near, room)
                texts = [documents[at] for at in kept]
            random.Random(self.seed).shuffle(texts)
            context = "\n\n".join(
                DATA["document"].format(i=at, document=text) for at, text in enumerate(texts, 1)
            )
            filled = f"{self.template}{self.prefix}".format(context=context, query=asked.text)
            return filled, asked.answers

        make = partial(among, questions[0])
        size = self.largest(make, step, self.estimated(make, step), self.new_tokens)
        for asked in questions[:number]:
            yield self.fitting(partial(among, asked), size, step, self.new_tokens)


def numbered(words: Sequence[str]) -> str:
    return " ".join(f"{at}. {word}" for at, word in enumerate(words, start=1))


def sentences_of(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", text)


def share_found(answer: str, golds: Sequence[str], task: str) -> float:
    """Share of the golds that stand in the answer, in any case of letters; of the questions' golds
    one is enough (string_match_all and string_match_part there)."""
    cleaned = re.sub(r"[\x00-\x1f]", "\n", answer).lower()
    hits = [gold.lower() in cleaned for gold in golds]
    return float(any(hits)) if task in QUESTIONS else sum(hits) / len(hits)
