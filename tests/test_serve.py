"""`make serve` takes the server that is here, and refuses in one line before anything is loaded."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, edit, environment
from processes import free_port, is_alive
from small_models import make_tokenizer, random_model

from ground.checksums import seal
from ground.errors import UserError
from launch.tools.serve import example, running, serve
from runtimes import servers
from runtimes.gguf_file import write_gguf
from runtimes.servers import server_command


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "release"
    tokenizer = make_tokenizer(short_system=True)
    random_model(tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_gguf(folder, folder.parent / "some.gguf", "f32")
    return folder


@pytest.fixture
def release(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "release"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs, the only one on PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    return tmp_path / "bin"


def program(folder: Path, name: str) -> str:
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)
    return str(folder / name)


def test_a_folder_is_served_by_vllm_where_it_is_installed(release: Path, path: Path) -> None:
    assert server_command(release, "127.0.0.1", 1).name == "transformers serve"
    vllm = program(path, "vllm")
    server = server_command(release, "127.0.0.1", 8000)
    assert server.words[:3] == (vllm, "serve", str(release))
    options = dict(zip(server.words[3::2], server.words[4::2], strict=False))
    assert options["--host"] == "127.0.0.1" and options["--port"] == "8000"
    assert options["--allowed-origins"] == "[]"
    words = " ".join(server.words)
    assert "--served-model-name release " in words and "--enable-auto-tool-choice" in words
    for kind in ("tool-call-parser", "reasoning-parser"):
        assert f"--{kind} smollm3" in words
    (release / "vllm_tool_parser.py").write_text("")
    words = " ".join(server_command(release, "127.0.0.1", 8000).words)
    assert words.count(str(release / "vllm_tool_parser.py")) == 2, "the release's own plugin"


def test_a_gguf_file_is_served_by_llama_cpp(
    release: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = release.parent / "some.gguf"
    assert "runtimes.llama_server" in server_command(file, "127.0.0.1", 1).words
    binary = program(path, "llama-server")
    words = server_command(file, "127.0.0.1", 1).words
    assert words[0] == binary and "--jinja" in words
    (path / "llama-server").unlink()
    monkeypatch.setattr(servers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        UserError, match=r"llama\.cpp's server is missing; `pip install -e '\.\[serve\]'`"
    ):
        server_command(file, "127.0.0.1", 1)
    with pytest.raises(UserError, match="lacks fastapi, openai, uvicorn: `pip install"):
        server_command(release, "127.0.0.1", 1)


def test_what_the_folder_lacks_for_tool_calls_is_said(release: Path, path: Path) -> None:
    assert "no response_template: tool calls and" in server_command(release, "x", 1).remark
    file = release / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"response_template": {"a": 1}}))
    assert server_command(release, "x", 1).remark == ""


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: folder / "nowhere", r"nowhere/config\.json: no such file; name the folder"),
        (lambda folder: folder.parent / "nowhere.gguf", r"nowhere\.gguf: no such file"),
        (lambda folder: edit(folder / "config.json", "smollm3", "llama"), "model_type: llama; name the folder of a SmolLM3"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template, a base model"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "model.safetensors: "),
        (lambda folder: (folder / "config.json").rename(folder / "a.gguf"), "no GGUF file"),
    ],
    ids=["no folder", "no file", "another model", "a base model", "damaged", "no GGUF"],
)  # fmt: skip
def test_a_model_that_cannot_be_served_is_one_line(release: Path, spoil: object, said: str) -> None:
    seal(release)
    named = spoil(release)  # type: ignore[operator]
    with pytest.raises(UserError, match=said) as refused:
        serve(named or release, "127.0.0.1", free_port())
    assert "\n" not in str(refused.value)


def test_a_gguf_file_without_a_template_is_refused(release: Path) -> None:
    (release / "chat_template.jinja").unlink()
    base = release.parent / "base.gguf"
    write_gguf(release, base, "f32")
    with pytest.raises(UserError, match=r"base\.gguf: no chat template, a base model"):
        serve(base, "127.0.0.1", free_port())


def test_where_nothing_can_listen_is_said(release: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"PORT={port}: address already in use .*PORT=<number>"):
            serve(release, "127.0.0.1", port)
    for host in ("no host", "no..host"):
        with pytest.raises(UserError, match=f"HOST={host}: "):
            serve(release, host, port)
    with pytest.raises(UserError, match=r"cannot assign requested address on 192\.0\.2\.1"):
        serve(release, "192.0.2.1", port)


# A server whose child does not end by a signal.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = [sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(600)"]
print(subprocess.Popen(child).pid, flush=True)
time.sleep(600 * (sys.argv[1] == "stays"))
"""


@pytest.mark.parametrize("ends", ["stays", "ends"])
def test_what_a_server_started_ends_with_it(
    ends: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.tools.serve.END_SECONDS", 0.1)
    words = (sys.executable, "-c", STUBBORN, ends)
    with running(words, dict(os.environ)) as process:
        while not (printed := capfd.readouterr().out):
            time.sleep(0.01)
    assert not is_alive(process.pid)
    while is_alive(int(printed)):  # ends a moment after it was told to
        time.sleep(0.01)


def test_a_server_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    code = (
        "import os; from launch.tools.serve import running\n"
        "with running(('sleep', '600'), dict(os.environ)) as p: print(p.pid, flush=True); p.wait()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    while is_alive(child):
        time.sleep(0.01)


def test_the_example_is_a_line_for_a_shell() -> None:
    line = example("http://h:1", "it's").replace("curl", "printf %s\\\\n", 1)
    out = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout
    assert json.loads(out.splitlines()[-1])["model"] == "it's"
