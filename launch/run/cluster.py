"""How many processes a stage needs, the sbatch line where they lack, and its steps in a Slurm job."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from ground.errors import SAVED, UserError
from ground.files import checkpoints
from ground.processes import PARENT, Stopped, command
from ground.tracking import check, watched
from launch.run.child import lines_from, run_child
from launch.run.folder import StageRun

GPUS_PER_NODE = 8
# More processes per CPU core than this are a mistake, not a layout.
PROCESSES_PER_CORE = 4
# Variables of a command line that a job needs too.
PASSED_ON = ("RUNS", "CACHE", "TRACK")
# As srun reports a task that has saved, or that USR1 ended before there was anything to save.
TASK_STOPPED = re.compile(rf"srun: error: .*(exit code {SAVED}$|: User defined signal 1$)")
ZERO3 = Path(__file__).parent.parent / "accelerate" / "zero3.yaml"


class TrainedStage(StageRun):
    """A stage trained by many processes: what this file needs from it."""

    script: ClassVar[str]  # the script of launch/ that runs it on a cluster
    module: ClassVar[str]  # what each of its processes runs: `python -m <module> <run folder>`
    only_steps: ClassVar[
        tuple[str, ...]
    ] = ()  # arguments after these, where one node does the rest
    # Whether it writes data of its own before its steps, which one node does for all.
    prepares_data: ClassVar[bool] = False

    @property
    def device(self) -> str:
        """gpu | cpu"""
        raise NotImplementedError

    @property
    def world_size(self) -> int:
        """Processes that the recipe asks for."""
        raise NotImplementedError

    @property
    def size_key(self) -> str:
        """The key of the recipe that asks for the most of them."""
        raise NotImplementedError

    @property
    def layout(self) -> str:
        """The factors of `world_size`, as text."""
        return ""

    @property
    def is_fitted(self) -> bool:
        """Whether the layout follows the GPUs: what a scale file's `layout: fit` says."""
        return bool(self.recipe.layout == "fit")

    @property
    def steps_left(self) -> int:
        """0 once the last step is done."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Write the job, for the step to continue from."""
        raise NotImplementedError

    @property
    def is_prepared(self) -> bool:
        """Whether the data of its own is there."""
        return True

    def train(self, lock: int) -> None:
        """Run the steps that are left, on this machine."""
        raise NotImplementedError

    def results(self) -> dict[str, object]:
        """The manifest's results of a stage whose last step is done."""
        raise NotImplementedError

    def work(self, lock: int) -> dict[str, object]:
        self.prepare()
        with watched(self.folder, self.is_paused):
            self.train(lock)
        return self.results()

    def is_paused(self, step: int) -> bool:
        """Whether after this step something else is done, for longer than a step."""
        return self.steps_left <= 0

    def refuse_layout(self) -> None:
        """Raise UserError where the layout was to be fitted to the GPUs and cannot be."""

    def refuse_recipe(self) -> None:
        """Raise UserError for what no machine can do."""

    def refuse_loss(self, lost: str) -> None:
        if not self.rerun_on_change and not checkpoints(self.folder):
            raise UserError(
                f"{lost}, and {self.folder / 'checkpoints'} has none to make it from; "
                f"`{self.command} FORCE=1` trains it again"
            )

    def refuse(self) -> None:
        check()
        self.refuse_recipe()
        refuse_without_processors(self)

    def sbatch(self, options: str) -> str:
        return sbatch(self, self.script, options)


def sbatch(run: StageRun, script: str, options: str = "") -> str:
    """The command line that submits a script of launch/ for a stage."""
    target = shlex.quote(str(run.file)) if run.is_own else run.stage
    names = [*PASSED_ON]
    if isinstance(run, TrainedStage) and run.is_fitted:  # inside a job GPUS is set from its nodes
        names += ["GPU_GB"] if "SLURM_JOB_ID" in os.environ else ["GPU_GB", "GPUS"]
    given = [f"{v}={shlex.quote(os.environ[v])}" for v in names if os.environ.get(v)]
    words = [*given, run.arguments, "sbatch", options, f"launch/{script}", target]
    return " ".join(word for word in words if word)


def refuse_without_processors(run: TrainedStage) -> None:
    """Exit with the sbatch line when this machine lacks the GPUs that the recipe needs."""
    needed = run.world_size
    if run.device == "cpu":
        cores = os.cpu_count() or 1
        if needed > PROCESSES_PER_CORE * cores:
            raise UserError(
                f"{run.where(run.size_key)}: {run.stage} at {run.arguments} needs {needed} "
                f"processes{run.layout}, this machine has {cores} cores ({run.where('device')}: "
                "cpu); lower it"
            )
        return
    import torch

    found = torch.cuda.device_count()
    if found < needed:
        hint = (
            " (is torch's CUDA build installed? A scale with `device: cpu` runs without a GPU)"
            if run.is_fitted and not found
            else ""
        )
        raise UserError(
            f"{run.stage} at {run.arguments} needs {needed} GPU{'s' * (needed > 1)}{run.layout}, "
            f"this machine has {found}{hint}; on the cluster: {run.sbatch(f'--nodes={-(-needed // GPUS_PER_NODE)}')}"
        )


