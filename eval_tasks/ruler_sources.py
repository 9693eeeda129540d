"""What RULER's tasks are made of besides an essay: words, and questions with their documents."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

from eval_tasks.task_table import dataset
from ground.errors import UserError, first_line

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """`own` and `near` number the documents that answer it and those of the same article."""

    text: str
    answers: list[str]
    own: list[int]
    near: list[int]


@dataclass(frozen=True)
class Sources:
    """`essay` fills the haystacks; `questions` gives those of a task of QUESTIONS and its documents."""

    essay: str = ""
    questions: Callable[[str], tuple[list[Question], list[str]]] | None = None


class Pairs(Sequence[str]):
    """All `adjective-noun`, each once and sorted, without the 6 million of them in memory: pairs of
    one adjective stand together, except for adjectives that begin another one and a hyphen."""

    def __init__(self, adjectives: Sequence[str], nouns: Sequence[str]):
        self.nouns, self.groups = sorted({*nouns}), list[list[str]]()
        for beginning in sorted({f"{adjective}-" for adjective in adjectives}):
            if self.groups and beginning.startswith(self.groups[-1][0]):
                self.groups[-1].append(beginning)
            else:
                self.groups.append([beginning])
        sizes = (len(self._group(group)) for group in self.groups)
        self.starts = [0, *accumulate(sizes)]

    def _group(self, group: list[str]) -> list[str]:
        if len(group) == 1:
            return self.nouns
        return sorted({beginning + noun for beginning in group for noun in self.nouns})

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: Any) -> Any:
        at = bisect_right(self.starts, index) - 1
        group = self.groups[at]
        pair = self._group(group)[index - self.starts[at]]
        return pair if len(group) > 1 else group[0] + pair


@cache
def word_lists() -> tuple[list[str], list[str], list[str]]:
    """Nouns, adjectives and verbs of wonderwords."""
    from importlib.resources import files

    folder = files("wonderwords") / "assets"
    names = ("nounlist.txt", "adjectivelist.txt", "verblist.txt")
    nouns, adjectives, verbs = (
        [line.rstrip() for line in (folder / name).read_text("utf-8").splitlines()]
        for name in names
    )
    return nouns, adjectives, verbs


@cache
def pairs() -> Pairs:
    return Pairs(word_lists()[1], word_lists()[0])


Found = tuple[list[Question], list[str]]


def squad(rows: Iterable[Row]) -> Found:
    """Of SQuAD 2.0, the questions that have an answer; a document is a paragraph."""
    rows = list(rows)
    documents, number = _numbered(row["context"] for row in rows)
    articles: dict[str, list[int]] = {}
    for row in rows:
        paragraphs = articles.setdefault(row["title"], [])
        if number[row["context"]] not in paragraphs:
            paragraphs.append(number[row["context"]])
    questions = [
        Question(
            row["question"], [*row["answers"]["text"]], [own := number[row["context"]]],
            [at for at in articles[row["title"]] if at != own],
        )
        for row in rows
        if row["answers"]["text"]
    ]  # fmt: skip
    return questions, documents


def hotpot(rows: Iterable[Row]) -> Found:
    """Of HotpotQA with its ten paragraphs a question (distractor)."""
    rows = list(rows)
    paragraphs = [
        [
            f"{title}\n{''.join(sentences)}"
            for title, sentences in zip(row["context"]["title"], row["context"]["sentences"], strict=True)
        ]
        for row in rows
    ]  # fmt: skip
    documents, number = _numbered(text for texts in paragraphs for text in texts)
    questions = [
        Question(row["question"], [row["answer"]], [number[text] for text in texts], [])
        for row, texts in zip(rows, paragraphs, strict=True)
    ]
    return questions, documents


def _numbered(texts: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    documents = sorted({*texts})
    return documents, {text: at for at, text in enumerate(documents)}


@dataclass(frozen=True)
class Asked:
    """A data set of the hub and how its rows become questions."""

    repo: str
    config: str
    read: Callable[[Iterable[Row]], Found]


# Both are read whole: the documents that distract come from all rows.
QUESTIONS = {
    "qa_1": Asked("rajpurkar/squad_v2", "squad_v2", squad),
    "qa_2": Asked("hotpotqa/hotpot_qa", "distractor", hotpot),
}


@cache
def read_questions(task: str) -> Found:
    """From the hub, or from its folder under EVAL_DATA. Raises UserError where they cannot be read."""
    from datasets import load_dataset

    asked = QUESTIONS[task]
    try:
        rows = load_dataset(dataset(asked.repo), asked.config, split="validation")
    except Exception as error:  # datasets and huggingface_hub each have their own
        raise UserError(f"{task}: {asked.repo} cannot be read: {first_line(error)}") from None
    return asked.read(rows)
