"""The layout of a pretraining stage on the GPUs at hand: fitted, refused, changed between starts."""

from pathlib import Path
from typing import TYPE_CHECKING

from ground.errors import UserError
from launch.machine.fit import fit, fit_if_possible
from launch.machine.gpus import given, gpus_for
from launch.machine.memory import memory
from launch.recipe.pretrain import Nanotron
from launch.recipe.scale_file import ScaleFile

if TYPE_CHECKING:
    from launch.stages.pretrain import PretrainStage


def laid_out(nanotron: Nanotron, says: ScaleFile) -> Nanotron:
    """The recipe in its own layout, or in one for the GPUs at hand, as the scale file says."""
    if says.layout == "recipe":
        return nanotron
    return fit_if_possible(nanotron, gpus_for(says.device))


def refuse_layout(run: "PretrainStage") -> None:
    """A layout that is to be fitted must fit, and must not show in the loss."""
    nanotron, key = run.recipe.nanotron, "nanotron.tokens.loss_mean_over"
    if run.recipe.layout == "recipe":
        return
    if nanotron.tokens.loss_mean_over != "tokens":
        raise UserError(
            f"{run.where(key)}: {nanotron.tokens.loss_mean_over}: with layout: fit "
            f"({run.where('layout')}) the loss would depend on the GPUs; write tokens"
        )
    try:
        fit(nanotron, gpus_for(run.device))
    except UserError as error:
        raise UserError(
            f"{run.arguments}{given()}: {run.stage}: {error} ({run.where('layout')}: fit)"
        ) from None


def memory_remedy(run: "PretrainStage") -> str:
    """What helps where a GPU's memory does not suffice after all."""
    nanotron = run.recipe.nanotron
    if run.recipe.layout == "fit":
        least = memory(nanotron).total / 2**30
        return (
            f"give a GPU_GB= below {least:.0f}: the layout is fitted anew, and the run goes on from "
            "its last checkpoint"
        )
    if not nanotron.parallelism.recompute_layer:
        return f"write true for {run.where('nanotron.parallelism.recompute_layer')}"
    return f"lower {run.where('nanotron.tokens.micro_batch_size')}, or raise parallelism.tp"


def recut_for(run: "PretrainStage", checkpoint: Path) -> Path:
    """The checkpoint with its optimizer states cut for the run's replicas."""
    from nanotron_ext.recut import recut

    dp, zero_stage = (
        run.recipe.nanotron.parallelism.dp,
        run.recipe.nanotron.optimizer.zero_stage,
    )
    found = recut(checkpoint, run.folder / "recut", dp, zero_stage)
    if found != checkpoint:
        print(
            f"{run.stage}: {checkpoint}: optimizer states cut for dp {dp}, ZeRO stage {zero_stage}",
            flush=True,
        )
    return found
