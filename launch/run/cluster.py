"""How many processes a stage needs, and the sbatch line for a machine or job that lacks them."""

import os
import shlex
from typing import ClassVar

from ground.errors import UserError
from ground.files import checkpoints
from launch.run.folder import StageRun

GPUS_PER_NODE = 8
# More processes per CPU core than this are a mistake, not a layout.
PROCESSES_PER_CORE = 4
# Variables of a command line that a job needs too.
PASSED_ON = ("RUNS", "CACHE")


class TrainedStage(StageRun):
    """A stage trained by many processes: what this file needs from it."""

    script: ClassVar[str]  # the script of launch/ that runs it on a cluster

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

    def train(self, lock: int) -> None:
        """Run the steps that are left, on this machine."""
        raise NotImplementedError

    def results(self) -> dict[str, object]:
        """The manifest's results of a stage whose last step is done."""
        raise NotImplementedError

    def work(self, lock: int) -> dict[str, object]:
        self.prepare()
        self.train(lock)
        return self.results()

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
        self.refuse_recipe()
        refuse_without_processors(self)

    def sbatch(self, options: str) -> str:
        target = shlex.quote(str(self.file)) if self.is_own else self.stage
        names = [*PASSED_ON]
        if self.is_fitted:  # inside a job GPUS is set from its nodes
            names += ["GPU_GB"] if "SLURM_JOB_ID" in os.environ else ["GPU_GB", "GPUS"]
        given = [f"{v}={shlex.quote(os.environ[v])} " for v in names if os.environ.get(v)]
        variables = "".join(given) + self.arguments
        return f"{variables} sbatch {options} launch/{self.script} {target}"


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
