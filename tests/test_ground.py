"""What the engines stand on: files whole or absent, weights checked, one line for a mistake."""

import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ground import errors, files, weights
from ground.errors import UserError

# ---- killed at any moment a writer leaves the old content or the new


def snapshot(folder: Path) -> dict[str, str]:
    """{path below `folder`: text} of every file; a folder without files counts as nothing."""
    return {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()}


def write_folder(target: Path, text: str) -> None:
    with files.folder_aside(target) as aside:
        for name in ("a", "b"):
            (aside / name).write_text(text)


def write_lines(target: Path, text: str) -> None:
    with files.open_aside(target) as file:
        for line in text.splitlines(keepends=True):
            file.write(line)


def copy(target: Path, text: str) -> None:
    source = target.parent.parent / f"source of {len(text)}"
    source.write_text(text)
    files.copy_aside(source, target)


def put_in_place(target: Path, text: str) -> None:
    new = target.parent / "made elsewhere"
    write_folder(new, text)
    files.replace_folder(new, target)


def cut_back(target: Path, text: str) -> None:
    """Metrics of five steps, cut back to the length of `text`."""
    if not target.exists():
        target.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 6)))
    files.cut_back(target, len(text))


# {what writes: (how, what it leaves of a text)}
FOLDER = {"a": "{}", "b": "{}"}
WRITERS: dict[str, Callable[[Path, str], Any]] = {
    "write_text": files.write_text,
    "write_json": lambda target, text: files.write_json(target, {"text": text}),
    "open_aside": write_lines,
    "copy_aside": copy,
    "cut_back": cut_back,
    "folder_aside": write_folder,
    "replace_folder": put_in_place,
}
OLD, NEW = "one\ntwo\n34", "3\n4"
# What Python says before it changes anything on the disk.
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def killed_at(change: int, write: Callable[[], Any]) -> bool:
    """Run `write` in a process that ends at its n-th change of the disk; False where it has fewer."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    left = iter(range(change))

    def kill(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event != "open" or (len(arguments) > 2 and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if event in CHANGES and writes and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    write()
    os._exit(0)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "again"])
def test_a_killed_write_leaves_the_old_or_the_new_and_the_next_one_tidies_up(
    tmp_path: Path, name: str, is_first: bool
) -> None:
    write = WRITERS[name]

    def in_new_folder(place: str) -> Path:
        target = tmp_path / place / "folder" / "target"
        target.parent.mkdir(parents=True)
        if not is_first:
            write(target, OLD)
        return target

    whole = in_new_folder("whole")
    old = snapshot(whole.parent)
    write(whole, NEW)
    new = snapshot(whole.parent)
    assert old != new
    kills = 0
    while killed_at(kills, lambda: write(target, NEW)) if (
        target := in_new_folder(f"killed at {kills}")
    ) else False:
        after = {path: text for path, text in snapshot(target.parent).items()}
        seen = {path: text for path, text in after.items() if path.split("/")[0] == "target"}
        assert seen in (old, new) or set_aside(after) in (old, new), (kills, after)
        write(target, NEW)
        assert snapshot(target.parent) == new, kills
        kills += 1
    assert kills >= 2
