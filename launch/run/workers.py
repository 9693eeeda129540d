"""Processes that train on this machine's CPU, forked from one that has imported nanotron.

That one, nanotron_ext.fork_server, lives as long as this process: all stages of a `make` with the
same number of processes share it.
"""

import json
import os
import socket
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ground.errors import SAVED
from ground.processes import Stopped, asked, command, until_saved
from launch.run.child import child_environment, failure


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    connection: socket.socket


def run_workers(folder: Path, name: str, *, processes: int, lock: int) -> None:
    """Train the job in a run folder in so many processes; their errors are appended to its log.txt.

    `lock` is their standard input. Raises as `run_child` does.
    """
    log = folder / "log.txt"
    job = {"folder": str(folder), "processes": processes, "working_folder": os.getcwd()}
    message = json.dumps(job).encode()
    with log.open("a") as errors:
        begin = errors.tell()
        server = _started(message, [lock, 1, errors.fileno()], processes)
        with until_saved(server.process.send_signal):
            status = _answer(server)
            # Without an answer after a signal: it came while the server imported.
            if status not in (0, SAVED) and not (status is None and asked()):
                raise failure(log, begin, name)
    if status == SAVED:  # a signal to the workers alone
        raise Stopped


def _started(message: bytes, descriptors: list[int], processes: int) -> Server:
    """The server that was sent a job."""
    server = start_server(processes)
    try:
        socket.send_fds(server.connection, [message], descriptors)
    except ConnectionError:  # somebody ended it since the last job
        start_server.cache_clear()
        server = start_server(processes)
        with suppress(ConnectionError):  # its imports failed: there will be no answer
            socket.send_fds(server.connection, [message], descriptors)
    return server


def _answer(server: Server) -> int | None:
    """The job's exit status; None where the server ended before the job did."""
    with suppress(ConnectionError):  # it ended with the job unread: its imports failed
        for status in server.connection.recv(1):
            return status
    return None


@cache
def start_server(processes: int) -> Server:
    """A fork server whose jobs have so many processes; it imports meanwhile."""
    threads = max((os.cpu_count() or 1) // processes, 1)
    environment = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "CUDA_VISIBLE_DEVICES": "",
    }
    here, there = socket.socketpair()
    with there:
        process = subprocess.Popen(
            command("nanotron_ext.fork_server", str(there.fileno())), pass_fds=[there.fileno()],
            env=child_environment(environment), stdin=subprocess.DEVNULL,
        )  # fmt: skip
    return Server(process, here)
