"""The command line behind `make` and the Slurm scripts: `python -m launch --help`."""

import os
import sys
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

# typer has its own copy of click, whose base class it does not export.
from typer._click.exceptions import ClickException

from ground.errors import SAVED, UserError, disk_error, fail
from ground.processes import Stopped, is_stop, listen
from launch.tools.options import Origin, Scale, Stage, Start, Text, scale_at

if TYPE_CHECKING:
    from launch.recipe.scale import Scale as ScaleOf
    from launch.run.folder import StageRun

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _resolve(stage: str, scale: str, text: str, origin: str, start: str = "") -> "StageRun":
    from launch import walk

    def ablation_run(name: str, at: "ScaleOf") -> "StageRun":
        from launch.tools.ablation import ablation_run

        return ablation_run(name, at)

    walk.RESOLVERS["ablations/"] = ablation_run
    return walk.resolve(stage, scale_at(scale, text, origin), start)


@app.command()
def run(
    stage: Stage,
    scale: Scale,
    text: Text = "",
    origin: Origin = "",
    start: Start = "",
    part: Annotated[
        str, typer.Option(help="prepare, train or score: of a job of launch/*.slurm")
    ] = "",
) -> None:
    """Run a stage and the stages it takes; finished ones are not touched."""
    from launch.run.folder import check_roots
    from launch.tools.parts import run_part
    from launch.walk import is_forced, run_stage

    check_roots()
    resolved = _resolve(stage, scale, text, origin, start)
    done = run_part(resolved, part, is_forced()) if part else run_stage(resolved, is_forced())
    if not done:
        print(f"{resolved.stage}: up to date, {resolved.folder}")


@app.command()
def diff(
    stage: Stage, scale: Scale, text: Text = "", origin: Origin = "", start: Start = ""
) -> None:
    """Print what a scale changes of a stage's recipe, and why."""
    from launch.tools.diff import show

    if start:
        raise UserError(f"FROM={start}: diff compares the scale's own recipes; leave it out")
    show(stage, scale_at(scale, text, origin))


@app.command()
def plan(
    scale: Scale,
    text: Text = "",
    origin: Origin = "",
    gpu: Annotated[str, typer.Option(envvar="GPU", help="a row of launch/machine/cards.yaml")] = "",
    price: Annotated[
        float, typer.Option(envvar="PRICE", min=0, help="money for a GPU-hour, in any unit")
    ] = 0.0,
    start: Start = "",
) -> None:
    """Predict what each stage takes on GPUS= of a card: time, memory, disk, energy, money."""
    from launch.tools.plan import show_plan

    if start:
        raise UserError(f"FROM={start}: plan counts the scale's own model; leave it out")
    if not isfinite(price):
        raise UserError(
            f"PRICE={price}: not a sum of money; write a number from 0, or leave it out"
        )
    show_plan(scale_at(scale, text, origin), gpu, price)


@app.command("data-check")
def data_check(scale: Scale, text: Text = "", origin: Origin = "") -> None:
    """Print what the mixtures fetch and need at a scale, and ask the hub for it; nothing is fetched."""
    from launch.tools.data_check import check

    check(scale_at(scale, text, origin))


@app.command()
def mixture(stage: Stage, scale: Scale, text: Text = "", origin: Origin = "") -> None:
    """Print and draw a stage's mixture, planned and drawn, by source, category and language."""
    from launch.tools.mixture import show

    show(stage, scale_at(scale, text, origin))


@app.command()
def ablation(
    name: Annotated[str, typer.Argument(help="a row of recipes/ablations.yaml")],
    scale: Scale,
    text: Text = "",
    origin: Origin = "",
) -> None:
    """Run one change against its baseline over three seeds; print and store the table."""
    from launch.tools.ablation import run_ablation

    run_ablation(name, scale_at(scale, text, origin))


@app.command(name="merge-sweep")
def merge_sweep(
    scale: Scale,
    text: Text = "",
    origin: Origin = "",
    partner: Annotated[str, typer.Option(envvar="PARTNER", help="a stage or a folder")] = "",
) -> None:
    """Score the soup merged with a partner at weights 0 to 1; draw what it gains and costs."""
    from launch.tools.merge_sweep import run_sweep

    run_sweep(partner, scale_at(scale, text, origin))


