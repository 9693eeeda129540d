"""A post-training stage: from recipe, chats and a model to a job for posttrain/stage.py, and its end."""

import copy
import json
import os
import sys
from hashlib import blake2b
from pathlib import Path
from typing import Any

from launch.chats import chats_folder, split_files
from launch.child import run_child
from launch.errors import UserError, did_you_mean
from launch.recipe import checked, load_scale, load_yaml, scale_file, stage_file
from launch.run_folder import StageRun, write_aside
from launch.scale import lay_over
from launch.schema_posttrain import DpoTrl, PosttrainFile, SftTrl
from launch.slurm import world_size

SECTIONS = {"SFTTrainer": SftTrl, "DPOTrainer": DpoTrl}
NOT_SCALED = ("stage", "trainer", "mixture", "mixture_seed")
ACCELERATE = Path(__file__).parent / "accelerate"


def load_posttrain(stage: str) -> dict[str, Any]:
    """The recipe file of a post-training stage, checked; plain values."""
    file = stage_file(stage)
    return _checked(load_yaml(file), file)


def _checked(values: dict[str, Any], file: Path) -> dict[str, Any]:
    recipe: dict[str, Any] = checked(values, PosttrainFile, file)
    if recipe["trainer"] not in SECTIONS:
        hint = did_you_mean(recipe["trainer"], SECTIONS)
        raise UserError(f"{file}: trainer: {recipe['trainer']}: {hint}")
    recipe["trl"] = checked(recipe["trl"], SECTIONS[recipe["trainer"]], file, "trl")
    if not recipe["mixture"]:
        raise UserError(f"{file}: mixture: empty: name a split of posttrain/splits.yaml")
    for split, weight in recipe["mixture"].items():
        if not 0 < weight <= 1:  # NaN too
            raise UserError(
                f"{file}: mixture.{split}: weight {weight:g}: write a share above 0, at most 1, or "
                "remove the line"
            )
    return recipe


def scale_posttrain(recipe: dict[str, Any], dial: dict[str, Any]) -> dict[str, Any]:
    """`recipe` with what the scale lays over every post-training stage, then over this one."""
    scaled, section = copy.deepcopy(recipe), dial["posttrain"]
    file = scale_file(dial["scale"])
    for key in (("every_stage",), ("stages", recipe["stage"])):
        overlay: dict[str, Any] = section
        for part in key:
            overlay = overlay.get(part, {})
        for name in overlay:
            if name in NOT_SCALED or name not in recipe:
                allowed = [known for known in recipe if known not in NOT_SCALED]
                where = f"posttrain.{'.'.join(key)}.{name}"
                raise UserError(
                    f"{file}: {where}: no scale sets that; {did_you_mean(name, allowed)}"
                )
        lay_over(scaled, overlay)
    return _checked(scaled, file)


def posttrain_recipe(stage: str, scale: str) -> dict[str, Any]:
    """The resolved recipe of a stage at a scale, as plain values."""
    dial = load_scale(scale)
    recipe = scale_posttrain(load_posttrain(stage), dial)
    name = recipe["template"]["file"]
    if name:
        # The text of the template belongs to the recipe.
        recipe["template"]["digest"] = _digest(_template(stage, name))
    return {**recipe, "device": dial["device"]}


def _template(stage: str, name: str) -> Path:
    file = stage_file(stage).parent / name
    if not file.is_file():
        raise UserError(f"{stage_file(stage)}: template.file: {name}: no such file beside it")
    return file


def _digest(file: Path) -> str:
    return blake2b(file.read_bytes(), digest_size=8).hexdigest()


def on_this_machine(run: StageRun) -> bool:
    """Whether the recipe's world is this one process, on the CPU."""
    return run.recipe["device"] == "cpu" and run.recipe["world_size"] == 1


def steps_left(run: StageRun) -> int:
    """0 once the last step is done; how many there are follows from the data."""
    return int(not (run.folder / "results.json").exists())


