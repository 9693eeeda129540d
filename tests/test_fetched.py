"""The bytes that are fetched of a hub's files are at most 1.2 times the bytes that are used.

Used are the stored bytes of the units whose documents are in the shards, in the columns that are read.
Not counted is the end of a table, 64 kB for each time that it is opened: once to look into the source,
and once for each file.
"""

import gzip
import io
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from loopback_hub import Hub, loopback_hub
from test_units import tokenizer

from datatrove_pipelines.building import tokenize_source
from datatrove_pipelines.sources import HubSplit, SourceJob

__all__ = ["tokenizer"]  # the fixture

END_BYTES = 1 << 16
BYTES = random.Random(0)
ROWS = [f"{n} {BYTES.randbytes(BYTES.randint(100, 1500)).hex()}" for n in range(8000)]


def parquet(rows: list[str]) -> bytes:
    """Two columns of one row group, in pages of a few rows."""
    file, other = io.BytesIO(), [os.urandom(len(row)).hex() for row in rows]
    pq.write_table(
        pa.table({"other": other, "text": rows}), file, use_dictionary=False, compression="zstd",
        write_batch_size=16, data_page_size=1 << 14,
    )  # fmt: skip
    return file.getvalue()


def jsonl(rows: list[str]) -> bytes:
    return b"".join(json.dumps({"text": row}).encode() + b"\n" for row in rows)


def zst(rows: list[str]) -> bytes:
    """Frames of a few rows: a block is as small beside these files as it is beside real ones."""
    frames = (jsonl(rows[start : start + 10]) for start in range(0, len(rows), 10))
    return b"".join(map(zstandard.ZstdCompressor().compress, frames))


WRITERS = {
    "jsonl.zst": zst, "parquet": parquet, "jsonl.gz": lambda rows: gzip.compress(jsonl(rows), 1)
}  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "set").mkdir()
    with loopback_hub({f"datasets/of/{tmp_path.name}": tmp_path / "set"}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "files", "tokens"),
    [
        ("jsonl.zst", 1, 200_000),
        ("parquet", 1, 200_000),
        *(
            pytest.param(kind, files, tokens, marks=SLOW)
            for kind in WRITERS
            for files, tokens in ((1, 400_000), (1, 2_000_000), (20, 400_000), (20, 2_000_000))
        ),
    ],
)
def test_little_is_fetched_that_is_not_used(
    hub: Hub, tmp_path: Path, tokenizer: Path, kind: str, files: int, tokens: int
) -> None:
    for n in range(files):
        content = WRITERS[kind](ROWS[n::files])
        (tmp_path / "set" / f"train-{n:02}.{kind}").write_bytes(content)
    split = HubSplit(f"of/{tmp_path.name}", None, "train", "main", portion=(0, tokens))
    info = tokenize_source(SourceJob("web", split, seed=3), tokenizer, tmp_path / "cache")
    used = sum(
        (unit.stop - unit.start) * stored(tmp_path / "set" / unit.file) for unit in info.units
    )
    ends = END_BYTES * (1 + len({unit.file for unit in info.units})) * (kind == "parquet")
    fetched = sum(size for name, size in hub.sent.items() if "/train-" in name) - ends
    whole = sum(map(stored, (tmp_path / "set").iterdir()))
    print(f"{kind}, {files} files: {used:,.0f} of {whole:,} used, {fetched:,} fetched")
    assert fetched <= 1.2 * used < whole / 2


def stored(file: Path) -> int:
    """Bytes of the file, or of its column that is read."""
    if file.suffix != ".parquet":
        return file.stat().st_size
    metadata = pq.read_metadata(file)
    groups = range(metadata.num_row_groups)
    return sum(metadata.row_group(n).column(1).total_compressed_size for n in groups)
