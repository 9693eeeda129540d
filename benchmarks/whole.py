"""Time and results of one `make`, read from its manifests: `SCALE=... python benchmarks/whole.py`.

Run `make clean && make` first, on an idle machine. Seconds are by the clock in one process, as a
user waits for them. Writes benchmarks/whole.json.
"""

import os
from pathlib import Path

from ground.files import write_json
from launch.machine.here import machine
from launch.recipe.scale import load_scale
from launch.report.results import collect, summary_rows
from launch.walk import resolve


def main() -> None:
    scale = os.environ["SCALE"]
    stages = collect(resolve("report", load_scale(scale)))
    rows = summary_rows(stages)
    report = {**machine(), "scale": scale, "seconds": sum(row["seconds"] for row in rows)}
    report |= {"stages": rows, "evaluation": stages[-1].manifest["evaluation"]}
    write_json(Path(__file__).with_suffix(".json"), report)
    for row in rows:
        print(f"{row['stage']:16} {row['seconds']:6.0f} s")
    print(f"{'all':16} {report['seconds']:6.0f} s on {report['machine']}")


if __name__ == "__main__":
    main()
