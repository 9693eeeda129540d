"""The peak that a training reports is its own."""

from pathlib import Path

import numpy as np
import pytest

from ground import peak_memory
from ground.files import read_record, write_record

MEGABYTES = 300 * 2**20


def test_a_peak_is_counted_from_the_beginning_of_a_training() -> None:
    held = np.ones(MEGABYTES, np.uint8)
    before = peak_memory.peak()
    if before is None:
        pytest.skip("this system does not say how much memory a process held")
    del held
    peak_memory.begin()
    assert (low := peak_memory.peak()) is not None and low < before - MEGABYTES // 2
    held = np.ones(MEGABYTES, np.uint8)
    del held
    assert (high := peak_memory.peak()) is not None and high >= low + MEGABYTES // 2


def test_a_run_that_goes_on_keeps_the_larger_peak(tmp_path: Path) -> None:
    assert peak_memory.kept(tmp_path) == {}
    peak_memory.keep(tmp_path)
    first = read_record(tmp_path / peak_memory.FILE)
    assert first["gpu"] == "" and first["processes"] == 1
    write_record(tmp_path / peak_memory.FILE, first | {"peak_memory_bytes": 2**50})
    peak_memory.keep(tmp_path)
    assert peak_memory.kept(tmp_path)["machine"]["peak_memory_bytes"] == 2**50
