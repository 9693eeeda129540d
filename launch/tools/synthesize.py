"""`make synthesize`: a split's prompts answered by larger models, as a split of one's own."""

from pathlib import Path

from ground.errors import UserError, did_you_mean
from ground.files import read_json_object, write_json
from launch.recipe.scale import Scale
from launch.recipe.tables import load_splits, load_synthetic
from launch.run.folder import cache_root, runs_root
from launch.stages.chats import ChatsStage, split_files
from launch.walk import resolve, run_stage


def run_synthesis(split: str, endpoints: str, models: str, limit: int, at: Scale) -> Path:
    """Write `runs/<scale>/synthetic/<split>.jsonl`; its path. Raises UserError, or Outage.

    `endpoints` and `models` name the server of the answers, and of a pair's rejected side after a
    comma; no model: the row's own.
    """
    from datatrove_pipelines.synthetic.chats import Sampling, SyntheticJob, synthesize
    from datatrove_pipelines.synthetic.server import server

    rows = load_synthetic()
    if split not in rows:
        raise UserError(f"SPLIT={split}: no row of it in recipes/posttrain/synthetic.yaml; {did_you_mean(split, rows)}")  # fmt: skip
    row = rows[split]
    wanted = [row.answers, *([row.rejected] if row.rejected else [])]
    addresses = _one_each("ENDPOINT", endpoints, wanted)
    names = _one_each("MODEL", models, wanted) if models else wanted
    servers = [server(url, name) for url, name in zip(addresses, names, strict=True)]
    chats = resolve("data-chats", at)
    assert isinstance(chats, ChatsStage)
    run_stage(chats, False)
    job = SyntheticJob(
        Path(split_files(chats.chats, [row.prompts])[row.prompts]),
        row.mode == "think",
        servers[0],
        servers[1] if row.rejected else None,
        Sampling(row.temperature, row.top_p, row.max_tokens),
        limit,
        split,
    )
    file = runs_root() / at.name / "synthetic" / f"{split}.jsonl"
    record = file.with_suffix(".json")
    if file.exists() and record.exists() and read_json_object(record)["job"] == job.key():
        print(f"{split}: up to date, {file}")
        return file
    counts = synthesize(job, file, cache_root() / "synthetic")
    write_json(record, {"job": job.key(), "models": names, "prompts": row.prompts, **counts})
    _show(split, file, counts, "Preference" if row.rejected else "SFT", row.mode)
    return file


def _one_each(variable: str, values: str, models: list[str]) -> list[str]:
    parts = [part.strip() for part in values.split(",")]
    if len(parts) == 1:
        parts *= len(models)
    if not all(parts) or len(parts) != len(models):
        raise UserError(f"{variable}={values}: one for each of {' and '.join(models)}, a comma between")  # fmt: skip
    return parts


def _show(split: str, file: Path, counts: dict[str, int], config: str, mode: str) -> None:
    out = ", ".join(
        f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items() if name != "rows"
    )
    print(f"{split}: {counts['rows']:,} rows, {file}" + (f"; left out: {out}" if out else ""))
    known = [name for rows in load_splits().splits.values() for name in rows]
    if counts["rows"] and split not in known:
        print(
            f"to train on it: in recipes/posttrain/splits.yaml, below {config}: "
            f"`{split}: {{mode: {mode}, path: {file}}}`, and a weight in the stage's mixture"
        )
