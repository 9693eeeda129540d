"""From a source's documents to its token shard: a list of steps, and the code that runs it.

The published sets arrive filtered and deduplicated; there is no quality filter here. Every document
ends in one EOS and no text can fake one: `<|end_of_text|>` written out in a document is plain
text. Documents are shuffled whole; windows are shuffled by the loader, since datatrove's chunk
shuffle writes chunk ends into the index as if documents ended there.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datatrove_pipelines.counts import Counts, Step, leave_out_where
from datatrove_pipelines.duplicates import SeenTexts
from datatrove_pipelines.executors import run_in_processes, run_pipeline
from datatrove_pipelines.fast_tokenizer import encoder, why_slow
from datatrove_pipelines.held_out import in_slice, is_held_out
from datatrove_pipelines.shards import (
    ShardInfo,
    check_shards,
    count_token,
    is_whole,
    read_info,
    seal_shards,
    shard_folder,
    write_info,
)
from datatrove_pipelines.sources import (
    HubSplit,
    OwnText,
    SourceJob,
    check_readable,
    clean,
    reader,
)
from datatrove_pipelines.token_writer import write_tokens
from ground.errors import UserError, disk_error
from ground.files import folder_aside

if TYPE_CHECKING:
    from datatrove.data import Document


def steps(job: SourceJob, tokenizer: Path, output: Path, counts: Counts) -> list[Step]:
    """The pipeline of a source, to be run as one task; `tokenizer` is a folder."""
    max_tokens = job.read.max_tokens if isinstance(job.read, HubSplit) else None
    encode = encoder(tokenizer)

    def count_tokens(text: str) -> int:
        return len(encode(text))

    def is_overlong(text: str) -> bool:
        if not max_tokens or len(text) <= max_tokens:  # a token is at least a byte
            return False
        return count_tokens(text) > max_tokens

    leave_out = partial(leave_out_where, counts)
    return [
        reader(job, TokenEstimate(count_tokens)),
        leave_out("empty", lambda text: not clean(text).strip()),
        *([leave_out("duplicates", SeenTexts().has)] if isinstance(job.read, OwnText) else []),
        # Both hash the text as read, NULs included.
        leave_out("held_out", lambda text: is_held_out(text, job.held_out_fraction)),
        leave_out("outside_slice", lambda text: not in_slice(text, *job.slice)),
        _clean,
        leave_out("overlong", is_overlong),
        *([_repeat(job.least_tokens, count_tokens)] if job.least_tokens else []),
        _count(counts),
        write_tokens(output, tokenizer, job.seed),
    ]


@dataclass
class TokenEstimate:
    """Tokens of each document in proportion to its bytes, as they are in every 20th of those before."""

    count_tokens: Callable[[str], int]
    every: int = 20
    documents: int = 0
    bytes: int = 0
    tokens: int = 0

    def __call__(self, text: str) -> float:
        size = len(text.encode())
        if self.documents % self.every == 0:
            self.bytes += size
            self.tokens += self.count_tokens(text)
        self.documents += 1
        return size * self.tokens / max(self.bytes, 1)


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


def tokenize_source(job: SourceJob, tokenizer: Path, cache: Path) -> ShardInfo:
    """The shard of `job`, built when it is missing. `tokenizer` is a folder with tokenizer.json."""
    from filelock import FileLock

    folder = shard_folder(job, tokenizer, cache)
    if is_whole(folder):
        return read_info(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if is_whole(folder):  # another process built it meanwhile
                return read_info(folder)
            with folder_aside(folder) as output:
                info = _build(job, tokenizer, output)
        return replace(info, folder=folder)
    except OSError as error:
        error.filename = error.filename or str(folder)
        if line := disk_error(error):
            raise UserError(f"source {job.name}: {line}") from error
        raise


def tokenize_all(
    jobs: Sequence[SourceJob], tokenizer: Path, cache: Path, workers: int
) -> list[ShardInfo]:
    """The shards of all `jobs`, in order; the missing ones are built by `workers` processes.

    Nothing is built before all are known to be readable, and the first failure stops the others.
    """
    folders = [shard_folder(job, tokenizer, cache) for job in jobs]
    missing = {
        folder: job for folder, job in zip(folders, jobs, strict=True) if not is_whole(folder)
    }
    check_readable(missing.values())
    if missing and (reason := why_slow(tokenizer)):
        print(f"{tokenizer}: {reason}: tokenised by the tokenizers library, several times slower")
    if (workers := min(workers, len(missing))) > 1:
        run = partial(tokenize_source, tokenizer=tokenizer, cache=cache)
        run_in_processes(run, list(missing.values()), workers)
    return [tokenize_source(job, tokenizer, cache) for job in jobs]


def _build(job: SourceJob, tokenizer: Path, output: Path) -> ShardInfo:
    """Run the pipeline into `output` and check what it wrote."""
    counts, logs = Counts(), output / "logs"
    run_pipeline(steps(job, tokenizer, output, counts), logs)
    shutil.rmtree(logs)
    if not counts.documents:
        reasons = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.left_out.items())
        raise UserError(
            f"source {job.name}: no document is left ({reasons}): give it more text or a larger slice"
        )
    encode = encoder(tokenizer)
    eos_id, token_bytes = encode.eos_id, encode.token_bytes
    shards = sorted(output.glob("*.ds"))
    ends = sum(count_token(shard, eos_id, token_bytes) for shard in shards)
    if ends != counts.documents:
        raise UserError(
            f"source {job.name}: {ends} EOS in {counts.documents} documents: a document's text "
            f"was read as a special token; check the added tokens of {tokenizer}"
        )
    tokens = sum(shard.stat().st_size for shard in shards) // token_bytes
    written = (counts.documents, counts.bytes, token_bytes, eos_id)
    write_info(ShardInfo(job.name, output, tokens, *written, counts.left_out))
    info = check_shards(output, eos_id)
    seal_shards(output)
    return info
