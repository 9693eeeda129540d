"""The texts that tasks score on, for decontamination: `python -m eval_tasks.texts <job file>`.

Items are read by the code that scores them, so that no prompt is forgotten: questions without worked
examples and without what all questions of a task share, and the right answers.
"""

import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from eval_tasks.suite import end_with_caller
from ground.errors import UserError, fail, first_line
from ground.files import open_aside, read_json_object, write_json

# A question below this many characters is hardly found alone, and stands beside its answer; an
# answer from this many on is found alone, as a solution is.
SHORT = 100
OPTIONS = re.compile(r"\n\s*\(?A[.):]\s")


@dataclass(frozen=True)
class TextsJob:
    """`tasks` by name, written to `output` as lines {task, text}; `found` gets a Found."""

    tasks: list[str]
    output: str
    found: str
    data: str | None = None  # a folder of local datasets, see package_data.py

    def write(self, file: Path) -> None:
        write_json(file, asdict(self))


@dataclass(frozen=True)
class Found:
    texts: dict[str, int] = field(default_factory=dict)  # lines of each task
    missing: dict[str, str] = field(default_factory=dict)  # tasks without data, and why


def main() -> None:
    end_with_caller()
    try:
        write_texts(TextsJob(**read_json_object(Path(sys.argv[1]))))
    except UserError as error:
        sys.exit(fail(str(error)))


def write_texts(job: TextsJob) -> None:
    """Write every task's texts, each once: a text of several tasks is the first one's."""
    if job.data:
        os.environ["EVAL_DATA"] = job.data  # before tasks are made: they look for their data then
    from eval_tasks import compat

    compat.before_import()
    from lighteval.tasks.registry import Registry

    tasks = Registry(
        tasks=",".join(f"{name}|0" for name in job.tasks),
        custom_tasks=str(Path(__file__).with_name("smollm3.py")),
    ).load_tasks()
    found, seen = Found(), set[str]()
    with open_aside(Path(job.output)) as file:
        for name in job.tasks:
            task = tasks.get(f"{name}|0")
            try:
                if task is None:
                    raise UserError("no such task")
                random.seed(0)  # GPQA draws the places of its options
                docs = task.eval_docs()
            except Exception as error:  # datasets, huggingface_hub and formats each have their own
                found.missing[name] = first_line(error)
                continue
            new = [text for text in dict.fromkeys(texts_of(docs)) if text not in seen]
            seen.update(new)
            found.texts[name] = len(new)
            for text in new:
                row = {"task": name, "text": text}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    write_json(Path(job.found), asdict(found))


def texts_of(docs: Sequence[Any]) -> Iterator[str]:
    """The texts of a task's items: the question with its options and without, alone or with the right
    answer, and a long answer alone."""
    queries = without_template([doc.query.removeprefix(doc.instruction or "") for doc in docs])
    for doc, query in zip(docs, queries, strict=True):
        question, row = OPTIONS.split(query)[0], (doc.specific or {}).get("row", {})
        answers = [gold for gold in doc.get_golds() if len(gold.strip()) > 1]
        answers += [row[key] for key in ("canonical_solution", "code") if key in row]
        for text in dict.fromkeys((query, question)):
            yield from (
                f"{text}{_space(answer)}{answer}" for answer in answers if len(text) < SHORT
            )
            yield text
        yield from (answer for answer in answers if len(answer) >= SHORT)


def _space(answer: str) -> str:
    return "" if answer[:1].isspace() else " "


def without_template(queries: Sequence[str]) -> list[str]:
    """The queries without the words that all begin or end with, and lines that most of them have."""
    if len(queries) < 3:
        return list(queries)
    lines = Counter(line for query in queries for line in {*query.split("\n")})
    kept = [
        "\n".join(line for line in query.split("\n") if 2 * lines[line] <= len(queries))
        for query in queries
    ]
    words = [re.findall(r"\s*\S+", query) for query in kept]
    begin = _shared(words)
    end = _shared([one[begin:][::-1] for one in words])
    return ["".join(one[begin : len(one) - end]).strip() for one in words]


def _shared(words: Sequence[Sequence[str]]) -> int:
    """How many words all begin with."""
    columns = zip(*words, strict=False)
    return sum(1 for _ in takewhile(lambda column: len({*column}) == 1, columns))


if __name__ == "__main__":
    main()
