"""The memory of a task does not grow with its source; what would take too much is refused before."""

import io
import random
import runpy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from datatrove_pipelines import hub_files, table_pages
from datatrove_pipelines.counts import Counts
from datatrove_pipelines.sources import HubSplit
from datatrove_pipelines.table_pages import Pages
from datatrove_pipelines.units import MOST_TOKENS, Unit
from ground.errors import UserError


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_is_that_of_a_unit(tmp_path: Path) -> None:
    bench = runpy.run_path(str(ROOT / "benchmarks" / "data_memory.py"), run_name="imported")
    bench["train_tokenizer"](tmp_path)
    few, many = 40_000, 240_000
    peaks = []
    for count, units in ((few, 1), (many, 5), (many, 1)):
        root = tmp_path / f"{count}-{units}"
        (root / "set").mkdir(parents=True)
        bench["write_lines"](root / "set" / "train.jsonl.zst", count)
        found = bench["measured"](root, units * MOST_TOKENS)
        assert (found["documents"], found["units"]) == (count, units)
        peaks.append(found["peak_bytes"])
    print(peaks)
    small, in_units, in_one = peaks
    assert in_units < small + 12e6
    assert in_one < small + 12e6 + 50 * (many - few)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {"compression": "none", "use_dictionary": False},
    "dictionary": {"compression": "zstd"},
    "second version": {"data_page_version": "2.0", "compression": "snappy"},
    "checksums": {"write_page_checksum": True, "write_statistics": False},
    "index": {"write_page_index": True, "compression": "gzip"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_pages_are_followed_in_pieces_of_any_size(kind: str) -> None:
    draw = random.Random(kind)
    texts = [draw.randbytes(draw.randint(0, 200)).hex() for _ in range(2000)]
    numbers = [draw.choice([n, None, -n]) for n in range(2000)]
    table = pa.table({"n": numbers, "text": texts, "half": [n / 2 for n in range(2000)]})
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=700, data_page_size=3000, **KINDS[kind])
    content, metadata = file.getvalue(), pq.read_metadata(file)
    for group in range(metadata.num_row_groups):
        pages = Pages()
        pages.begin(metadata, group, ["n", "text", "half"])
        assert len(pages.columns) == 3
        for column in pages.columns:
            at = column.start
            while at < column.stop:
                size = min(draw.choice([1, 7, 100, 5000]), column.stop - at)
                pages.check(at, content[at : at + size])
                at += size
            assert column.header == column.stop and not column.kept


def test_a_page_of_too_many_bytes_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "train.parquet"
    words = ["first", "word " * 40_000, "last"]
    table = pa.table({"other": words[::-1], "text": words})
    pq.write_table(table, file, row_group_size=1, compression="zstd")
    assert file.stat().st_size < 10_000  # the size is that of what is unpacked
    split = HubSplit(str(tmp_path), None, "train", "abc")
    unit = Unit(0, file.name, 0.0, 1.0, file.stat().st_size)
    monkeypatch.setattr(table_pages, "MOST_PAGE_BYTES", 100_000)
    read = []
    with pytest.raises(UserError) as error:
        read += (text for _, text in hub_files.texts(split, unit, Counts()))
    where = "train.parquet, row 1: row group 1: column text: a page of 200,004 bytes"
    assert where in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setattr(table_pages, "MOST_PAGE_BYTES", 300_000)
    assert [text for _, text in hub_files.texts(split, unit, Counts())] == words
