"""`make eval-longctx`: the long-context set on a checkpoint, as a table, JSON and heat maps."""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ground.errors import UserError
from ground.files import write_json, write_text
from launch.recipe import load
from launch.recipe.evaluation import load_long_context
from launch.recipe.load import short
from launch.report.terminal import print_table_of
from launch.run.model import checkpoint_folder, encoder, load_checkpoint

Row = dict[str, Any]


def texts_of(corpus: Path) -> Iterator[str]:
    """The texts of a jsonl file (key `text`), or of every .txt and .md file of a folder."""
    if not corpus.exists():
        raise UserError(f"CORPUS={corpus}: no such file or folder; name a jsonl file or a folder")
    if corpus.is_dir():
        files = sorted(file for file in corpus.rglob("*") if file.suffix in (".txt", ".md"))
        if not files:
            raise UserError(f"CORPUS={corpus}: no .txt or .md file in it")
        yield from (file.read_text("utf-8", "replace") for file in files)
        return
    for number, line in enumerate(corpus.open(encoding="utf-8"), start=1):
        try:
            yield json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{corpus} line {number}: not a JSON object with a `text`") from None


def evaluate_long_context(
    model_folder: Path, corpus: Path, target: Path, limit: int = 0, in_chat: bool = False
) -> Path:
    """Score every task, language, length and depth of the suite; `limit` replaces `per_cell`.

    `in_chat` puts each sample into the model's chat template, whose tokens count in its length.
    Writes `<target>.json`, and a heat map per task, `<target>-<task>.svg`; returns the JSON file.
    """
    from tqdm import tqdm

    from eval_tasks.long_context import Corpus, samples

    file, suite = short(load.RECIPES / "eval" / "longctx.yaml"), load_long_context()
    if limit < 0:
        raise UserError(f"LIMIT={limit}: below 0; name samples a cell, or 0 for the suite's own")
    checkpoint, documents = checkpoint_folder(model_folder), list(texts_of(corpus))
    model, tokenizer = load_checkpoint(checkpoint)
    encode = encoder(tokenizer)
    chat = chat_of(tokenizer, model_folder) if in_chat else None
    window = model.config.max_position_embeddings
    lengths = [length for length in suite.lengths if length <= window]
    if not lengths:
        raise UserError(
            f"MODEL={model_folder}: its window of {window} is shorter than every length of {file}"
        )
    texts = Corpus.of(encode, documents)
    per_cell, rows = limit or suite.per_cell, list[Row]()
    cells = list(itertools.product(suite.tasks, suite.languages, lengths))
    for task, language, length in tqdm(cells, desc="long context", unit="cell"):
        try:
            found = samples(
                texts, [task], [length], suite.depths, per_cell, [language], suite.seed, chat
            )
            rows += _score(model, list(found))
        except UserError as error:
            print(f"left out: {task}, {language}, length {length}: {error}", flush=True)
    if not rows:
        raise UserError(f"CORPUS={corpus}: no sample of any length could be made of it")
    report = {"model": str(model_folder), "rows": rows}
    write_json(target.with_suffix(".json"), report, indent=None)
    _draw(rows, target)
    _show(rows, str(model_folder))
    return target.with_suffix(".json")


def chat_of(tokenizer: Any, folder: Path) -> Any:
    """What the template of `tokenizer` puts around a user's text, without thinking."""
    from eval_tasks.long_context import Chat

    if not tokenizer.chat_template:
        raise UserError(f"CHAT: MODEL={folder} has no chat template; leave CHAT out")
    mark = "<<text>>"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}],
        tokenize=False, add_generation_prompt=True, enable_thinking=False,
    )  # fmt: skip
    before, _, between = text.partition(mark)
    ids = tokenizer([before, between], add_special_tokens=False)["input_ids"]
    return Chat(*ids)


def _score(model: Any, found: Sequence[Any]) -> list[Row]:
    """{task, language, length, depth, hits, of, chance} of each sample."""
    from eval_tasks.intervals import summed
    from eval_tasks.likelihood import choice_log_likelihoods

    rows = []
    for sample in found:
        scores = choice_log_likelihoods(model, sample.context, sample.choices)
        best = max(range(len(scores)), key=scores.__getitem__)
        names = ("task", "language", "length", "depth")
        score = {"hits": int(best == sample.answer), "of": 1, "chance": 1 / len(sample.choices)}
        rows.append({name: getattr(sample, name) for name in names} | score)
    return summed(rows, "task", "language", "length", "depth")


def _draw(rows: Sequence[Row], target: Path) -> None:
    from eval_tasks.intervals import summed
    from launch.report.charts import needles

    for task in dict.fromkeys(row["task"] for row in rows):
        own = summed([row for row in rows if row["task"] == task], "length", "depth")
        chart = needles(own, f"{task}, chance {own[0]['chance']:.0%}")
        header = '<?xml version="1.0" encoding="utf-8"?>\n'
        write_text(target.with_name(f"{target.stem}-{task}.svg"), header + chart)


def _show(rows: Sequence[Row], model: str) -> None:
    from eval_tasks.intervals import summed

    lengths = list(dict.fromkeys(row["length"] for row in rows))
    cells = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        of_length = {g["length"]: f"{_share(g)}\n{_interval(g)}" for g in summed(own, "length")}
        chance = f"{own[0]['chance']:.0%}"
        cells.append([task, *(of_length.get(length, "") for length in lengths), chance])
    title = f"long context, {model}: share of right choices, 95 % interval"
    lines = [
        f"{group['language']}: {_share(group)} ({_interval(group)})"
        for group in summed(rows, "language")
    ]
    columns = ("task", *(f"{length:,}" for length in lengths), "chance")
    print_table_of(columns, cells, title, lines)


def _share(group: Row) -> str:
    return f"{group['hits'] / group['of']:.0%}"


def _interval(group: Row) -> str:
    return f"{group['low']:.0%}-{group['high']:.0%}"
