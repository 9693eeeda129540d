"""Tasks of the embedded chats: a question, reasoning in which every step is right, an answer.

A task is drawn from a grammar by a random generator. `result` is the word or number that a right
answer contains; `steps` lead to it and are left out in /no_think.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from datatrove_pipelines.standins import words
from datatrove_pipelines.standins.words import LANGUAGES, NAMES, PLACES


@dataclass(frozen=True)
class Task:
    kind: str
    question: str
    steps: tuple[str, ...]
    answer: str
    result: str
    language: str = "en"
    instructions: str = ""  # of the system block, where the task is to follow it

    @property
    def trace(self) -> str:
        """The reasoning, on one line."""
        return " ".join((LANGUAGES[self.language].trace, *self.steps))


def word_sum(rng: random.Random, language: str) -> Task:
    """Things that a person has, gets and gives."""
    say, name = LANGUAGES[language], rng.choice(NAMES)
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    gains = a - b < 2 or rng.random() < 0.5  # at least two are left: the nouns are plural
    c = a + b if gains else a - b
    things = rng.choice(say.things)
    question = (say.gain if gains else say.loss).format(name=name, a=a, b=b, things=things)
    answer = say.owns.format(name=name, c=c, things=things)
    step = f"{a} + {b} = {c}." if gains else f"{a} - {b} = {c}."
    return Task("sum", question, (step,), answer, str(c), language)


def plain_sum(rng: random.Random, language: str) -> Task:
    """Two or three numbers, added and subtracted from left to right."""
    numbers = [rng.randint(2, 9) for _ in range(rng.choice((2, 2, 2, 3)))]
    total, expression, steps = numbers[0], str(numbers[0]), []
    for n in numbers[1:]:
        sign = "-" if total > n and rng.random() < 0.4 else "+"
        after = total + n if sign == "+" else total - n
        steps.append(f"{total} {sign} {n} = {after}.")
        expression += f" {sign} {n}"
        total = after
    say = LANGUAGES[language]
    question = _opened(rng, language, say.plain_sum.format(sum=expression))
    return Task("sum", question, tuple(steps), say.sum_is.format(c=total), str(total), language)


def number_list(rng: random.Random, language: str) -> Task:
    """The largest or smallest of three numbers, found by sorting them."""
    say, numbers = LANGUAGES[language], rng.sample(range(2, 30), 3)
    largest = rng.random() < 0.5
    ordered = sorted(numbers)
    best = ordered[-1 if largest else 0]
    step = " < ".join(map(str, ordered)) + "."
    question = (say.largest if largest else say.smallest).format(
        numbers=", ".join(map(str, numbers))
    )
    answer = (say.largest_is if largest else say.smallest_is).format(n=best)
    return Task("list", _opened(rng, language, question), (step,), answer, str(best), language)


def fact(rng: random.Random, language: str) -> Task:
    """A capital, an opposite, a day of the week."""
    say, which = LANGUAGES[language], rng.choice(("capital", "opposite", "day"))
    if which == "capital":
        country, result = rng.choice(say.capitals)
        question = say.capital.format(country=country)
        answer, step = say.capital_is.format(country=country, city=result), f"{country}: {result}."
    elif which == "opposite":
        pair = rng.choice(say.opposites)
        word, result = pair if rng.random() < 0.5 else pair[::-1]
        question = say.opposite.format(word=word)
        answer, step = say.opposite_is.format(word=word, other=result), f"{word}: {result}."
    else:
        today = rng.randrange(7)
        day, result = say.days[today], say.days[(today + 1) % 7]
        question = say.day.format(day=day)
        answer, step = say.day_is.format(day=day, next=result), f"{day}, {result}."
    return Task(which, _opened(rng, language, question), (step,), answer, result, language)


def greeting(rng: random.Random, language: str) -> Task:
    """The first turn of everyday talk."""
    say, name = LANGUAGES[language], rng.choice(NAMES)
    question = say.introduction.format(greeting=rng.choice(say.greetings), name=name)
    answer = say.welcome.format(name=name)
    return Task("greeting", question, (f"{name}.",), answer, name, language)


def document(rng: random.Random, language: str) -> Task:
    """Who lives where: one line of a small document answers."""
    say = LANGUAGES[language]
    names, cities = rng.sample(NAMES, 3), rng.sample(PLACES, 3)
    lines = [say.lives.format(name=n, city=c) for n, c in zip(names, cities, strict=True)]
    i = rng.randrange(3)
    question = " ".join(lines) + " " + say.where.format(name=names[i])
    return Task("document", question, (f"{names[i]}: {cities[i]}.",), lines[i], cities[i], language)


def table(rng: random.Random, language: str) -> Task:
    """A cell of a small table."""
    names = rng.sample(NAMES, 3)
    ages = rng.sample(range(20, 60), 3)
    rows = "\n".join(f"| {name} | {age} |" for name, age in zip(names, ages, strict=True))
    i = rng.randrange(3)
    question = f"| name | age |\n|---|---|\n{rows}\nHow old is {names[i]}?"
    step = f"{names[i]}: {ages[i]}."
    return Task("table", question, (step,), f"{names[i]} is {ages[i]}.", str(ages[i]))


def system_rule(rng: random.Random, language: str) -> Task:
    """A fact, in the manner that the system text asks for."""
    task = fact(rng, language)
    rule, form = rng.choice(words.RULES)
    answer = form.format(answer=task.answer)
    return Task("system", task.question, (*task.steps, rule), answer, answer, language, rule)


def instruction(rng: random.Random, language: str) -> Task:
    """An instruction whose result can be verified: how often, how many, in which letters."""
    word, times = rng.choice(words.REPEATED), rng.randint(2, 5)
    if rng.random() < 0.5:
        question = f"Write the word “{word}” {times} times."
    else:
        question = f"Write the word “{word}” in capital letters, {times} times."
        word = word.upper()
    step, answer = f"{word}, {times}.", f"Here: {' '.join([word] * times)}."
    return Task("instruction", _opened(rng, language, question), (step,), answer, answer)


def rewrite(rng: random.Random, language: str) -> Task:
    """A sentence into the past tense."""
    name, room = rng.choice(NAMES), rng.choice(words.ROOMS)
    now, past = rng.choice(words.DEEDS)
    question = f"Rewrite in the past tense: {name} {now} {room}."
    answer = f"{name} {past} {room}."
    return Task("rewrite", question, (f"{now}, {past}.",), answer, past)


def summarize(rng: random.Random, language: str) -> Task:
    """Three sentences about one person into one."""
    name, room = rng.choice(NAMES), rng.choice(words.ROOMS)
    (_, first), (_, second) = rng.sample(words.DEEDS, 2)
    question = f"Summarize: {name} was {room}. First {name} {first}. Then {name} {second}."
    answer = f"{name} {first} and {second} {room}."
    return Task(
        "summary", question, (f"{name}: {first}, {second}.",), answer, f"{first} and {second}"
    )


def science(rng: random.Random, language: str) -> Task:
    """A conversion of units."""
    small, large, factor = rng.choice(words.UNITS)
    n = rng.randint(2, 9)
    question = _opened(rng, language, f"How many {small} are {n} {large}?")
    step, answer = f"{n} * {factor} = {n * factor}.", f"{n} {large} are {n * factor} {small}."
    return Task("unit", question, (step,), answer, str(n * factor))


def _opened(rng: random.Random, language: str, question: str) -> str:
    opener = rng.choice(LANGUAGES[language].openers)
    return opener.format(name=rng.choice(NAMES)) + question


TASKS: dict[str, Callable[[random.Random, str], Task]] = {
    draw.__name__: draw
    for draw in (
        *(word_sum, plain_sum, number_list, fact, greeting, document),
        *(table, system_rule, instruction, rewrite, summarize, science),  # in English only
    )
}
