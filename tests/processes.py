"""Processes of a test, found in /proc: workers in sessions of their own included."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def is_alive(pid: int) -> bool:
    """Whether the process still holds files; one that only its parent remembers does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def working_in(folder: Path) -> list[int]:
    """Every other process whose working directory is the folder."""
    place = folder.resolve()
    return list(_found(lambda entry: (entry / "cwd").resolve() == place))


def called_with(word: str) -> list[int]:
    """Every other process that has this word on its command line."""
    return list(_found(lambda entry: word in (entry / "cmdline").read_text().split("\0")))


def _found(is_wanted: Callable[[Path], bool]) -> Iterator[int]:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int(entry.name) != os.getpid() and is_wanted(entry):
                yield int(entry.name)
        except OSError:  # it has ended
            continue


def kill(pids: Iterable[int]) -> None:
    """SIGKILL, and wait until they hold no file any more."""
    pids = list(pids)
    for pid in pids:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
    while any(map(is_alive, pids)):
        time.sleep(0.005)
