"""The command line behind `make` and the Slurm scripts: `python -m launch --help`."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.errors import UserError, disk_error

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
Stage = Annotated[str, typer.Argument(help="a stage of recipes/pipeline.yaml, or a recipe file")]
Scale = Annotated[str, typer.Option(envvar="SCALE", help="a file of recipes/scales/")]


@app.command()
def run(stage: Stage, scale: Scale) -> None:
    """Run a stage and whatever it takes; what is finished is left alone."""
    from launch.stages import is_forced, resolve, run_stage

    resolved = resolve(stage, scale)
    if not run_stage(resolved, is_forced()):
        print(f"{resolved.stage}: up to date, {resolved.folder}")


@app.command()
def diff(stage: Stage, scale: Scale) -> None:
    """Print what a scale changes of a stage's recipe, and why."""
    from rich.console import Console
    from rich.table import Column, Table

    from launch.diff import stage_changes
    from launch.recipe import load_scale

    found = stage_changes(stage, scale)
    key = Column("key", overflow="fold", ratio=3)
    table = Table(key, "published", scale, Column("why", ratio=2))
    origin = load_scale(scale)["origin"]
    table.add_row("(data)", "hub", origin, "recipes/sources.yaml says what stands in")
    for change in found:
        name = change.key.removeprefix("nanotron.")
        table.add_row(name, str(change.before), str(change.after), change.why)
    Console().print(table)


@app.command()
def ablation(
    name: Annotated[str, typer.Argument(help="a row of recipes/ablations.yaml")], scale: Scale
) -> None:
    """Run one change against its baseline over three seeds; print and store the table."""
    from launch.ablation import run_ablation

    run_ablation(name, scale)


@app.command(name="merge-sweep")
def merge_sweep(
    scale: Scale,
    partner: Annotated[str, typer.Option(envvar="PARTNER", help="a stage or a folder")] = "",
) -> None:
    """Score the soup merged with a partner at weights 0 to 1; draw what it gains and costs."""
    from launch.merge_sweep import run_sweep

    run_sweep(partner, scale)


@app.command("eval")
def evaluate(
    scale: Scale,
    model: Annotated[str, typer.Option(envvar="MODEL", help="folders or hub ids, commas between")],
    suite: Annotated[str, typer.Option(envvar="SUITE", help="a file of recipes/eval/")] = "local",
    limit: Annotated[int, typer.Option(envvar="LIMIT", help="items a task; 0: all")] = 0,
) -> None:
    """Score checkpoints on a suite; writes runs/<scale>/evaluation/<suite>.json."""
    from launch.evaluate import evaluate_models

    evaluate_models(model.split(","), suite, scale, limit)


@app.command("win-rate")
def win_rate(
    suite: Annotated[
        str, typer.Option(envvar="SUITE", help="base, no_think or think of published.yaml")
    ] = "base",
    scores: Annotated[
        str,
        typer.Option(envvar="SCORES", help="YAML of your models: {model: {benchmark: percent}}"),
    ] = "",
) -> None:
    """Print the pairwise win rates of the published models, with your own among them."""
    from launch.win_rate import show_win_rates

    show_win_rates(suite, Path(scores) if scores else None)


@app.command("eval-reference")
def evaluate_reference(store: bool = False) -> None:
    """Score SmolLM2-135M on the local suite and compare with the stored figures, or store them."""
    from launch.eval_reference import eval_reference

    eval_reference(store)


@app.command("eval-longctx")
def eval_longctx(
    scale: Scale,
    model: Annotated[str, typer.Option(envvar="MODEL", help="a transformers folder")] = "",
    corpus: Annotated[
        str, typer.Option(envvar="CORPUS", help="jsonl file or folder of texts")
    ] = "",
    limit: Annotated[int, typer.Option(envvar="LIMIT", help="samples a cell; 0: the suite's")] = 0,
    chat: Annotated[
        bool, typer.Option(envvar="CHAT", help="in the model's chat template: 1 or 0")
    ] = False,
) -> None:
    """Score the long-context set; the scale's release and held-out text where none is named."""
    from launch.long_context import evaluate_long_context
    from launch.run_folder import runs_root

    runs = runs_root() / scale
    texts = Path(corpus) if corpus else runs / "data-longctx" / "held_out.jsonl"
    folder = Path(model) if model else runs / "release"
    name = f"{folder.parent.name}-hf" if folder.name == "hf" else folder.name
    target = runs / "longctx" / (f"{name}-chat" if chat else name)
    print(evaluate_long_context(folder, texts, target, limit, chat))


