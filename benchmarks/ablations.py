"""Run every ablation: `SCALE=... python benchmarks/ablations.py [name ...]`.

Writes benchmarks/ablations.json (with machine and versions) and the curve of the embedding's norm.
"""

import os
import shutil
import sys
from pathlib import Path

from ground.files import read_json, write_json
from launch.machine.here import machine
from launch.recipe.scale import load_scale
from launch.recipe.tables import load_ablations
from launch.tools.ablation import run_ablation

HERE = Path(__file__).parent


def main() -> None:
    at, file = load_scale(os.environ["SCALE"]), HERE / "ablations.json"
    ablations = read_json(file)["ablations"] if file.exists() else {}
    for name in sys.argv[1:] or load_ablations():
        result = run_ablation(name, at)
        ablations[name] = read_json(result)
        write_json(file, {**machine(), "scale": at.name, "ablations": ablations})
        if name == "embed-decay":
            shutil.copy(result.with_suffix(".svg"), HERE / "embedding_norm.svg")
    print(file)


if __name__ == "__main__":
    main()
