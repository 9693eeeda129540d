"""A stage's rows as a token dataset on disk: mixed, rendered, masked and packed, once.

TRL is handed `input_ids` and `labels` (or prompt, chosen and rejected ids) that were made here, so
that no mask or template setting can get lost on its way through TRL's own preparation.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ground.checksums import Damaged, seal, verify
from ground.errors import UserError
from ground.files import folder_aside, kept_record, write_record
from ground.processes import begin_worker
from ground.weights import check_floats, tensors
from posttrain.job import Job
from posttrain.mixing import mixed_rows
from posttrain.rows import Lines, chat_tokens, holds_control_strings, pair_tokens
from posttrain.template import Row, configured, with_settings

# Best fit needs many rows to choose from; TRL's default of 1,000 rows per batch fills 98.9 % of a
# window, 50,000 fill 99.97 %.
PACKED_TOGETHER = 50_000
# A document's `origin` is its split's place in the mixture times this, plus its row, from 0.
ROWS_OF_A_SPLIT = 1 << 32
Figures = dict[str, Any]
PAD = "<|finetune_right_pad_id|>"  # Llama 3's, which SmolLM3 pads with


def load_tokenizer(job: Job) -> Any:
    """The stage's tokenizer, with the template and the end token that the model will carry."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
    if job.template:
        tokenizer.chat_template = configured(Path(job.template), **job.template_defaults)
    if not tokenizer.chat_template:
        raise UserError(f"{job.tokenizer}: no chat template; name one in the recipe")
    # What transformers' `sanitize_control_tokens` keeps out of messages beside the special tokens; by
    # default all that the template names, which would take the tags out of earlier answers.
    tokenizer.chat_control_tokens = []
    if end := job.trl.get("eos_token"):
        tokenizer.eos_token = end
    if tokenizer.pad_token in (None, tokenizer.eos_token) and PAD in tokenizer.get_vocab():
        tokenizer.pad_token = PAD  # released: padded with the end of a turn
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        raise UserError(
            f"{job.tokenizer}: no padding token of its own: set pad_token to one that no text has, "
            f"such as {PAD}"
        )
    return tokenizer


def prepare_data(folder: Path) -> Figures:
    """Write the run folder's data/ and data.json, the figures returned, unless they are there.

    For one process only. UserError where the model or a row cannot be trained on.
    """
    from datasets import disable_progress_bars

    figures = folder / "data.json"
    if (kept := kept_record(figures)) and _is_whole(folder / "data"):
        return kept
    disable_progress_bars()
    job, scratch = Job.read(folder), folder / "data.scratch"
    # Checked before minutes of tokenising, although only the training needs the model.
    for file, name, tensor in tensors(Path(job.model), "run the stage that makes it"):
        check_floats(file, name, tensor)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    dataset, counts = (_pairs if job.trains_pairs else _windows)(job, scratch)
    with folder_aside(folder / "data") as aside:
        dataset.save_to_disk(str(aside))
        seal(aside)
    write_record(figures, counts)
    shutil.rmtree(scratch)
    return counts


def _is_whole(data: Path) -> bool:
    try:
        verify(data)
    except Damaged as error:
        print(f"{str(error).rpartition(';')[0]}; made again", flush=True)
        return False
    return True


def _windows(job: Job, scratch: Path) -> tuple[Any, Figures]:
    """Chats packed into windows of `max_length` tokens, and figures of them."""
    tokenizer, length = load_tokenizer(job), job.trl["max_length"]
    masked, strategy = bool(job.trl["assistant_only_loss"]), job.trl["packing_strategy"]

    def tokens(row: Row, where: str) -> Row:
        return chat_tokens(tokenizer, with_settings(row, job.settings, where), masked, where)

    rows, spelled = _tokenised(job, tokenizer, tokens, scratch)
    (sizes,) = _lengths(rows, "input_ids")
    counts: Figures = {"rows": len(rows), "tokens": int(sizes.sum()), **spelled}
    if strategy != "wrapped":  # `wrapped` cuts every row that crosses the end of a window
        counts["rows_cut_at_max_length"] = int((sizes > length).sum())
    windows = packed(_changed(rows, each_token, scratch), length, strategy, scratch)
    windows = _changed(windows, each_document, scratch)
    return windows, counts | {"windows": len(windows)}


def _changed(dataset: Any, change: Callable[[Any], Any], scratch: Path) -> Any:
    """The dataset with each pyarrow table of it changed."""
    name = change.__name__
    changed = dataset.with_format("arrow").map(
        change, batched=True, cache_file_name=str(scratch / f"{name}.arrow"), new_fingerprint=name
    )
    return changed.with_format(None)