@app.command()
def chat(
    scale: Scale,
    model: Annotated[str, typer.Option(envvar="MODEL", help="a transformers folder")] = "",
    mode: Annotated[str, typer.Option(envvar="MODE", help="think or no_think")] = "no_think",
) -> None:
    """Talk to a checkpoint; the scale's release where none is named."""
    from launch.chat import chat as talk
    from launch.run_folder import runs_root

    talk(Path(model) if model else runs_root() / scale / "release", mode)


@app.command()
def prepare(stage: Stage, scale: Scale) -> None:
    """Write a training job, at the step to go on from (launch/*.slurm)."""
    from launch.recipe import load_scale
    from launch.stages import is_forced, resolve, run_stage

    resolved = resolve(stage, scale)
    if not is_forced() and resolved.is_finished():
        print(f"{resolved.stage}: up to date, {resolved.folder}")
        return
    for taken in resolved.inputs.values():
        run_stage(taken)
    resolved.begin(load_scale(scale)["rerun_on_change"], is_forced())
    _trainer(resolved).prepare(resolved)


@app.command()
def finish(stage: Stage, scale: Scale) -> None:
    """Write the results of a training stage whose last step is done."""
    from launch.stages import ENGINE_OF, resolve

    resolved = resolve(stage, scale)
    if not resolved.is_finished():
        resolved.finish(**_trainer(resolved).finish(resolved))
    ENGINE_OF[resolved.engine].show(resolved)


@app.command()
def job(
    stage: Stage,
    scale: Scale,
    nodes: int = 1,
    gpus_per_node: int = 0,
    engine: Annotated[str, typer.Option(help="pretrain | posttrain")] = "pretrain",
) -> None:
    """Print a Slurm job's processes per node, device, steps left and run folder, or refuse it."""
    from launch.slurm import processes_per_node
    from launch.stages import resolve

    run = resolve(stage, scale)
    trainer = _trainer(run)
    if run.engine != engine:
        raise UserError(
            f"{run.stage} is no stage of that script: SCALE={scale} sbatch "
            f"launch/{run.engine}.slurm {run.stage}"
        )
    each = processes_per_node(run, nodes, gpus_per_node)
    print(each, run.recipe["device"], trainer.steps_left(run), run.folder)


def _trainer(run: Any) -> Any:
    """launch's module for a stage that a Slurm script trains."""
    from launch import posttrain, pretrain

    modules = {"pretrain": pretrain, "posttrain": posttrain}
    if run.engine not in modules:
        raise UserError(f"{run.stage} trains nothing: make {run.stage} SCALE={run.scale}")
    return modules[run.engine]


@app.command()
def folder(stage: Stage, scale: Scale) -> None:
    """Print a stage's run folder."""
    from launch.stages import resolve

    print(resolve(stage, scale).folder)


def main() -> None:
    """Exit 2 with one line for a user's mistake, 130 when interrupted."""
    try:
        app()
    except UserError as error:
        sys.exit(_fail(str(error), 2))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted; the same command goes on from the last checkpoint", 130))
    except Exception as error:
        line = disk_error(error) or (str(error) if _is_users(error) else None)
        if line is None:
            raise
        sys.exit(_fail(line, 2))


def _is_users(error: Exception) -> bool:
    """The engines' own one-line errors."""
    from datatrove_pipelines.executors import WorkerDied
    from datatrove_pipelines.sources import ShardError
    from datatrove_pipelines.standin import StandInError
    from datatrove_pipelines.standin_chat import ChatError
    from datatrove_pipelines.tokenizer import TokenizerError
    from nanotron_ext.checkpoint import ConvertError
    from nanotron_ext.dataloader import DataError
    from posttrain.errors import PosttrainError

    data = (StandInError, ShardError, TokenizerError, WorkerDied, ChatError)
    return isinstance(error, (*data, DataError, ConvertError, PosttrainError))


def _fail(message: str, status: int) -> int:
    color = "\033[31m" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ""
    print(f"{color}error:{color and chr(27) + '[0m'} {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
