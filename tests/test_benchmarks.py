"""What benchmarks/ takes from the project is there."""

import runpy
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda f: f.stem)
def test_a_benchmark_finds_all_that_it_imports(file: Path) -> None:
    assert callable(runpy.run_path(str(file), run_name="imported")["main"])
