"""Token shards that are not on this disk: read from copies at any fsspec URL, through a folder of the node.

A shard folder whose *.ds files are elsewhere keeps its small files and copies.json, the folders that
hold the same files (s3://..., gs://..., https://..., file://...), in the order in which they are asked.
The mixture draws windows from all over a shard, so what is fetched at the first need is a block of 64
MiB, which has a hash in blocks.json, not the whole file. A block that fails at one copy, or is not what
was written, is taken from the next. Processes of a node share its blocks; when the folder is full,
those that were not read for the longest time go.
"""

import hashlib
import os
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from ground.checksums import FILE as SEAL
from ground.checksums import verify
from ground.errors import Outage, UserError, first_line
from ground.files import folder_aside, read_json_object, write_json, written_aside

COPIES_FILE, BLOCKS_FILE, BLOCK_BYTES = "copies.json", "blocks.json", 64 << 20
PUSH = "push the shards again (`make push-shards`)"
# Seconds before each round over the copies; a bucket may be out of reach for some minutes.
PAUSES = (0, 5, 30, 120)
DEFAULT_FOLDER, DEFAULT_GB = Path(tempfile.gettempdir(), "smollm3-shards"), 100
LOCKS = 64
LEFT_OVER_SECONDS = 3600  # after which a file that is still being written belongs to no process


class Tokens(Protocol):
    """A run of tokens: mapped into memory, or fetched when it is read."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> NDArray[Any]: ...


@dataclass
class NodeCache:
    """A folder of blocks, of at most `limit_bytes`, that the node's processes share."""

    folder: Path = DEFAULT_FOLDER
    limit_bytes: int = DEFAULT_GB * 10**9
    _checked: set[Path] = field(default_factory=set)  # by this process
    _said: set[str] = field(default_factory=set)

    def read(self, block: "Block", start: int, count: int) -> NDArray[Any]:
        """Tokens [count] of a block, fetched where it is not there."""
        try:
            return self._read(self.folder / block.name, block, start, count)
        except OSError as error:
            what = (error.strerror or first_line(error)).lower()
            line = f"NODE_CACHE={self.folder}: {error.filename or self.folder}: {what}"
            raise UserError(f"{line}; name a folder that can be written to") from error

    def _read(self, path: Path, block: "Block", start: int, count: int) -> NDArray[Any]:
        while True:
            try:
                if path not in self._checked:
                    self._check(path, block)
                os.utime(path)  # what is read stays
                return np.fromfile(path, block.dtype, count, offset=start * block.dtype.itemsize)
            except FileNotFoundError:
                if path in self._checked:
                    self._say(
                        f"{self.folder}: {self.limit_bytes / 1e9:.0f} GB do not hold what is drawn, "
                        "and blocks are fetched again: raise NODE_CACHE_GB"
                    )
                if data := self._fetch(path, block):  # before another process needs the room
                    return np.frombuffer(data, block.dtype, count, start * block.dtype.itemsize)

    def _check(self, path: Path, block: "Block") -> None:
        """A disk that was full or lost its power can hold other bytes than were renamed."""
        if block_hash(path.read_bytes()) != block.digest:
            path.unlink(missing_ok=True)
            raise FileNotFoundError(path)
        self._checked.add(path)

    def _fetch(self, path: Path, block: "Block") -> bytes | None:
        """Put a block into the folder; None where another process has done so meanwhile."""
        with self._lock(f"{zlib.crc32(block.name.encode()) % LOCKS:02}"):
            if path.exists():
                return None
            for left_over in path.parent.glob(f".{path.name}.*"):
                left_over.unlink(missing_ok=True)
            data = self._download(block)
            with self._lock("room"):
                self._make_room(len(data))
                with written_aside(path) as aside:
                    aside.write_bytes(data)
            self._checked.add(path)
            return data

    def _lock(self, name: str) -> FileLock:
        folder = self.folder / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / name)

    def _make_room(self, size: int) -> None:
        if size > self.limit_bytes:
            raise UserError(
                f"NODE_CACHE_GB={self.limit_bytes / 1e9:g}: less than a block ({size:,} bytes); "
                "raise it"
            )
        files = list(_by_last_use(self.folder))
        excess = sum(bytes_ for _, bytes_, _ in files) + size - self.limit_bytes
        for _, bytes_, file in files:
            if excess <= 0:
                return
            file.unlink(missing_ok=True)
            excess -= bytes_

    def _download(self, block: "Block") -> bytes:
        problems: dict[str, str] = {}
        for pause in PAUSES:
            time.sleep(pause)
            is_lasting = True
            for url in block.copies:
                try:
                    data = read_range(f"{url}/{block.file}", block.start, block.stop)
                    if block_hash(data) == block.digest:
                        return data
                    problems[url] = (
                        f"{block.file}: bytes from {block.start:,} are not what was written"
                    )
                except Exception as error:  # any error of network, store or library
                    kinds = (FileNotFoundError, PermissionError, ImportError, ValueError)
                    is_lasting &= isinstance(error, kinds)
                    problems[url] = f"{block.file}: {type(error).__name__}: {first_line(error)}"
                self._say(f"{url}: {problems[url]}; other copies are tried")
            if is_lasting:
                break
        line = "; ".join(f"{url}: {problem}" for url, problem in problems.items())
        raise (UserError if is_lasting else Outage)(
            f"source {source_of(block.folder)}: no copy gives a block: {line}: {PUSH}"
        )

    def _say(self, line: str) -> None:
        """Once a process and place."""
        place = line.partition(": ")[0]
        if place not in self._said:
            self._said.add(place)
            print(line, flush=True)


