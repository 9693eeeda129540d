"""`make eval-longctx SUITE=ruler`: RULER's own tasks on a checkpoint, which writes its answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval_tasks.job import Result
from ground.errors import UserError
from ground.files import write_json
from launch.recipe import load
from launch.recipe.evaluation import RulerSuite, load_ruler, published_score
from launch.recipe.load import short
from launch.report.terminal import percent, print_table_of
from launch.run.model import checkpoint_folder, encoder, load_checkpoint
from launch.tools.long_context import chat_of, texts_of

METRIC = "string match"


@dataclass(frozen=True)
class Reader:
    """A checkpoint that goes on with a prompt; with `chat` the prompt is the user's turn and its
    prefix begins the assistant's."""

    model: Any
    encode: Any
    decode: Any
    chat: Any

    def answer(self, item: Any) -> str:
        """Greedy, at most the item's `new_tokens`."""
        import torch

        if self.chat:
            ids = [*self.chat.before, *self.encode(item.prompt), *self.chat.between]
            ids += self.encode(item.prefix)
        else:
            ids = self.encode(item.prompt + item.prefix)
        prompt = torch.tensor([ids], device=self.model.device)
        with torch.no_grad():
            out = self.model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                max_new_tokens=item.new_tokens, temperature=None, top_p=None, top_k=None,
                pad_token_id=self.model.config.eos_token_id,
            )  # fmt: skip
        return str(self.decode(out[0, len(ids) :]))


def evaluate_ruler(
    model_folder: Path, corpus: Path, target: Path, limit: int = 0, in_chat: bool = False
) -> Path:
    """Score every task and length of recipes/eval/ruler.yaml; `limit` replaces `samples`.

    Writes `<target>.json` and returns it: a row for each task and length, and for each length their
    mean beside the published score. Raises UserError.
    """
    file, suite = short(load.RECIPES / "eval" / "ruler.yaml"), load_ruler()
    if limit < 0:
        raise UserError(f"LIMIT={limit}: below 0; name samples a task, or 0 for the suite's own")
    checkpoint, essay = checkpoint_folder(model_folder), "\n".join(texts_of(corpus))
    model, tokenizer = load_checkpoint(checkpoint)
    window = model.config.max_position_embeddings
    lengths = [length for length in suite.lengths if length <= window]
    if not lengths:
        raise UserError(
            f"MODEL={model_folder}: its window of {window} is shorter than every length of {file}"
        )
    chat = chat_of(tokenizer, model_folder) if in_chat else None
    reader = Reader(model, encoder(tokenizer), tokenizer.decode, chat)
    rows = list(_rows(reader, replace(suite, lengths=tuple(lengths)), essay, limit, model_folder))
    if all(row.error for row in rows):
        raise UserError(f"MODEL={model_folder}: no task could be made; the first: {rows[0].error}")
    whole = target.with_suffix(".json")
    write_json(whole, {"model": str(model_folder), "rows": [row.as_json() for row in rows]})
    _show(rows, suite, lengths, str(model_folder))
    return whole


def _rows(
    reader: Reader, suite: RulerSuite, essay: str, limit: int, model: Path
) -> Iterator[Result]:
    """Of each length its tasks and then their mean; a task that cannot be made has an error."""
    from tqdm import tqdm

    from eval_tasks.ruler import items, share_found
    from eval_tasks.ruler_sources import Sources, read_questions
    from eval_tasks.suite import of_items, with_score

    sources, chat = Sources(essay, read_questions), reader.chat
    taken = len(chat.before) + len(chat.between) if chat else 0

    def count(text: str) -> int:
        return len(reader.encode(text))

    with tqdm(total=len(suite.lengths) * len(suite.tasks), desc="RULER", unit="task") as progress:
        for length in suite.lengths:
            scored, errors = [], 0
            for task in suite.tasks:
                row = Result(str(model), f"{task} {length}", METRIC, 0)
                try:
                    made = items(
                        task, length, limit or suite.samples, count, sources, suite.seed, taken
                    )
                    shares = [share_found(reader.answer(item), item.answers, task) for item in made]
                    scored.append(of_items(shares))
                    yield with_score(row, scored[-1:])
                except UserError as error:
                    errors += 1
                    progress.write(f"left out: {task}, length {length}: {error}")
                    yield replace(row, error=str(error))
                progress.update()
            if scored:
                published = None if errors else _published(length)
                mean = Result(str(model), f"mean {length}", METRIC, 0, published=published)
                yield with_score(mean, scored)


def _published(length: int) -> float | None:
    return published_score("base", f"RULER-{length // 1024}k")


def _show(rows: Sequence[Result], suite: RulerSuite, lengths: Sequence[int], model: str) -> None:
    of_name = {row.name: row for row in rows}

    def cell(name: str, length: int) -> str:
        row = of_name.get(f"{name} {length}")
        if row is None or row.value is None or row.low is None or row.high is None:
            return ""
        return f"{row.value:.0%}\n{row.low:.0%}-{row.high:.0%}"

    cells = [
        [name, *(cell(name, length) for length in lengths)]
        for name in (*suite.tasks, "mean")
    ]  # fmt: skip
    published = [_published(length) for length in lengths]
    cells.append(["published", *(percent(value, 1) for value in published)])
    scored = sum(f"{task} {length}" in of_name and of_name[f"{task} {length}"].error is None
                 for task in suite.tasks for length in lengths[:1])  # fmt: skip
    title = f"RULER, {model}: share of the answers found, 95 % interval"
    lines = (
        [f"the mean is of {scored} of {len(suite.tasks)} tasks"]
        if scored < len(suite.tasks)
        else []
    )
    print_table_of(("task", *(f"{length:,}" for length in lengths)), cells, title, lines)
