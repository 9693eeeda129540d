"""Time `make` stage by stage from nothing but the downloads: `python benchmarks/stages.py`.

Each stage runs in its own process, as with `make <stage>`, in a fresh RUNS and CACHE (the
package downloads are copied from the present cache). Writes benchmarks/stages.json with the
machine and the library versions.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ground.files import read_json, read_json_lines, write_json
from launch.machine.here import machine
from launch.recipe.tables import load_pipeline


def main() -> None:
    scale = os.environ["SCALE"]
    downloads = Path(os.environ.get("CACHE") or ".cache") / "downloads"
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {"RUNS": f"{scratch}/runs", "CACHE": f"{scratch}/cache"}
        if downloads.exists():
            shutil.copytree(downloads, f"{scratch}/cache/downloads")
        for stage in load_pipeline():
            start = time.perf_counter()
            command = [sys.executable, "-m", "launch", "run", stage]
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - start
            rows.append({"stage": stage, "seconds": round(seconds, 1)})
            rows[-1] |= results(Path(scratch) / "runs" / scale / stage)
            print(f"{stage:16} {seconds:6.1f} s", flush=True)
    report = {**machine(), "scale": scale, "stages": rows}
    write_json(Path(__file__).with_suffix(".json"), report)
    print(f"total {sum(row['seconds'] for row in rows):.0f} s on {report['machine']}")


def results(folder: Path) -> dict[str, Any]:
    """What the stage's own files say: tokens, tokens per second (median step), scores, sample."""
    if not (folder / "metrics.jsonl").exists():
        return {}
    lines, manifest = read_json_lines(folder / "metrics.jsonl"), read_json(folder / "manifest.json")
    return {
        "tokens": lines[-1]["tokens"],
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in lines),
        "bits_per_byte": manifest["bits_per_byte"],
        "sample": manifest["sample"],
    }


if __name__ == "__main__":
    main()
