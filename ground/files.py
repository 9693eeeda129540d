"""Files and folders that are whole or absent: written aside, then renamed."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ground.errors import UserError

STOPPED = ".stopped"  # in checkpoints/: the steps that were saved because of a signal
AGAIN = "run the stage that writes it with FORCE=1"


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a hidden sibling of `path` that takes its place on a clean exit and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        aside.replace(path)
    except OSError as error:
        if error.errno and not error.filename:  # a write does not say which file
            error.filename = str(path)
        raise
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
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(folder)
        raise
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


def read_json(path: Path, remedy: str = AGAIN) -> Any:
    """The JSON value in a file. Raises UserError that names the file and `remedy`."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); {remedy}") from None


def read_json_object(path: Path, remedy: str = AGAIN) -> Any:
    """As `read_json`, for a file that must hold an object."""
    values = read_json(path, remedy)
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object; {remedy}")
    return values


CHECKSUM = "checksum"


def write_record(path: Path, values: Mapping[str, Any]) -> None:
    """A JSON object with its own checksum, which `read_record` takes only as it was written."""
    write_json(path, {**values, CHECKSUM: _checksum(values)})


def read_record(path: Path, remedy: str = AGAIN) -> dict[str, Any]:
    """As `read_json_object`; a file that was changed, or has no checksum, is refused too."""
    values: dict[str, Any] = read_json_object(path, remedy)
    if values.pop(CHECKSUM, None) != _checksum(values):
        raise UserError(f"{path}: not as it was written (its checksum differs); {remedy}")
    return values


def kept_record(path: Path) -> dict[str, Any] | None:
    """A record that can be made again: None where it is missing, or damaged, which is said."""
    try:
        return read_record(path, "made again") if path.exists() else None
    except UserError as error:
        print(error, flush=True)
        return None


def _checksum(values: Mapping[str, Any]) -> str:
    # As they are read again: a number that is a key comes back as text.
    text = json.dumps(json.loads(json.dumps(values)), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def read_json_lines(path: Path, remedy: str = AGAIN, key: str = "") -> list[dict[str, Any]]:
    """The objects of a .jsonl file, none where there is no file. UserError for any other line, and
    for one without `key`."""
    rows = list[dict[str, Any]]()
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if not isinstance(row := json.loads(line), dict):
                    raise ValueError("not a JSON object")
                if key and key not in row:
                    raise ValueError(f"no {key}")
                rows.append(row)
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UserError(f"{path}: line {len(rows) + 1}: damaged ({error}); {remedy}") from None
    return rows


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


def cut_back(metrics: Path, last_step: int, copies: Iterable[Path] = ()) -> None:
    """Drop the lines after `last_step`, which a resumed run writes again, and any cut short.

    `copies` are the lines that checkpoints keep, each of its own steps: what is damaged or missing in
    `metrics` is taken from them. That, and what no copy has, is said.
    """
    text = metrics.read_text("utf-8", "replace") if metrics.exists() else ""
    steps = [(_step_of_line(line), line) for line in text.splitlines()]
    lost = sum(step < 0 for step, _ in steps[:-1])  # a kill may have cut the last one short
    found = {step: line for step, line in steps if 0 <= step <= last_step}
    lines = dict(found)
    for copy in copies:
        own = {_step_of_line(line): line for line in copy.read_text("utf-8").splitlines()}
        for step in range(min(own), max(own) + 1) if own else ():
            lines.pop(step, None)
        lines |= own
    mended = sum(lines.get(step) != found.get(step) for step in {*lines, *found})
    if mended or lost:
        print(f"{metrics}: damaged: {mended} lines are taken from the checkpoints", flush=True)
    if text or lines:
        write_text(metrics, "".join(f"{lines[step]}\n" for step in sorted(lines)))


def _step_of_line(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1
