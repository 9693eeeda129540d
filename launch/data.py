"""The tokenizer and data stages: what the recipe's sources mean at a scale, and who makes them."""

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from launch.recipe import (
    canonical,
    load_pipeline,
    load_recipe,
    load_scale,
    load_sources,
    load_standins,
)
from launch.run_folder import StageRun, cache_root

# A stand-in that the first mixture hardly uses still shows the tokenizer its script.
MINIMUM_TRAIN_BYTES = 40_000


def mixture_of(stage: str, origin: str) -> dict[str, float]:
    """A stage's mixture under canonical source names, without what cannot be had."""
    mixture = {canonical(name): weight for name, weight in load_recipe(stage).mixture.items()}
    left_out = unreleased(stage, origin)
    return {name: weight for name, weight in mixture.items() if name not in left_out}


def unreleased(stage: str, origin: str) -> dict[str, str]:
    """Sources of a mixture that exist on no hub, and what to build in their place."""
    if origin != "hub":
        return {}
    rows = {canonical(name): load_sources()[canonical(name)] for name in load_recipe(stage).mixture}
    return {name: row["substitute"] for name, row in rows.items() if row["hub_id"] is None}


def pretraining_stages() -> list[str]:
    return [name for name, row in load_pipeline().items() if row["engine"] == "pretrain"]


def all_sources(origin: str) -> list[str]:
    """Every source of any stage that pretrains, by canonical name."""
    return sorted({name for stage in pretraining_stages() for name in mixture_of(stage, origin)})


def slices(stand_in: str) -> dict[str, tuple[float, float]]:
    """Disjoint shares [start, stop) of a stand-in's documents, for each source that maps to it."""
    shares = {
        name: row["share"]
        for name, row in sorted(load_sources().items())
        if row["stand_in"] == stand_in and not row["same_as"]
    }
    total, start, result = sum(shares.values()), 0.0, {}
    for name, share in shares.items():
        result[name] = (start, start + share / total)
        start += share / total
    last = list(shares)[-1]
    result[last] = (result[last][0], 1.0)
    return result


def source_recipe(name: str, origin: str) -> dict[str, Any]:
    """What a source is at a scale, as plain values: part of the data stage's identity."""
    row = load_sources()[name]
    if origin == "standin":
        stand_in = row["stand_in"]
        return {"stand_in": {stand_in: load_standins()[stand_in]}, "slice": slices(stand_in)[name]}
    return {
        key: row[key]
        for key in ("hub_id", "config", "split", "revision", "data_files", "text_field", "max_tokens")
    }  # fmt: skip


def tokenizer_recipe(scale: str) -> dict[str, Any]:
    """What the tokenizer stage depends on."""
    dial, first = load_scale(scale), load_recipe(pretraining_stages()[0])
    if not dial["tokenizer"]["vocab_size"]:
        return {"published": first.nanotron["tokenizer"]}
    bytes_of: dict[str, float] = {}
    mixture = mixture_of(first.stage, dial["origin"])
    for name in all_sources(dial["origin"]):
        stand_in = load_sources()[name]["stand_in"]
        share = mixture.get(name, 0.0) * dial["tokenizer"]["train_bytes"]
        bytes_of[stand_in] = bytes_of.get(stand_in, 0.0) + share
    return {
        "vocab_size": dial["tokenizer"]["vocab_size"],
        "held_out_fraction": dial["held_out"]["fraction"],
        "train_bytes": {k: max(round(v), MINIMUM_TRAIN_BYTES) for k, v in bytes_of.items()},
        "standins": {name: load_standins()[name] for name in bytes_of},
    }


def data_recipe(stage: str, scale: str) -> dict[str, Any]:
    """What a data stage depends on: the sources of its mixture and the held-out set."""
    dial, recipe_stages = load_scale(scale), load_pipeline()[stage]["mixture_of"]
    origin = dial["origin"]
    names = sorted({name for taken in recipe_stages for name in mixture_of(taken, origin)})
    left_out: dict[str, str] = {}
    for taken in recipe_stages:
        left_out |= unreleased(taken, origin)
    held_out = {name: source_recipe(name, origin) for name in all_sources(origin)}
    return {
        "sources": {name: source_recipe(name, origin) for name in names},
        "held_out": dial["held_out"] | {"sources": held_out},
        "unreleased": left_out,
        "seed": data_seed(recipe_stages[0]),
    }


def data_seed(stage: str) -> int:
    seed: int = load_recipe(stage).nanotron["data_stages"][0]["data"]["seed"]
    return seed


