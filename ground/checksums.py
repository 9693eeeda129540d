"""A folder's seal: checksums.json, its last file, with the SHA-256 and size of each of the others.

    {"files": {"model.safetensors": {"sha256": "9f...", "bytes": 1234}}, "sha256": "of `files`"}

A folder that we write is whole once it is sealed; one from elsewhere has no seal and is taken as it is.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from ground.errors import UserError
from ground.files import write_json

FILE = "checksums.json"
AGAIN = "write the folder again"


class Damaged(UserError):
    """A file is not what was written into its folder, or the folder was never finished."""


@dataclass(frozen=True)
class Sum:
    sha256: str
    bytes: int


def seal(folder: Path, files: Iterable[str | Path] | None = None) -> None:
    """Write checksums.json over `files`, names below `folder`; by default over all of its files."""
    names = _files(folder) if files is None else sorted(str(file) for file in files)
    _write(folder, _sums(folder, names))


def seal_together(folder: Path, rank: int, ranks: int, barrier: Callable[[], None]) -> None:
    """`seal`, of which each of `ranks` processes on one file system hashes its share.

    On return of rank 0 the folder is sealed; the others may return before that.
    """
    names = _files(folder)
    barrier()  # all have listed the files before the first share is one of them
    shares = [folder / f".{FILE}.{number}" for number in range(ranks)]
    mine = {name: asdict(each) for name, each in _sums(folder, names[rank::ranks]).items()}
    write_json(shares[rank], mine, indent=None)
    barrier()
    if rank == 0:
        sums: dict[str, Sum] = {}
        for share in shares:
            sums |= {name: Sum(**each) for name, each in json.loads(share.read_text()).items()}
            share.unlink()
        _write(folder, dict(sorted(sums.items())))


def is_sealed(folder: Path) -> bool:
    return (folder / FILE).is_file()


def verify(folder: Path, remedy: str = AGAIN, most_bytes: int | None = None) -> None:
    """Raise Damaged, with the file's name, where one is missing or not as it was sealed.

    With `most_bytes` not more than that is read, of whole files drawn afresh at each call; sizes are
    those of all files.
    """
    sums = _read(folder, remedy)
    if problem := _size_problem(folder, sums):
        raise Damaged(f"{problem}; {remedy}")
    names, left = list(sums), most_bytes
    if left is not None and sum(each.bytes for each in sums.values()) > left:
        random.SystemRandom().shuffle(names)
        drawn = []
        for name in names:
            if sums[name].bytes <= left:
                drawn.append(name)
                left -= sums[name].bytes
        names = drawn
    for name, now in _sums(folder, names).items():
        if now != sums[name]:
            raise Damaged(f"{folder / name}: its content is not what was written; {remedy}")


def sizes_differ(folder: Path) -> str | None:
    """What is wrong with a sealed folder, found without reading its files; None: nothing.

    Cheap: the seal itself is read, of each file the size.
    """
    try:
        return _size_problem(folder, _read(folder, ""))
    except Damaged as error:
        return str(error).removesuffix("; ")


def _size_problem(folder: Path, sums: dict[str, Sum]) -> str | None:
    for name, each in sums.items():
        file = folder / name
        if not file.is_file():
            return f"{file}: no such file"
        if (size := file.stat().st_size) != each.bytes:
            return f"{file}: {size} bytes, {each.bytes} were written"
    return None


def _files(folder: Path) -> list[str]:
    """All files below a folder that are not hidden, except the seal."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder) for path in paths)
    return sorted(
        str(name)
        for name in names
        if name != Path(FILE) and not any(part.startswith(".") for part in name.parts)
    )


def _sums(folder: Path, names: Iterable[str]) -> dict[str, Sum]:
    """In parallel: hashlib lets other threads run while it hashes."""
    names = list(names)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: _sum(folder / name), names), strict=True))


def _sum(file: Path) -> Sum:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        return Sum(digest, os.fstat(opened.fileno()).st_size)


def _own_sum(files: object) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _write(folder: Path, sums: dict[str, Sum]) -> None:
    files = {name: asdict(each) for name, each in sums.items()}
    write_json(folder / FILE, {"files": files, "sha256": _own_sum(files)})


def _read(folder: Path, remedy: str) -> dict[str, Sum]:
    """The sealed files. Raises Damaged for a seal that is missing or not as it was written."""
    file = folder / FILE
    try:
        values = json.loads(file.read_text("utf-8"))
        files = values["files"]
        if not files or values["sha256"] != _own_sum(files):
            raise ValueError("its own checksum differs")
        return {name: Sum(**each) for name, each in files.items()}
    except (FileNotFoundError, NotADirectoryError):
        problem = "no such file, so the folder is not whole"
    except (ValueError, KeyError, TypeError) as error:
        problem = f"damaged ({type(error).__name__}: {error})".replace("\n", " ")
    raise Damaged(f"{file}: {problem}; {remedy}")
