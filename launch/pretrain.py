"""A pretraining stage: from recipe and data to a job for nanotron, and from its end to hf/."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from launch.child import run_child
from launch.data import mixture_of
from launch.errors import UserError
from launch.recipe import RECIPES, load_recipe, load_scale
from launch.run_folder import StageRun, cache_root, write_aside
from launch.scale import scale
from launch.slurm import world_size


def pretrain_recipe(stage: str, scale_name: str) -> dict[str, Any]:
    """The resolved recipe of a stage at a scale, as plain values."""
    dial = load_scale(scale_name)
    recipe = scale(load_recipe(stage), dial)
    mixture = mixture_of(stage, dial["origin"])
    return {"mixture": mixture, "nanotron": recipe.nanotron, "device": dial["device"]}


def earlier_stages(run: StageRun) -> list[StageRun]:
    """The pretraining stages that `run` continues, first to last."""
    for previous in run.inputs.values():
        if previous.engine == "pretrain":
            return [*earlier_stages(previous), previous]
    return []


def _steps(run: StageRun) -> int:
    steps: int = run.recipe["nanotron"]["tokens"]["train_steps"]
    return steps


def starts_afresh(run: StageRun) -> bool:
    """Whether the stage takes weights alone and counts its own steps, as long context does."""
    return not run.recipe["nanotron"]["checkpoints"]["load_optimizer"]


def first_step(run: StageRun) -> int:
    """The step that the stage's own steps count on from."""
    earlier = earlier_stages(run)
    return _steps(earlier[-1]) if earlier and not starts_afresh(run) else 0


def _batch(run: StageRun) -> tuple[int, int]:
    """(windows, tokens) of a global batch."""
    tokens = run.recipe["nanotron"]["tokens"]
    windows = (
        tokens["micro_batch_size"]
        * tokens["batch_accumulation_per_replica"]
        * run.recipe["nanotron"]["parallelism"]["dp"]
    )
    return windows, windows * tokens["sequence_length"]


def drawn_windows(run: StageRun) -> dict[str, int]:
    """Windows of each source that this stage alone takes, in closed form."""
    from nanotron_ext.mixture import build_mixture

    samples = (_steps(run) - first_step(run)) * _batch(run)[0]
    return build_mixture(run.recipe["mixture"], cache_root()).counts(samples)


def tokens_per_source(runs: list[StageRun]) -> dict[str, int]:
    """Tokens of each source over whole stages."""
    total: dict[str, int] = {}
    for run in runs:
        length = run.recipe["nanotron"]["tokens"]["sequence_length"]
        for name, windows in drawn_windows(run).items():
            total[name] = total.get(name, 0) + windows * length
    return total


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run folder, oldest first: folders named by their step."""
    found = [path for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))


def _last_checkpoint(run: StageRun) -> Path:
    """The checkpoint of a stage's last step."""
    path = run.folder / "checkpoints" / str(_steps(run))
    if not path.is_dir():
        raise UserError(
            f"{path}: the stage's last checkpoint is missing; "
            f"`make {run.stage} SCALE={run.scale} FORCE=1` trains it again"
        )
    return path


def steps_left(run: StageRun) -> int:
    """Steps from the stage's own last checkpoint to its end."""
    own = checkpoints(run.folder)
    return _steps(run) - (int(own[-1].name) if own else first_step(run))


def prepare(run: StageRun) -> None:
    """Write nanotron.yaml and job.json for the step to resume at; cut metrics.jsonl back to it."""
    import yaml

    from nanotron_ext.adapter import lower

    own, earlier = checkpoints(run.folder), earlier_stages(run)
    if first_step(run) >= _steps(run):
        raise UserError(
            f"{run.stage} at SCALE={run.scale} ends at step {_steps(run)} and begins after step "
            f"{first_step(run)}: lower steps_divided_by in recipes/scales/{run.scale}.yaml"
        )
    before = _last_checkpoint(earlier[-1]) if earlier else None
    resume = own[-1] if own else None if starts_afresh(run) else before
    weights = before if starts_afresh(run) else None
    target = run.folder / "checkpoints"
    try:
        config, warnings = lower(run.recipe["nanotron"], target, resume, weights)
    except UserError as error:
        file = os.path.relpath(_recipe_file(run))
        raise UserError(f"{file} at SCALE={run.scale}: {error}") from None
    check_start(run, resume, weights)
    shards, eos_id = _checked_shards(run)
    _report_mixture(run, shards)
    write_aside(run.folder / "nanotron.yaml", yaml.safe_dump(config))
    write_aside(run.folder / "job.json", json.dumps(_job(run, shards, eos_id), indent=1))
    write_aside(run.folder / "adapter.txt", "\n".join(warnings) + "\n")
    print(
        f"{run.stage}: {len(warnings)} keys of the recipe dropped or changed for nanotron 0.4 "
        f"({run.folder / 'adapter.txt'}, docs/LEDGER.md)",
        flush=True,
    )
    _cut_metrics(run.folder / "metrics.jsonl", int(own[-1].name) if own else -1)


def _recipe_file(run: StageRun) -> Path:
    is_ablation = run.stage.startswith("ablations/")
    return RECIPES / "ablations.yaml" if is_ablation else load_recipe(run.stage).file


