"""A checkout with recipes of its own, small enough to run the whole pipeline in a test.

Code is linked, not copied. The text is Python's own library, so that nothing is downloaded.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import forked
import psutil
import yaml
from conftest import ROOT
from processes import is_alive, kill, working_in

CODE = (
    "ground", "launch", "nanotron_ext", "datatrove_pipelines", "eval_tasks", "posttrain", "runtimes",
    "conformance",
)  # fmt: skip
VOCAB_SIZE = 512
STEPS = {"pretrain-stage1": 29, "pretrain-stage2": 36, "pretrain-stage3": 40}
WINDOW, WINDOWS_PER_STEP, INTERVAL = 64, 4, 7
MIXTURES: dict[str, dict[str, float]] = {
    "pretrain-stage1": {"dclm": 0.75, "finemath": 0.2, "wiki": 0.01},  # sums to 0.96
    "pretrain-stage2": {"dclm": 0.5, "finemath": 0.3, "wiki": 0.2},
    "pretrain-stage3": {"dclm": 0.4, "finemath": 0.2, "kaggle": 0.4},
}
# source: category, stand-in
SOURCES = {
    "dclm": ("web-en", "prose"),
    "wiki": ("web-en", "prose"),
    "finemath": ("math", "scripts"),
    "kaggle": ("code", "scripts"),
}
FILES = {"prose": ["asyncio/*.py", "email/*.py"], "scripts": ["json/*.py", "logging/*.py", "u*.py"]}
SCALE: dict[str, Any] = {
    "scale": "small",
    "origin": "standin",
    "decontaminate": "off",
    "device": "cpu",
    "held_out": {"fraction": 0.06, "bytes_per_category": 4000},
    "tokenizer": {"vocab_size": VOCAB_SIZE, "train_bytes": 100_000},
    "windows_divided_by": 4096 // WINDOW,
    "steps_divided_by": 118_000,
    "ablation_steps": 12,
    "minimum_warmup_steps": 5,
    "learning_rate_times": 40,
    "nanotron": {
        "checkpoints": {
            "checkpoint_interval": INTERVAL,
            "checkpoints_path_is_shared_file_system": True,
        },
        "logging": {"log_level": "error", "log_level_replica": "error"},
        "model": {
            "dtype": "float32",
            "init_method": {"std": 0.08},
            "model_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_attention_heads": 4,
                "num_hidden_layers": 4,
                "num_key_value_heads": 1,
                "vocab_size": VOCAB_SIZE,
                "bos_token_id": VOCAB_SIZE - 13,
                "eos_token_id": VOCAB_SIZE - 12,
            },
        },
        "optimizer": {"accumulate_grad_in_fp32": False},
        "parallelism": {
            "dp": 2,
            "tp": 1,
            "tp_mode": "ALL_REDUCE",
            "tp_linear_async_communication": False,
        },
        "tokens": {"micro_batch_size": 2, "batch_accumulation_per_replica": 1},
    },
    "posttrain": {"chats": {"rows": 1, "held_out_rows": 1}},
    "why": {"nanotron": "small enough for a test"},
}


@dataclass(frozen=True)
class Checkout:
    """A checkout, its runs/ and .cache/, and the faults that are injected into its processes."""

    folder: Path
    faults: str = ""

    @property
    def runs(self) -> Path:
        return self.folder / "runs" / "small"

    @property
    def cache(self) -> Path:
        return self.folder / ".cache"

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "launch", *words]

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("RUNS", "CACHE")}
        kept |= {"SCALE": "small", "FORCE": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": self.faults}
        return kept

    def launch(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = self.environment | environment
        # The hub's client reads its variables when it is imported, Python those of faults.
        if not self.faults and not any(name.startswith("HF_") for name in env):
            return forked.run("launch", "-m", "launch", *words, cwd=self.folder, env=env)
        return subprocess.run(
            self.command(*words),
            cwd=self.folder,
            env=env,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    def done(self, *words: str, **environment: str) -> str:
        """What a command prints that must succeed."""
        result = self.launch(*words, **environment)
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    def refused(self, *words: str, **environment: str) -> str:
        """The one line of a command that must fail as a user's mistake does."""
        result = self.launch(*words, **environment)
        assert result.returncode == 2, (result.returncode, result.stdout, result.stderr[-3000:])
        assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr[-3000:]
        return result.stderr

    def copy(self, folder: Path) -> "Checkout":
        """The same checkout elsewhere, with all that it has done so far."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Checkout(folder)

    def with_fault(self, code: str) -> "Checkout":
        """Processes of this checkout run `code` when Python starts."""
        faults = self.folder / "faults"
        faults.mkdir(exist_ok=True)
        (faults / "sitecustomize.py").write_text(code)
        return replace(self, faults=str(faults))


def make_checkout(folder: Path) -> Checkout:
    folder.mkdir(parents=True)
    for name in CODE:
        (folder / name).symlink_to(ROOT / name)
    recipes = folder / "recipes"
    shutil.copytree(ROOT / "recipes/pretrain", recipes / "pretrain")
    for number, stage in enumerate(STEPS, start=1):
        file = recipes / f"pretrain/stage{number}.yaml"
        _write(file, yaml.safe_load(file.read_text()) | {"mixture": MIXTURES[stage]})
    pipeline = yaml.safe_load((ROOT / "recipes/pipeline.yaml").read_text())["stages"]
    used = {*STEPS, *(row.replace("pretrain", "data") for row in STEPS)}
    used |= {"tokenizer", "held-out", "eval-texts"}
    kept = {name: row for name, row in pipeline.items() if name in used}
    for row in kept.values():
        row["mixture_of"] = [name for name in row.get("mixture_of", ()) if name in used]
    _write(recipes / "pipeline.yaml", {"stages": kept})
    sources = yaml.safe_load((ROOT / "recipes/sources.yaml").read_text())["sources"]
    rows = {
        name: sources[name] | {"category": category, "stand_in": stand_in}
        for name, (category, stand_in) in SOURCES.items()
    }
    _write(recipes / "sources.yaml", {"sources": rows})
    stand_ins = {
        name: {
            "category": "code",
            "language": "Python",
            "files": {"stdlib": files},
            "reader": "whole_files",
            "licence": "PSF-2.0",
            "provenance": "Python's library",
            "max_bytes": 200_000,
        }
        for name, files in FILES.items()
    }
    _write(recipes / "standins.yaml", {"standins": stand_ins})
    _write(recipes / "scales/small.yaml", SCALE)
    shutil.copy(ROOT / "recipes/scales/full.yaml", recipes / "scales")
    return Checkout(folder)


def _write(file: Path, values: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(values, sort_keys=False))


@contextmanager
def no_process_left(checkout: Checkout) -> Iterator[None]:
    try:
        yield
    finally:
        kill(working_in(checkout.folder))


def workers_of(runner: int) -> list[int]:
    """The processes that a runner started, and those that these started."""
    return [child.pid for child in psutil.Process(runner).children(recursive=True)]


def send(target: str, runner: int, number: signal.Signals) -> None:
    """Send a signal to the runner alone, to its group, to its workers alone or to them and it."""
    if target == "group":
        os.killpg(runner, number)
        return
    for pid in [*({"all", "workers"} & {target} and workers_of(runner)), runner]:
        if pid != runner or target != "workers":
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def kill_when(
    checkout: Checkout, stage: str, reached: Callable[[], bool],
    target: str = "all", number: signal.Signals = signal.SIGKILL, **environment: str,
) -> int | None:  # fmt: skip
    """Run a stage; send a signal once `reached`, after which no process of it is left.

    Returns the runner's status; None when it ended before.
    """
    runner = subprocess.Popen(
        checkout.command("run", stage), cwd=checkout.folder, start_new_session=True,
        env=checkout.environment | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while runner.poll() is None and not reached():
        time.sleep(0.002)
    if runner.poll() is not None:
        return None
    send(target, runner.pid, number)
    status = runner.wait(120)
    end = time.monotonic() + 5
    while left := list(filter(is_alive, working_in(checkout.folder))):
        assert time.monotonic() < end, [Path(f"/proc/{pid}/cmdline").read_text() for pid in left]
        time.sleep(0.02)
    return status
