"""Whether `replay`, `seen` and what a run has logged say the same."""

import random
from collections.abc import Iterator

from ground.batch_hash import shown, total
from ground.files import read_json_lines
from launch.run.folder import StageRun
from launch.tools.chat_order import TRAINED, SeenRow
from launch.tools.order import SeenWindow
from launch.tools.replay import order_of
from launch.tools.seen import Search

END = "<|end_of_text|>"
SHORTEST = 8  # characters of a text that is sought: a line end alone is everywhere


def check_agreement(run: StageRun, steps: int, sought: int) -> None:
    """At most so many random steps of a stage, and texts out of such steps."""
    rng, order, stage = random.Random(0), order_of(run), run.stage
    lines = read_json_lines(run.folder / "metrics.jsonl")
    sample = rng.sample(lines, min(steps, len(lines)))
    logged = [(line["step"], line["batch_hash"]) for line in sample]
    assert logged
    for number, (step, value) in enumerate(logged):
        rows: list[SeenWindow | SeenRow] = list(order.step(step))
        assert order.batch_hash(step) == value, (stage, step)
        assert shown(total(int(row.hash, 16) for row in rows)) == value
        if number < sought:
            row = rng.choice(rows)
            texts = [text for text in texts_of(row) if len(text.strip()) >= SHORTEST]
            if not texts:
                continue
            text = rng.choice(texts)
            start = rng.randrange(max(len(text) - 60, 1))
            text = text[start : start + 60]
            found = [
                one
                for place in Search(text, [order]).places()
                for one in place.shown.get(stage, [])
            ]
            assert any((one.step, one.place) == (step, row.place) for one in found), (stage, text)


def texts_of(row: SeenWindow | SeenRow) -> Iterator[str]:
    """Texts that a row holds whole: no half of a character, no mark."""
    for document in row.documents:
        texts = document.texts.values() if hasattr(document, "texts") else [document.text]
        for text in texts:
            for cut in ("\ufffd", END, *TRAINED):
                text = max(text.split(cut), key=len)
            if text:
                yield text
