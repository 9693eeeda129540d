"""Processes that end with their parent, and what a signal does to a job."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
from conftest import ROOT, python_path
from processes import is_alive, kill

from ground import processes
from ground.errors import SAVED
from ground.files import drop_stopped, note_stopped
from launch.run.child import run_child

LEAF = """
import os, sys, time
from ground import processes
with processes.until_saved():
    print(os.getpid(), flush=True)
    while not processes.asked(): time.sleep(0.01)
    print("saved", flush=True)
"""
WAITS = "import os, time; print(os.getpid(), flush=True); time.sleep(20)"
# As torchrun: a worker in a session of its own, whose failure is an exception.
AGENT = """
import subprocess, sys
process = subprocess.Popen(
    [sys.executable, "-m", "ground.processes", sys.argv[1]], start_new_session=True
)
if status := process.wait():
    raise subprocess.CalledProcessError(status, "leaf")
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, code in {"leaf": LEAF, "waits": WAITS, "agent": AGENT}.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", python_path(tmp_path))
    return tmp_path


def started(*words: str, launches: bool = False) -> tuple[Popen[str], int]:
    """A process, and the id that its leaf prints."""
    command = processes.command(*words, launches=launches)
    process = Popen(command, stdout=PIPE, stderr=PIPE, text=True)
    assert process.stdout
    return process, int(process.stdout.readline())


def gone(pid: int) -> bool:
    end = time.monotonic() + 5
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    if left := is_alive(pid):
        kill([pid])
    return not left


def test_a_worker_of_a_killed_launcher_ends(modules: Path) -> None:
    agent, leaf = started("agent", "waits", launches=True)
    agent.kill()
    agent.wait()
    assert gone(leaf)


@pytest.mark.parametrize("number", processes.STOPS)
def test_a_launcher_passes_a_signal_on_and_ends_with_its_workers_status(
    modules: Path, number: signal.Signals
) -> None:
    agent, leaf = started("agent", "leaf", launches=True)
    agent.send_signal(number)
    output, errors = agent.communicate(timeout=20)
    assert (agent.returncode, output, errors) == (SAVED, "saved\n", "")
    assert gone(leaf)


def test_a_signal_ends_at_once_what_saves_nothing(modules: Path) -> None:
    process, _ = started("waits")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20) == ("", "") and process.returncode == SAVED


# As a child whose group got a signal, which its parent passes on once more while it ends.
TWICE = """
import signal, sys
leave = sys.exit
def late(status):
    signal.raise_signal(signal.SIGTERM)
    leave(status)
sys.exit = late
signal.raise_signal(signal.SIGTERM)
"""
# As an import that a signal interrupts: the library raises an error of its own.
WRAPPED = """
import signal
try:
    signal.raise_signal(signal.SIGTERM)
except BaseException as stopped:
    raise ImportError("no such thing") from stopped
"""
# As torch, which reads weights: the cause is lost.
REPLACED = """
import signal
try:
    signal.raise_signal(signal.SIGTERM)
except BaseException:
    pass
raise ValueError("could not determine the shape")
"""


@pytest.mark.parametrize("code", [TWICE, WRAPPED, REPLACED])
def test_a_signal_that_comes_twice_or_is_wrapped_is_no_failure(modules: Path, code: str) -> None:
    (modules / "ends.py").write_text(code)
    process = Popen(processes.command("ends"), stdout=PIPE, stderr=PIPE, text=True)
    assert process.communicate(timeout=20) == ("", "") and process.returncode == SAVED


AGAIN = """
import time
from ground import processes
processes.SAME_SIGNAL_SECONDS = 0.3
processes.listen(again_ends=True)
with processes.until_saved():
    print("in", flush=True)
    time.sleep(60)
"""


def test_a_second_signal_ends_at_once_and_an_echo_of_the_first_does_not(modules: Path) -> None:
    process = Popen([sys.executable, "-c", AGAIN], stdout=PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "in\n"
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    time.sleep(0.4)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize(("code", "error"), [
    (f"raise SystemExit({SAVED})", processes.Stopped),
    ("import os; os.kill(os.getpid(), 10)", processes.Stopped),
    ("raise SystemExit(3)", RuntimeError),
])  # fmt: skip
def test_a_child_that_saved_is_no_failure(
    tmp_path: Path, code: str, error: type[BaseException]
) -> None:
    with pytest.raises(error):
        run_child([sys.executable, "-c", code], tmp_path / "log.txt", "stage")


def test_a_checkpoint_of_a_signal_goes_with_the_next_one(tmp_path: Path) -> None:
    for step in (3, 5, 6):
        (tmp_path / str(step)).mkdir()
    note_stopped(tmp_path, 4)  # killed before it was saved
    note_stopped(tmp_path, 5)
    drop_stopped(tmp_path, 5)
    assert {path.name for path in tmp_path.iterdir()} == {".stopped", "3", "5", "6"}
    drop_stopped(tmp_path, 6)
    assert {path.name for path in tmp_path.iterdir()} == {"3", "6"}


def test_make_hands_a_signal_to_the_runner_itself(tmp_path: Path) -> None:
    """`make` runs the command without a shell between, which would end and leave it behind."""
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", "-o", f"{tmp_path}/.installed", f"VENV={tmp_path}", "sft"],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "MAKEFLAGS": ""},
    )  # fmt: skip
    assert done.stdout.strip() == f"{tmp_path}/bin/python -m launch run sft"
