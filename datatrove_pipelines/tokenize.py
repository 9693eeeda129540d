"""From a source's documents to its token shard: read, split, clean, tokenise, shuffle.

A source is a datatrove pipeline of three steps and becomes one folder, shared by all runs:

    <cache>/shards/<name>-<hash>/   *.ds (tokens)  *.ds.index (document ends, uint64)  info.json

The published sets arrive filtered and deduplicated; nothing is filtered again here. Every document
ends in one EOS and no text can forge another: `<|end_of_text|>` written out in a document is plain
text. Documents are shuffled whole; windows are shuffled by the loader, since datatrove's chunk
shuffle writes chunk ends into the index as if documents ended there.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datatrove_pipelines.executors import WorkerDied, run_in_processes, run_pipeline
from datatrove_pipelines.sources import ShardError, SourceJob, Step, clean, reader
from datatrove_pipelines.split import in_slice, is_held_out
from datatrove_pipelines.tokenizer import EOS, plain_text_tokenizer, whole_folder

if TYPE_CHECKING:
    from datatrove.data import Document
    from tokenizers import Tokenizer

INFO_FILE = "info.json"
REBUILD = "delete the folder and run `make data-stage1` again"
SAMPLED_ENDS = 1000
TOKENS_PER_READ = 1 << 22


@dataclass(frozen=True)
class ShardInfo:
    """What a shard folder holds."""

    name: str
    folder: Path
    tokens: int  # EOS included
    documents: int
    bytes: int  # UTF-8 bytes of the documents' text
    token_bytes: int  # 2 or 4
    eos_id: int


def shard_folder(job: SourceJob, tokenizer: Path, cache: Path) -> Path:
    """`<cache>/shards/<name>-<hash>`: the hash covers every value that the tokens depend on."""
    from importlib.metadata import version

    # 0 and 0.0 are one value
    values = asdict(job) | {"slice": [float(end) for end in job.slice]}
    values["held_out_fraction"] = float(job.held_out_fraction)
    if job.read["kind"] == "jsonl":
        values["read"] = job.read | {"path": _digest(Path(job.read["path"]), f"source {job.name}")}
    elif not job.read.get("revision"):
        raise ShardError(
            f"source {job.name}: {job.read['hub_id']} has no revision, so a change upstream "
            "would go unseen: "
            "pin one in recipes/sources.yaml"
        )
    values["tokenizer"] = _digest(tokenizer / "tokenizer.json", "tokenizer")
    values["datatrove"] = version("datatrove")
    digest = hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=6).hexdigest()
    return cache / "shards" / f"{job.name.replace('/', '--')}-{digest}"


def tokenize_source(job: SourceJob, tokenizer: Path, cache: Path) -> ShardInfo:
    """The shard of `job`, built when it is missing. `tokenizer` is a folder with tokenizer.json."""
    from filelock import FileLock

    folder = shard_folder(job, tokenizer, cache)
    if folder.is_dir():
        return _load_info(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if folder.is_dir():  # another process built it meanwhile
                return _load_info(folder)
            with whole_folder(folder) as output:
                info = _build(job, tokenizer, output)
        return replace(info, folder=folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ShardError(
            f"source {job.name}: no space left on the device while writing "
            f"{error.filename or folder}: free some, or point CACHE at a larger one, and run the "
            "stage again; nothing half-written was kept"
        ) from error


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
        try:
            run_in_processes(run, list(missing.values()), workers)
        except WorkerDied as error:
            raise ShardError(
                f"tokenising {len(missing)} sources: {error} (out of memory?): run the stage again "
                "with fewer workers; the shards already written are kept"
            ) from error
    return [tokenize_source(job, tokenizer, cache) for job in jobs]


def check_shards(folder: Path, eos_id: int) -> ShardInfo:
    """Check the structure of a shard folder, cheaply at any size: no token file is read in full."""
    info = _load_info(folder)
    if info.eos_id != eos_id:
        raise _broken(folder, INFO_FILE, f"the EOS id is {info.eos_id}, wanted {eos_id}")
    # Both suffixes, so that either file of a pair is missed when it is gone.
    names = {path.name.removesuffix(".index") for path in folder.glob("*.ds*")}
    tokens = documents = 0
    for shard in sorted(folder / name for name in names if name.endswith(".ds")):
        ends = _check_index(shard, info)
        tokens, documents = tokens + int(ends[-1]), documents + len(ends)
    if (tokens, documents) != (info.tokens, info.documents):
        wanted = f"{INFO_FILE} says {info.tokens} in {info.documents}"
        raise _broken(folder, "*.ds", f"{tokens} tokens in {documents} documents, {wanted}")
    return info


def _digest(path: Path, owner: str) -> str:
    """The content hash of a file, computed once a process for the same size and time."""
    try:
        status = path.stat()
    except OSError as error:
        remedy = "run the stage that writes it, or correct the path"
        raise ShardError(f"{owner}: {path} cannot be read ({error.strerror}): {remedy}") from error
    return _digest_of(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _digest_of(path: Path, size_bytes: int, modified_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


# ---- the pipeline


@dataclass
class _Count:
    """What passed on to the tokeniser, and what the split kept back."""

    documents: int = 0
    bytes: int = 0
    held_out: int = 0
    outside_slice: int = 0


def _build(job: SourceJob, tokenizer: Path, output: Path) -> ShardInfo:
    """Run the pipeline into `output` and check what it wrote."""
    count, logs = _Count(), output / "logs"
    steps = [reader(job), _keep(job, count, tokenizer), _tokenize(job, tokenizer, output)]
    run_pipeline(steps, logs)
    shutil.rmtree(logs)
    if not count.documents:
        raise ShardError(
            f"source {job.name}: no document is left ({count.held_out} held out, "
            f"{count.outside_slice} outside the slice {job.slice[0]:g}-{job.slice[1]:g}): "
            "give it a larger slice or a larger stand-in"
        )
    return _finish(job, tokenizer, output, count)


def _finish(job: SourceJob, tokenizer: Path, output: Path, count: _Count) -> ShardInfo:
    """Count every EOS once, while the shard is new, and write info.json."""
    table = plain_text_tokenizer(tokenizer, _digest(tokenizer / "tokenizer.json", "tokenizer"))
    eos_id = int(table.encode("").ids[-1])
    token_bytes = 2 if table.get_vocab_size() <= 1 << 16 else 4
    shards = sorted(output.glob("*.ds"))
    found = sum(_count_token(shard, eos_id, token_bytes) for shard in shards)
    if found != count.documents:
        raise ShardError(
            f"source {job.name}: {found} EOS in {count.documents} documents: a document's text "
            f"was read as a special token; check the added tokens of {tokenizer}"
        )
    tokens = sum(shard.stat().st_size for shard in shards) // token_bytes
    info = ShardInfo(job.name, output, tokens, count.documents, count.bytes, token_bytes, eos_id)
    values = asdict(info)
    del values["folder"]
    (output / INFO_FILE).write_text(json.dumps(values, indent=1) + "\n", "utf-8")
    return check_shards(output, eos_id)


def _count_token(shard: Path, token: int, token_bytes: int) -> int:
    import numpy as np

    tokens = np.memmap(shard, np.uint16 if token_bytes == 2 else np.uint32, "r")
    starts = range(0, len(tokens), TOKENS_PER_READ)
    return sum(int((tokens[n : n + TOKENS_PER_READ] == token).sum()) for n in starts)


def _keep(job: SourceJob, count: _Count, tokenizer: Path) -> Step:
    """Drop held-out, empty and overlong documents and those outside the slice (by the text as
    read)."""
    max_tokens = job.read.get("max_tokens")

    def is_overlong(text: str) -> bool:
        if not max_tokens or len(text) <= max_tokens:  # a token is at least a byte
            return False
        table = plain_text_tokenizer(tokenizer, _digest(tokenizer / "tokenizer.json", "tokenizer"))
        return len(table.encode(text).ids) > max_tokens

    def keep(
        data: "Iterator[Document]", rank: int = 0, world_size: int = 1
    ) -> "Iterator[Document]":
        for document in data:
            if is_held_out(document.text, job.held_out_fraction):
                count.held_out += 1
                continue
            if not in_slice(document.text, *job.slice):
                count.outside_slice += 1
                continue
            document.text = clean(document.text)
            if document.text.strip() and not is_overlong(document.text):
                count.documents += 1
                count.bytes += len(document.text.encode())
                yield document

    return keep


def _tokenize(job: SourceJob, tokenizer: Path, output: Path) -> Any:
    """datatrove's DocumentTokenizer, to which no text is a special token."""
    from datatrove.pipeline.tokens import DocumentTokenizer

    path = tokenizer / "tokenizer.json"

    class PlainTextTokenizer(DocumentTokenizer):
        # Loaded on use: the executor deep-copies its steps, which loses `encode_special_tokens`.
        @cached_property
        def tokenizer(self) -> "Tokenizer":
            return plain_text_tokenizer(tokenizer, _digest(path, "tokenizer"))

    return PlainTextTokenizer(
        str(output),
        str(path),
        eos_token=EOS,
        batch_size=1000,
        seed=job.seed,
        save_final_metadata=False,
    )


