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
from test_conformance import NAMED, config_with, modeless, no_yarn, other_theta, untied

from conformance.__main__ import conform
from conformance.cases import KIT
from launch.tools.serve import is_ready, running
from runtimes.gguf_file import write_gguf
from runtimes.servers import server_command, vllm

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


def as_llama(patch: pytest.MonkeyPatch) -> None:
    """A file of the architecture `llama`, as which a SmolLM3 loads: it rotates every layer."""
    import gguf

    class Writer(gguf.GGUFWriter):
        def __init__(self, path: Path, _: str):
            super().__init__(path, "llama")

    patch.setattr("gguf.GGUFWriter", Writer)


def in_transformers_order(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("runtimes.gguf_file._interleaved", lambda tensor, heads: tensor)


SERVED_FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str, str]] = {
    "every layer rotated": (as_llama, "nope", "NoPE layers"),
    "rotation": (in_transformers_order, "rotation", "pairs 2i with 2i + 1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*GGUF_FAULTS, *SERVED_FAULTS])
def test_a_fault_of_a_server_fails_the_case_that_names_it(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp")
    shutil.copytree(KIT, tmp_path / "kit", symlinks=True)
    if fault in GGUF_FAULTS:
        seed, case, words = GGUF_FAULTS[fault]
        seed(tmp_path / "kit")
    else:
        spoil, case, words = SERVED_FAULTS[fault]
        spoil(monkeypatch)
    file = written(tmp_path / "kit", tmp_path)
    is_yarn = fault == "yarn"
    file = file.with_name("kit-yarn-f32.gguf") if is_yarn else file
    with served("runtimes.llama_server", str(file)) as url:
        assert conform(url, yarn=url if is_yarn else "") == 1
    failed = lines(capsys, "failed")
    assert words in failed[case], failed
    assert failed.keys() & NAMED == {case}, failed


@pytest.mark.slow
def test_inverted_nope_shows_in_what_transformers_serve_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It gives no log-probabilities, and llama.cpp has NoPE where it is, whatever its file says."""
    shutil.copytree(KIT, tmp_path / "kit", symlinks=True)
    config_with(no_rope_layers=[0, 0, 0, 1] * 2)(tmp_path / "kit")
    with served("runtimes.transformers_server", str(tmp_path / "kit")) as url:
        assert conform(url) == 1
    assert "NoPE is inverted" in lines(capsys, "failed")["greedy-long"]


@pytest.mark.slow
def test_llama_cpps_server_passes_with_its_parsed_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("xllamacpp")
    with served("runtimes.llama_server", str(written(KIT, tmp_path))) as url:
        assert conform(url) == 0
    assert {"logits", "theta", "nope", "greedy", "template-tools", "answer-think", "answer-call"} <= lines(capsys, "passed").keys()  # fmt: skip


@pytest.mark.slow
def test_vllm_passes_with_its_parsed_answers(capsys: pytest.CaptureFixture[str]) -> None:
    if vllm() is None:
        pytest.skip("no vllm")
    port = free_port()
    server = server_command(KIT, "127.0.0.1", port)
    url = f"http://127.0.0.1:{port}"
    words = (*server.words, "--dtype", "float32")  # else it takes bfloat16 on a CPU
    with running(words, environment() | server.environment) as process:
        assert is_ready(process, url, 600)
        status = conform(url)
    assert status == 0, capsys.readouterr().out
    assert {"tied-head", "theta", "nope-order", "greedy", "template-tools", "answer-think", "answer-call"} <= lines(capsys, "passed").keys()  # fmt: skip


@pytest.mark.slow
def test_transformers_serve_passes(capsys: pytest.CaptureFixture[str]) -> None:
    with served("runtimes.transformers_server", str(KIT)) as url:
        status = conform(url)
    assert status == 0, capsys.readouterr().out
    assert {"greedy", "template-modes", "answer-think", "answer-call"} <= lines(capsys, "passed").keys()  # fmt: skip
