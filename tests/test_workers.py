"""Jobs whose processes are forked from one that has imported nanotron (launch/run/workers.py)."""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import metrics, torchrun, train
from processes import is_alive, kill
from stage_runs import plain

from launch.run.workers import run_workers, start_server

pytestmark = pytest.mark.slow
TWO = {"parallelism.dp": 2, "tokens.batch_accumulation_per_replica": 2}
MakeJob = Callable[..., Path]


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def server() -> Iterator[int]:
    """The process that the next job of two processes is forked from: a new one."""
    start_server.cache_clear()
    pid = start_server(2).process.pid
    yield pid
    if is_alive(pid):
        kill([*children(pid), pid])


def test_jobs_of_one_server_train_as_under_torchrun_and_hold_the_lock(
    server: int, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    first, second, other = (make_job(name, TWO, steps=30) for name in ("first", "second", "other"))
    train(first, 2)
    stage = plain("stage")
    with stage.locked() as lock:
        job = threading.Thread(
            target=run_workers, args=(second, "second"), kwargs={"processes": 2, "lock": lock}
        )
        job.start()
        while not (second / "metrics.jsonl").exists():
            time.sleep(0.01)
        held = [Path(f"/proc/{pid}/fd/0").resolve() for pid in children(server)]
        assert held == [(tmp_path / "runs/small/.stage.lock").resolve()] * 2
        job.join()
    assert torchrun(other, 2).returncode == 0
    for key in ("loss", "grad_norm"):
        ours = [[line[key] for line in metrics(folder)] for folder in (first, second)]
        assert ours == [[line[key] for line in metrics(other)]] * 2


def test_a_process_that_fails_ends_the_others_and_the_next_job_runs(
    server: int, make_job: MakeJob
) -> None:
    long, short = make_job("long", TWO, steps=100_000), make_job("short", TWO)

    def end_one() -> None:
        while not (long / "metrics.jsonl").exists():
            time.sleep(0.01)
        waits, ends = children(server)
        os.kill(waits, signal.SIGSTOP)  # as one that hangs where no message reaches it
        os.kill(ends, signal.SIGKILL)

    threading.Thread(target=end_one).start()
    with pytest.raises(RuntimeError, match="long failed; the end of"):
        train(long, 2)
    assert not any(map(is_alive, children(server)))
    train(short, 2)
    assert len(metrics(short)) == 6


@pytest.mark.parametrize("lives", [0, 0.5])  # ends before the job is sent, and with it unread
def test_a_server_whose_imports_fail_is_a_failed_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lives: float
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nsleep {lives}\nexit 1\n")
    python.chmod(0o755)
    start_server.cache_clear()
    with (
        monkeypatch.context() as patch,
        pytest.raises(RuntimeError, match="job failed; the end of"),
    ):
        patch.setattr(sys, "executable", str(python))
        start_server(1)
        time.sleep(0.2)
        run_workers(tmp_path, "job", processes=1, lock=0)
    start_server.cache_clear()


def test_a_server_whose_launcher_is_gone_ends_quietly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanotron_ext import fork_server

    here, there = socket.socketpair()

    def run(*_: object) -> int:
        here.close()  # while the job runs
        return 1

    def end(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["", str(there.detach())])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(fork_server, "run", run)
    job = {"folder": ".", "processes": 1, "working_folder": "."}
    socket.send_fds(here, [json.dumps(job).encode()], [0])
    with pytest.raises(SystemExit, match="0"):
        fork_server.main()


def test_a_server_that_is_gone_is_replaced(server: int, make_job: MakeJob) -> None:
    kill([server])
    folder = make_job("job", TWO)
    train(folder, 2)
    assert len(metrics(folder)) == 6
