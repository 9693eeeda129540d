"""Peak memory of converting 3B weights, both ways: `python benchmarks/convert_memory.py`.

Writes random bf16 weights of the published shape as a tp 2 checkpoint (6.2 GB, and as much again
for each direction) and watches the converter's anonymous memory, which is what it needs: the kernel
can drop the files that it maps. Writes benchmarks/convert_memory.json.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from ground.files import write_json
from launch.machine.here import machine
from launch.recipe.book import load_recipe
from nanotron_ext.adapter import lower
from nanotron_ext.checkpoint import CHECKPOINT_VERSION
from nanotron_ext.config import SmolLM3Config
from nanotron_ext.weight_table import Weight, weights_of

TP = 2


def main() -> None:
    report = machine()
    config, _ = lower(
        asdict(load_recipe("pretrain-stage1").recipe.nanotron), Path("checkpoints"), None
    )
    model = SmolLM3Config(**config["model"]["model_config"])
    with tempfile.TemporaryDirectory() as scratch:
        source, hf, back = (Path(scratch) / name for name in ("source", "hf", "back"))
        write_checkpoint(model, source)
        report["to_hf"] = watch(["to-hf", str(source), str(hf)])
        report["largest_shard_bytes"] = max(f.stat().st_size for f in hf.glob("*.safetensors"))
        report["from_hf"] = watch(["from-hf", str(hf), str(back)])
        report["weight_bytes"] = sum(f.stat().st_size for f in hf.glob("*.safetensors"))
    write_json(Path(__file__).with_suffix(".json"), report)
    print(json.dumps(report, indent=1))


def write_checkpoint(config: SmolLM3Config, folder: Path) -> None:
    """Random weights in one file per tensor and tensor-parallel rank, as nanotron writes them."""
    torch.manual_seed(0)
    for weight in weights_of(config):
        *path, leaf = weight.name.split(".")
        place = folder.joinpath("model", *path)
        place.mkdir(parents=True)
        whole = torch.randn(weight.shape).to(torch.bfloat16)
        if weight.split_dim is None:
            save_file({"data": whole}, place / f"model_{leaf}.safetensors")
            continue
        for rank in range(TP):
            part, pairs = cut(weight, whole, rank)
            metadata = {
                "version": CHECKPOINT_VERSION,
                "unsharded_shape": str(weight.shape),
                "local_global_slices_pairs": ";".join(pairs),
            }
            name = f"model_{leaf}_pp-rank-0-of-1_tp-rank-{rank}-of-{TP}.safetensors"
            save_file({"data": part.contiguous()}, place / name, metadata=metadata)
    (folder / "model_config.json").write_text(json.dumps(asdict(config)))


def cut(weight: Weight, whole: torch.Tensor, rank: int) -> tuple[torch.Tensor, list[str]]:
    """A rank's share of each stacked part, and its place in the whole."""
    every = "None,None,None"
    if weight.split_dim == 1:
        columns = weight.shape[1] // TP
        place = f"{rank * columns},{(rank + 1) * columns},None"
        part = whole[:, rank * columns : (rank + 1) * columns]
        return part, [f"{every}|{every}#{every}|{place}"]
    parts, pairs, local, start = [], [], 0, 0
    for shape in weight.parts.values():
        rows = shape[0] // TP
        first = start + rank * rows
        parts.append(whole[first : first + rows])
        pairs.append(f"{local},{local + rows},None|{every}#{first},{first + rows},None|{every}")
        local, start = local + rows, start + shape[0]
    return torch.cat(parts), pairs


def watch(arguments: list[str]) -> dict[str, float]:
    """Run the converter; its peak anonymous memory in bytes (sampled every 10 ms) and seconds."""
    begin, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", "nanotron_ext.convert", *arguments])
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if found := re.search(r"RssAnon:\s+(\d+) kB", status):
            peak = max(peak, int(found[1]) * 1024)
        time.sleep(0.01)
    if process.returncode:
        sys.exit(f"the converter failed: {arguments}")
    return {"peak_anonymous_bytes": peak, "seconds": round(time.perf_counter() - begin, 1)}


if __name__ == "__main__":
    main()
