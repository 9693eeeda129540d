"""launch/*.slurm on a real Slurm: four nodes on this machine, started and ended here."""

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

import psutil
import pytest
import yaml
from conftest import ROOT, metrics

from ground.errors import UserError
from launch.recipe.scale import load_scale
from launch.run.cluster import TrainedStage, processes_per_node, srun
from launch.stages.pretrain import PretrainStage
from launch.tools.submit import chain
from launch.walk import resolve

NEEDED = ("slurmctld", "slurmd")
PACKAGES = "apt-get install --no-install-recommends slurm-wlm munge shellcheck"
STAGE, NODES = "pretrain-stage1", ("n1", "n2", "n3", "n4")
CODE = (
    "ground",
    "launch",
    "nanotron_ext",
    "datatrove_pipelines",
    "posttrain",
    "eval_tasks",
    "recipes",
)


def need(*programs: str) -> None:
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        pytest.skip(f"NOT TESTED: launch/*.slurm: no {', '.join(missing)} here: {PACKAGES}")


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
SlurmctldPort={port}
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
KillWait=20
SlurmdTimeout=10
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=n[1-4] NodeHostname={host} NodeAddr=127.0.0.1 Port={ports} CPUs=2 RealMemory=1000 Gres=gpu:8
PartitionName=test Nodes=n[1-4] Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Cluster:
    """A checkout of our own with a scale of its own, and the Slurm to submit it to."""

    checkout: Path
    env: dict[str, str]

    @property
    def daemons(self) -> dict[str, int]:
        """The process id of each node's slurmd."""
        files = Path(self.env["SLURM_CONF"]).parent.glob("slurmd.*.pid")
        return {file.name.split(".")[1]: int(file.read_text()) for file in files}

    def sbatch(
        self, *options: str, script: str = "pretrain", stage: str = STAGE, **environment: str
    ) -> str:
        command = ("sbatch", "--parsable", *options, f"launch/{script}.slurm", stage)
        return call(*command, env=self.env | environment, cwd=self.checkout)

    def interrupt(self, number: str, is_time: Callable[[], bool]) -> None:
        """As `--signal` does before the time limit: USR1 to all tasks, and not to the script."""
        wait_until(is_time, 300, lambda: self.log(number)[-4000:])
        call("scancel", "--signal=USR1", number, env=self.env)
        self.start_again(number)

    def start_again(self, number: str, restarts: int = 1, seconds: float = 60) -> None:
        """Slurm holds a requeued job back for two minutes; here for seconds, or its credential is still revoked."""

        def waits() -> bool:
            job = self.job(number)
            return job["Restarts"] == str(restarts) and job["JobState"] == "PENDING"

        def is_over() -> bool:
            return not call("squeue", "--noheader", "--states=CG", env=self.env)

        for holds in (waits, is_over):
            wait_until(holds, seconds, lambda: f"{self.job(number)}\n{self.log(number)[-4000:]}")
        call("scontrol", "update", f"JobId={number}", "StartTime=now+3", env=self.env)

    def kill_on_last_node(self, number: str, is_node: bool) -> str:
        """End what the job runs on its last node, at once, and the node too; returns its name."""
        nodes = self.job(number)["NodeList"]
        node = call("scontrol", "show", "hostnames", nodes, env=self.env).split()[-1]
        of_task = {"SLURMD_NODENAME": node, "SLURM_CONF": self.env["SLURM_CONF"]}.items()
        doomed = {p for p in psutil.process_iter() if of_task <= environment_of(p).items()}
        assert doomed
        if is_node:
            doomed |= {s for p in doomed for s in p.parents() if s.name().startswith("slurmstepd")}
            doomed.add(psutil.Process(self.daemons[node]))
        for process in doomed:
            process.kill()
        return node

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
        return "".join(path.read_text() for path in self.checkout.glob(f"slurm-*-{number}.log"))


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """munged, slurmctld and four slurmd with eight pretended GPUs each; yields the environment."""
    need(*NEEDED)
    root = tmp_path_factory.mktemp("slurm")
    for folder in ("state", *(f"spool/{node}" for node in NODES)):
        (root / folder).mkdir(parents=True)
    user, host = getpass.getuser(), socket.gethostname().split(".")[0]
    port, *ports = free_ports(5)
    conf = SLURM_CONF.format(
        root=root, user=user, host=host, port=port, ports=f"[{','.join(map(str, ports))}]"
    )
    (root / "slurm.conf").write_text(conf)
    for number in range(8):
        (root / f"gpu{number}").touch()
    (root / "gres.conf").write_text(f"NodeName=n[1-4] Name=gpu File={root}/gpu[0-7]\n")
    key = root / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(1024))
    env = os.environ | {"SLURM_CONF": str(root / "slurm.conf")}
    munged = ["munged", "--foreground", "--force", f"--key-file={key}"]
    munged += [f"--{name}-file={root}/munged.{name}" for name in ("pid", "log", "seed")]
    munged += [f"--socket={root}/munge.socket"]
    daemons = [
        ["slurmctld", "-D", "-c"],
        *(["slurmd", "-D", "-N", node] for node in NODES),
    ]
    started: list[subprocess.Popen[bytes]] = []
    try:
        with (root / "daemons.log").open("w") as log:
            started.append(subprocess.Popen(munged, env=env, stdout=log, stderr=log))
            wait_until((root / "munge.socket").exists, 10)
            for daemon in daemons:
                started.append(subprocess.Popen(daemon, env=env, stdout=log, stderr=log))
        wait_until(lambda: _idle_nodes(env) == 4, 30, (root / "daemons.log").read_text)
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
    """The code, with a scale whose run lasts seconds and in which SFT comes after pretraining."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in CODE:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".venv").symlink_to(sys.prefix)
    pipeline = yaml.safe_load((folder / "recipes/pipeline.yaml").read_text())
    pipeline["stages"]["sft"]["takes"] = ["tokenizer", "data-chats", STAGE]
    pipeline["stages"]["eval"]["takes"] = ["sft"]
    (folder / "recipes/pipeline.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    (folder / "recipes/scales/small.yaml").write_text(yaml.safe_dump(small_scale()))
    return folder


def small_scale() -> dict[str, Any]:
    dial: dict[str, Any] = yaml.safe_load((ROOT / "recipes/scales/tiny.yaml").read_text())
    dial |= {"scale": "small", "windows_divided_by": 64, "steps_divided_by": 4_720_000 // 164}
    dial["held_out"] |= {"bytes_per_category": 2000}
    section = dial["nanotron"]
    section["checkpoints"]["checkpoint_interval"] = 50
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    section["model"]["model_config"] |= sizes
    section["tokens"]["micro_batch_size"] = 1
    post = dial["posttrain"]
    post["every_stage"]["world_size"] = 2
    post["every_stage"]["scores"] |= {"prompts": 0, "prompts_at_end": 2, "max_new_tokens": 8}
    post["every_stage"]["trl"] |= {"per_device_train_batch_size": 2, "logging_steps": 1}
    post["stages"]["sft"]["trl"]["max_steps"] = 8
    suite = yaml.safe_load((ROOT / "recipes/eval/local.yaml").read_text())
    rows = [row["name"] for row in suite["rows"] if row["name"] != "PIQA"]
    runs = [{"model": "sft/hf", "suite": "local"}]
    dial["evaluation"] |= {"runs": runs, "limit": 4, "leave_out": rows}
    return dial


@pytest.fixture(scope="module")
def local(checkout: Path) -> Path:
    """RUNS of the same stages run on this machine by `python -m launch run`."""
    env = _environment(checkout / "local")
    call(sys.executable, "-m", "launch", "run", "sft", env=env, cwd=checkout)
    return checkout / "local"


def _environment(runs: Path) -> dict[str, str]:
    own = {
        "SCALE": "small",
        "RUNS": str(runs),
        "CACHE": os.environ.get("CACHE") or str(ROOT / ".cache"),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",  # all nodes are this machine
    }
    return {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))} | own


@pytest.fixture
def cluster(slurm: dict[str, str], checkout: Path, local: Path, tmp_path: Path) -> Cluster:
    """RUNS of the test's own, all that pretraining takes from the local run."""
    for stage in ("tokenizer", "held-out", "eval-texts", "data-stage1", "data-chats"):
        shutil.copytree(local / "small" / stage, tmp_path / "small" / stage)
    return Cluster(checkout, slurm | _environment(tmp_path))


