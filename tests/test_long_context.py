"""The long-context set: exact lengths, evidence where it is said to be, an oracle and a guesser."""

import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from eval_tasks.intervals import wilson
from eval_tasks.long_context import CHOICES, PHRASES, TASKS, Chat, Corpus, Sample, samples
from ground.errors import UserError
from launch.recipe.evaluation import load_long_context

SUBJECTS = ("The old captain", "A young painter", "The quiet teacher", "My tall neighbour")
VERBS = ("sold", "found", "lost", "kept", "saw")
THINGS = ("seven green bottles", "a broken watch", "some dry bread", "the long letter")
TEXTS = [
    f"{subject} {verb} {thing} in the town of {town} yesterday {number}."
    for number, (subject, verb, thing, town) in enumerate(
        (s, v, t, w)
        for s in SUBJECTS
        for v in VERBS
        for t in THINGS
        for w in ("Hull", "Kent", "Bath")
    )
]


def encode(text: str) -> list[int]:
    """Bytes as tokens: every length can be counted by hand."""
    return list(text.encode())


def decode(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


CORPUS = Corpus.of(encode, TEXTS)
LENGTHS, DEPTHS = (900, 1500), (0.0, 0.5, 1.0)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("language", PHRASES)
def test_requested_and_actual_length_agree_exactly(task: str, language: str) -> None:
    for length in (900, 901, 1333, 4096):
        for sample in samples(CORPUS, [task], [length], DEPTHS, 2, [language]):
            assert {len(sample.context) + len(choice) for choice in sample.choices} == {length}
            assert len({tuple(choice) for choice in sample.choices}) == CHOICES
            assert sample.length == length


@pytest.mark.parametrize("task", TASKS)
def test_every_length_of_the_recipe_is_made_exactly_from_256_to_128k(task: str) -> None:
    known: dict[str, int] = {}

    def words(text: str) -> list[int]:
        return [known.setdefault(word, len(known)) for word in re.findall(r"\s?\w+|\W", text)]

    corpus = Corpus.of(words, [f"{text} " * 3 for text in TEXTS * 20])
    lengths = load_long_context().lengths
    assert (lengths[0], lengths[-1]) == (256, 131072) and len(corpus.hay) > lengths[-1]
    for length in lengths:
        (sample,) = samples(corpus, [task], [length], [0.5], 1)
        assert {len(sample.context) + len(choice) for choice in sample.choices} == {length}


@pytest.mark.parametrize("task", TASKS)
def test_a_chat_template_counts_in_the_length(task: str) -> None:
    chat = Chat(encode("<user>"), encode("</user><assistant>"))
    for length in (900, 1501):
        (framed,) = samples(CORPUS, [task], [length], [0.5], 1, chat=chat)
        assert {len(framed.context) + len(choice) for choice in framed.choices} == {length}
        text = decode(framed.context)
        user, _, assistant = text.partition("</user><assistant>")
        assert user.startswith("<user>") and assistant == text[-framed.question :]
        inside = decode(framed.context[6 : -framed.question - 18] + encode(assistant))
        whole = replace(framed, context=encode(inside))
        assert oracle(whole) == framed.answer


def oracle(sample: Sample) -> int:
    """The right choice, found by reading the text alone."""
    text, choices = decode(sample.context), [decode(choice) for choice in sample.choices]
    body, _, question = text.rpartition("\n")
    if sample.task in ("needle", "multi_key"):
        (value,) = re.findall(re.escape(question) + r"( \d+)\.", body)
    elif sample.task == "variables":
        values = dict(re.findall(r"VAR (\w+) = (\w+)\.", body))
        match = re.search(r"X\d\d", question)
        assert match
        name = match[0]
        while name in values:
            name = values[name]
        value = f" {name}"
    elif sample.task == "aggregation":
        value = Counter({choice: body.count(choice) for choice in choices}).most_common(1)[0][0]
    else:
        beginning = question.split(":", 1)[1].lstrip()
        (value,) = {choice for choice in choices if beginning + choice in body}
    return choices.index(value)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("language", ["en", "fr"])
def test_a_retrieval_oracle_scores_100_percent(task: str, language: str) -> None:
    found = list(samples(CORPUS, [task], LENGTHS, DEPTHS, 8, [language]))
    assert all(oracle(sample) == sample.answer for sample in found)


@pytest.mark.parametrize("task", TASKS)
def test_a_shuffled_oracle_scores_chance(task: str) -> None:
    """Answers carry no trace of where they stand among the choices, nor of one another."""
    found = list(samples(CORPUS, [task], LENGTHS, DEPTHS, 60))
    answers = [oracle(sample) for sample in found]
    random.Random(0).shuffle(answers)
    hits = sum(a == sample.answer for a, sample in zip(answers, found, strict=True))
    low, high = wilson(hits, len(found), z=3.3)
    assert low <= 1 / CHOICES <= high
    places = Counter(sample.answer for sample in found)
    assert all(place < 0.4 * len(found) for place in places.values()) and len(places) == CHOICES


@pytest.mark.parametrize("task", ["needle", "multi_key", "variables", "quotation"])
def test_the_evidence_lies_at_its_depth(task: str) -> None:
    for sample in samples(CORPUS, [task], [4000], DEPTHS, 4):
        text = decode(sample.context)
        body, _, question = text.rpartition("\n")
        answer = decode(sample.choices[sample.answer])
        evidence = {
            "variables": f"={answer}.",
            "quotation": question.split(": ", 1)[-1] + answer,
        }.get(task, question + answer)
        assert abs(body.index(evidence) / len(body) - sample.depth) < 0.15
        assert body.count(evidence) == 1


def test_what_sounds_likely_is_no_help_in_a_quotation() -> None:
    """Who knows the corpus by heart but reads the question alone scores chance."""
    found = list(samples(CORPUS, ["quotation"], LENGTHS, DEPTHS, 60))
    hits = 0
    for sample in found:
        beginning = decode(sample.context).rpartition("\n")[2].split(": ", 1)[1]
        (text,) = {text for text in TEXTS if text.startswith(beginning)} or {""}
        likely = [text.endswith(decode(choice)) for choice in sample.choices]
        hits += likely.index(True) == sample.answer
    low, high = wilson(hits, len(found), z=3.3)
    assert low <= 1 / CHOICES <= high


def test_no_quoted_sentence_is_in_the_haystack() -> None:
    hay = decode(CORPUS.hay)
    assert len(CORPUS.sentences) >= 2 * CHOICES
    assert not any(decode(sentence).strip() in hay for sentence in CORPUS.sentences)
    assert sum(text in hay for text in TEXTS) + len(CORPUS.sentences) == len(TEXTS)


def test_the_wrong_needles_are_in_the_text_of_many_and_not_of_one() -> None:
    for task, count in (("needle", 1), ("multi_key", CHOICES)):
        for sample in samples(CORPUS, [task], [1500], [0.5], 5):
            assert sum(f"is{decode(c)}." in decode(sample.context) for c in sample.choices) == count


def test_samples_depend_on_their_own_cell_alone() -> None:
    few = list(samples(CORPUS, ["variables"], [900], [0.5], 2, ["de"]))
    many = list(samples(CORPUS, list(TASKS), LENGTHS, DEPTHS, 3, ["en", "de"]))
    assert all(sample in many for sample in few)
    assert few != list(samples(CORPUS, ["variables"], [900], [0.5], 2, ["de"], seed=1))


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    for depth in (-0.2, 1.2):
        with pytest.raises(UserError, match=rf"depth {depth}: not in 0 .* to 1"):
            list(samples(CORPUS, ["needle"], [900], [depth], 1))
    with pytest.raises(UserError, match=r"sentences and question alone take \d+"):
        list(samples(CORPUS, ["multi_key"], [90], [0.5], 1))
    with pytest.raises(UserError, match=r"the haystack has \d+ of \d+; give more text"):
        list(samples(CORPUS, ["needle"], [10**6], [0.5], 1))
    with pytest.raises(UserError, match="task 'neddle': use some of needle"):
        list(samples(CORPUS, ["neddle"], [900], [0.5], 1))
    with pytest.raises(UserError, match="language 'xx': use some of en"):
        list(samples(CORPUS, ["needle"], [900], [0.5], 1, ["xx"]))
    with pytest.raises(UserError, match=r"the corpus has 0 sentences .* give more text"):
        list(samples(Corpus.of(encode, ["short. " * 300]), ["quotation"], [900], [0.5], 1))
    with pytest.raises(UserError, match=r"the corpus has no \d tokens; give more text"):
        list(samples(Corpus.of(encode, []), ["aggregation"], list(range(900, 908)), [0.5], 1))
    with pytest.raises(UserError, match="a list of 4 words does not fit"):
        list(samples(CORPUS, ["aggregation"], [60], [0.5], 1))
