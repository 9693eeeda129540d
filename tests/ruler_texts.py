"""Made-up texts and questions for RULER's tasks: those on which the golden hashes were made."""

import random
from functools import cache
from typing import Any

from eval_tasks.ruler_sources import Found, Sources, hotpot, squad

WORDS = [
    *("river", "stone", "lamp", "garden", "window", "paper", "silver", "quiet"),
    *("morning", "engine", "letter", "winter", "bridge", "orange", "yellow", "market"),
]
Row = dict[str, Any]


@cache
def made() -> tuple[str, list[Row], list[Row]]:
    """An essay, and rows in the columns of SQuAD 2.0 and of HotpotQA; the order of draws matters."""
    rng = random.Random(7)

    def sentence() -> str:
        words = " ".join(rng.choice(WORDS) for _ in range(rng.randint(4, 14)))
        return words.capitalize() + rng.choice(".!?")

    essay = "\n".join(" ".join(sentence() for _ in range(6)) for _ in range(250))
    squad_rows, hotpot_rows = list[Row](), list[Row]()
    for article in range(12):
        for paragraph in range(rng.randint(2, 9)):
            context = " ".join(sentence() for _ in range(8))
            for question in range(3):  # the second has no answer
                answers = [] if question == 1 else [rng.choice(WORDS), rng.choice(WORDS)]
                squad_rows.append({
                    "title": f"T{article}", "context": context, "answers": {"text": answers},
                    "question": f"What of {article} {paragraph} {question}?",
                })  # fmt: skip
    for number in range(30):
        answer = rng.choice(WORDS)
        found = [(f"P{rng.randint(0, 150)}", [sentence() for _ in range(5)]) for _ in range(10)]
        context = {"title": [title for title, _ in found], "sentences": [own for _, own in found]}
        hotpot_rows.append({"question": f"Who {number}?", "answer": answer, "context": context})
    return essay, squad_rows, hotpot_rows


def sources() -> Sources:
    essay, squad_rows, hotpot_rows = made()
    of_task: dict[str, Found] = {"qa_1": squad(squad_rows), "qa_2": hotpot(hotpot_rows)}
    return Sources(essay, of_task.__getitem__)