@dataclass(frozen=True)
class Block:
    """The tokens of one block of a shard that is elsewhere."""

    cache: NodeCache
    copies: tuple[str, ...]  # URLs of folders
    folder: str  # the shard folder's name
    file: str
    start: int  # bytes
    stop: int
    digest: str
    dtype: np.dtype[Any]

    @property
    def name(self) -> str:
        return f"{self.folder}/{self.file}.{self.start // BLOCK_BYTES:05}"

    def __len__(self) -> int:
        return (self.stop - self.start) // self.dtype.itemsize

    def __getitem__(self, part: slice) -> NDArray[Any]:
        start, stop, _ = part.indices(len(self))
        return self.cache.read(self, start, stop - start)


def open_shards(folder: Path, token_bytes: int, cache: NodeCache | None = None) -> list[Tokens]:
    """The tokens of a folder's shards in order: files here are mapped, others read by blocks."""
    cache, names = cache or NodeCache(), {file.name for file in folder.glob("*.ds")}
    if copies_of(folder):
        names |= {file.stem for file in folder.glob("*.ds.index")}
    return [part for name in sorted(names) for part in open_shard(folder, name, token_bytes, cache)]


def open_shard(folder: Path, name: str, token_bytes: int, cache: NodeCache) -> list[Tokens]:
    """The tokens of one shard: mapped in one piece, or in blocks."""
    dtype = np.dtype(f"u{token_bytes}")
    if (folder / name).is_file():
        return [np.memmap(folder / name, dtype, "r")]
    return list(_blocks(folder, name, dtype, copies_of(folder), cache))


def _blocks(
    folder: Path, name: str, dtype: np.dtype[Any], copies: Sequence[str], cache: NodeCache
) -> Iterator[Block]:
    # The last document's end is the shard's.
    size = int(np.memmap(folder / f"{name}.index", np.uint64, "r")[-1]) * dtype.itemsize
    digests = read_json_object(folder / BLOCKS_FILE, PUSH)[name]
    for start, digest in zip(range(0, size, BLOCK_BYTES), digests, strict=True):
        stop = min(start + BLOCK_BYTES, size)
        yield Block(cache, tuple(copies), folder.name, name, start, stop, digest, dtype)


