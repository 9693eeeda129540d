"""Processes that train on this machine's CPU, forked from one that has imported nanotron.

That one, nanotron_ext.fork_server, lives as long as this process: all stages of a `make` with the
same number of processes share it.
"""

import json
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

from launch.run.child import child_environment, failure


def run_workers(folder: Path, name: str, *, processes: int, lock: int) -> None:
    """Train the job in a run folder in so many processes; their errors are appended to its log.txt.

    `lock` is their standard input. Raises as `run_child` does.
    """
    log = folder / "log.txt"
    job = {"folder": str(folder), "processes": processes, "working_folder": os.getcwd()}
    message = json.dumps(job).encode()
    with log.open("a") as errors:
        begin = errors.tell()
        status = _status_of(message, [lock, 1, errors.fileno()], processes)
    if status != b"\0":
        raise failure(log, begin, name)


def _status_of(message: bytes, descriptors: list[int], processes: int) -> bytes:
    """The job's exit status; empty where the server ended before the job did."""
    try:
        try:
            socket.send_fds(start_server(processes), [message], descriptors)
        except ConnectionError:  # somebody ended it since the last job
            start_server.cache_clear()
            socket.send_fds(start_server(processes), [message], descriptors)
        return start_server(processes).recv(1)
    except ConnectionError:  # it ended with the job unread: its imports failed
        return b""


@cache
def start_server(processes: int) -> socket.socket:
    """A connection to a fork server whose jobs have so many processes; it imports meanwhile."""
    threads = max((os.cpu_count() or 1) // processes, 1)
    environment = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "CUDA_VISIBLE_DEVICES": "",
    }
    here, there = socket.socketpair()
    command = [sys.executable, "-m", "nanotron_ext.fork_server", str(there.fileno())]
    with there:
        subprocess.Popen(
            command, pass_fds=[there.fileno()], env=child_environment(environment),
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    return here
