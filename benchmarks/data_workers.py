"""Two workers against one on the same source: `python benchmarks/data_workers.py`.

Made-up texts in eight files of a local folder of the hub's layout, through the real build, in rounds
that alternate. Beside the wall time of the whole, which other processes on the machine lengthen,
stands the CPU time of the process that waits (`serial`), during which no worker is kept from
working, and that of the workers. Writes benchmarks/data_workers.json.
"""

import resource
import runpy
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from datatrove_pipelines.fast_tokenizer import encoder
from ground.files import write_json
from launch.machine.here import machine
from launch.run.folder import git_commit

MEMORY = runpy.run_path(str(Path(__file__).with_name("data_memory.py")), run_name="imported")
FILES, DOCUMENTS, ROUNDS = 8, 100_000, 3


def cpu_seconds(whose: int) -> float:
    usage = resource.getrusage(whose)
    return usage.ru_utime + usage.ru_stime


def measured(root: Path, workers: int) -> dict[str, float]:
    """Seconds of the whole build, start and end of the workers included."""
    from datatrove_pipelines.building import tokenize_all
    from datatrove_pipelines.sources import HubSplit, SourceJob

    job = SourceJob("made-up", HubSplit(str(root / "set"), None, "train", "main"))
    begin, own = time.monotonic(), cpu_seconds(resource.RUSAGE_SELF)
    children = cpu_seconds(resource.RUSAGE_CHILDREN)
    tokenize_all([job], root / "tokenizer", root / "cache", workers)
    wall = time.monotonic() - begin
    shutil.rmtree(root / "cache")
    return {
        "wall": wall,
        "own": cpu_seconds(resource.RUSAGE_SELF) - own,
        "workers": cpu_seconds(resource.RUSAGE_CHILDREN) - children,
    }


def main() -> None:
    rounds: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        MEMORY["train_tokenizer"](root)
        (root / "set").mkdir()
        for n in range(FILES):
            MEMORY["write_lines"](root / "set" / f"train-{n}.jsonl.zst", DOCUMENTS, n)
        encoder(root / "tokenizer")("a")  # which is loaded once
        for number in range(ROUNDS):
            for workers in (1, 2) if number % 2 else (2, 1):
                rounds[workers].append(measured(root, workers))
    ratios = [two["wall"] / one["wall"] for one, two in zip(rounds[1], rounds[2], strict=True)]
    # Of one worker all is in one process. Of two, what the waiting process does is done by no worker.
    one = statistics.median(each["own"] for each in rounds[1])
    serial = statistics.median(each["own"] for each in rounds[2])
    theirs = statistics.median(each["workers"] for each in rounds[2])
    report: dict[str, Any] = {
        **machine(),
        "commit": git_commit(),
        "documents": FILES * DOCUMENTS,
        "rounds": {
            str(n): [{key: round(value, 2) for key, value in each.items()} for each in found]
            for n, found in rounds.items()
        },
        "wall_ratios": [round(ratio, 2) for ratio in ratios],
        "median_wall_ratio": round(statistics.median(ratios), 2),
        "ratio_by_cpu_time": round((serial + theirs / 2) / one, 2),
    }
    write_json(Path(__file__).with_suffix(".json"), report)
    print(report)


if __name__ == "__main__":
    main()
