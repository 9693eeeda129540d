"""Units on a Slurm and on a Ray of the tests' own: the shards of one process, whoever dies on the way."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from test_how_tos import HOW_TOS, clone, finished, run
from test_slurm import call, slurm, wait_until
from test_units import portion, split_of, tokenizer, write_set

from datatrove_pipelines import clusters
from datatrove_pipelines.building import tokenize_all
from datatrove_pipelines.clusters import executor_of, in_rounds
from datatrove_pipelines.sources import SourceJob
from ground.errors import UserError

__all__ = ["clone", "slurm", "tokenizer"]  # the fixtures
CLUSTERS = ("slurm", "ray")


@pytest.fixture
def at_slurm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = request.getfixturevalue("slurm")
    monkeypatch.setenv("SLURM_CONF", environment["SLURM_CONF"])
    monkeypatch.setenv("SBATCH_MEM_PER_CPU", "400M")  # the nodes have 1,000 MB


@pytest.fixture
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == "slurm":
        request.getfixturevalue("at_slurm")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return name


def jobs_of(folder: Path) -> list[SourceJob]:
    """A portion of one set and the whole of another, several files each."""
    whole = write_set(folder / "whole", "parquet", files=3)
    return [
        portion(write_set(folder / "set", "jsonl.zst", files=4), 9_000, 60_000),
        SourceJob("other", whole.read, seed=3),
    ]


def contents(cache: Path) -> dict[str, bytes]:
    """Every file of all shard folders."""
    files = sorted(file for file in (cache / "shards").rglob("*") if file.is_file())
    return {str(f.relative_to(cache)): f.read_bytes() for f in files if f.suffix != ".lock"}


def meanwhile(act: Callable[[], bool]) -> threading.Thread:
    """Try `act` in a thread of its own until it has done something."""

    def run() -> None:
        end = time.monotonic() + 120
        while not act() and time.monotonic() < end:
            time.sleep(0.01)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def kill_one(word: str) -> Callable[[], bool]:
    """SIGKILL the first process below this one, or of the Slurm, that has the word in its command."""

    def act() -> bool:
        for process in psutil.process_iter(["cmdline"]):
            if word in " ".join(process.info["cmdline"] or ()):
                process.send_signal(signal.SIGKILL)
                return True
        return False

    return act


@pytest.mark.slow
@pytest.mark.parametrize("cluster", CLUSTERS, indirect=True)
def test_a_cluster_writes_the_shards_of_one_process(
    tmp_path: Path, tokenizer: Path, cluster: str
) -> None:
    jobs = jobs_of(tmp_path)
    tokenize_all(jobs, tokenizer, tmp_path / "one", 1)
    infos = tokenize_all(jobs, tokenizer, tmp_path / "cluster", 2, cluster)
    assert contents(tmp_path / "cluster") == contents(tmp_path / "one")
    assert 60_000 <= infos[0].tokens < 70_000 and len(infos[1].units) == 3
    assert not list((tmp_path / "cluster" / "shards").glob("*.building"))
    assert not list((tmp_path / "cluster").glob("slurm/*"))


@pytest.mark.slow
@pytest.mark.parametrize("cluster", CLUSTERS, indirect=True)
def test_a_task_that_is_killed_is_tried_again(
    tmp_path: Path, tokenizer: Path, cluster: str
) -> None:
    jobs = jobs_of(tmp_path)
    tokenize_all(jobs, tokenizer, tmp_path / "one", 1)
    word = "datatrove_pipelines.clusters" if cluster == "slurm" else "ray::_unit_of"
    killer = meanwhile(kill_one(word))
    tokenize_all(jobs, tokenizer, tmp_path / "cluster", 2, cluster)
    assert not killer.is_alive(), "no task was killed"
    assert contents(tmp_path / "cluster") == contents(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("cluster", CLUSTERS, indirect=True)
def test_a_file_that_cannot_be_read_costs_no_other(
    tmp_path: Path, tokenizer: Path, cluster: str
) -> None:
    broken, other = jobs_of(tmp_path)
    broken = replace(broken, read=replace(split_of(broken), portion=None))
    file = tmp_path / "set" / "train-2.jsonl.zst"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] + b"not zstandard" * 99)
    with pytest.raises(UserError, match=r"source web: .*train-2\.jsonl\.zst"):
        tokenize_all([broken, other], tokenizer, tmp_path / "cluster", 2, cluster)
    finished = [folder.name for folder in (tmp_path / "cluster" / "shards").glob("*/info.json")]
    assert len(finished) == 1 and list((tmp_path / "cluster" / "shards").glob("other-*/info.json"))


@pytest.mark.slow
@pytest.mark.usefixtures("at_slurm")
def test_what_is_stopped_cancels_its_job(
    tmp_path: Path, tokenizer: Path, slurm: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: str) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(clusters, "_is_queued", stop)
    with pytest.raises(KeyboardInterrupt):
        tokenize_all(jobs_of(tmp_path), tokenizer, tmp_path / "cluster", 2, "slurm")
    wait_until(lambda: not call("squeue", "--noheader", env=slurm), 60)


@pytest.mark.slow
@pytest.mark.usefixtures("at_slurm")
def test_the_how_to_ends_in_a_finished_stage(clone: Path) -> None:
    (command,) = HOW_TOS["tokenise on a cluster"].commands
    assert "slurm job" in run(clone, command)
    assert finished(clone, "tiny/data-stage1")


class Numbers:
    """Tasks 0 to 5 of two sources, even and odd; a source says once that one more is left."""

    def __init__(self) -> None:
        self.asked = list[str]()

    def __call__(self, number: int) -> None: ...

    def source(self, number: int) -> str:
        return "odd" if number % 2 else "even"

    def label(self, number: int) -> str:
        return f"task {number}"

    def more(self, source: str) -> list[int]:
        self.asked.append(source)
        return [10 + (source == "odd")] if self.asked.count(source) == 1 else []


def test_a_round_ends_once_no_source_has_any_left() -> None:
    rounds = list[list[int]]()

    def run(_: object, numbers: list[int]) -> dict[int, Exception | None]:
        rounds.append(list(numbers))
        return dict.fromkeys(numbers)

    assert in_rounds(Numbers(), range(4), run) == {}
    assert rounds == [[0, 1, 2, 3], [10, 11]]


def test_a_task_that_died_twice_is_a_failure_and_its_source_is_left() -> None:
    rounds = list[list[int]]()

    def run(_: object, numbers: list[int]) -> dict[int, Exception | None]:
        rounds.append(list(numbers))
        return {number: None for number in numbers if number != 2}

    failures = in_rounds(Numbers(), range(4), run)
    assert list(failures) == [2] and "task 2: its process died twice" in str(failures[2])
    assert rounds == [[0, 1, 2, 3], [2, 11]]


def test_a_failure_is_not_tried_again() -> None:
    error = UserError("no such column")

    def run(_: object, numbers: list[int]) -> dict[int, Exception | None]:
        return {number: error if number == 1 else None for number in numbers}

    assert in_rounds(Numbers(), range(4), run) == {1: error}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"EXECUTOR": "slrum"}, "EXECUTOR=slrum: unknown; did you mean 'slurm'"),
        ({"WORKERS": "many"}, "WORKERS=many: not a number"),
        ({"WORKERS": "0"}, "WORKERS=0: not a number"),
    ],
)
def test_a_wrong_word_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        executor_of(environment)


def test_what_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="EXECUTOR=slurm: no sbatch here"):
        executor_of({"EXECUTOR": "slurm"})
    assert executor_of({}) == ("local", os.cpu_count())
    assert executor_of({"WORKERS": "3"}) == ("local", 3)
