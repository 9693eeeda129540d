"""From a unit of a source's documents to its token shard: a list of steps, and the code that runs it.

The published sets arrive filtered and deduplicated; others go through cleaning first. Every document
ends in one EOS and no text can fake one: `<|end_of_text|>` written out in a document is plain
text. Documents are shuffled whole; windows are shuffled by the loader, since datatrove's chunk
shuffle writes chunk ends into the index as if documents ended there.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datatrove_pipelines.cleaning.documents import cleaned
from datatrove_pipelines.cleaning.steps import replace_personal
from datatrove_pipelines.counts import Counts, Step, leave_out_where
from datatrove_pipelines.executors import run_pipeline
from datatrove_pipelines.fast_tokenizer import encoder
from datatrove_pipelines.held_out import in_slice, is_held_out
from datatrove_pipelines.shards import UNIT_FILE, UnitInfo, count_token
from datatrove_pipelines.sources import HubSplit, SourceJob, clean
from datatrove_pipelines.token_writer import TokenWriter, write_tokens
from datatrove_pipelines.units import Unit
from ground.errors import UserError
from ground.files import folder_aside, write_json

if TYPE_CHECKING:
    from datatrove.data import Document


def steps(
    job: SourceJob, unit: Unit, tokenizer: Path, output: Path, counts: Counts, cache: Path
) -> list[Step | TokenWriter]:
    """The pipeline of a unit of a source, to be run as one task; `tokenizer` is a folder."""
    max_tokens = job.read.max_tokens if isinstance(job.read, HubSplit) else None
    encode = encoder(tokenizer)

    def count_tokens(text: str) -> int:
        return len(encode(text))

    def is_overlong(text: str) -> bool:
        if not max_tokens or len(text) <= max_tokens:  # a token is at least a byte
            return False
        return count_tokens(text) > max_tokens

    leave_out = partial(leave_out_where, counts)
    # Of a source of many units, shards are repeated.
    repeats = job.least_tokens and not isinstance(job.read, HubSplit)
    return [
        *cleaned(job, unit, counts, cache),
        # Both hash the text with NULs, and before `pii`, whose replacements hang on what came before.
        leave_out("held_out", lambda text: is_held_out(text, job.held_out_fraction)),
        leave_out("outside_slice", lambda text: not in_slice(text, *job.slice)),
        *_decontaminate(job, output, counts),
        _clean,
        *([replace_personal(counts)] if "pii" in job.clean else []),
        leave_out("overlong", is_overlong),
        *([_repeat(job.least_tokens, count_tokens)] if repeats else []),
        _count(counts),
        write_tokens(output, tokenizer, job.seed + unit.number),
    ]


def _decontaminate(job: SourceJob, output: Path, counts: Counts) -> list[Step]:
    if job.decontaminate is None:
        return []
    from datatrove_pipelines.decontaminate import REPORT, leave_out_contaminated

    report = output / f"0.{REPORT}"
    return [leave_out_contaminated(job.decontaminate, counts, report, job.only_report)]


def _repeat(least_tokens: int, count_tokens: Callable[[str], int]) -> Step:
    """Pass all documents on again, in their order, until they have `least_tokens`."""

    def repeat(data: "Iterator[Document]", rank: int = 0, world_size: int = 1) -> Any:
        documents, tokens, number = list["Document"](), 0, 0
        for document in data:
            documents.append(document)
            tokens += count_tokens(document.text)
            yield document
        whole = tokens
        while documents and tokens < least_tokens:
            number += 1
            tokens += whole
            for document in documents:
                yield replace(document, id=f"{document.id}-{number}")

    return repeat


def _clean(data: "Iterator[Document]", rank: int = 0, world_size: int = 1) -> Any:
    for document in data:
        document.text = clean(document.text)
        yield document


def _count(counts: Counts) -> Step:
    def count(data: "Iterator[Document]", rank: int = 0, world_size: int = 1) -> Any:
        for document in data:
            counts.documents += 1
            counts.bytes += len(document.text.encode())
            yield document

    return count


def build_unit(job: SourceJob, unit: Unit, tokenizer: Path, folder: Path, cache: Path) -> UnitInfo:
    """Tokenise one unit into `folder`, which is whole or absent; `job` is pinned to its revision."""
    counts = Counts()
    with folder_aside(folder) as output:
        run_pipeline(steps(job, unit, tokenizer, output, counts, cache))
        tokens = 0
        for written in output.glob("*.ds*"):
            if counts.documents:
                written.rename(output / f"{unit.number:05}.{written.name.partition('.')[2]}")
            else:
                written.unlink()
        if counts.documents:
            shard = output / f"{unit.number:05}.ds"
            tokens = _checked_tokens(job, shard, counts.documents, tokenizer)
        sizes = (
            tokens,
            counts.documents,
            counts.bytes,
            counts.left_out,
            counts.read,
            counts.changed,
        )
        info = UnitInfo(unit.number, unit.file, unit.start, unit.stop, *sizes)
        write_json(output / UNIT_FILE, asdict(info))
    return info


def _checked_tokens(job: SourceJob, shard: Path, documents: int, tokenizer: Path) -> int:
    encode = encoder(tokenizer)
    if (ends := count_token(shard, encode.eos_id, encode.token_bytes)) != documents:
        raise UserError(
            f"source {job.name}: {ends} EOS in {documents} documents: a document's text "
            f"was read as a special token; check the added tokens of {tokenizer}"
        )
    return shard.stat().st_size // encode.token_bytes
