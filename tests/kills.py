"""Kills a chain of stages at drawn moments until it is done, and compares it with one left alone.

    python tests/kills.py [kills] [seed] [scale] [stage]       small: pretraining; tiny: all stages

SIGKILL of the runner, of its group or of its workers. After a kill of the runner no process may be
left 5 s later; each time a chain is done it must hold the same bits. Ends with a table.
"""

import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT
from conftest import metrics as lines_of
from processes import is_alive, working_in
from safetensors.torch import load_file
from small_checkout import CODE, Checkout, make_checkout, no_process_left, send

TARGETS = ("runner", "group", "workers")
SECONDS = 5  # after which nobody may be left


def digest(data: Any) -> str:
    return hashlib.blake2b(data).hexdigest()


def made(folder: Path, scale: str) -> Checkout:
    """A checkout of the small pipeline, or of the repository's own recipes."""
    if scale == "small":
        return make_checkout(folder)
    folder.mkdir(parents=True)
    for name in (*CODE, "recipes"):
        (folder / name).symlink_to(ROOT / name)
    return Checkout(folder)


def outcome(checkout: Checkout) -> dict[str, object]:
    """Weights and metrics of all stages, by their place."""
    found: dict[str, object] = {}
    runs = checkout.folder / "runs"
    for file in sorted(runs.glob("*/*/**/model*.safetensors")):
        tensors = load_file(file)  # not the file's bytes: its metadata has no fixed order
        found[str(file.relative_to(runs))] = {
            name: digest(tensor.contiguous().flatten().view(torch.uint8).numpy())
            for name, tensor in tensors.items()
        }
    for file in sorted(runs.glob("*/*/metrics.jsonl")):
        lines = lines_of(file.parent)
        found[str(file.relative_to(runs))] = [
            {key: value for key, value in line.items() if key != "tokens_per_second"}
            for line in lines
        ]
    return found


def stage_of(checkout: Checkout) -> str:
    """The stage that ran last."""
    manifests = list(checkout.folder.glob("runs/*/*/recipe.yaml"))
    newest = max(manifests, key=lambda file: file.stat().st_mtime, default=None)
    return newest.parent.name if newest else "none yet"


def killed(checkout: Checkout, stage: str, scale: str, target: str, delay: float) -> str | None:
    """The stage in which a run was killed; None where it was done before."""
    log = checkout.folder / "killed.log"
    with log.open("w") as output:
        runner = subprocess.Popen(
            checkout.command("run", stage), cwd=checkout.folder, start_new_session=True,
            env=checkout.environment | {"SCALE": scale}, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        runner.wait(delay)
        assert runner.returncode == 0, log.read_text()[-3000:]
        return None
    except subprocess.TimeoutExpired:
        where = stage_of(checkout)
        send(target, runner.pid, signal.SIGKILL)
    runner.wait(600)  # without its workers it goes on, or fails
    end = time.monotonic() + SECONDS
    while left := list(filter(is_alive, working_in(checkout.folder))):
        assert time.monotonic() < end, f"{target}, {where}: {len(left)} processes are left"
        time.sleep(0.02)
    return where


def main(kills: int = 50, seed: int = 0, scale: str = "small", stage: str = "") -> None:
    stage = stage or ("pretrain-stage3" if scale == "small" else "report")
    draw, table, chains, done = random.Random(seed), Counter[tuple[str, str]](), 0, 0
    with tempfile.TemporaryDirectory(prefix="kills-") as root:
        whole = made(Path(root) / "whole", scale)
        begin = time.monotonic()
        subprocess.run(
            whole.command("run", stage), cwd=whole.folder, check=True, stdout=subprocess.DEVNULL,
            env=whole.environment | {"SCALE": scale},
        )  # fmt: skip
        # Not longer than a stage: a kill after the chain's end is none.
        longest, expected = min((time.monotonic() - begin) / 2, 45), outcome(whole)
        while done < kills:
            chains += 1
            checkout = made(Path(root) / f"chain-{chains}", scale)
            with no_process_left(checkout):
                while True:
                    target = draw.choice(TARGETS)
                    delay = draw.uniform(0.3, longest) if done < kills else 3600
                    where = killed(checkout, stage, scale, target, delay)
                    if where is None:
                        break
                    table[where, target] += 1
                    done += 1
                    print(f"{done}: {target} after {delay:.1f} s in {where}", flush=True)
            found = outcome(checkout)
            assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
            assert not (wrong := [name for name in found if found[name] != expected[name]]), wrong
    print(
        f"{done} kills, {chains} chains ended in the same bits, no process left {SECONDS} s later"
    )
    print(f"{'stage':20}" + "".join(f"{target:>9}" for target in TARGETS))
    for name in dict.fromkeys(name for name, _ in sorted(table)):
        print(f"{name:20}" + "".join(f"{table[name, target]:9}" for target in TARGETS))


if __name__ == "__main__":
    main(*(kind(word) for kind, word in zip((int, int, str, str), sys.argv[1:], strict=False)))