def block_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def source_of(folder: str) -> str:
    """The source whose shard folder has this name."""
    return folder.removesuffix(".partial").rpartition("-")[0]


def copies_of(folder: Path) -> list[str]:
    """URLs of the folders that hold the same files."""
    file = folder / COPIES_FILE
    return list(read_json_object(file, PUSH)["copies"]) if file.exists() else []


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file."""
    from fsspec.core import url_to_fs

    store, path = url_to_fs(url)
    data = bytes(store.cat_file(path, start=start, end=stop))
    # A web server that knows no ranges sends it all.
    return data if len(data) <= stop - start else data[start:stop]


def push(folder: Path, url: str) -> int:
    """Copy a sealed shard folder to `<url>/<its name>`, its seal last; returns the bytes that were sent.

    What is there in its size is not sent again. Raises UserError, naming the URL.
    """
    from fsspec.core import url_to_fs

    target, sent, copies = f"{url.rstrip('/')}/{folder.name}", 0, copies_of(folder)
    names = [file.name for file in folder.iterdir() if file.name not in (COPIES_FILE, SEAL)]
    if not {*read_json_object(folder / BLOCKS_FILE, "make the shards again")} <= {*names}:
        if target in copies:
            return 0
        raise UserError(
            f"{folder}: its tokens are at {copies} alone; copy them with the store's tool"
        )
    try:
        store, path = url_to_fs(target)
        store.makedirs(path, exist_ok=True)
        there = {Path(one["name"]).name: one["size"] for one in store.ls(path, detail=True)}
        for name in (*sorted(names), SEAL):
            size = (folder / name).stat().st_size
            if there.get(name) != size or name.endswith(".json"):
                store.put_file(str(folder / name), f"{path}/{name}")
                sent += size
    except Exception as error:  # any error of network, store or library
        raise _refused(target, error, "give a URL that can be written to") from error
    write_json(folder / COPIES_FILE, {"copies": list(dict.fromkeys([*copies, target]))})
    return sent


def is_kept(name: str, urls: Sequence[str]) -> bool:
    """Whether a shard folder of this name is at one of the URLs."""
    return bool(_kept(name, urls))


def pull(folder: Path, urls: Sequence[str]) -> bool:
    """Make a shard folder of the small files that one of `urls` has of it, if one has; *.ds stay there."""
    from fsspec.core import url_to_fs

    if folder.exists() or not (copies := _kept(folder.name, urls)):
        return False
    store, path = url_to_fs(copies[0])
    with folder_aside(folder) as aside:
        try:
            for one in store.ls(path, detail=False):
                if not one.endswith(".ds"):
                    store.get_file(one, str(aside / Path(one).name))
        except Exception as error:  # any error of network, store or library
            raise _refused(copies[0], error, "try again") from error
        verify(aside, f"{copies[0]}: {PUSH}")
        write_json(aside / COPIES_FILE, {"copies": copies})
    return True


def _kept(name: str, urls: Sequence[str]) -> list[str]:
    from fsspec.core import url_to_fs

    kept = []
    for url in urls:
        target = f"{url.rstrip('/')}/{name}"
        try:
            store, path = url_to_fs(target)
            kept += [target] * bool(store.exists(f"{path}/{SEAL}"))
        except Exception as error:  # any error of network, store or library
            raise _refused(url, error, "correct SHARDS") from error
    return kept


def _refused(url: str, error: Exception, remedy: str) -> UserError:
    return UserError(f"SHARDS: {url}: {type(error).__name__}: {first_line(error)}; {remedy}")


def _by_last_use(folder: Path) -> list[tuple[float, int, Path]]:
    """(time, bytes, file) of all blocks, and of what killed processes have left, oldest first."""
    files = []
    for file in folder.glob("[!.]*/*"):
        try:
            status = file.stat()
        except FileNotFoundError:
            continue
        if not file.name.startswith(".") or time.time() - status.st_mtime > LEFT_OVER_SECONDS:
            files.append((status.st_mtime, status.st_size, file))
    return sorted(files)