@app.command("eval")
def evaluate(
    scale: Scale,
    model: Annotated[str, typer.Option(envvar="MODEL", help="folders or hub ids, commas between")],
    suite: Annotated[str, typer.Option(envvar="SUITE", help="a file of recipes/eval/")] = "local",
    limit: Annotated[int, typer.Option(envvar="LIMIT", help="items a task; 0: all")] = 0,
    origin: Origin = "",
    backend: Annotated[
        str, typer.Option(envvar="BACKEND", help="transformers, vllm or endpoint")
    ] = "transformers",
    endpoint: Annotated[
        str, typer.Option(envvar="ENDPOINT", help="OpenAI-compatible servers, commas between")
    ] = "",
    samples: Annotated[
        int, typer.Option(envvar="SAMPLES", help="at most, of an item; 0: the suite's")
    ] = 0,
) -> None:
    """Score checkpoints on a suite; writes runs/<scale>/evaluation/<suite>.json."""
    from launch.tools.evaluate_any import evaluate_models

    at = scale_at(scale, "", origin).name
    evaluate_models(model.split(","), suite, at, limit, backend, endpoint, samples)


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
    from launch.tools.win_rate import show_win_rates

    show_win_rates(suite, Path(scores) if scores else None)


@app.command("eval-reference")
def evaluate_reference(store: bool = False) -> None:
    """Score SmolLM2-135M on the local suite and compare with the stored figures, or store them."""
    from launch.tools.reference import eval_reference

    eval_reference(store)


ShowsAll = Annotated[bool, typer.Option(envvar="ALL", help="all of it, uncut: 1 or 0")]
AsJson = Annotated[bool, typer.Option(envvar="JSON", help="all of it as JSON: 1 or 0")]


@app.command()
def replay(
    stage: Stage,
    scale: Scale,
    step: Annotated[int, typer.Option(envvar="STEP", min=1, help="as in metrics.jsonl")],
    text: Text = "",
    origin: Origin = "",
    start: Start = "",
    shows_all: ShowsAll = False,
    as_json: AsJson = False,
) -> None:
    """Print what a training stage's model sees at a step, whether it was trained or not."""
    from launch.tools.replay import replay as show

    show(_resolve(stage, scale, text, origin, start), step, shows_all, as_json)


@app.command()
def seen(
    scale: Scale,
    stage: Annotated[str, typer.Argument(help="one stage alone; none: all that train")] = "",
    sought: Annotated[
        str, typer.Option(envvar="SOUGHT", help="the text; TEXT= of `make seen`")
    ] = "",
    text: Text = "",
    origin: Origin = "",
    start: Start = "",
    shows_all: ShowsAll = False,
    as_json: AsJson = False,
) -> None:
    """Print the documents that hold a text, and the steps at which a model is shown it."""
    from launch.tools.seen import seen as show
    from launch.tools.seen import trained_stages

    at = scale_at(scale, text, origin)
    runs = [_resolve(stage, scale, text, origin, start)] if stage else trained_stages(at)
    show(sought, runs, shows_all, as_json)


@app.command()
def synthesize(
    split: Annotated[
        str, typer.Option(envvar="SPLIT", help="a row of recipes/posttrain/synthetic.yaml")
    ],
    endpoint: Annotated[
        str, typer.Option(envvar="ENDPOINT", help="address of an OpenAI-compatible server")
    ],
    scale: Scale,
    origin: Origin = "",
    model: Annotated[str, typer.Option(envvar="MODEL", help="as the server names it")] = "",
    limit: Annotated[int, typer.Option(envvar="LIMIT", min=0, help="prompts; 0: all")] = 0,
) -> None:
    """Have larger models answer a split's prompts; writes runs/<scale>/synthetic/<split>.jsonl."""
    from launch.tools.synthesize import run_synthesis

    run_synthesis(split, endpoint, model, limit, scale_at(scale, "", origin))


