"""What one `make` cost and gave, read from its manifests: `SCALE=... python benchmarks/whole.py`.

Run `make clean && make` first, on an idle machine. Seconds are by the clock in one process, as a
user waits for them. Writes benchmarks/whole.json.
"""

import json
import os
from pathlib import Path

from launch.machine import machine
from launch.report_data import collect, summary_rows

from launch.stages import resolve


def main() -> None:
    scale = os.environ["SCALE"]
    stages = collect(resolve("report", scale))
    rows = summary_rows(stages)
    report = {**machine(), "scale": scale, "seconds": sum(row["seconds"] for row in rows)}
    report |= {"stages": rows, "evaluation": stages[-1].manifest["evaluation"]}
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    for row in rows:
        print(f"{row['stage']:16} {row['seconds']:6.0f} s")
    print(f"{'all':16} {report['seconds']:6.0f} s on {report['machine']}")


if __name__ == "__main__":
    main()