def check_start(run: StageRun, resume: Path | None, weights: Path | None) -> None:
    """Refuse a checkpoint that nanotron would fail on, or misread, once all processes run."""
    from nanotron_ext.checkpoint import check_layout, check_weights

    nanotron = run.recipe["nanotron"]
    if start := resume or weights:
        check_weights(start, nanotron["model"]["model_config"])
    if resume:
        check_layout(resume, nanotron["parallelism"], nanotron["optimizer"]["zero_stage"])


def _job(run: StageRun, shards: dict[str, Any], eos_id: int) -> dict[str, Any]:
    """Plain values for nanotron_ext.job.Job."""
    nanotron, earlier = run.recipe["nanotron"], earlier_stages(run)
    length = nanotron["tokens"]["sequence_length"]
    drawn: dict[str, int] = {}
    for previous in earlier:
        # A new window length starts a new pass over each source.
        if previous.recipe["nanotron"]["tokens"]["sequence_length"] == length:
            for name, windows in drawn_windows(previous).items():
                drawn[name] = drawn.get(name, 0) + windows
    before = tokens_per_source(earlier)
    return {
        "stage": run.stage,
        "weights": run.recipe["mixture"],
        "sources": [
            {
                "name": name,
                "folder": str(cache_root() / shard["folder"]),
                "token_bytes": shard["token_bytes"],
                "drawn_windows": drawn.get(name, 0),
            }
            for name, shard in shards.items()
        ],
        "decay_exclude": nanotron["optimizer"]["weight_decay_exclude_named_params"],
        "gradient_spikes": nanotron["optimizer"]["gradient_spikes"],
        "data_seed": nanotron["data_stages"][0]["data"]["seed"],
        "eos_id": eos_id,
        "first_step": first_step(run),
        "tokens_before": sum(before.values()),
        "tokens_per_source_before": before,
        "cache": str(cache_root()),
    }


def _checked_shards(run: StageRun) -> tuple[dict[str, Any], int]:
    """The data stage's shards by source, each checked on disk."""
    from datatrove_pipelines.tokenize import check_shards

    data = next(taken for taken in run.inputs.values() if taken.engine == "data")
    manifest = data.manifest()
    assert manifest is not None
    shards = {name: manifest["shards"][name] for name in run.recipe["mixture"]}
    window = run.recipe["nanotron"]["tokens"]["sequence_length"] + 1
    for name, shard in shards.items():
        check_shards(cache_root() / shard["folder"], manifest["eos_id"])
        if shard["tokens"] < window:
            raise UserError(
                f"source '{name}' has {shard['tokens']:,} tokens, fewer than one window of {window:,} "
                f"of {run.stage}: shorten nanotron.tokens.sequence_length, or drop it from the mixture"
            )
    return shards, manifest["eos_id"]


def _report_mixture(run: StageRun, shards: dict[str, Any]) -> None:
    """Say out loud what is renormalised, and which sources repeat."""
    total = sum(run.recipe["mixture"].values())
    if abs(total - 1) > 1e-9:
        print(f"{run.stage}: weights sum to {total:.8g}: renormalised to 1", flush=True)
    length = run.recipe["nanotron"]["tokens"]["sequence_length"]
    seen = tokens_per_source([*earlier_stages(run), run])
    epochs = {
        name: seen[name] / max(shard["tokens"] // (length + 1) * length, 1)
        for name, shard in shards.items()
    }
    short = {name: value for name, value in epochs.items() if value > 1}
    if short:
        worst = ", ".join(
            f"{n} {short[n]:.1f}x" for n in sorted(short, key=lambda n: -short[n])[:4]
        )
        print(
            f"{run.stage}: {len(short)} of {len(shards)} sources are read more than once by the "
            f"end of the stage: {worst}",
            flush=True,
        )


def _cut_metrics(path: Path, last_step: int) -> None:
    """Drop the lines after `last_step`, which the resumed run writes again."""
    if path.exists():
        lines = path.read_text().splitlines()
        kept = [line for line in lines if 0 <= _step_of(line) <= last_step]
        write_aside(path, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> int:
    """A metrics line's step; -1 for a line that was cut off."""
    try:
        return int(json.loads(line)["step"])
    except ValueError:
        return -1


def train(run: StageRun, lock: int) -> None:
    """Run the job under torchrun on this machine until its last step."""
    own = checkpoints(run.folder)
    if own and int(own[-1].name) >= _steps(run):
        return
    size = world_size(run.recipe)
    environment = {
        "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // size, 1)),
        # Published: one hardware queue keeps tensor-parallel communication in issue order.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    environment = {name: os.environ.get(name, value) for name, value in environment.items()}
    if run.recipe["device"] == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(size), "-m", "nanotron_ext.trainer", str(run.folder)]
    log = run.folder / "log.txt"
    run_child(command, log, run.stage, lock=lock, environment=environment)


def finish(run: StageRun) -> dict[str, Any]:
    """Convert the last checkpoint to hf/ and score it; returns the manifest's results."""
    from launch.score import score_long_context, score_stage
    from nanotron_ext.convert import to_hf

    tokenizer = run.inputs["tokenizer"].folder / "tokenizer"
    to_hf(_last_checkpoint(run), run.folder / "hf", tokenizer)
    earlier = earlier_stages(run)
    seen = tokens_per_source([*earlier, run])
    results = {
        "step": _steps(run),
        "tokens": sum(seen.values()),
        "tokens_per_source": seen,
        **score_stage(run, seen),
    }
    if starts_afresh(run):
        first_window = earlier[0].recipe["nanotron"]["tokens"]["sequence_length"]
        results |= score_long_context(run, first_window)
    return results