def each_token(table: Any) -> Any:
    """`origin` of each row becomes that of each of its tokens, which are packed as tokens are."""
    import pyarrow as pa

    sizes = _sizes(table, "input_ids")
    ends = np.concatenate([[0], sizes.cumsum()]).astype(np.int32)
    origins = np.repeat(table["origin"].to_numpy(), sizes)
    column = pa.ListArray.from_arrays(ends, pa.array(origins))
    return table.set_column(table.column_names.index("origin"), "origin", column)


def each_document(table: Any) -> Any:
    """`origin` of each token of a window becomes `origins` [N] of its documents, and `ends` [N]."""
    import pyarrow as pa

    window_ends = _sizes(table, "origin").cumsum()
    of_tokens = table["origin"].combine_chunks().flatten().to_numpy()
    ends = np.union1d(np.flatnonzero(np.diff(of_tokens)) + 1, window_ends)
    window = np.searchsorted(window_ends, ends)
    begins = np.concatenate([[0], window_ends])
    lists = np.searchsorted(window, np.arange(len(window_ends) + 1)).astype(np.int32)
    for name, values in (("origins", of_tokens[ends - 1]), ("ends", ends - begins[window])):
        table = table.append_column(name, pa.ListArray.from_arrays(lists, pa.array(values)))
    return table.drop_columns(["origin"])


def _pairs(job: Job, scratch: Path) -> tuple[Any, Figures]:
    """Preference pairs whose prompt leaves room for an answer, and figures of all."""
    tokenizer, length = load_tokenizer(job), job.trl["max_length"]
    rows, spelled = _tokenised(
        job, tokenizer, lambda row, where: pair_tokens(tokenizer, row, job.settings, where), scratch
    )
    prompt, chosen, rejected = _lengths(rows, "prompt_ids", "chosen_ids", "rejected_ids")
    counts: Figures = {
        "rows": len(rows),
        **spelled,
        "tokens": int(prompt.sum() + chosen.sum() + rejected.sum()),
        "rows_cut_at_max_length": int((prompt + chosen.clip(min=rejected) > length).sum()),
    }
    kept = rows.filter(lambda row: len(row["prompt_ids"]) < length, new_fingerprint="kept")
    return kept, counts


def _lengths(rows: Any, *columns: str) -> list[Any]:
    """The number of tokens of each row, one array per column."""
    return [_sizes(rows.data, name) for name in columns]


def _sizes(table: Any, column: str) -> Any:
    import pyarrow.compute as pc

    return pc.list_value_length(table.column(column)).to_numpy()


def _tokenised(
    job: Job, tokenizer: Any, tokens: Callable[[Row, str], Row], scratch: Path
) -> tuple[Any, Figures]:
    """The mixture's rows through `tokens` (row, its place), in mixed order; a datasets.Dataset.

    And how many of each split's rows hold control strings.
    """
    from datasets import Dataset

    splits = [Lines(Path(job.files[split])) for split in job.mixture]
    counts = dict(zip(job.mixture, map(len, splits), strict=True))
    mixed = mixed_rows(counts, job.mixture, job.mixture_seed)
    rows, parent = Dataset.from_dict({"split": mixed[:, 0], "row": mixed[:, 1]}), os.getpid()

    def tokenised(at: Row) -> Row:
        if os.getpid() != parent:
            begin_worker(parent)
        row, where = splits[at["split"]].row(at["row"])
        origin = at["split"] * ROWS_OF_A_SPLIT + at["row"]
        spells = holds_control_strings(tokenizer, row)
        return {**tokens(row, where), "spells": spells, "origin": origin}

    rows = rows.map(
        tokenised,
        remove_columns=["row"],
        num_proc=job.workers if job.workers > 1 else None,
        cache_file_name=str(scratch / "tokens.arrow"),
        new_fingerprint="tokens",  # or the function is pickled, tokenizer and all, to be hashed
    )
    spelled = Counter(rows.data.column("split").filter(rows.data.column("spells")).to_pylist())
    counts = {name: spelled[index] for index, name in enumerate(job.mixture) if spelled[index]}
    return rows.remove_columns(["split", "spells"]), {"rows_with_control_strings": counts}


def packed(dataset: Any, length: int, strategy: str, scratch: Path) -> Any:
    """Rows in windows of `length` tokens: `bfd` keeps rows whole, `wrapped` cuts a stream of them."""
    from trl.data_utils import pack_dataset

    options = {
        "batch_size": PACKED_TOGETHER,
        "cache_file_name": str(scratch / "packed.arrow"),
        "new_fingerprint": "packed",
    }
    return pack_dataset(dataset, length, strategy, options)
