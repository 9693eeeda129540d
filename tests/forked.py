"""Processes of a test that are forked from one which has imported what they need.

A stage of a test trains for a second and imports for ten. `Forked` is a Popen: its process has its
own environment, directory, pipes, signals and end; only its imports are another's. Where the start
itself is tested, `python -m` starts it.
"""

import atexit
import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from processes import free_port

ROOT = Path(__file__).parent.parent
# What the processes of a kind have imported: nothing that reads their own environment for it.
IMPORTS = {
    # Libraries alone: a checkout runs its own code.
    "launch": """
import numpy, pyarrow.parquet, scipy.stats, torch._dynamo, torch.distributed, yaml
import datatrove.pipeline.tokens, safetensors.torch, tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, SmolLM3ForCausalLM
subprocess.Popen = ForksTrainers
""",
    "trainer": """
import torch._dynamo
import nanotron_ext.trainer
""",
    "posttrain": """
import accelerate, datasets, peft, torch._dynamo
import posttrain.apo, posttrain.scores, posttrain.sft
from transformers import AutoModelForCausalLM, SmolLM3ForCausalLM
""",
    "scores": """
from eval_tasks import compat
compat.before_import()
import datasets, torch._dynamo
import lighteval.models.model_loader, lighteval.pipeline, lighteval.tasks.registry
import torch
torch.set_grad_enabled(True)  # which lighteval has turned off
from transformers import AutoModelForCausalLM, SmolLM3ForCausalLM
""",
}
MESSAGE_BYTES = 1 << 17
PR_SET_PDEATHSIG = 1
_servers: dict[str, socket.socket] = {}


class Forked(subprocess.Popen[str]):
    """`python <words>`: -m, -c or a script; `kind` says what is imported already."""

    def __init__(self, kind: str, *words: str, **options: Any) -> None:
        self._kind = kind
        super().__init__([sys.executable, *words], text=True, **options)

    # What Popen itself does through the system's own fork and wait.

    def _execute_child(self, args: list[str], *more: Any) -> None:
        folder, environment, ends = more[4], more[5], more[9:15]
        child_ends = [ends[0], ends[3], ends[5]]
        standard = [own if end == -1 else end for own, end in enumerate(child_ends)]
        job = {
            "words": args[1:],
            "folder": str(folder or os.getcwd()),
            "environment": dict(os.environ if environment is None else environment),
        }
        self._keeper, theirs = socket.socketpair()
        with theirs:
            message = json.dumps(job).encode()
            socket.send_fds(_server(self._kind), [message], [*standard, theirs.fileno()])
        (self.pid,) = struct.unpack("i", self._keeper.recv(4))
        self._child_created = True
        self._close_pipe_fds(*ends)  # type: ignore[attr-defined]

    def _try_wait(self, flags: int) -> tuple[int, int]:
        only_look = socket.MSG_DONTWAIT if flags & os.WNOHANG else 0
        try:
            return self.pid, struct.unpack("i", self._keeper.recv(4, only_look))[0]
        except BlockingIOError:
            return 0, 0

    def _internal_poll(self, _deadstate: int | None = None) -> int | None:
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)  # type: ignore[attr-defined]
        return self.returncode


def run(
    kind: str, *words: str, given: str = "", **options: Any
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run does, with what is printed captured; `given` is its input."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with Forked(kind, *words, **pipes, **options) as process:
        printed, errors = process.communicate(given, timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, printed, errors)


def distributed(
    kind: str, processes: int, *words: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`words` in so many processes that find each other, as torchrun starts them; one that fails
    ends the others."""
    shared = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", **environment}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    shared["MASTER_PORT"] = str(free_port())
    with tempfile.TemporaryFile("w+") as errors:
        ranks = [
            Forked(kind, *words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
                   env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(processes)
        ]  # fmt: skip
        end = time.monotonic() + 550
        while any(rank.poll() is None for rank in ranks):
            if any(rank.returncode for rank in ranks) or time.monotonic() > end:
                for rank in ranks:
                    rank.kill()
            time.sleep(0.01)
        errors.seek(0)
        statuses = [rank.returncode for rank in ranks]
        return subprocess.CompletedProcess(words, max(statuses, key=abs), "", errors.read())


def _server(kind: str) -> socket.socket:
    """Of one kind at a time: each holds half a gigabyte. It ends with this process."""
    if kind not in _servers:
        while _servers:
            _servers.popitem()[1].close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if kind == "scores":
            environment["HF_HUB_OFFLINE"] = "1"  # read when it is imported
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        with theirs:
            subprocess.Popen(
                [sys.executable, __file__, kind, str(theirs.fileno())], env=environment,
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
            )  # fmt: skip
        _servers[kind] = ours
    return _servers[kind]


# ---- in the server


class ForksTrainers(subprocess.Popen[bytes]):
    """A Popen that forks what trains on this machine, which the stage's process starts."""

    def _execute_child(self, args: list[str], *more: Any) -> None:
        if list(args[1:4]) != ["-m", "ground.processes", "nanotron_ext.fork_server"]:
            super()._execute_child(args, *more)  # type: ignore[misc]
            return
        passed, folder, environment, ends = more[3], more[4], more[5], more[9:15]
        sys.stdout.flush()
        sys.stderr.flush()
        if pid := os.fork():
            self.pid, self._child_created = pid, True
            self._close_pipe_fds(*ends)  # type: ignore[attr-defined]
            return
        for own, end in enumerate((ends[0], ends[3], ends[5])):
            if end != -1:
                os.dup2(end, own)
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            if descriptor > 2 and descriptor not in passed:
                with suppress(OSError):
                    os.close(descriptor)
        work(list(args[1:]), str(folder or os.getcwd()), dict(environment))


def serve(connection: socket.socket) -> None:
    """Fork a process for each job that comes, until nobody is there to send one."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.freeze()  # else each process copies all that was imported to look through it
    while True:
        message, descriptors, *_ = socket.recv_fds(connection, MESSAGE_BYTES, 4)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            connection.close()
            keep(descriptors.pop(), descriptors)
            work(**json.loads(message))
        for descriptor in descriptors:
            os.close(descriptor)


def keep(status: int, standard: list[int]) -> None:
    """Return in a process of its own, with these as its input, output and error; from here its
    process id and how it ended are told."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _end_with_parent()
    if pid := os.fork():
        for descriptor in standard:
            os.close(descriptor)
        os.write(status, struct.pack("i", pid))
        ended = os.waitpid(pid, 0)[1]
        os.write(status, struct.pack("i", ended))
        os._exit(0)
    _end_with_parent()
    os.close(status)
    for own, descriptor in enumerate(standard):
        os.dup2(descriptor, own)
        if descriptor > 2:
            os.close(descriptor)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def work(words: list[str], folder: str, environment: dict[str, str]) -> NoReturn:
    """Do what the words say, and end: without taking apart what was imported, for seconds."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = folder
    warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning, "runpy")
    # As Python has it without a script: a process that it spawns would run this file again.
    main = sys.modules["__main__"] = ModuleType("__main__")
    option, *sys.argv[:] = words
    status = 0
    try:
        if option == "-m":
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        elif option == "-c":
            exec(compile(sys.argv[0], "<string>", "exec"), main.__dict__)
        else:
            sys.argv.insert(0, option)
            sys.path[0] = str(Path(option).parent)
            runpy.run_path(option, run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    kind, descriptor = sys.argv[1:]
    exec(IMPORTS[kind])
    serve(socket.socket(fileno=int(descriptor)))
