"""Shared pieces: small shards on disk and a nanotron job that trains on them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml

if TYPE_CHECKING:
    from nanotron_ext.job import Job, Source

# As the Makefile says: threads that wait in a loop lose to any other program on the machine. To be
# set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many tests at once as there are cores
ROOT = Path(__file__).parent.parent
VOCAB_SIZE, EOS_ID = 256, 255
# Minutes each: begun first, so that no process works on one alone at the end.
LONG = (
    "test_slurm.py",
    "test_how_tos.py",
    "test_hub_runs.py",
    "test_pipeline_end_to_end.py",
    "test_sizes_chain.py",
    "test_how_to_own_text.py",
    "test_posttrain_zero3.py",
)
# A test for a GPU runs on a CPU too, smaller, so that its logic is known before a GPU sees it.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    ranks = {name: rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


def kept_environment() -> Iterator[None]:
    """Put os.environ back, with what it held: our jobs and libraries set variables, and `datasets`
    (map over processes) puts a copy in its place, of which nothing that is undone takes effect."""
    environ, before = os.environ, dict(os.environ)
    yield
    added = {*environ, *os.environ} - before.keys() - {"PYTEST_CURRENT_TEST"}
    os.environ = environ  # noqa: B003
    for name in added:
        environ.pop(name, None)
        os.unsetenv(name)  # what the copy alone had
    environ.update({k: v for k, v in before.items() if k != "PYTEST_CURRENT_TEST"})


# Neither a test nor a module's fixture leaves a variable to what its process runs next.
_of_module = pytest.fixture(kept_environment, scope="module", autouse=True, name="_of_module")
_of_test = pytest.fixture(kept_environment, autouse=True, name="_of_test")


def write_shard(folder: Path, tokens: int, seed: int = 0, files: int = 1) -> Path:
    """Token shards of random documents of about 20 tokens, EOS between them."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, VOCAB_SIZE - 1, tokens).astype(np.uint16)
    values[rng.random(tokens) < 1 / 20] = EOS_ID
    folder.mkdir(parents=True)
    for number, part in enumerate(np.array_split(values, files)):
        part.tofile(folder / f"{number:05d}.ds")
    return folder


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., Path]:
    return job_maker(tmp_path)


# What a job of the tests changes of stage 1's section.
SMALL = {
    "checkpoints.checkpoint_interval": 3,
    "checkpoints.checkpoints_path_is_shared_file_system": True,
    "logging.log_level": "warning",
    "model.dtype": "float32",
    "model.model_config.hidden_size": 32,
    "model.model_config.intermediate_size": 64,
    "model.model_config.num_attention_heads": 4,
    "model.model_config.num_key_value_heads": 2,
    "model.model_config.num_hidden_layers": 4,
    "model.model_config.vocab_size": VOCAB_SIZE,
    "optimizer.accumulate_grad_in_fp32": False,
    "optimizer.learning_rate_scheduler.learning_rate": 0.01,
    "optimizer.learning_rate_scheduler.lr_warmup_steps": 2,
    "optimizer.learning_rate_scheduler.lr_decay_starting_step": 4,
    "optimizer.learning_rate_scheduler.lr_decay_steps": 3,
    "parallelism.dp": 1,
    "parallelism.tp": 1,
    "parallelism.tp_mode": "ALL_REDUCE",
    "tokens.batch_accumulation_per_replica": 4,
    "tokens.micro_batch_size": 1,
    "tokens.sequence_length": 32,
}


