"""How many processes a stage needs, and the sbatch line for a machine or job that lacks them."""

from typing import Any

from launch.errors import UserError
from launch.run_folder import StageRun

GPUS_PER_NODE = 8


def world_size(recipe: dict[str, Any]) -> int:
    """Processes of a training recipe: its `world_size`, or the product of its layout."""
    if "world_size" in recipe:
        size: int = recipe["world_size"]
    else:
        layout = recipe["nanotron"]["parallelism"]
        size = layout["dp"] * layout["tp"] * layout["pp"] * layout["context_parallel_size"]
    return size


def _layout(recipe: dict[str, Any]) -> str:
    if "world_size" in recipe:
        return ""
    layout = recipe["nanotron"]["parallelism"]
    names = {"dp": "dp", "tp": "tp", "cp": "context_parallel_size", "pp": "pp"}
    return f" ({' x '.join(f'{short} {layout[name]}' for short, name in names.items())})"


def _sbatch(run: StageRun, options: str) -> str:
    return f"SCALE={run.scale} sbatch {options} launch/{run.engine}.slurm {run.stage}"


def refuse_without_gpus(run: StageRun) -> None:
    """Exit with the sbatch line when this machine lacks the GPUs that the recipe needs."""
    if run.recipe["device"] == "cpu":
        return
    import torch

    needed, found = world_size(run.recipe), torch.cuda.device_count()
    if found < needed:
        raise UserError(
            f"{run.stage} at SCALE={run.scale} needs {needed} GPUs{_layout(run.recipe)}, this "
            f"machine has {found}; on the cluster: "
            f"{_sbatch(run, f'--nodes={-(-needed // GPUS_PER_NODE)}')}"
        )


def processes_per_node(run: StageRun, nodes: int, gpus_per_node: int) -> int:
    """Processes on each node of a Slurm job: one a GPU, or an even share where none are used.

    Refuses a job whose nodes do not make up the recipe's processes.
    """
    needed = world_size(run.recipe)
    on_gpus = gpus_per_node > 0 and run.recipe["device"] != "cpu"
    each = gpus_per_node if on_gpus else needed // nodes
    if each * nodes == needed:
        return each
    most = gpus_per_node if on_gpus else needed
    fitting = next(n for n in range(-(-needed // most), needed + 1) if needed % n == 0)
    options = f"--nodes={fitting}"
    if on_gpus and needed // fitting != gpus_per_node:
        options += f" --gpus-per-node={needed // fitting}"
    raise UserError(
        f"{run.stage} at SCALE={run.scale} needs {needed} processes{_layout(run.recipe)}, this job "
        f"has {nodes} nodes{f' x {each} GPUs' if on_gpus else ''}; submit it so: "
        f"{_sbatch(run, options)}"
    )
