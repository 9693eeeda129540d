"""What a source has on disk: one folder, shared by all runs.

    <cache>/shards/<name>-<hash>/   00000.ds (tokens)  00000.ds.index (document ends, uint64)  ...
                                    00000.ds.rows (each document's row of its file, uint32)
                                    info.json (sums, and what each unit is of which file)
                                    blocks.json (hashes of each .ds)  checksums.json (of the rest)

The hash covers everything that the tokens depend on. Tokens are hashed in blocks: at the published
size they are too many to be read at each start, and any part of them can be checked.
"""

import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from datatrove_pipelines.sources import HubSplit, OwnText, SourceJob, errors_name
from datatrove_pipelines.text_files import fingerprint
from ground.checksums import seal, side_by_side, sizes_differ, verify
from ground.errors import UserError
from ground.files import digest, read_json_object, write_json
from ground.storage import BLOCK_BYTES, BLOCKS_FILE, Tokens, block_hash, copies_of, source_of

INFO_FILE, UNIT_FILE = "info.json", "unit.json"
REBUILD = "delete the folder and run `make data-stage1` again"
SAMPLED_ENDS = 1000
# What decides, beside the row, which documents cleaning keeps. The first number is raised with each
# change of the code or the constants of a step.
CLEANING_RULE = (1, digest(Path(__file__).with_name("cleaning") / "thresholds.yaml", 8))
ROW_BYTES = 4
TOKENS_PER_READ = 1 << 22
# A stage's shards are read in full at each start up to this size, a minute of one core; of larger
# ones so many bytes, in blocks drawn afresh at each start.
MOST_BYTES_READ = 64 << 30


@dataclass(frozen=True)
class UnitInfo:
    """A unit of the source's files, and what its shard holds; without documents it has no shard."""

    number: int  # the shard is f"{number:05}.ds"
    file: str
    start: float
    stop: float
    tokens: int
    documents: int
    bytes: int
    left_out: dict[str, int]
    read: int = 0  # documents, before any was left out; older shards do not have it
    changed: dict[str, int] = field(default_factory=dict)  # by step of cleaning


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
    # Documents that were read and not written, by reason; older shards do not have it.
    left_out: dict[str, int] = field(default_factory=dict)
    read: int = 0
    changed: dict[str, int] = field(default_factory=dict)
    units: list[UnitInfo] = field(default_factory=list)
    decontaminated: str = ""  # hash of the evaluation's texts that no document holds an item of


def shard_folder(job: SourceJob, tokenizer: Path, cache: Path) -> Path:
    """`<cache>/shards/<name>-<hash>`: the hash covers every value that the tokens depend on."""
    from importlib.metadata import version

    with errors_name(job.name):
        values = {
            "name": job.name,
            "read": _identity(job, cache),
            "slice": [float(end) for end in job.slice],  # 0 and 0.0 are one value
            "held_out_fraction": float(job.held_out_fraction),
            "seed": job.seed,
            "tokenizer": content_hash(tokenizer / "tokenizer.json"),
            "datatrove": version("datatrove"),
            **({"least_tokens": job.least_tokens} if job.least_tokens else {}),
            **_cleaning(job, cache),
            **_decontamination(job),
        }
    name = hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=6).hexdigest()
    return cache / "shards" / f"{job.name.replace('/', '--')}-{name}"


def _decontamination(job: SourceJob) -> dict[str, Any]:
    if job.decontaminate is None:
        return {}
    from datatrove_pipelines.decontaminate import RULE

    texts = content_hash(job.decontaminate)
    return {"decontaminate": {"texts": texts, "rule": RULE, "only_report": job.only_report}}


# Of a split, added later: shards that have none of it keep their names.
SINCE = ("portion", "tokens", "contents", "file_language", "messages")


def _identity(job: SourceJob, cache: Path) -> dict[str, Any]:
    """The values that define a source's documents, independent of their path."""
    read = job.read
    if isinstance(read, HubSplit):
        if not read.revision:
            raise UserError(
                f"{read.hub_id} has no revision, so a change upstream would go unseen: pin one in "
                "recipes/sources.yaml"
            )
        values = {k: v for k, v in asdict(read).items() if k not in SINCE or v is not None}
        return {"kind": "hub"} | values
    if isinstance(read, OwnText):
        files = fingerprint(read.path, cache)
        return {"kind": "text", "files": files, "text_field": read.text_field}
    fields = {} if read.text_field == "text" else {"text_field": read.text_field}
    return {"kind": "jsonl", "path": content_hash(read.path)} | fields


