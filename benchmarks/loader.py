"""Tokens that the loader reads in a second of CPU time, beside datatrove's own reader.

Windows of 4,096 tokens with their positions, out of the page cache, one thread. The loader makes
stage 1's micro-batches (41 sources in the mixture's order: inputs, labels, mask, positions, document
borders); datatrove's dataset makes single windows (tokens, positions) of the same files in their
order on disk, which is the fastest it has. Rounds alternate. Writes benchmarks/loader.json:

    python benchmarks/loader.py
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ground.files import write_json
from launch.machine.here import machine
from launch.recipe.book import load_recipe
from launch.run.folder import git_commit
from nanotron_ext.dataloader import Loader
from nanotron_ext.job import Source
from nanotron_ext.mixture import build_mixture

SEQUENCE_LENGTH, MICRO_BATCH_SIZE = 4096, 3  # as published
VOCAB_SIZE, EOS_ID = 128_256, 128_001
SOURCE_TOKENS, DOCUMENT_TOKENS = 500_000, 1000  # a source's, and the mean of a document
ROUNDS, CPU_SECONDS = 5, 2.0


def write_shards(root: Path, names: list[str]) -> list[Source]:
    rng, sources = np.random.default_rng(0), []
    for number, name in enumerate(names):
        folder = root / str(number)
        folder.mkdir()
        tokens = rng.integers(0, EOS_ID, SOURCE_TOKENS, np.uint32)
        tokens[rng.random(SOURCE_TOKENS) < 1 / DOCUMENT_TOKENS] = EOS_ID
        tokens[-1] = EOS_ID
        tokens.tofile(folder / "00000.ds")
        ends = np.flatnonzero(tokens == EOS_ID).astype(np.uint64) + np.uint64(1)
        ends.tofile(folder / "00000.ds.index")
        sources.append(Source(name, folder, 4))
    return sources


def loader(sources: list[Source], weights: dict[str, float]) -> Iterator[int]:
    """Tokens of each of the loader's micro-batches."""
    batches = Loader(
        build_mixture(weights), sources, SEQUENCE_LENGTH, MICRO_BATCH_SIZE, dp_rank=0, dp_size=1,
        first_sample=0, seed=6, eos_id=EOS_ID, vocab_size=VOCAB_SIZE,
    )  # fmt: skip
    for batch in batches:
        yield batch.input_ids.numel()


def datatrove(root: Path, **positions: Any) -> Iterator[int]:
    """Tokens of each of the windows of datatrove's dataset."""
    from datatrove.utils.dataset import DatatroveFolderDataset

    windows = DatatroveFolderDataset(
        str(root), SEQUENCE_LENGTH, "*/*.ds", token_size=4, return_positions=True, **positions
    )
    for index in cycle(range(len(windows))):
        assert len(windows[index]["positions"]) == SEQUENCE_LENGTH + 1
        yield SEQUENCE_LENGTH


def rate(tokens: Iterator[int]) -> float:
    """Million tokens a second of CPU time."""
    start, read = time.process_time(), 0
    while (used := time.process_time() - start) < CPU_SECONDS:
        read += next(tokens)
    return read / used / 1e6


def main() -> None:
    torch.set_num_threads(1)
    weights = load_recipe("pretrain-stage1").recipe.mixture
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        sources = write_shards(root, list(weights))
        ways: dict[str, Callable[[], Iterator[int]]] = {
            "loader": lambda: loader(sources, weights),
            "datatrove, positions by EOS": lambda: datatrove(
                root, positions_from_eos_token_id=EOS_ID
            ),
            "datatrove, positions by index": lambda: datatrove(root),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(ROUNDS):
            for name in list(ways)[:: 1 if number % 2 == 0 else -1]:
                rates[name].append(round(rate(ways[name]()), 1))
    table = {name: {"median": statistics.median(r), "rounds": r} for name, r in rates.items()}
    report = {
        **machine(),
        "commit": git_commit(),
        "sequence_length": SEQUENCE_LENGTH,
        "micro_batch_size": MICRO_BATCH_SIZE,
        "million_tokens_per_cpu_second": table,
    }
    write_json(Path(__file__).with_suffix(".json"), report)
    for name, row in table.items():
        print(f"{name:32} {row['median']:6.1f} million tokens a CPU-second")


if __name__ == "__main__":
    main()
