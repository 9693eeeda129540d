"""The lock of a stage: one process at a time, and whoever else comes is told whose it is."""

import fcntl
import getpass
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from ground.errors import UserError

FORMER = "its workers, or a job that leaves no name, still run: wait for them"


@dataclass(frozen=True)
class Owner:
    """Who took a lock; written into its file."""

    host: str
    pid: int
    user: str
    since: str
    command: str

    @classmethod
    def this(cls) -> "Owner":
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a container's user without a name
            user = str(os.getuid())
        since = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(socket.gethostname(), os.getpid(), user, since, shlex.join(sys.orig_argv))

    def __str__(self) -> str:
        who = f"{self.user} on {self.host}, process {self.pid}, since {self.since}"
        return f"{who}: `{self.command}`"

    @property
    def remedy(self) -> str:
        if self.host != socket.gethostname():
            return f"wait for it, or `kill {self.pid}` on {self.host}: it saves what it has first"
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return f"that process has ended; {FORMER}"
        except PermissionError:  # another user's
            pass
        return f"wait for it, or `kill {self.pid}`: it saves what it has first"


@contextmanager
def locked(file: Path, name: Path) -> Iterator[int]:
    """Hold the lock `file` of the folder `name`; yields its descriptor. UserError if it is taken.

    It lives as long as any process that holds the descriptor.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{name}: {_taken(file)}") from None
        lock.truncate(0)
        lock.write(json.dumps(asdict(Owner.this())))
        lock.flush()
        yield lock.fileno()


def _taken(file: Path) -> str:
    with suppress(OSError, ValueError, TypeError):  # a shell's `flock` writes nothing
        owner = Owner(**json.loads(file.read_text("utf-8")))
        return f"another process is running this stage ({owner}); {owner.remedy}"
    return f"another process is running this stage; {FORMER}"