# ---- reading back


def _load_info(folder: Path) -> ShardInfo:
    path = folder / INFO_FILE
    try:
        return ShardInfo(folder=folder, **json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise _broken(folder, INFO_FILE, f"missing or unreadable ({error})") from error


def _broken(folder: Path, file: str, what: str) -> ShardError:
    source = folder.name.removesuffix(".partial").rpartition("-")[0]
    return ShardError(f"source {source}: {folder / file}: {what}; {REBUILD}")


def _check_index(shard: Path, info: ShardInfo) -> Any:
    """The document ends of one .ds file (in tokens), after checking them against the file."""
    import numpy as np

    index = shard.with_name(shard.name + ".index")
    for path in (shard, index):
        if not path.is_file():
            raise _broken(shard.parent, path.name, "the file is missing")
    if (size := index.stat().st_size) == 0 or size % 8:
        raise _broken(shard.parent, index.name, f"{size} bytes are no list of 64-bit document ends")
    ends = np.memmap(index, np.uint64, "r")
    if ends[0] == 0 or not all(
        (
            ends[n + 1 : n + 1 + TOKENS_PER_READ]
            > ends[n : n + TOKENS_PER_READ][: len(ends) - n - 1]
        ).all()
        for n in range(0, len(ends), TOKENS_PER_READ)
    ):
        raise _broken(shard.parent, index.name, "the document ends do not increase")
    wanted = int(ends[-1]) * info.token_bytes
    if (size := shard.stat().st_size) != wanted:
        raise _broken(shard.parent, shard.name, f"{size} bytes, the index says {wanted}")
    tokens = np.memmap(shard, np.uint16 if info.token_bytes == 2 else np.uint32, "r")
    sample = np.unique(np.linspace(0, len(ends) - 1, SAMPLED_ENDS).astype(np.int64))
    last = tokens[ends[sample].astype(np.int64) - 1]
    if (wrong := np.flatnonzero(last != info.eos_id)).size:
        where = (
            f"document {sample[wrong[0]]} ends in token {last[wrong[0]]}, not in EOS {info.eos_id}"
        )
        raise _broken(shard.parent, shard.name, where)
    return ends
