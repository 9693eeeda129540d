"""Run every ablation: `SCALE=... python benchmarks/ablations.py [name ...]`.

Writes benchmarks/ablations.json (with machine and versions) and the curve of the embedding's norm.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from launch.ablation import load_ablations, run_ablation
from launch.machine import machine

HERE = Path(__file__).parent


def main() -> None:
    scale = os.environ["SCALE"]
    file = HERE / "ablations.json"
    report = json.loads(file.read_text()) if file.exists() else {"ablations": {}}
    report = {**machine(), "scale": scale, "ablations": report["ablations"]}
    for name in sys.argv[1:] or load_ablations():
        result = run_ablation(name, scale)
        report["ablations"][name] = json.loads(result.read_text())
        file.write_text(json.dumps(report, indent=1) + "\n")
        if name == "embed-decay":
            shutil.copy(result.with_suffix(".svg"), HERE / "embedding_norm.svg")
    print(file)


if __name__ == "__main__":
    main()
