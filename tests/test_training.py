"""A stage over real processes: layouts agree, and a killed run ends in the same bits."""

import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import command, environment, metrics, python_path, torchrun, train
from forked import distributed
from processes import called_with, kill
from safetensors.torch import load_file

from ground import processes
from ground.errors import SAVED, UserError
from ground.files import checkpoints, cut_back
from ground.processes import STOPS

pytestmark = pytest.mark.slow
TWO = {"parallelism.dp": 2, "tokens.batch_accumulation_per_replica": 2}
MakeJob = Callable[..., Path]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder)]


def trained(folder: Path, processes: int = 1) -> list[float]:
    train(folder, processes)
    return losses(folder)


def test_two_data_parallel_processes_take_the_same_steps_as_one(make_job: MakeJob) -> None:
    one = trained(make_job("one"))
    assert trained(make_job("two", TWO), 2) == pytest.approx(one, rel=1e-6)


def test_metrics_count_tokens_and_follow_the_schedule(make_job: MakeJob) -> None:
    folder = make_job("run")
    trained(folder)
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in lines] == [step * 4 * 32 for step in range(1, 7)]
    # warm-up 2, decay from step 4 over 3 steps; nanotron takes step s at the rate of s - 1
    expected = [0, 0.005, 0.01, 0.01, 0.01, 0.02 / 3]
    assert [line["lr"] for line in lines] == pytest.approx(expected)
    assert sum(lines[-1]["tokens_per_source"].values()) == lines[-1]["tokens"]
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["3", "6"]


def test_a_stage_continues_weights_optimizer_and_schedule(make_job: MakeJob) -> None:
    """A second stage of the same mixture, made to draw what one long run would draw."""
    whole = trained(make_job("whole"))
    first = make_job("first", steps=3)
    assert trained(first) == whole[:3]
    # The order of sources starts anew with a stage: with one source alone it is the same.
    alone = {"weights": {"a": 1.0}}
    long = trained(make_job("long", **alone))
    before = make_job("before", steps=3, **alone)
    trained(before)
    resume = before / "checkpoints" / "3"
    after = make_job("after", resume=resume, first_step=3, drawn={"a": 12}, **alone)
    assert losses(before) + trained(after) == long
    assert [line["step"] for line in metrics(after)] == [4, 5, 6]
    assert [line["lr"] for line in metrics(after)] == pytest.approx([0.01, 0.01, 0.02 / 3])


def test_killed_at_a_random_moment_the_run_ends_in_the_same_bits(make_job: MakeJob) -> None:
    dp = {**TWO, "checkpoints.checkpoint_interval": 5}
    whole = trained(make_job("whole", dp, steps=40), 2)
    folder = make_job("killed", dp, steps=40)
    _kill_after(folder, lines=random.randint(6, 35))
    saved = checkpoints(folder)
    assert saved, "killed before the first checkpoint"
    cut_back(folder / "metrics.jsonl", int(saved[-1].name))
    make_job("killed", dp, steps=40, resume=saved[-1])
    assert trained(folder, 2) == whole
    last = "checkpoints/40/model/model/final_layer_norm/pp_block"
    name = next((folder / last).iterdir()).name
    assert (folder / last / name).read_bytes() == (
        folder.parent / "whole" / last / name
    ).read_bytes()


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_to_one_process_saves_in_all_and_the_run_ends_in_the_same_bits(
    make_job: MakeJob, number: signal.Signals
) -> None:
    dp = {**TWO, "checkpoints.checkpoint_interval": 50}
    whole, folder = make_job("whole", dp, steps=60), make_job("stopped", dp, steps=60)
    losses_of_whole = trained(whole, 2)
    words = processes.command("torch.distributed.run", *command(folder, 2)[3:], launches=True)
    with subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL) as launcher:
        while not (
            (file := folder / "metrics.jsonl").exists() and file.read_text().count("\n") > 3
        ):
            assert launcher.poll() is None
            time.sleep(0.01)
        psutil.Process(launcher.pid).children()[1].send_signal(number)
    assert launcher.returncode == SAVED
    (saved,) = checkpoints(folder)
    assert len(losses(folder)) == int(saved.name) < 50
    make_job("stopped", dp, steps=60, resume=saved)
    assert trained(folder, 2) == losses_of_whole
    # What a signal saved is no checkpoint of the recipe's: others may take the last two.
    assert [path.name for path in checkpoints(folder)] == ["50", "60"]
    for file in (whole / "checkpoints/60/model").rglob("*.safetensors"):
        ours, theirs = (load_file(one) for one in (folder / file.relative_to(whole), file))
        assert all(ours[name].equal(theirs[name]) for name in theirs)  # metadata has no fixed order


def _kill_after(folder: Path, lines: int) -> None:
    """SIGKILL both processes and their launcher once metrics.jsonl has that many lines."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        command(folder, 2), env=environment(), stdout=quiet, stderr=quiet, start_new_session=True
    )
    path = folder / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and path.read_text().count("\n") >= lines):
        time.sleep(0.01)
    # torchrun gives each worker a session of its own; find them by the job's folder.
    kill(called_with(str(folder)))
    process.wait()


AHEAD = """
import sys
from pathlib import Path
from nanotron_ext import compat
from nanotron_ext.job import Job
from nanotron_ext.trainer import SmolLM3Trainer, DistributedTrainer
compat.steps_ahead = lambda: 1
folder, save = Path(sys.argv[1]), DistributedTrainer.save_checkpoint
def counted(self):
    lines = (folder / "metrics.jsonl").read_text().count("\\n")
    print("saved", self.iteration_step, lines, file=sys.stderr)
    return save(self)
DistributedTrainer.save_checkpoint = counted
compat.init_distributed()
SmolLM3Trainer(folder, Job.read(folder)).run()
"""


def test_a_host_that_is_a_step_ahead_writes_the_same_lines_before_it_saves(
    make_job: MakeJob, tmp_path: Path
) -> None:
    """As on a GPU; a line that is missing at a checkpoint would be missing after a resume."""
    script = tmp_path / "ahead.py"
    script.write_text(AHEAD)
    whole, ahead = make_job("whole"), make_job("ahead")
    train(whole)
    done = distributed("trainer", 1, str(script), str(ahead))
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.findall(r"saved (\d+) (\d+)", done.stderr) == [("3", "3"), ("6", "6")]
    found, wanted = metrics(ahead), metrics(whole)
    for line in found + wanted:
        del line["tokens_per_second"]
    assert found == wanted


def test_a_corrupt_token_stops_the_run_with_one_line(make_job: MakeJob, tmp_path: Path) -> None:
    folder = make_job("run")
    shard = tmp_path / "shards" / "a" / "00000.ds"
    shard.write_bytes(b"\xff\x7f" * (shard.stat().st_size // 2))
    with pytest.raises(UserError, match="source 'a': token 32767"):
        train(folder)
    assert not list((folder / "checkpoints").glob("*"))


def test_a_full_disk_leaves_no_checkpoint_that_passes_for_whole(
    make_job: MakeJob, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import errno, safetensors.torch as s\n"
        "def full(*a, **k): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "s.save_file = full\n"
    )
    folder = make_job("run")
    done = torchrun(folder, PYTHONPATH=python_path(tmp_path))
    assert done.returncode != 0
    assert "error: " in done.stderr and "no space left" in done.stderr
    assert not list((folder / "checkpoints").glob("[0-9]*"))
