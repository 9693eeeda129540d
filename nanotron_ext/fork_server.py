"""Trainers of several stages from one import of nanotron: `python -m nanotron_ext.fork_server <fd>`.

On a CPU a small stage's processes import for longer than they train. This process imports once,
starts no thread, and forks the processes of each job that comes over the socket `fd`; the answer
is the exit status. launch/run/workers.py is the other end. With a GPU torchrun starts trainers:
CUDA cannot be forked.
"""

import json
import os
import signal
import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import torch._dynamo  # noqa: F401  (torch's optimizers import it, over a second in each process)

from ground.errors import SAVED
from ground.processes import STOPPED_STATUSES, Stopped, asked, begin, until_saved
from nanotron_ext import trainer

STORE = ".rendezvous"  # in the run folder; a file needs no port that another program might take
MESSAGE_BYTES = 65_536


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends all processes, however busy
    with socket.socket(fileno=int(sys.argv[1])) as launcher, suppress(ConnectionError):
        while serve(launcher):
            pass
    os._exit(0)  # the launcher has ended; a clean end of the libraries takes a second


def serve(launcher: socket.socket) -> bool:
    """Take one job and answer with its status; False once there is no launcher to take one from."""
    message, descriptors, *_ = socket.recv_fds(launcher, MESSAGE_BYTES, maxfds=3)
    if message:
        job = json.loads(message)
        os.chdir(job["working_folder"])  # paths of the job are relative to it
        status = run(Path(job["folder"]), job["processes"], descriptors, launcher)
        for descriptor in descriptors:
            os.close(descriptor)
        launcher.sendall(bytes([status]))
    return bool(message) and not asked()


def run(folder: Path, processes: int, standard: list[int], launcher: socket.socket) -> int:
    """Train a run folder's job in forked processes; 0, SAVED, or 1 once one of them has failed.

    `standard` are their standard input (the stage's lock, which they hold as long as they live),
    output and error.
    """
    (folder / STORE).unlink(missing_ok=True)
    left, server, result = set[int](), os.getpid(), 0

    def kill_left(number: int) -> None:
        for pid in left:
            os.kill(pid, number)

    with suppress(Stopped), until_saved(kill_left):
        for rank in range(processes):
            if (pid := os.fork()) == 0:
                begin(server)
                launcher.close()
                for descriptor, own in enumerate(standard):
                    os.dup2(own, descriptor)
                _work(folder, rank, processes)
            left.add(pid)
        while left:
            pid, waited = os.wait()
            left.discard(pid)
            if waited and not result:
                stopped = os.waitstatus_to_exitcode(waited) in STOPPED_STATUSES
                result = SAVED if stopped else 1
                kill_left(signal.SIGKILL)  # they would wait for the one that is gone
    (folder / STORE).unlink(missing_ok=True)
    return result


def _work(folder: Path, rank: int, processes: int) -> None:
    """The life of one forked process; does not return."""
    status = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        status = trainer.train(folder, f"file://{(folder / STORE).resolve()}")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # the server's own exit handlers are not this process's


if __name__ == "__main__":
    begin()
    main()
