"""What `make` does where a GPU is, and where none is; nothing is installed."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT


def program(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return folder / name


def make(*words: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *words],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("status", [0, 9], ids=["a GPU", "no driver"])
def test_install_takes_the_gpu_extra_where_a_gpu_is(tmp_path: Path, status: int) -> None:
    program(tmp_path, "nvidia-smi", f"[ {status} = 0 ] && echo 'GPU 0: one'; exit {status}")
    done = make("-n", "install", f"VENV={tmp_path / 'venv'}", path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--editable '.[dev]'" in done.stdout
    assert ("--editable '.[gpu]'" in done.stdout) == (status == 0)


@pytest.mark.parametrize("has_gpu", [True, False])
def test_gpu_check_runs_the_marked_tests_or_says_that_it_ran_none(
    tmp_path: Path, has_gpu: bool
) -> None:
    seen = tmp_path / "seen"
    answer = f'[ "$1" = -c ] && exit {int(not has_gpu)}; echo "$@" >> {seen}'
    program(tmp_path / "venv" / "bin", "python", answer)
    (tmp_path / "venv" / ".installed").touch()
    done = make("gpu-check", f"VENV={tmp_path / 'venv'}", path=tmp_path)
    if has_gpu:
        assert done.returncode == 0, done.stderr
        assert seen.read_text() == "-m pytest -m gpu\n"
    else:
        assert done.returncode == 2 and not seen.exists()
        assert done.stderr.splitlines()[0] == "error: no GPU here: nothing was run"