def losses(runs: Path, stage: str = STAGE) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics(runs / "small" / stage)]


def manifest(runs: Path, stage: str = STAGE) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((runs / "small" / stage / "manifest.json").read_text())
    return found


def weights(runs: Path, stage: str = STAGE) -> bytes:
    return (runs / "small" / stage / "hf/model.safetensors").read_bytes()


def test_the_scripts_pass_shellcheck() -> None:
    need("shellcheck")
    scripts = [*(ROOT / "launch").glob("*.slurm"), ROOT / "launch/stage.sh"]
    command = ["shellcheck", *map(str, scripts)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_a_chain_interrupted_by_usr1_ends_in_the_bits_of_one_machine(
    cluster: Cluster, local: Path, tmp_path: Path
) -> None:
    """`make submit`: data, pretraining and SFT on two nodes each, eval; USR1 in both trainings."""
    shutil.rmtree(tmp_path / "small/data-stage1")
    stages = f"data-stage1 {STAGE} sft eval"
    command = (sys.executable, "-m", "launch", "submit", "--stages", stages)
    lines = call(*command, env=cluster.env, cwd=cluster.checkout).splitlines()
    assert [line.split()[-3] for line in lines] == [
        "data-stage1", STAGE, STAGE, "sft", "sft", "sft", "eval",
    ]  # fmt: skip
    numbers = [line.split()[-1] for line in lines]
    cluster.interrupt(numbers[1], lambda: len(losses_so_far(tmp_path, STAGE)) > 20)
    cluster.interrupt(numbers[4], lambda: len(losses_so_far(tmp_path, "sft")) > 2)
    for number in numbers:
        assert cluster.ended(number)["JobState"] == "COMPLETED", cluster.log(number)
    logs = [cluster.log(number) for number in numbers]
    for stage, log in ((STAGE, logs[1]), ("sft", logs[4])):
        assert log.count(" on 2 nodes x 1 processes") == 2, log
        assert f"{stage}: saved before its end, queued again" in log
        assert losses(tmp_path, stage) == losses(local, stage)
        assert weights(tmp_path, stage) == weights(local, stage)
    assert manifest(tmp_path)["bits_per_byte"] == manifest(local)["bits_per_byte"]
    assert manifest(tmp_path, "sft")["scores"] == manifest(local, "sft")["scores"]
    sft = tmp_path / "small/sft"
    assert (sft / "before.json").stat().st_mtime > (sft / "metrics.jsonl").stat().st_mtime
    assert [row["task"] for row in manifest(tmp_path, "eval")["evaluation"]] == ["PIQA"]
    # Nothing of it is left to do.
    printed = call(*command, env=cluster.env, cwd=cluster.checkout)
    assert printed == f"data-stage1, {STAGE}, sft, eval: up to date"


def losses_so_far(runs: Path, stage: str) -> list[str]:
    file = runs / "small" / stage / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.slow
def test_a_node_that_fails_is_left_out(cluster: Cluster, local: Path, tmp_path: Path) -> None:
    """First a node's process dies, as after an error of its GPU, then a node as a whole."""
    number = cluster.sbatch("--nodes=2", FORCE="1")
    left_out = []
    for restarts, (steps, is_node) in enumerate([(10, False), (60, True)], start=1):
        wait_until(
            lambda at=steps: len(losses_so_far(tmp_path, STAGE)) > at,
            60,
            lambda: f"{cluster.job(number)} {cluster.log(number)[-400:]}",
        )
        left_out.append(cluster.kill_on_last_node(number, is_node))
        cluster.start_again(number, restarts)
        log = cluster.log(number)
        assert f"queued again without {left_out[-1]}" in log, log
    job, log = cluster.ended(number), cluster.log(number)
    excluded = call("scontrol", "show", "hostnames", job["ExcNodeList"], env=cluster.env).split()
    assert (job["JobState"], excluded) == ("COMPLETED", sorted({*left_out})), log
    assert len(excluded) == 2, "the second start was on the node that failed"
    assert f"{STAGE}: 70 steps on 2 nodes" in log, log
    assert losses(tmp_path) == losses(local)
    folder = tmp_path / "small" / STAGE
    assert not list(folder.parent.glob("*.old-*")), "FORCE=1 set the run aside at its second start"


@pytest.mark.slow
def test_a_job_that_cannot_train_is_refused_with_one_line(cluster: Cluster, tmp_path: Path) -> None:
    jobs = [
        (cluster.sbatch("--nodes=2", SCALE="full"), f"{STAGE} at SCALE=full needs 384 processes"),
        (cluster.sbatch("--nodes=2", script="posttrain", stage="sft"),
         f"sft at SCALE=small takes what is not there: {STAGE}; this job only trains"),
    ]  # fmt: skip
    for number, problem in jobs:
        job, lines = cluster.ended(number), cluster.log(number).splitlines()
        assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0"), lines
        assert len(lines) == 1 and lines[0].startswith(f"error: {problem}"), lines
        assert job["Restarts"] == "0"
    assert cluster.log(jobs[0][0]).endswith(
        f" SCALE=full sbatch --nodes=48 launch/pretrain.slurm {STAGE}\n"
    )
    assert not (tmp_path / "full").exists()


@pytest.mark.slow
def test_failures_are_bounded_and_a_cancelled_job_stays_so(
    slurm: dict[str, str], checkout: Path, tmp_path: Path
) -> None:
    """With a program in the place of Python that fails, or that lasts."""
    cluster = Cluster(checkout, slurm | _environment(tmp_path) | {"MAX_RESTARTS": "1"})
    numbers = {}
    for name, does in (("fails", "exit 1"), ("lasts", "trap 'exit 75' TERM; sleep 300 & wait")):
        program = tmp_path / name / "bin/python"
        program.parent.mkdir(parents=True)
        program.write_text(f"#!/bin/bash\n[[ $3 != folder ]] || exec echo {tmp_path}/run\n{does}\n")
        program.chmod(0o755)
        venv = str(tmp_path / name)
        numbers[name] = cluster.sbatch(script="data", stage="data-stage1", VENV=venv)
    cluster.start_again(numbers["fails"])
    assert cluster.ended(numbers["fails"])["ExitCode"] == "1:0"
    assert "failed 2 times at checkpoint none" in cluster.log(numbers["fails"])
    assert cluster.job(numbers["lasts"])["JobState"] == "RUNNING"
    call("scancel", numbers["lasts"], env=slurm)
    job = cluster.ended(numbers["lasts"])
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")


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


def test_a_chain_is_all_that_a_stage_takes_in_the_recipes_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNS", str(tmp_path))
    jobs = chain([resolve("sft", load_scale("full"))], "gpu", force=True)
    nodes = {job.run.stage: job.options for job in jobs if job.part == "train"}
    assert nodes == {
        **dict.fromkeys(("pretrain-stage1", "pretrain-stage2", "pretrain-stage3"), "--nodes=48"),
        **dict.fromkeys(("longctx-32k", "longctx-64k"), "--nodes=12"),
        **dict.fromkeys(("midtrain", "sft"), "--nodes=8"),
    }
    behind: list[set[str]] = []  # the stages whose last jobs a job waits for, at whatever distance
    for job in jobs:
        ended = {jobs[n].run.stage for n in job.after if jobs[n].part != "train"}
        behind.append(ended.union(*(behind[n] for n in job.after)))
        assert {*job.run.inputs} <= behind[-1]
    forced = [(job.run.stage, job.part) for job in jobs if job.is_forced]
    assert forced == [("sft", "prepare")]
    line = jobs[-2].line([str(100 + n) for n in range(len(jobs))])
    assert line.endswith(
        f" SCALE=full sbatch --parsable --job-name=sft-train --nodes=8 "
        f"--dependency=afterok:{100 + len(jobs) - 3} --kill-on-invalid-dep=yes "
        "launch/posttrain.slurm sft"
    )


@pytest.mark.parametrize("stage", ["sft", "pretrain-stage1"])
def test_a_step_has_a_task_a_process_or_one_a_node_for_accelerate(stage: str) -> None:
    run = resolve(stage, load_scale("full"))
    assert isinstance(run, TrainedStage)
    command = srun(run, 8, 8, "10.0.0.1", "20001")
    is_accelerated = "--main_process_ip" in command
    assert is_accelerated == (stage == "sft")
    assert f"--ntasks={8 if is_accelerated else 64}" in command
    job = ["-m", run.module, str(run.folder), *["--steps"] * is_accelerated]
    assert command[-len(job) :] == job
    if is_accelerated:  # bash puts the machine's rank before the module
        shell = command[command.index("bash") + 2]
        words = ["bash", "-c", f"SLURM_NODEID=5; {shell}", "task", "echo", "-c", *job]
        echoed = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
        assert echoed == ["-c", "--machine_rank", "5", *job]
