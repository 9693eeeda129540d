"""The conformance kit on llama.cpp and on servers: it passes, and it finds faults in a file."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from conftest import ROOT, environment
from processes import free_port
from test_conformance import modeless, no_yarn, other_theta, untied

from conformance.__main__ import conform
from conformance.cases import KIT
from runtimes.gguf_file import write_gguf

llama_cpp = pytest.importorskip("llama_cpp", reason="no llama-cpp-python")


def written(folder: Path, to: Path) -> Path:
    """The two GGUF files of a kit's folder; the path of the first."""
    write_gguf(folder, to / "kit-f32.gguf", "f32")
    write_gguf(folder / "yarn", to / "kit-yarn-f32.gguf", "f32")
    return to / "kit-f32.gguf"


def lines(capsys: pytest.CaptureFixture[str], outcome: str) -> dict[str, str]:
    """Case: line, of those with an outcome."""
    rows = capsys.readouterr().out.splitlines()
    return {row[len(outcome) :].split()[0]: row for row in rows if row.startswith(outcome + " ")}


@pytest.mark.slow
def test_an_exported_file_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert conform(str(written(KIT, tmp_path))) == 0
    assert {"tied-head", "logits", "packed", "yarn", "greedy", "greedy-yarn", "tokens", "template-modes", "answer-call"} <= lines(capsys, "passed").keys()  # fmt: skip


GGUF_FAULTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "theta": (other_theta, "theta", "rope_theta is ignored"),
    "yarn": (no_yarn, "yarn", "YaRN is ignored"),
    "untied": (untied, "tied-head", "output head"),
    "template": (modeless, "template-modes", "no modes"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", GGUF_FAULTS)
def test_a_fault_in_a_file_fails_the_case_that_names_it(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed, case, words = GGUF_FAULTS[fault]
    shutil.copytree(KIT, tmp_path / "kit", symlinks=True)
    seed(tmp_path / "kit")
    assert conform(str(written(tmp_path / "kit", tmp_path))) == 1
    assert words in lines(capsys, "failed")[case]


@pytest.mark.slow
def test_rows_left_in_transformers_order_fail_as_rotation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtimes.gguf_file._interleaved", lambda tensor, heads: tensor)
    assert conform(str(written(KIT, tmp_path))) == 1
    assert "pairs 2i with 2i + 1" in lines(capsys, "failed")["rotation"]


@contextmanager
def served(*words: str) -> Iterator[str]:
    """The URL of a server of ours, once it answers."""
    port = free_port()
    command = [sys.executable, "-m", *words, "127.0.0.1", str(port)]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        for _ in range(300):
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            assert process.poll() is None
            time.sleep(0.3)
        yield url
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.slow
def test_llama_cpps_server_passes_with_its_parsed_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("xllamacpp")
    with served("runtimes.llama_server", str(written(KIT, tmp_path))) as url:
        assert conform(url) == 0
    assert {"logits", "theta", "nope", "greedy", "template-tools", "answer-think", "answer-call"} <= lines(capsys, "passed").keys()  # fmt: skip


@pytest.mark.slow
def test_transformers_serve_passes(capsys: pytest.CaptureFixture[str]) -> None:
    with served("runtimes.transformers_server", str(KIT)) as url:
        status = conform(url)
    assert status == 0, capsys.readouterr().out
    assert {"greedy", "template-modes", "answer-think", "answer-call"} <= lines(capsys, "passed").keys()  # fmt: skip