def build_standins(rows: dict[str, dict[str, Any]]) -> dict[str, Path]:
    """The embedded corpus' files for these rows, fetched and built when missing."""
    from datatrove_pipelines.executors import run_in_processes
    from datatrove_pipelines.standins.corpus import StandIn, build, fetch, target

    standins = [StandIn(name=name, **row) for name, row in rows.items()]
    missing = [standin for standin in standins if not target(standin, cache_root()).exists()]
    if missing:
        fetch([pin for standin in missing for pin in standin.packages], cache_root())
        run = partial(build, cache=cache_root())
        run_in_processes(run, missing, workers=min(os.cpu_count() or 1, len(missing)))
    return {standin.name: target(standin, cache_root()) for standin in standins}


def make_tokenizer(run: StageRun) -> dict[str, Any]:
    """Train the scale's BPE, or fetch the published table; writes `<folder>/tokenizer/`."""
    from datatrove_pipelines.tokenizer import llama_tokenizer, train_bpe

    target, recipe = run.folder / "tokenizer", run.recipe
    if "published" in recipe:
        revision = recipe["published"]["tokenizer_revision"] or "main"
        llama_tokenizer(recipe["published"]["tokenizer_name_or_path"], target, revision)
    else:
        files = build_standins(recipe["standins"])
        train_bpe(_training_texts(recipe, files), recipe["vocab_size"], target)
    table = json.loads((target / "tokenizer.json").read_text())
    return {"vocab_size": len(table["model"]["vocab"]) + len(table["added_tokens"])}


def _training_texts(recipe: dict[str, Any], files: dict[str, Path]) -> Iterator[str]:
    from datatrove_pipelines.held_out import is_held_out
    from datatrove_pipelines.sources import JsonlFile, SourceJob, read_documents

    for name, limit in sorted(recipe["train_bytes"].items()):
        size = 0
        for document in read_documents(SourceJob(name, JsonlFile(files[name]))):
            if size >= limit:
                break
            if not is_held_out(document.text, recipe["held_out_fraction"]):
                size += len(document.text.encode())
                yield document.text


def is_there(run: StageRun) -> bool:
    """Whether the files of a finished tokenizer or data stage still exist."""
    if run.engine == "tokenizer":
        return (run.folder / "tokenizer" / "tokenizer.json").exists()
    shards = (run.manifest() or {})["shards"].values()
    folders = [cache_root() / shard["folder"] for shard in shards]
    return all(path.exists() for path in [run.folder / "held_out.jsonl", *folders])


def make_data(run: StageRun) -> dict[str, Any]:
    """Tokenise the mixture's sources into shards and write the held-out text."""
    from datatrove_pipelines.held_out import write_held_out
    from datatrove_pipelines.pipeline import tokenize_all

    for name, substitute in run.recipe["unreleased"].items():
        print(
            f"{run.stage}: {name} was never released and is left out, the other weights are "
            f"renormalised; to put it back, build it ({substitute}) and name it in "
            "recipes/sources.yaml",
            flush=True,
        )
    held_out = run.recipe["held_out"]
    rows: dict[str, dict[str, Any]] = {}
    for source in held_out["sources"].values():
        rows |= source.get("stand_in", {})
    files = build_standins(rows) if rows else {}
    jobs = [_job(run, name, source, files) for name, source in run.recipe["sources"].items()]
    tokenizer = run.inputs["tokenizer"].folder / "tokenizer"
    infos = tokenize_all(jobs, tokenizer, cache_root(), workers=os.cpu_count() or 1)
    sizes = write_held_out(_held_out_jobs(run, files), run.folder / "held_out.jsonl")
    shards = {
        info.name: {
            "folder": str(info.folder.relative_to(cache_root())),
            "tokens": info.tokens,
            "documents": info.documents,
            "bytes": info.bytes,
            "token_bytes": info.token_bytes,
        }
        for info in infos
    }
    return {"shards": shards, "eos_id": infos[0].eos_id, "held_out_bytes": sizes}


def _job(run: StageRun, name: str, source: dict[str, Any], files: dict[str, Path]) -> Any:
    from datatrove_pipelines.sources import HubSplit, JsonlFile, SourceJob

    fraction = run.recipe["held_out"]["fraction"]
    if "stand_in" in source:
        read = JsonlFile(files[next(iter(source["stand_in"]))])
        return SourceJob(name, read, tuple(source["slice"]), fraction, run.recipe["seed"])
    return SourceJob(name, HubSplit(**source), (0.0, 1.0), fraction, run.recipe["seed"])


def _held_out_jobs(run: StageRun, files: dict[str, Path]) -> Iterator[tuple[str, Any, int]]:
    """(category, job, bytes) once per text: sources that share a stand-in share its documents."""
    held_out, unique = run.recipe["held_out"], {}
    for name, source in held_out["sources"].items():
        category = load_sources()[name]["category"]
        unique[category, next(iter(source.get("stand_in", [name])))] = _job(
            run, name, source, files
        )
    per_category: dict[str, int] = {}
    for category, _ in unique:
        per_category[category] = per_category.get(category, 0) + 1
    for (category, _), job in unique.items():
        yield category, job, held_out["bytes_per_category"] // per_category[category]
