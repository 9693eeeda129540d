"""Peak memory of tokenising 10 million documents and one of a gigabyte: `python benchmarks/data_memory.py`.

Made-up texts in a local folder of the hub's layout, through the real build, each case in a process of
its own: its largest resident set (VmHWM), in which the files that it maps count too. Writes
benchmarks/data_memory.json; the files take 3 GB while it runs.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ground.files import write_json
from launch.machine.here import machine
from launch.run.folder import git_commit

DOCUMENTS, WORDS, HUGE_BYTES = 10_000_000, 24, 1_000_000_000
VOCAB_SIZE, TABLE_ROWS = 8192, 100_000


def texts(count: int, seed: int = 0) -> Iterator[list[str]]:
    """Texts of about WORDS made-up words, by lists of TABLE_ROWS."""
    rng = np.random.default_rng(seed)
    letters = rng.integers(ord("a"), ord("z") + 1, (5000, 6), np.uint8)
    words = [bytes(row[: 2 + n % 5]).decode() for n, row in enumerate(letters)]
    for start in range(0, count, TABLE_ROWS):
        sizes = rng.integers(WORDS // 2, WORDS + WORDS // 2, min(TABLE_ROWS, count - start))
        ranks = np.minimum(rng.zipf(1.3, int(sizes.sum())) - 1, len(words) - 1)
        picked, end = [words[rank] for rank in ranks], 0
        texts = []
        for size in sizes:
            texts.append(" ".join(picked[end : end + size]))
            end += size
        yield texts


@contextmanager
def lines(file: Path) -> Iterator[io.BufferedIOBase | Any]:
    from zstandard import ZstdCompressor

    with file.open("wb") as stored, ZstdCompressor(3).stream_writer(stored) as stream:
        yield stream


def write_lines(file: Path, count: int, seed: int = 0) -> None:
    with lines(file) as stream:
        for part in texts(count, seed):
            stream.write(b"".join(b'{"text": "%s"}\n' % text.encode() for text in part))


def write_table(file: Path, count: int, seed: int = 0) -> None:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    with ParquetWriter(file, pa.schema({"text": pa.string()}), compression="zstd") as table:
        for part in texts(count, seed):
            table.write_table(pa.table({"text": part}))


def write_huge_line(file: Path) -> None:
    part = b"many words of one text " * 50_000
    with lines(file) as stream:
        stream.write(b'{"text": "first"}\n{"text": "')
        for _ in range(HUGE_BYTES // len(part)):
            stream.write(part)
        stream.write(b'"}\n{"text": "last"}\n')


def write_huge_row(file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = "many words of one text " * (HUGE_BYTES // 23)
    pq.write_table(pa.table({"text": ["first", text, "last"]}), file, compression="zstd")


def build(root: Path, tokens: int | None) -> dict[str, Any]:
    """Tokenise the set in `root` in this process; the peak of its memory, and what came of it."""
    from datatrove_pipelines.building import tokenize_source
    from datatrove_pipelines.sources import HubSplit, SourceJob
    from ground.errors import UserError

    job = SourceJob("made-up", HubSplit(str(root / "set"), None, "train", "main", tokens=tokens))
    begin, result = time.process_time(), dict[str, Any]()
    try:
        info = tokenize_source(job, root.parent / "tokenizer", root / "cache")
        result = {
            "documents": info.documents, "tokens": info.tokens, "units": len(info.units),
            "most_tokens_of_a_unit": max(unit.tokens for unit in info.units),
            "left_out": {name: n for name, n in info.left_out.items() if n},
        }  # fmt: skip
    except UserError as error:
        result = {"refused": str(error).replace(str(root), "<folder>")}
    return result | {"peak_bytes": peak(), "cpu_seconds": round(time.process_time() - begin)}


def peak() -> int:
    """Of this process; getrusage would tell its parent's where that is more."""
    (size,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(size) * 1024


def measured(root: Path, tokens: int | None) -> dict[str, Any]:
    """`build` in a process of its own, which gives freed memory back (`make` sets glibc to keep it)."""
    environment = {k: value for k, value in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, __file__, str(root), str(tokens or 0)], capture_output=True, text=True,
        check=False, env=environment,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def train_tokenizer(scratch: Path) -> None:
    from datatrove_pipelines.tokenizer import train_bpe

    train_bpe(next(texts(TABLE_ROWS)), VOCAB_SIZE, scratch / "tokenizer")


def main(scratch: Path, documents: int = DOCUMENTS) -> dict[str, Any]:
    train_tokenizer(scratch)
    ways = {
        "lines": ("jsonl.zst", write_lines), "table": ("parquet", write_table),
        "a gigabyte in a line": ("jsonl.zst", lambda file, _: write_huge_line(file)),
        "a gigabyte in a table": ("parquet", lambda file, _: write_huge_row(file)),
    }  # fmt: skip
    cases = dict[str, Any]()
    for name, (kind, write) in ways.items():
        root = scratch / kind
        (root / "set").mkdir(parents=True)
        write(root / "set" / f"train.{kind}", documents)
        stored = sum(file.stat().st_size for file in root.glob("set/*"))
        # In one unit, and in ten.
        for published in {"lines": (documents, 200 * documents), "table": (documents,)}.get(
            name, (None,)
        ):
            units = f" of {published:,} published tokens" if published else ""
            cases[f"{name}{units}"] = measured(root, published) | {"stored_bytes": stored}
            print(f"{name}{units}: {cases[f'{name}{units}']}", flush=True)
            shutil.rmtree(root / "cache", ignore_errors=True)
        shutil.rmtree(root)
    return cases


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(build(Path(sys.argv[1]), int(sys.argv[2]) or None)))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            cases = main(Path(scratch))
        report = {**machine(), "commit": git_commit(), "vocabulary": VOCAB_SIZE, "cases": cases}
        write_json(Path(__file__).with_suffix(".json"), report)