@app.command("train-quality")
def train_quality(
    rows: Annotated[
        str, typer.Option(envvar="ROWS", help="jsonl, parquet or hub id: text, score or label")
    ] = "",
    language: Annotated[str, typer.Option(envvar="TEXT_LANGUAGE", help="ISO 639-3")] = "eng",
    good: Annotated[
        float | None, typer.Option(envvar="GOOD", help="least score of a good text (3; label: 1)")
    ] = None,
) -> None:
    """Train the classifier of the cleaning step `educational` from scored texts."""
    from launch.run.folder import check_roots
    from launch.tools.train_quality import train_quality as train

    check_roots()
    train(rows, language, good)


@app.command()
def submit(
    stages: Annotated[str, typer.Option(help="names of stages, or recipe files, in quotes")],
    scale: Scale,
    text: Text = "",
    origin: Origin = "",
    start: Start = "",
    dry: Annotated[
        bool, typer.Option(envvar="DRY", help="only print the commands: 1 or 0")
    ] = False,
) -> None:
    """Submit stages to Slurm, and what they take: the sbatch commands, each after those it needs."""
    from launch.tools.submit import submit_chain

    at = scale_at(scale, text, origin)
    runs = [_resolve(stage, scale, text, origin, start) for stage in stages.split()]
    submit_chain(runs, at.values.device, dry)


@app.command(name="push-shards")
def push_shards(scale: Scale, text: Text = "", origin: Origin = "") -> None:
    """Copy the shards of finished data stages to the URLs of SHARDS."""
    from launch.tools.push_shards import push_shards as push

    push(scale_at(scale, text, origin))


@app.command()
def folder(
    stage: Stage, scale: Scale, text: Text = "", origin: Origin = "", start: Start = ""
) -> None:
    """Print a stage's run folder."""
    print(_resolve(stage, scale, text, origin, start).folder)


# Commands in modules of their own, each by its function `command`, imported when it is asked for.
TOOLS = {
    "chat": "launch.tools.chat",
    "compare": "launch.tools.compare",
    "eval-longctx": "launch.tools.long_context_sets",
    "serve": "launch.tools.serve",
    "export": "launch.tools.export",
    "push": "launch.tools.push",
    "publish-checkpoints": "launch.tools.publish_checkpoints",
}


def _add_tools(words: list[str]) -> None:
    from importlib import import_module

    for name, module in TOOLS.items():
        if words[:1] in ([], ["--help"], [name]):
            app.command(name)(import_module(module).command)


def main() -> None:
    """Exit 2 with one line for a user's mistake, 75 when stopped by a signal, 130 when interrupted."""
    try:
        listen(again_ends=True)
        _add_tools(sys.argv[1:])
        app(standalone_mode=False)
    except Stopped as stopped:
        print(str(stopped) or "stopped by a signal; the same command goes on", flush=True)
        sys.exit(SAVED)
    except UserError as error:
        sys.exit(fail(str(error), error.status))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(fail("interrupted; the same command goes on from the last checkpoint", 130))
    except ClickException as error:
        sys.exit(fail(_command_line(error)))
    except Exception as error:
        if is_stop(error):
            sys.exit(SAVED)
        if (line := disk_error(error)) is None:
            raise
        sys.exit(fail(line))


def _command_line(error: ClickException) -> str:
    """A wrong argument in one line: the variable or argument, its value, the remedy."""
    parameter = getattr(error, "param", None)
    variable = getattr(parameter, "envvar", None) or getattr(parameter, "name", None)
    if isinstance(error, typer.BadParameter) and variable:
        problem = error.message.removeprefix("Input should be").strip() or "give it"
        given = f"={value}" if (value := os.environ.get(str(variable))) else ""
        is_missing = not error.message or problem.startswith("Missing")
        problem = "missing; give it" if is_missing else f"must be {problem}"
        return f"{variable}{given}: {problem}; `make help` says what it means"
    message = error.format_message().strip().rstrip(".")
    return f"{message}; `make help` and `python -m launch --help` say what there is"


if __name__ == "__main__":
    main()