def small_section(overlay: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Stage 1's `nanotron` section, small; keys of `overlay` are joined by points."""
    from launch.recipe.book import load_recipe

    section = asdict(load_recipe("pretrain-stage1").recipe.nanotron)
    # With data parallelism nanotron demands that no two ranks hold equal position_ids.
    unchecked = {"general.ignore_sanity_checks": overlay.get("parallelism.dp", 1) > 1}
    for key, value in {**SMALL, **unchecked, "tokens.train_steps": steps, **overlay}.items():
        *path, last = key.split(".")
        target = section
        for part in path:
            target = target[part]
        target[last] = value
    return section


def small_job(
    name: str, section: Mapping[str, Any], sources: list["Source"], first_step: int, cache: Path
) -> "Job":
    """A job of these sources, for a section that is lowered."""
    from nanotron_ext.job import FastStep, Job, SpikeOptions

    return Job(
        stage=name,
        weights={"a": 0.7, "b": 0.3},
        sources=sources,
        decay_exclude=[".*token_embedding.*"],
        gradient_spikes=SpikeOptions(**section["optimizer"]["gradient_spikes"]),
        fast_step=FastStep(**section["fast_step"]),
        data_seed=6,
        eos_id=EOS_ID,
        first_step=first_step,
        tokens_before=0,
        cache=cache,
    )


def job_maker(tmp_path: Path) -> Callable[..., Path]:
    """Makes run folders in `tmp_path` with nanotron.yaml and job.json, ready for torchrun."""
    from nanotron_ext.adapter import lower
    from nanotron_ext.job import Source

    shards = {
        name: write_shard(tmp_path / "shards" / name, tokens, seed=len(name) + tokens)
        for name, tokens in {"a": 4000, "b": 3000}.items()
    }

    def make(
        name: str,
        overlay: Mapping[str, Any] | None = None,
        steps: int = 6,
        resume: Path | None = None,
        first_step: int = 0,
        weights: Mapping[str, float] | None = None,
        drawn: Mapping[str, int] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        section = small_section(overlay or {}, steps)
        config, _ = lower(section, folder / "checkpoints", resume)
        (folder / "nanotron.yaml").write_text(yaml.safe_dump(config))
        sources = [Source(one, shards[one], 2, (drawn or {}).get(one, 0)) for one in shards]
        job = small_job(name, section, sources, first_step, tmp_path / "cache")
        replace(job, weights=dict(weights or job.weights)).write(folder)
        return folder

    return make


def command(folder: Path, processes: int = 1) -> list[str]:
    """Trains a run folder's job over real processes (gloo)."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return [*words, str(processes), "-m", "nanotron_ext.trainer", str(folder)]


def python_path(*first: Path) -> str:
    """For a child process: `first`, the project, and what this process was given."""
    return os.pathsep.join(map(str, filter(None, [*first, ROOT, os.environ.get("PYTHONPATH")])))


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"} | more


def torchrun(folder: Path, processes: int = 1, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, processes),
        capture_output=True,
        text=True,
        env=environment(**more),
        check=False,
        timeout=300,
    )


def train(folder: Path, processes: int = 1) -> None:
    """Train a run folder's job in processes that share one import with the other tests'.

    Raises UserError for a mistake, as a stage does.
    """
    from launch.run.workers import run_workers

    with open(os.devnull) as lock:
        run_workers(folder, folder.name, processes=processes, lock=lock.fileno())


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def forget_recipes() -> None:
    """Let launch read recipes/ anew: each of its files is read once a process."""
    for module in list(sys.modules.values()):
        if module.__name__.startswith(("launch.recipe.", "launch.stages.")):
            for name, value in vars(module).items():
                if name != "_adapter":  # of our own types, which no recipe changes
                    getattr(value, "cache_clear", int)()


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of recipes/ that launch reads, to be spoilt."""
    from launch.recipe import load

    folder = tmp_path / "checkout" / "recipes"
    shutil.copytree(ROOT / "recipes", folder)
    monkeypatch.setattr(load, "RECIPES", folder)
    forget_recipes()
    yield folder
    forget_recipes()


def edit(file: Path, old: str, new: str) -> None:
    """Replace the one place where `old` stands; an edit that changes nothing is a broken test."""
    text = file.read_text()
    assert old in text, f"{file} has no {old!r}"
    file.write_text(text.replace(old, new, 1))
    forget_recipes()
