"""Engines in separate processes: their output goes to a log, their mistakes to the user."""

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ground.errors import UserError
from ground.processes import PARENT, STOPPED_STATUSES, Stopped, until_saved

CHECKOUT = Path(__file__).parent.parent.parent
LINES_SHOWN = 15


def run_child(
    command: Sequence[str], log: Path, name: str, *,
    lock: int | None = None, environment: dict[str, str] | None = None, shown: str | None = None,
) -> None:  # fmt: skip
    """Run `command` with this checkout's packages importable; its errors are appended to `log`.

    As standard input the descriptor `lock` reaches grandchildren too: torchrun closes all else it
    inherits. Standard output goes to the terminal; where `shown` is given it goes to the log, and
    of that the lines which begin with `shown` to the terminal. Raises UserError with the line that
    a child began with `error: `, else RuntimeError with the end of the log; Stopped where a signal,
    which the child gets too, has ended it.
    """
    with log.open("a") as errors:
        begin = errors.tell()
        process = subprocess.Popen(
            command, stdin=lock, stdout=errors if shown else None, stderr=errors,
            env=child_environment(environment),
        )  # fmt: skip
    with until_saved(process.send_signal):
        try:
            status = process.wait()
        finally:
            process.kill()  # after Ctrl-C; else it has ended
        for line in lines_from(log, begin):
            if shown and line.startswith(shown):
                print(line, flush=True)
        if status not in (0, *STOPPED_STATUSES):
            raise failure(log, begin, name)
    if status:  # a signal to the child alone
        raise Stopped


def child_environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """This process's environment and `more`, with this checkout's packages importable."""
    paths = [str(CHECKOUT), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), PARENT: str(os.getpid())}
    return {**os.environ, **(more or {}), **own}


def lines_from(log: Path, begin: int) -> list[str]:
    """The log's lines from the offset `begin` (bytes) on."""
    with log.open(errors="replace") as file:
        file.seek(begin)
        return file.read().splitlines()


def failure(log: Path, begin: int, name: str) -> Exception:
    """What to raise for a child that failed: a UserError where one of its lines, from the log's
    offset `begin` on, begins with `error: `; else a RuntimeError with the end of the log."""
    lines = lines_from(log, begin)
    for line in lines:
        if found := re.match(r"(?:\[.*\]:? *)?error: (.*)", line):  # torchrun may name the rank
            return UserError(f"{name}: {found[1]}")
    end = "\n".join([*lines[-LINES_SHOWN:], *_causes(lines)[:1]])
    return RuntimeError(f"{name} failed; the end of {log}:\n{end}")


def _causes(lines: Sequence[str]) -> list[str]:
    """The lines that name an exception; after it torchrun only reports that there was one."""
    named = [re.search(r"\b[A-Za-z]+(Error|Exception): .+", line) for line in lines]
    return [f"first: {found[0]}" for found in named if found and "ChildFailed" not in found[0]]
