"""launch/pretrain.slurm on a real Slurm: two nodes on this machine, started and ended here."""

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, metrics

from ground.errors import UserError
from launch.recipe.scale import load_scale
from launch.run.cluster import processes_per_node
from launch.stages.pretrain import PretrainStage
from launch.walk import resolve

NEEDED = ("slurmctld", "slurmd")
PACKAGES = "apt-get install --no-install-recommends slurm-wlm munge shellcheck"
STAGE, STEPS = "pretrain-stage1", 120
CODE = ("ground", "launch", "nanotron_ext", "datatrove_pipelines", "eval_tasks", "recipes")


def need(*programs: str) -> None:
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        pytest.skip(f"NOT TESTED: launch/pretrain.slurm: no {', '.join(missing)} here: {PACKAGES}")


def call(*command: str, env: Mapping[str, str], cwd: Path | None = None) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout.strip()


def wait_until(holds: Callable[[], Any], seconds: float, otherwise: Callable[[], str] = str) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := holds():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {otherwise()}")


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


# No accounting, no cgroups, no privileges: what a test may ask of a machine.
SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
KillWait=2
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000 Gres=gpu:8
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000 Gres=gpu:8
PartitionName=test Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Cluster:
    """A checkout of our own with a scale of its own, and the Slurm to submit it to."""

    checkout: Path
    env: dict[str, str]

    def sbatch(self, *options: str, **environment: str) -> str:
        command = ("sbatch", "--parsable", *options, "launch/pretrain.slurm", STAGE)
        return call(*command, env=self.env | environment, cwd=self.checkout)

    def job(self, number: str) -> dict[str, str]:
        words = call("scontrol", "show", "job", number, "--oneliner", env=self.env).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ended(self, number: str, seconds: float = 200) -> dict[str, str]:
        """The job's record, once it is over."""
        states = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}

        def over() -> dict[str, str] | None:
            time.sleep(0.2)
            job = self.job(number)
            return job if job["JobState"] in states else None

        return wait_until(over, seconds, lambda: f"job {number}:\n{self.log(number)[-4000:]}")

    def log(self, number: str) -> str:
        path = self.checkout / f"slurm-smollm3-{number}.log"
        return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """munged, slurmctld and two slurmd with eight pretended GPUs each; yields the environment."""
    need(*NEEDED)
    root = tmp_path_factory.mktemp("slurm")
    for folder in ("state", "spool/n1", "spool/n2"):
        (root / folder).mkdir(parents=True)
    user, host = getpass.getuser(), socket.gethostname().split(".")[0]
    conf = SLURM_CONF.format(root=root, user=user, host=host, ports=free_ports(3))
    (root / "slurm.conf").write_text(conf)
    for number in range(8):
        (root / f"gpu{number}").touch()
    (root / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={root}/gpu[0-7]\n")
    key = root / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(1024))
    env = os.environ | {"SLURM_CONF": str(root / "slurm.conf")}
    munged = ["munged", "--foreground", "--force", f"--key-file={key}"]
    munged += [f"--{name}-file={root}/munged.{name}" for name in ("pid", "log", "seed")]
    munged += [f"--socket={root}/munge.socket"]
    daemons = [
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", "n1"],
        ["slurmd", "-D", "-N", "n2"],
    ]
    started: list[subprocess.Popen[bytes]] = []
    try:
        with (root / "daemons.log").open("w") as log:
            started.append(subprocess.Popen(munged, env=env, stdout=log, stderr=log))
            wait_until((root / "munge.socket").exists, 10)
            for daemon in daemons:
                started.append(subprocess.Popen(daemon, env=env, stdout=log, stderr=log))
        wait_until(lambda: _idle_nodes(env) == 2, 30, (root / "daemons.log").read_text)
        yield env
        subprocess.run(["scancel", f"--user={user}"], env=env, check=False)
        wait_until(lambda: not call("squeue", "--noheader", env=env), 30)
    finally:
        for process in reversed(started):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _idle_nodes(env: Mapping[str, str]) -> int:
    command = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]
    return len(subprocess.run(command, capture_output=True, text=True, env=env).stdout.split())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code, with a scale whose run lasts seconds; corpus and shards are the tests' own tree's."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in CODE:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".venv").symlink_to(sys.prefix)
    dial = yaml.safe_load((ROOT / "recipes/scales/tiny.yaml").read_text())
    dial |= {"scale": "small", "windows_divided_by": 64, "steps_divided_by": 4_720_000 // 164}
    dial["held_out"] = dial["held_out"] | {"bytes_per_category": 2000}
    section = dial["nanotron"]
    section["checkpoints"]["checkpoint_interval"] = 10
    section["model"]["model_config"] |= {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
    }
    section["tokens"]["micro_batch_size"] = 1
    (folder / "recipes/scales/small.yaml").write_text(yaml.safe_dump(dial))
    return folder


@pytest.fixture(scope="module")
def local(checkout: Path) -> Path:
    """RUNS of the same stage run on this machine by `python -m launch run`."""
    env = _environment(checkout / "local")
    call(sys.executable, "-m", "launch", "run", STAGE, env=env, cwd=checkout)
    return checkout / "local"


def _environment(runs: Path) -> dict[str, str]:
    own = {
        "SCALE": "small",
        "RUNS": str(runs),
        "CACHE": os.environ.get("CACHE") or str(ROOT / ".cache"),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",  # both nodes are this machine
    }
    return {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))} | own