def processes_per_node(run: TrainedStage, nodes: int, gpus_per_node: int) -> int:
    """Processes on each node of a Slurm job: one per GPU, or an even share where none are used.

    Refuses a job whose nodes do not make up the recipe's processes.
    """
    run.refuse_layout()
    needed = run.world_size
    on_gpus = gpus_per_node > 0 and run.device != "cpu"
    each = gpus_per_node if on_gpus else needed // nodes
    if each * nodes == needed:
        return each
    most = gpus_per_node if on_gpus else needed
    fitting = next(n for n in range(-(-needed // most), needed + 1) if needed % n == 0)
    options = f"--nodes={fitting}"
    if on_gpus and needed // fitting != gpus_per_node:
        options += f" --gpus-per-node={needed // fitting}"
    raise UserError(
        f"{run.stage} at {run.arguments} needs {needed} processes{run.layout}, this job has {nodes} "
        f"nodes{f' x {each} GPUs' if on_gpus else ''}; submit it so: {run.sbatch(options)}"
    )


def train_on_nodes(run: TrainedStage, each: int, lock: int) -> None:
    """Run the steps that are left on all nodes of this Slurm job, `each` processes on a node.

    Raises Stopped where they were asked to end before the last step, and have saved.
    """
    job, nodes, log = os.environ["SLURM_JOB_ID"], os.environ["SLURM_NNODES"], run.folder / "log.txt"
    # The job's first node has rank 0. Its name need not resolve, its address does.
    node = ["scontrol", "show", "node", os.environ["SLURMD_NODENAME"], "--oneliner"]
    described = subprocess.run(node, capture_output=True, text=True, check=True).stdout
    address = described.partition(" NodeAddr=")[2].split()[0]
    port = str(20000 + int(job) % 10000)  # below the kernel's own ports
    threads = max(int(os.environ["SLURM_CPUS_ON_NODE"]) // each, 1)
    environment = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        # Published: one hardware queue keeps tensor-parallel communication in issue order.
        "CUDA_DEVICE_MAX_CONNECTIONS": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "1"),
        **({"CUDA_VISIBLE_DEVICES": ""} if run.device == "cpu" else {}),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "WORLD_SIZE": str(run.world_size),
    }
    steps = "" if run.prepares_data else f"{run.steps_left} steps "  # else it follows from the data
    print(f"{run.stage}: {steps}on {nodes} nodes x {each} processes, {address}:{port}", flush=True)
    begin = log.stat().st_size if log.exists() else 0
    try:
        command = srun(run, int(nodes), each, address, port)
        run_child(command, log, run.stage, lock=lock, environment=environment)
    except RuntimeError:
        if not any(TASK_STOPPED.search(line) for line in lines_from(log, begin)):
            raise
        raise Stopped(f"{run.stage}: stopped by a signal: what it has done is saved") from None


def srun(run: TrainedStage, nodes: int, each: int, address: str, port: str) -> list[str]:
    """The Slurm step: a task for each process, or one a node where accelerate starts its processes."""
    job = ["-m", run.module, str(run.folder), *run.only_steps]
    tasks, words = each, [sys.executable, *job]
    shell = 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"'
    if run.module == "posttrain.stage" and run.device == "gpu":  # it passes DeepSpeed's settings on
        tasks, last = 1, len(job)
        shell = f'exec "${{@:1:$#-{last}}}" --machine_rank $SLURM_NODEID "${{@: -{last}}}"'
        words = ["accelerate.commands.accelerate_cli", "launch", "--config_file", str(ZERO3)]
        words += ["--num_machines", str(nodes), "--num_processes", str(nodes * each)]
        words += ["--main_process_ip", address, "--main_process_port", port]
        words = command(*words, *job, launches=True)
    return [
        # --export: even after `sbatch --export=NONE`. --cpu-bind: a task is not one core.
        # --kill-on-bad-exit: or all nodes wait for a dead one until a collective times out.
        *("srun", "--export=ALL", f"--nodes={nodes}", f"--ntasks={nodes * tasks}"),
        *(f"--ntasks-per-node={tasks}", "--overcommit", "--distribution=block", "--cpu-bind=none"),
        *("--kill-on-bad-exit=1", "--label", "--input=none"),
        *("bash", "-c", f"unset {PARENT}; {shell}", "task", *words),  # its parent is Slurm's
    ]
