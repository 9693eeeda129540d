"""A folder's seal: checksums.json, its last file, with the SHA-256 and size of each of the others.

    {"files": {"model.safetensors": {"sha256": "9f...", "bytes": 1234}}, "step": null, "sha256": "..."}

`step` is that of a checkpoint, the last `sha256` the seal's own. A folder that we write is whole once
it is sealed; one from elsewhere has no seal and is taken as it is. One core of an AMD EPYC hashes
1.46 GB a second.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from ground.errors import UserError
from ground.files import checkpoints, drop_stopped, step_of, write_json

FILE = "checksums.json"
Piece = TypeVar("Piece")
Result = TypeVar("Result")
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
    names = _files(folder)  # the shares are hidden
    shares = [folder / f".{FILE}.{number}" for number in range(ranks)]
    mine = {name: asdict(each) for name, each in _sums(folder, names[rank::ranks]).items()}
    write_json(shares[rank], mine, indent=None)
    barrier()
    if rank == 0:
        sums: dict[str, Sum] = {}
        for share in shares:
            sums |= {name: Sum(**each) for name, each in json.loads(share.read_text()).items()}
            share.unlink()
        # Over a network file system a process may have listed the folder as it was before.
        sums |= _sums(folder, {*_files(folder)} - {*sums})
        _write(folder, dict(sorted(sums.items())))


def verify_if_sealed(folder: Path, remedy: str = AGAIN) -> None:
    """`verify` for a folder that may be from elsewhere, without a seal."""
    if (folder / FILE).exists():
        verify(folder, remedy)


def verify(folder: Path, remedy: str = AGAIN) -> None:
    """Raise Damaged, with the file's name, where one is missing or not as it was sealed."""
    sums = _read(folder, remedy)
    if problem := _size_problem(folder, sums):
        raise Damaged(f"{problem}; {remedy}")
    for name, now in _sums(folder, sums).items():
        if now != sums[name]:
            raise Damaged(f"{folder / name}: its content is not what was written; {remedy}")


def intact(folders: Iterable[Path], name: str) -> list[Path]:
    """The files of that name in sealed folders, without those that are not as they were sealed."""
    files = []
    for folder in folders:
        with suppress(Damaged, OSError):
            if _read(folder, "").get(name) == _sum(folder / name):
                files.append(folder / name)
    return files


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
    names = list(names)
    return dict(zip(names, side_by_side(_sum, [folder / name for name in names]), strict=True))


def side_by_side(hashed: Callable[[Piece], Result], pieces: Iterable[Piece]) -> list[Result]:
    """`hashed` of each piece, in threads: hashlib lets others run while it hashes."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(hashed, pieces))


def _sum(file: Path) -> Sum:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        return Sum(digest, os.fstat(opened.fileno()).st_size)


def _own_sum(values: dict[str, Any]) -> str:
    text = json.dumps({key: values[key] for key in ("files", "step")}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _write(folder: Path, sums: dict[str, Sum]) -> None:
    values = {"files": {k: asdict(each) for k, each in sums.items()}, "step": step_of(folder)}
    write_json(folder / FILE, values | {"sha256": _own_sum(values)})


def _read(folder: Path, remedy: str) -> dict[str, Sum]:
    """The sealed files. Raises Damaged for a seal that is missing, damaged or of another step."""
    file = folder / FILE
    try:
        values = json.loads(file.read_text("utf-8"))
        if not values["files"] or values["sha256"] != _own_sum(values):
            raise ValueError("its own checksum differs")
        step = step_of(folder)
        if None in (step, values["step"]) or step == values["step"]:
            return {name: Sum(**each) for name, each in values["files"].items()}
        problem = f"the folder is the checkpoint of step {values['step']}"
    except (FileNotFoundError, NotADirectoryError):
        problem = "no such file, so the folder is not whole"
    except (ValueError, KeyError, TypeError) as error:
        problem = f"damaged ({type(error).__name__}: {error})"
    raise Damaged(f"{file}: {problem}; {remedy}")


def whole_checkpoints(run_folder: Path, name: str, again: str) -> list[Path]:
    """A run's checkpoints up to its last whole one, oldest first; those before it are not read.

    Damaged ones after it are named and set aside as `<step>.damaged`. What a signal saved before it
    goes: a kill may have come between the save and that. `again` is the remedy where there are some
    and none is whole: Damaged.
    """
    saved, problems = checkpoints(run_folder), list[str]()
    while saved:
        try:
            verify(saved[-1], "")
            break
        except Damaged as error:
            problems.append(str(error).removesuffix("; "))
            saved.pop()
    if problems and not saved:
        raise Damaged(f"{problems[0]}; no checkpoint before it is whole: {again}")
    for folder, problem in zip(reversed(checkpoints(run_folder)), problems, strict=False):
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        print(f"{name}: {problem}; set aside as {aside}, goes on from {saved[-1]}", flush=True)
    if saved:
        drop_stopped(run_folder / "checkpoints", int(saved[-1].name))
    return checkpoints(run_folder)
