"""`make push-shards`: the shards of the scale's data stages, copied to every URL of SHARDS."""

from ground.errors import UserError
from ground.storage import push
from launch.recipe.scale import Scale
from launch.recipe.tables import load_pipeline
from launch.run.folder import cache_root, shard_urls
from launch.stages.data import DataStage
from launch.walk import resolve


def push_shards(at: Scale) -> None:
    """Copy what finished data stages list and is not there yet."""
    if not (urls := shard_urls()):
        raise UserError("SHARDS is missing: where to copy to, s3://bucket/shards; commas between")
    runs = [resolve(stage, at) for stage, row in load_pipeline().items() if row.engine == "data"]
    finished = [run for run in runs if isinstance(run, DataStage) and run.is_finished()]
    if not finished:
        raise UserError(f"{runs[0].arguments}: no data stage is finished; `{runs[0].command}`")
    folders = {cache_root() / shard["folder"] for run in finished for shard in run.shards.values()}
    for url in urls:
        sent = sum(push(folder, url) for folder in sorted(folders))
        print(f"{url}: {len(folders)} sources, {sent / 1e9:.2f} GB sent", flush=True)
    print(
        f"now {cache_root() / 'shards'}/*/*.ds can be deleted where disk is short: pretraining "
        "reads them from there, block by block, through NODE_CACHE"
    )
