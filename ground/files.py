"""Files and folders that are whole or absent: written aside, then renamed."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ground.errors import UserError

STOPPED = ".stopped"  # in checkpoints/: the steps that were saved because of a signal


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a hidden sibling of `path` that takes its place on a clean exit and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def open_aside(path: Path) -> Iterator[IO[str]]:
    """A text file to write, on the disk in full before it takes the place of `path`."""
    with written_aside(path) as aside, aside.open("w", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    with open_aside(path) as file:
        file.write(text)


def write_json(path: Path, values: Any, indent: int | None = 1) -> None:
    """JSON that any reader takes: NaN and infinity are refused (ValueError)."""
    write_text(path, json.dumps(values, indent=indent, allow_nan=False) + "\n")


@contextmanager
def folder_aside(folder: Path) -> Iterator[Path]:
    """Yield an empty `<folder>.partial`; it takes the place of `folder` on a clean exit, else vanishes.

    An old `folder` stays until the new one is whole.
    """
    aside, old = (folder.with_name(f"{folder.name}.{end}") for end in ("partial", "old"))
    if old.exists() and not folder.exists():  # killed between the two renames of `replace_folder`
        old.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        replace_folder(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Put a finished folder in the place of `folder`.

    A kill leaves the old or the new: between the two renames the old one as `<folder>.old`.
    """
    old = folder.with_name(f"{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def copy_aside(file: Path, target: Path) -> None:
    """Copy the content, not the mode: some writers close their files to others."""
    with written_aside(target) as aside:
        shutil.copyfile(file, aside)


def read_json(path: Path, remedy: str = "run the stage that writes it with FORCE=1") -> Any:
    """The JSON value in a file. Raises UserError that names the file and `remedy`."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); {remedy}") from None


def read_json_object(path: Path, remedy: str = "run the stage that writes it with FORCE=1") -> Any:
    """As `read_json`, for a file that must hold an object."""
    values = read_json(path, remedy)
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object; {remedy}")
    return values


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, none where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def digest(path: Path, size: int = 8) -> str:
    """Hash of a file's content, `size` bytes in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=size)).hexdigest()


def step_of(path: Path) -> int | None:
    """The step that a checkpoint's folder is named by, `<step>` or `checkpoint-<step>`; else None."""
    match = re.fullmatch(r"(?:checkpoint-)?(\d+)", path.name)
    return int(match[1]) if match else None


def checkpoints(run_folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first: a folder gets its step's name once all is written."""
    steps = {path: step_of(path) for path in (run_folder / "checkpoints").glob("*")}
    named = {path: step for path, step in steps.items() if step is not None}
    return sorted(named, key=named.__getitem__)


def note_stopped(checkpoints: Path, step: int) -> None:
    """Note that a checkpoint is to be saved because of a signal, and may go at the next one."""
    steps = {*_stopped(checkpoints), step}
    write_text(checkpoints / STOPPED, "".join(f"{one}\n" for one in sorted(steps)))


def drop_stopped(checkpoints: Path, step: int) -> None:
    """Once `step` is saved, delete what a signal had saved before: no stage takes the mean of it."""
    if steps := _stopped(checkpoints):
        for one in steps - {step}:
            shutil.rmtree(checkpoints / str(one), ignore_errors=True)
        (checkpoints / STOPPED).unlink()
        if step in steps:
            note_stopped(checkpoints, step)


def _stopped(checkpoints: Path) -> set[int]:
    note = checkpoints / STOPPED
    return {int(line) for line in note.read_text().split()} if note.exists() else set()


def cut_back(metrics: Path, last_step: int) -> None:
    """Drop the lines after `last_step`, which a resumed run writes again, and any cut short."""
    if metrics.exists():
        lines = metrics.read_text("utf-8").splitlines()
        kept = [line for line in lines if 0 <= _step_of_line(line) <= last_step]
        write_text(metrics, "".join(f"{line}\n" for line in kept))


def _step_of_line(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1
