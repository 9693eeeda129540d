"""The longest how-to, and the one that asks a model for chats."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from processes import free_port
from talking_model import write_talking_model
from test_how_tos import HOW_TOS, clone, finished, run

from ground.files import read_json_lines
from ground.modes import keeps_mode

__all__ = ["clone"]  # the fixture


@pytest.mark.slow
@pytest.mark.timeout(1200)  # minutes, beside another slow test
def test_the_whole_chain_runs_on_text_of_ones_own(clone: Path) -> None:
    how_to = HOW_TOS["train on my own text"]
    (command,) = how_to.commands
    printed = run(clone, command)
    assert finished(clone, "tiny-notes/report")
    page = (clone / "runs" / "tiny-notes" / "report.html").read_text("utf-8")
    for text in (printed, page):
        assert "notes (source text)" in text
        assert "10 duplicates" in text
        assert "held out" in text
    assert "text of its maker's own" in (
        clone / "runs" / "tiny-notes" / "release" / "README.md"
    ).read_text("utf-8")


@contextmanager
def served(model: Path, folder: Path) -> Iterator[str]:
    """`transformers serve` with a model, until the block ends."""
    port, log = free_port(), folder / "serve.log"
    words = [Path(sys.executable).parent / "transformers", "serve", model, "--port", str(port)]
    with log.open("w") as output:
        server = subprocess.Popen(
            words, stdout=output, stderr=output, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(240):
                assert server.poll() is None, log.read_text()
                try:
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                except httpx.HTTPError:
                    time.sleep(0.5)
            yield url
        finally:
            server.terminate()
            server.wait(30)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_served_model_writes_chats(clone: Path, tmp_path: Path) -> None:
    """A real server, and a model that keeps the mode that it is asked for."""
    # With these heads it keeps the mode of prompts that it never saw, too.
    release = write_talking_model(tmp_path / "talks", head_dim=16)
    (command,) = HOW_TOS["have a larger model write chats"].commands
    with served(release, tmp_path) as url:
        told = command.replace("http://127.0.0.1:8000", url) + f" MODEL={release}"
        printed = run(clone, told)
        assert "up to date" in run(clone, told)
    rows = read_json_lines(clone / "runs/tiny/synthetic/everyday_think.jsonl")
    assert f"everyday_think: {len(rows)} rows" in printed and 1 <= len(rows) <= 4
    for row in rows:
        turns = [
            message["content"] for message in row["messages"] if message["role"] == "assistant"
        ]
        assert turns and all(keeps_mode(turn, think=True) for turn in turns)
