"""Tokens that are made in a second of CPU time, beside datatrove's own DocumentTokenizer.

The text of all stand-ins, with tokenizers that are trained on it; each way writes the whole shard,
shuffled, with its index, in one thread. Rounds alternate, and the files are compared byte by byte.
Writes benchmarks/data.json:

    make bench-data
"""

import os

os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.tokens import DocumentTokenizer
from loguru import logger

from datatrove_pipelines.fast_tokenizer import encoder
from datatrove_pipelines.shards import content_hash
from datatrove_pipelines.sources import JsonlFile, SourceJob, read_documents
from datatrove_pipelines.token_writer import write_tokens
from datatrove_pipelines.tokenizer import EOS, plain_text_tokenizer, train_bpe
from ground.files import write_json
from launch.machine.here import machine
from launch.recipe.tables import load_standins
from launch.run.folder import git_commit
from launch.stages.sources import build_standins

VOCAB_SIZES, ROUNDS, SEED = (49_152, 128_000), 3, 6


def texts() -> list[Document]:
    files = build_standins(load_standins())
    jobs = [SourceJob(name, JsonlFile(file)) for name, file in sorted(files.items())]
    return [document for job in jobs for document in read_documents(job)]


def stock(output: Path, folder: Path) -> Any:
    """datatrove's step as it is, with the tokenizer that reads control tokens as plain text."""
    step = DocumentTokenizer(
        str(output), str(folder / "tokenizer.json"), eos_token=EOS, seed=SEED,
        save_final_metadata=False,
    )  # fmt: skip
    step.__dict__["tokenizer"] = plain_text_tokenizer(
        folder, content_hash(folder / "tokenizer.json")
    )
    return step


def measured(step: Any, documents: list[Document]) -> float:
    """Seconds of CPU time that a step takes."""
    start = time.process_time()
    step.run(iter(documents))
    return time.process_time() - start


def compare(documents: list[Document], folder: Path, scratch: Path) -> dict[str, Any]:
    ways: dict[str, Callable[[Path], Any]] = {
        "DocumentTokenizer": lambda output: stock(output, folder),
        "token_writer": lambda output: write_tokens(output, folder, SEED),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for name, way in ways.items():  # once aside, with what is loaded at the first text
        measured(way(scratch / "warm" / name), documents[:100])
    for number in range(ROUNDS):
        for name in list(ways)[:: 1 if number % 2 == 0 else -1]:
            seconds[name].append(measured(ways[name](scratch / name), documents))
    files = [file.name for file in (scratch / "DocumentTokenizer").iterdir()]
    for file in files:
        one, other = ((scratch / name / file).read_bytes() for name in ways)
        assert one == other, f"{file} differs"
    tokens = next((scratch / "token_writer").glob("*.ds")).stat().st_size
    tokens //= encoder(folder).token_bytes
    rates = {n: [round(tokens / s / 1e6, 3) for s in times] for n, times in seconds.items()}
    medians = {name: statistics.median(rate) for name, rate in rates.items()}
    return {
        "tokens": tokens,
        "equal_files": sorted(files),
        "million_tokens_per_cpu_second": rates,
        "ratio_of_medians": round(medians["token_writer"] / medians["DocumentTokenizer"], 2),
    }


def main() -> None:
    logger.disable("datatrove")
    documents, rows = texts(), dict[str, Any]()
    with tempfile.TemporaryDirectory() as scratch:
        for vocab_size in VOCAB_SIZES:
            folder = Path(scratch) / str(vocab_size)
            train_bpe((document.text for document in documents), vocab_size, folder)
            row = compare(documents, folder, Path(scratch) / f"shards-{vocab_size}")
            rows[str(vocab_size)] = row
            print(f"vocabulary of {vocab_size:,}: {row['ratio_of_medians']} times, same bytes")
    report: dict[str, Any] = machine()
    report["versions"]["tiktoken"] = version("tiktoken")
    report |= {
        "commit": git_commit(),
        "documents": len(documents),
        "bytes": sum(len(document.text.encode()) for document in documents),
        "by_vocabulary": rows,
    }
    write_json(Path(__file__).with_suffix(".json"), report)


if __name__ == "__main__":
    main()
