"""Runs code that a model wrote, where it can do no harm: HumanEval+ and MBPP+ need it.

Its own Linux namespaces (user, network, process, mount, IPC), no files but those that Python needs,
read-only, and an empty /tmp, no capabilities, no system calls that these programs do not need and
that pass a limit, limits on time, memory, processes and file size. Root's code runs as nobody, a
user's as that user. Where the kernel denies any of this, code is refused, never run without.

A solution shares its process with its tests, as in HumanEval: one written against this file could
find the nonce in it and report itself as passed. It could do no harm.
"""

import functools
import importlib.util
import os
import secrets
import select
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ground.errors import UserError

INSIDE = Path(__file__).with_name("inside.py")
# Root needs no user namespace to set the others up; inside.py makes one after it becomes nobody.
AS_USER = ["--user", "--map-root-user"]
UNSHARE = [
    "unshare", "--net", "--ipc", "--pid", "--mount",
    "--fork", "--kill-child", "--mount-proc",
]  # fmt: skip
OUTPUT_BYTES = 1_000_000
# Numerical libraries start one thread per core, which the limit on processes would refuse.
ENVIRONMENT = {
    "PATH": os.defpath, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
}  # fmt: skip
# Longer than any start of Python: the limit that matters is the program's own.
START_SECONDS = 20.0


@dataclass(frozen=True)
class Result:
    """Whether the program ran to its last line, else the end of what it said, or why it was ended.

    `printed` is the end of what a program that passed has printed, at most 2,000 bytes.
    """

    passed: bool
    reason: str
    printed: str = ""


def run_tests(program: str, timeout_s: float = 10.0, memory_mb: int = 1024) -> Result:
    """Run `program` (a solution followed by its tests) in the sandbox.

    It passes when its last line is reached: an early exit, whatever it prints, does not. Raises
    UserError where the sandbox is not available.
    """
    require_sandbox()
    return _run(program, timeout_s, memory_mb)


@functools.cache
def require_sandbox() -> None:
    """Raise UserError where code cannot be run, or could not import what is installed."""
    if sys.platform != "linux":
        raise UserError(f"generated code is not run on {sys.platform}: the sandbox needs Linux")
    try:
        result = _run("pass", START_SECONDS, 1024)
    except FileNotFoundError:
        raise UserError(
            "generated code is not run: no `unshare` here; install util-linux"
        ) from None
    if not result.passed:
        raise UserError(
            f"generated code is not run: no sandbox here ({result.reason}); allow user namespaces "
            "(sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, "
            "kernel.apparmor_restrict_unprivileged_userns; in a container: CAP_SYS_ADMIN) "
            "and install libseccomp2"
        )
    if importlib.util.find_spec("numpy") is None:
        return
    if not (result := _run("import numpy", START_SECONDS, 1024)).passed:
        raise UserError(
            f"generated code is not run: it could not import numpy ({result.reason}); the sandbox "
            f"offers what is installed in {sys.prefix}, if all users may read it"
        )


def _run(program: str, timeout_s: float, memory_mb: int) -> Result:
    nonce = secrets.token_hex(16)
    arguments = [str(timeout_s), str(memory_mb), str(OUTPUT_BYTES)]
    # -I: the caller's environment and folder do not affect what is imported.
    command = [*UNSHARE, *([] if os.geteuid() == 0 else AS_USER)]
    command += [sys.executable, "-I", str(INSIDE), *arguments]
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as out:
        source.write(f"{nonce}\n{program}".encode(errors="replace"))
        source.seek(0)
        process = subprocess.Popen(
            command, stdin=source, stdout=out, stderr=subprocess.STDOUT, cwd="/",
            env=ENVIRONMENT, start_new_session=True,
        )  # fmt: skip
        handle = os.pidfd_open(process.pid)  # Popen.wait looks only every 50 ms
        try:
            if not select.select([handle], [], [], timeout_s + START_SECONDS)[0]:
                return Result(False, f"no end after {timeout_s:g} s")
        finally:
            os.close(handle)
            # Its end ends every process of the namespace, whoever started them.
            process.kill()
            process.wait()
        out.seek(max(out.seek(0, os.SEEK_END) - 2000, 0))
        said = out.read().decode(errors="replace")
    if process.returncode == 0 and said.rstrip().endswith(nonce):
        return Result(True, "", said.rstrip().removesuffix(nonce).removesuffix("\n"))
    lines = said.replace(nonce, "").strip().splitlines() or [f"exit {process.returncode}"]
    return Result(False, lines[-1][-200:])
