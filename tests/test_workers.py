"""Jobs whose processes are forked from one that has imported nanotron (launch/run/workers.py)."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import metrics, torchrun, train
from processes import called_with, is_alive, kill
from stage_runs import plain

from ground.errors import UserError
from launch.run.workers import run_workers, start_server

pytestmark = pytest.mark.slow
TWO = {"parallelism.dp": 2, "tokens.batch_accumulation_per_replica": 2}
MakeJob = Callable[..., Path]


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def server() -> int:
    """The process that the next job of two processes is forked from: a new one."""
    start_server.cache_clear()
    before = set(called_with("nanotron_ext.fork_server"))
    start_server(2)
    while not (found := set(called_with("nanotron_ext.fork_server")) - before):
        time.sleep(0.01)
    return found.pop()


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
    server: int, make_job: MakeJob, tmp_path: Path
) -> None:
    shard = tmp_path / "shards" / "a" / "00000.ds"
    whole = shard.read_bytes()
    corrupt, good = make_job("corrupt", TWO), make_job("good", TWO)
    shard.write_bytes(b"\xff\x7f" * (shard.stat().st_size // 2))
    with pytest.raises(UserError, match=r"corrupt: source 'a': token 32767"):
        train(corrupt, 2)
    assert not any(map(is_alive, children(server)))
    shard.write_bytes(whole)
    train(good, 2)
    assert len(metrics(good)) == 6


def test_a_server_that_is_gone_is_replaced(server: int, make_job: MakeJob) -> None:
    kill([server])
    folder = make_job("job", TWO)
    train(folder, 2)
    assert len(metrics(folder)) == 6