@pytest.fixture
def cluster(slurm: dict[str, str], checkout: Path, local: Path, tmp_path: Path) -> Cluster:
    """RUNS of the test's own, all that the stage takes from the local run."""
    for stage in ("tokenizer", "held-out", "data-stage1"):
        shutil.copytree(local / "small" / stage, tmp_path / "small" / stage)
    return Cluster(checkout, slurm | _environment(tmp_path))


def losses(runs: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics(runs / "small" / STAGE)]


def manifest(runs: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((runs / "small" / STAGE / "manifest.json").read_text())
    return found


def test_the_scripts_pass_shellcheck() -> None:
    need("shellcheck")
    done = subprocess.run(
        ["shellcheck", *map(str, (ROOT / "launch").glob("*.slurm"))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_two_nodes_take_the_steps_of_a_local_run(
    cluster: Cluster, local: Path, tmp_path: Path
) -> None:
    number = cluster.sbatch("--nodes=2")
    job = cluster.ended(number)
    log = cluster.log(number)
    assert (job["JobState"], job["ExitCode"], job["NumNodes"]) == ("COMPLETED", "0:0", "2"), log
    assert "on 2 nodes x 1 processes" in log
    assert losses(tmp_path) == losses(local)
    assert manifest(tmp_path)["finished"]
    assert manifest(tmp_path)["bits_per_byte"] == manifest(local)["bits_per_byte"]
    # A finished stage is left alone, by the script too.
    before = manifest(tmp_path)
    again = cluster.sbatch("--nodes=2")
    assert cluster.ended(again)["JobState"] == "COMPLETED", cluster.log(again)
    assert "up to date" in cluster.log(again) and "2 nodes" not in cluster.log(again)
    assert manifest(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "requeue",
    [("scontrol", "requeue"), ("scancel", "--signal=USR1", "--batch")],
    ids=["by-an-operator", "at-the-time-limit"],
)
def test_a_requeued_job_goes_on_from_its_last_checkpoint(
    cluster: Cluster, local: Path, tmp_path: Path, requeue: tuple[str, ...]
) -> None:
    folder = tmp_path / "small" / STAGE
    number = cluster.sbatch("--nodes=2", FORCE="1")
    wait_until((folder / "checkpoints/30").exists, 100, lambda: cluster.log(number)[-4000:])
    call(*requeue, number, env=cluster.env)
    wait_until(lambda: cluster.job(number)["Restarts"] == "1", 30)
    wait_until(lambda: cluster.job(number)["JobState"] == "PENDING", 30)
    saved = max(int(path.name) for path in (folder / "checkpoints").glob("[0-9]*"))
    assert 30 <= saved < STEPS, "the requeue came too late to show anything"
    # Slurm holds a requeued job back for two minutes, in which its first start ends.
    idle = {"idle"}
    wait_until(lambda: set(call("sinfo", "-h", "-o", "%T", env=cluster.env).split()) == idle, 60)
    call("scontrol", "update", f"JobId={number}", "StartTime=now", env=cluster.env)
    job = cluster.ended(number)
    log = cluster.log(number)
    assert job["JobState"] == "COMPLETED", log
    assert f"{STAGE}: {STEPS - saved} steps on 2 nodes x 1 processes, start 2" in log
    assert losses(tmp_path) == losses(local)
    assert manifest(tmp_path)["bits_per_byte"] == manifest(local)["bits_per_byte"]
    assert not list(folder.parent.glob("*.old-*")), "FORCE=1 set the run aside at its second start"


@pytest.mark.slow
def test_a_wrong_number_of_nodes_is_refused_with_one_line(cluster: Cluster, tmp_path: Path) -> None:
    number = cluster.sbatch("--nodes=2", SCALE="full")
    job = cluster.ended(number)
    lines = cluster.log(number).splitlines()
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0"), lines
    assert len(lines) == 1, lines
    problem, _, command = lines[0].partition("; submit it so: ")
    assert problem == (
        f"error: {STAGE} at SCALE=full needs 384 processes (dp 192 x tp 2 x cp 1 x pp 1), this job "
        "has 2 nodes x 8 GPUs"
    )
    assert command.startswith("RUNS=")  # the same folders as this job's
    assert command.endswith(f" SCALE=full sbatch --nodes=48 launch/pretrain.slurm {STAGE}")
    assert not (tmp_path / "full").exists()


@pytest.mark.parametrize(
    ("device", "nodes", "gpus", "expected"),
    [
        ("gpu", 48, 8, 8),
        ("gpu", 96, 4, 4),
        ("gpu", 48, 0, 8),  # a site whose Slurm does not count GPUs
        ("cpu", 2, 8, 192),  # the nodes' GPUs are not used
        ("gpu", 2, 8, "--nodes=48 launch"),
        ("gpu", 2, 5, "--nodes=96 --gpus-per-node=4 launch"),
        ("cpu", 5, 0, "--nodes=1 launch"),
    ],
)
def test_processes_per_node_make_up_the_layout_or_the_line_that_does_is_named(
    device: str, nodes: int, gpus: int, expected: int | str
) -> None:
    stage = resolve(STAGE, load_scale("full"))
    assert isinstance(stage, PretrainStage)
    run = replace(stage, recipe=replace(stage.recipe, device=device))
    if isinstance(expected, int):
        assert processes_per_node(run, nodes, gpus) == expected
    else:
        with pytest.raises(UserError, match=expected):
            processes_per_node(run, nodes, gpus)
