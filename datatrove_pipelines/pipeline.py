"""From a source's documents to its token shard: a list of steps, and what runs it.

The published sets arrive filtered and deduplicated; nothing is filtered again here. Every document
ends in one EOS and no text can forge another: `<|end_of_text|>` written out in a document is plain
text. Documents are shuffled whole; windows are shuffled by the loader, since datatrove's chunk
shuffle writes chunk ends into the index as if documents ended there.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datatrove_pipelines.executors import run_in_processes, run_pipeline
from datatrove_pipelines.held_out import in_slice, is_held_out
from datatrove_pipelines.shards import (
    ShardInfo,
    check_shards,
    content_hash,
    count_token,
    read_info,
    shard_folder,
    write_info,
)
from datatrove_pipelines.sources import HubSplit, SourceJob, Step, clean, reader
from datatrove_pipelines.tokenizer import EOS, plain_text_tokenizer
from ground.errors import UserError, disk_error
from ground.files import folder_aside

if TYPE_CHECKING:
    from datatrove.data import Document
    from tokenizers import Tokenizer


@dataclass
class Counts:
    """Documents that a pipeline has written, and those that it has left out."""

    documents: int = 0
    bytes: int = 0  # of the documents' text
    held_out: int = 0
    outside_slice: int = 0
    empty: int = 0
    overlong: int = 0


def steps(job: SourceJob, tokenizer: Path, output: Path, counts: Counts) -> list[Step]:
    """The pipeline of a source, to be run as one task; `tokenizer` is a folder."""
    max_tokens = job.read.max_tokens if isinstance(job.read, HubSplit) else None

    def fits(text: str) -> bool:
        if not max_tokens or len(text) <= max_tokens:  # a token is at least a byte
            return True
        return len(_tokenizer(tokenizer).encode(text).ids) <= max_tokens

    def keep(holds: Callable[[str], bool], otherwise: str) -> Step:
        return _keep(counts, holds, otherwise)

    return [
        reader(job),
        # Both hash the text as it was read.
        keep(lambda text: not is_held_out(text, job.held_out_fraction), "held_out"),
        keep(lambda text: in_slice(text, *job.slice), "outside_slice"),
        _clean,
        keep(lambda text: bool(text.strip()), "empty"),
        keep(fits, "overlong"),
        _count(counts),
        _write_tokens(job, tokenizer, output),
    ]


def _keep(counts: Counts, holds: Callable[[str], bool], otherwise: str) -> Step:
    """Pass on the documents of which `holds` is true; count the others as `otherwise`."""

    def keep(data: "Iterator[Document]", rank: int = 0, world_size: int = 1) -> Any:
        for document in data:
            if holds(document.text):
                yield document
            else:
                setattr(counts, otherwise, getattr(counts, otherwise) + 1)

    return keep


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


def _tokenizer(folder: Path) -> "Tokenizer":
    return plain_text_tokenizer(folder, content_hash(folder / "tokenizer.json"))


def _write_tokens(job: SourceJob, tokenizer: Path, output: Path) -> Any:
    """datatrove's DocumentTokenizer, to which no text is a special token."""
    from datatrove.pipeline.tokens import DocumentTokenizer

    class PlainTextTokenizer(DocumentTokenizer):
        # Loaded on use: the executor deep-copies its steps, which loses `encode_special_tokens`.
        @cached_property
        def tokenizer(self) -> "Tokenizer":
            return _tokenizer(tokenizer)

    return PlainTextTokenizer(
        str(output),
        str(tokenizer / "tokenizer.json"),
        eos_token=EOS,
        batch_size=1000,
        seed=job.seed,
        save_final_metadata=False,
    )


def tokenize_source(job: SourceJob, tokenizer: Path, cache: Path) -> ShardInfo:
    """The shard of `job`, built when it is missing. `tokenizer` is a folder with tokenizer.json."""
    from filelock import FileLock

    folder = shard_folder(job, tokenizer, cache)
    if folder.is_dir():
        return read_info(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if folder.is_dir():  # another process built it meanwhile
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
    """The shards of all `jobs`, in order; the missing ones are built by `workers` processes."""
    folders = [shard_folder(job, tokenizer, cache) for job in jobs]
    missing = {
        folder: job for folder, job in zip(folders, jobs, strict=True) if not folder.is_dir()
    }
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
        raise UserError(
            f"source {job.name}: no document is left ({counts.held_out} held out, "
            f"{counts.outside_slice} outside the slice {job.slice[0]:g}-{job.slice[1]:g}): "
            "give it a larger slice or a larger stand-in"
        )
    table = _tokenizer(tokenizer)
    eos_id = int(table.encode("").ids[-1])
    token_bytes = 2 if table.get_vocab_size() <= 1 << 16 else 4
    shards = sorted(output.glob("*.ds"))
    ends = sum(count_token(shard, eos_id, token_bytes) for shard in shards)
    if ends != counts.documents:
        raise UserError(
            f"source {job.name}: {ends} EOS in {counts.documents} documents: a document's text "
            f"was read as a special token; check the added tokens of {tokenizer}"
        )
    tokens = sum(shard.stat().st_size for shard in shards) // token_bytes
    write_info(
        ShardInfo(job.name, output, tokens, counts.documents, counts.bytes, token_bytes, eos_id)
    )
    return check_shards(output, eos_id)