def start_of(run: StageRun) -> StageRun:
    """The stage whose model this one starts from: the last that it takes."""
    return list(run.inputs.values())[-1]


def job(run: StageRun) -> dict[str, Any]:
    """Plain values for posttrain.job.Job."""
    recipe, start = run.recipe, start_of(run)
    template, scores = recipe["template"], recipe["scores"]
    chats = chats_folder(run.inputs["data-chats"])
    named = bool(template["file"])
    model = start.folder / "hf"
    defaults = {key: template[key] for key in ("model_name", "short_system") if template[key]}
    date = template["date_string"]
    held_out = chats / "held_out"
    return {
        "stage": run.stage,
        "trainer": recipe["trainer"],
        "model": str(model),
        "tokenizer": str(run.inputs["tokenizer"].folder / "tokenizer" if named else model),
        "template": str(_template(run.stage, template["file"])) if named else "",
        "template_defaults": defaults if named else {},
        "settings": {"date_string": date} if date else {},
        "files": split_files(chats, recipe["mixture"]),
        "mixture": recipe["mixture"],
        "mixture_seed": recipe["mixture_seed"],
        "trl": {key: value for key, value in recipe["trl"].items() if value not in (None, {})},
        "world_size": recipe["world_size"],
        "workers": 1 if on_this_machine(run) else os.cpu_count() or 1,
        "held_out": str(held_out) if held_out.is_dir() else "",
        "score_steps": scores["every_steps"],
        "score_prompts": scores["prompts"],
        "score_prompts_at_end": scores["prompts_at_end"],
        "max_new_tokens": scores["max_new_tokens"],
        "tokens_before": int((start.manifest() or {}).get("tokens", 0)),
    }


def prepare(run: StageRun) -> None:
    """Write job.json and the token dataset."""
    from posttrain.data import prepare_data

    write_aside(run.folder / "job.json", json.dumps(job(run), indent=1))
    counted = prepare_data(run.folder)
    if cut := counted.get("rows_cut_at_max_length"):
        print(
            f"{run.stage}: {cut} of {counted['rows']} rows are longer than trl.max_length "
            f"{run.recipe['trl']['max_length']} and lose their ends",
            flush=True,
        )


def train(run: StageRun, lock: int) -> None:
    """Run the job to its end: in this process where it is one CPU process, so that imports are
    paid for once a `make`; else under accelerate."""
    if not steps_left(run):
        return
    if on_this_machine(run):
        from posttrain.stage import train as train_here

        train_here(run.folder)
        return
    size = world_size(run.recipe)
    if run.recipe["device"] == "cpu":
        # accelerate's MULTI_CPU starts one process and exits 0.
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(size)]
    else:
        config = ACCELERATE / ("zero3.yaml" if size > 1 else "gpu.yaml")
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        command += ["--config_file", str(config)]
        command += ["--num_machines", "1", "--num_processes", str(size)]
    command += ["-m", "posttrain.stage", str(run.folder)]
    run_child(command, run.folder / "log.txt", run.stage, lock=lock)


def work(run: StageRun, lock: int) -> dict[str, Any]:
    prepare(run)
    train(run, lock)
    return finish(run)


def finish(run: StageRun) -> dict[str, Any]:
    """The manifest's results, as the last process wrote them."""
    file = run.folder / "results.json"
    if not file.exists():
        raise UserError(f"{file}: missing: `make {run.stage} SCALE={run.scale}` trains to the end")
    results: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return results


def show(run: StageRun) -> None:
    """Held-out figures before and after the stage."""
    scores = (run.manifest() or {}).get("scores", {})
    before, after = scores.get("before", {}), scores.get("after", {})
    for name, value in sorted(after.items()):
        was = f"{before[name]:.3f} -> " if name in before else ""
        print(f"  {name:28} {was}{value:.3f}", flush=True)