def _cleaning(job: SourceJob, cache: Path) -> dict[str, Any]:
    """What cleaning makes of the documents; nothing where there is none."""
    if not job.clean:
        return {}
    files = {"quality_model": job.quality_model, "language_model": job.language_model}
    return {
        "clean": sorted(job.clean),
        "rule": CLEANING_RULE,
        "language": job.language,
        "earlier": [documents_hash(one, cache) for one in job.earlier],
        **{key: content_hash(file) for key, file in files.items() if file},
    }


def documents_hash(job: SourceJob, cache: Path) -> str:
    """What the documents of a source depend on, in their order, before any is held out."""
    from importlib.metadata import version

    values: dict[str, Any] = {"name": job.name, "read": _identity(job, cache)}
    values["datatrove"] = version("datatrove")
    if isinstance(job.read, HubSplit):  # whose files have a seeded order
        values["seed"] = job.seed
    text = json.dumps(values | _cleaning(job, cache), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def content_hash(path: Path) -> str:
    """The content hash of a file, computed once per process for the same size and time."""
    try:
        status = path.stat()
    except OSError as error:
        remedy = "run the stage that writes it, or correct the path"
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    return _content_hash(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _content_hash(path: Path, size_bytes: int, modified_ns: int) -> str:
    return digest(path, 16)


def write_info(info: ShardInfo) -> None:
    values = asdict(info)
    del values["folder"]
    write_json(info.folder / INFO_FILE, values)


def seal_shards(folder: Path) -> None:
    """Write blocks.json and, last, checksums.json: a folder without it is not whole."""
    shards = sorted(folder.glob("*.ds"))
    hashes = {shard.name: side_by_side(_block_hash, _blocks(shard)) for shard in shards}
    write_json(folder / BLOCKS_FILE, hashes, indent=None)
    seal(folder, [f.name for end in ("json", "index", "rows") for f in folder.glob(f"*.{end}")])


def has_its_files(folder: Path, unit: UnitInfo) -> bool:
    """Whether the shard of a unit has the sizes that the unit says."""
    if not unit.documents:
        return True
    shard = f"{unit.number:05}.ds"
    size, ends, rows = (
        (folder / f"{shard}{end}").stat().st_size for end in ("", ".index", ".rows")
    )
    return size // unit.tokens in (2, 4) and (ends, rows) == (
        8 * unit.documents,
        4 * unit.documents,
    )


def is_whole(folder: Path) -> bool:
    """Whether all files are there in the size that they were written in; tokens may be elsewhere."""
    if sizes_differ(folder):
        return False
    info = read_info(folder)
    if copies_of(folder):
        return bool(list(folder.glob("*.rows")))
    sizes = {end: sum(f.stat().st_size for f in folder.glob(f"*.{end}")) for end in ("ds", "rows")}
    return sizes == {"ds": info.tokens * info.token_bytes, "rows": info.documents * ROW_BYTES}


def verify_shards(folders: Iterable[Path]) -> None:
    """Refuse a stage's shards of which a block that is read, or another file, is not as written."""
    blocks = []
    for folder in folders:
        with errors_name(source_of(folder.name)):
            verify(folder, REBUILD)
        for name, hashes in read_json_object(folder / BLOCKS_FILE, REBUILD).items():
            if _is_elsewhere(folder / name):  # its blocks are checked when they are fetched
                continue
            blocks += list(zip(_blocks(folder / name), hashes, strict=True))
    if len(blocks) > (most := MOST_BYTES_READ // BLOCK_BYTES):
        blocks = random.SystemRandom().sample(blocks, most)
    now = side_by_side(_block_hash, (block for block, _ in blocks))
    for ((shard, start), then), hashed in zip(blocks, now, strict=True):
        if hashed != then:
            where = f"bytes {start:,} to {start + BLOCK_BYTES:,} are not what was written"
            raise _broken(shard.parent, shard.name, where)


def _blocks(shard: Path) -> list[tuple[Path, int]]:
    """(file, first byte) of each block."""
    return [(shard, start) for start in range(0, shard.stat().st_size, BLOCK_BYTES)]


def _block_hash(block: tuple[Path, int]) -> str:
    shard, start = block
    with shard.open("rb") as file:
        file.seek(start)
        return block_hash(file.read(BLOCK_BYTES))


def _is_elsewhere(shard: Path) -> bool:
    return not shard.is_file() and bool(copies_of(shard.parent))


def read_info(folder: Path) -> ShardInfo:
    with errors_name(source_of(folder.name)):
        values = read_json_object(folder / INFO_FILE, REBUILD)
    try:
        units = [UnitInfo(**unit) for unit in values.pop("units", [])]
        return ShardInfo(folder=folder, units=units, **values)
    except TypeError as error:
        raise _broken(folder, INFO_FILE, f"unreadable ({error})") from error


def check_shards(folder: Path, eos_id: int) -> ShardInfo:
    """Check the structure of a shard folder, cheaply at any size: no token file is read in full."""
    info = read_info(folder)
    if info.eos_id != eos_id:
        raise _broken(folder, INFO_FILE, f"the EOS id is {info.eos_id}, wanted {eos_id}")
    # Both suffixes, so that a missing file of a pair is noticed.
    names = {path.name.removesuffix(".index") for path in folder.glob("*.ds*")}
    tokens = documents = 0
    for shard in sorted(folder / name for name in names if name.endswith(".ds")):
        ends = _check_index(shard, info)
        tokens, documents = tokens + int(ends[-1]), documents + len(ends)
    if (tokens, documents) != (info.tokens, info.documents):
        expected = f"{INFO_FILE} says {info.tokens} in {info.documents}"
        raise _broken(folder, "*.ds", f"{tokens} tokens in {documents} documents, {expected}")
    return info


def read_tokens(shard: Path, token_bytes: int) -> Any:
    """The tokens of one .ds file, mapped into memory."""
    import numpy as np

    return np.memmap(shard, f"u{token_bytes}", "r")


def count_token(shard: Path, token: int, token_bytes: int) -> int:
    tokens = read_tokens(shard, token_bytes)
    starts = range(0, len(tokens), TOKENS_PER_READ)
    return sum(int((tokens[n : n + TOKENS_PER_READ] == token).sum()) for n in starts)


def token_counts(tokens: Tokens, vocab_size: int) -> Any:
    """How often each token occurs [V]; a block at a time, since numpy counts in
    8 bytes a token."""
    import numpy as np

    counts = np.zeros(vocab_size, np.int64)
    for n in range(0, len(tokens), TOKENS_PER_READ):
        counts += np.bincount(tokens[n : n + TOKENS_PER_READ], minlength=vocab_size)
    return counts


def _broken(folder: Path, file: str, what: str) -> UserError:
    return UserError(f"source {source_of(folder.name)}: {folder / file}: {what}; {REBUILD}")


def _check_index(shard: Path, info: ShardInfo) -> Any:
    """The document ends of one .ds file (in tokens), after checking them against the file."""
    import numpy as np

    index = shard.with_name(shard.name + ".index")
    is_elsewhere = _is_elsewhere(shard)
    for path in (index,) if is_elsewhere else (shard, index):
        if not path.is_file():
            raise _broken(shard.parent, path.name, "the file is missing")
    if (size := index.stat().st_size) == 0 or size % 8:
        raise _broken(shard.parent, index.name, f"{size} bytes are no list of 64-bit document ends")
    ends = np.memmap(index, np.uint64, "r")
    if ends[0] == 0 or not all(
        (np.diff(ends[n : n + TOKENS_PER_READ + 1].astype(np.int64)) > 0).all()
        for n in range(0, len(ends), TOKENS_PER_READ)
    ):
        raise _broken(shard.parent, index.name, "the document ends do not increase")
    if is_elsewhere:
        return ends
    size_bytes = int(ends[-1]) * info.token_bytes
    if (size := shard.stat().st_size) != size_bytes:
        raise _broken(shard.parent, shard.name, f"{size} bytes, the index says {size_bytes}")
    sample = np.unique(np.linspace(0, len(ends) - 1, SAMPLED_ENDS).astype(np.int64))
    last = read_tokens(shard, info.token_bytes)[ends[sample].astype(np.int64) - 1]
    if (wrong := np.flatnonzero(last != info.eos_id)).size:
        where = f"document {sample[wrong[0]]} ends in token {last[wrong[0]]}"
        raise _broken(shard.parent, shard.name, f"{where}, not in EOS {info.eos_id}")
    return ends
