"""Processes that end with the one that started them, and stop where they can go on later.

SIGTERM and SIGUSR1 ask a job to stop. `Stopped` is raised at once, except during `until_saved`:
a trainer saves a checkpoint first, a launcher waits for its workers. The exit status is `SAVED`.

    python -m ground.processes [--launcher] <module> <arguments>

runs a module that ends with its parent; a launcher (torchrun, accelerate) passes both signals on.
"""

import ctypes
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from ground.batch_hash import MODULUS
from ground.errors import SAVED

if TYPE_CHECKING:
    import torch

    from ground.host_copy import HostCopy

STOPS = (signal.SIGTERM, signal.SIGUSR1)
# Exit statuses of a process that stopped; a signal that comes before it listens ends it.
STOPPED_STATUSES = {SAVED, *(-number for number in STOPS)}
PARENT = "SMOLLM3_PARENT"  # variable: the process id of the parent, should it end before we ask
# `make` passes on what its whole group has got already: a second signal is one that comes later.
SAME_SIGNAL_SECONDS = 1.0


class Stopped(BaseException):
    """A signal asked this job to stop; what it says is for the user."""


_asked_at: float | None = None  # time.monotonic()
_is_raised = False  # the handler has raised Stopped, wherever the process was
_saving: list[Callable[[int], object]] = []


def listen(again_ends: bool = False) -> None:
    """Handle SIGTERM and SIGUSR1; with `again_ends` a second one ends the process at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        global _asked_at, _is_raised
        now, is_first = time.monotonic(), _asked_at is None
        _asked_at = _asked_at or now
        is_another = now - _asked_at > SAME_SIGNAL_SECONDS
        if again_ends and is_another:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(signal.Signals(number))
        for pass_on in list(_saving):
            pass_on(number)
        # The same signal once more, from the group and from a parent, must not raise in what the
        # first one's Stopped unwinds.
        if not _saving and (is_first or is_another):
            _is_raised = True
            raise Stopped

    for number in STOPS:
        signal.signal(number, stop)


def asked() -> bool:
    """Whether a signal has asked this process to stop."""
    return _asked_at is not None


def is_stop(error: BaseException | None) -> bool:
    """Whether an exception is Stopped, or one that a library raised in its place.

    Compiled code may leave no trace of the cause: torch makes a ValueError of it while it reads
    weights. So once the handler has raised, every error is a stop.
    """
    if _is_raised:
        return True
    while error and not isinstance(error, Stopped):
        error = error.__cause__ or error.__context__
    return error is not None


@contextmanager
def until_saved(pass_on: Callable[[int], object] = int) -> Iterator[None]:
    """Raise Stopped only after the `with`; `pass_on` is called with each signal meanwhile."""
    _saving.append(pass_on)
    try:
        if asked():
            raise Stopped
        yield
    finally:
        _saving.remove(pass_on)
    if asked():
        raise Stopped


HALF = (1 << 32) - 1


@dataclass(frozen=True)
class Agreed:
    """What all processes of a job said at a step; reading it waits for the device."""

    sums: "HostCopy"

    def was_asked(self) -> bool:
        return self.sums.read()[0] > 0

    def total(self) -> int:
        """The sum of all processes' numbers modulo 2^63."""
        _, high, low = map(int, self.sums.read())
        return ((high << 32) + low) % MODULUS


class Agreement:
    """Whether any process of a job was asked to stop: called at each step, by all of them.

    A signal may reach one process alone, and all must save the same step. It is reduced with the
    step's own tensors: on a GPU it is read a step late, so that the host does not wait for the
    device, and no second group of connections among all processes is needed. With it goes a sum
    over all processes, the hash of what the step has read (ground/batch_hash.py).
    """

    def __init__(self, device: "torch.device"):
        self.device = device
        self.unread: deque[Agreed] = deque()

    def __call__(self, number: "int | torch.Tensor" = 0) -> bool:
        """`number` is this process's part of the sum: 63 bits, or an int64 tensor on the device."""
        import torch
        from torch import distributed as dist

        from ground.host_copy import HostCopy

        # In halves no sum overflows. Filled on the device: a copy from the host would wait for it.
        numbers = (int(asked()), (number >> 32) & HALF, number & HALF)
        sums = torch.stack([
            torch.full((), one, dtype=torch.int64, device=self.device)
            if isinstance(one, int)
            else one
            for one in numbers
        ])  # fmt: skip
        if dist.is_initialized():
            dist.all_reduce(sums)
        self.last = Agreed(HostCopy(sums))
        self.unread.append(self.last)
        if len(self.unread) <= int(sums.is_cuda):
            return False
        return self.unread.popleft().was_asked()


def end_with(parent: int) -> None:
    """Let the system end this process once its parent has ended, however that ended."""
    if sys.platform == "linux":
        # Kept by the process that a shell executes, given to no child. What ends is the parent's
        # thread: start no process in a thread that ends before it.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def begin(parent: int | None = None) -> None:
    """What each process of a job does first, and may do again; a forked one names its parent."""
    global _is_raised
    end_with(parent or int(os.environ.get(PARENT) or os.getppid()))
    _saving.clear()
    _is_raised = False
    listen()


def begin_worker(parent: int) -> None:
    """What a process of a pool does first: it ends with its parent, and at any signal."""
    end_with(parent)
    for number in STOPS:
        signal.signal(number, signal.SIG_DFL)


def command(module: str, *arguments: str, launches: bool = False) -> list[str]:
    """A command line that runs a module as a process which ends with this one."""
    words = [sys.executable, "-m", "ground.processes", *["--launcher"] * launches]
    return [*words, module, *arguments]


def _to_children(number: int) -> None:
    import psutil

    for child in psutil.Process().children():
        child.send_signal(number)


def _status_of(error: Exception) -> int | None:
    """The exit status of the process whose failure a launcher reports."""
    if isinstance(error, subprocess.CalledProcessError):  # accelerate, one process
        return error.returncode
    first: Any = getattr(error, "get_first_failure", None)  # torch's ChildFailedError
    return int(first()[1].exitcode) if first else None


def main() -> None:
    is_launcher = sys.argv[1] == "--launcher"
    sys.argv = sys.argv[1 + is_launcher :]
    try:
        begin()
        if is_launcher:
            os.environ[PARENT] = str(os.getpid())
            # torchrun would end its workers after 30 s, and itself with 1.
            os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGINT,SIGHUP,SIGQUIT")
        with until_saved(_to_children) if is_launcher else nullcontext():
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except Stopped:
        sys.exit(SAVED)
    except Exception as error:
        if not is_stop(error) and _status_of(error) not in STOPPED_STATUSES:
            raise
        sys.exit(SAVED)


if __name__ == "__main__":
    from ground import processes  # the module that others import, not this copy of it

    processes.main()
