"""A server of this machine is asked directly, whatever proxy the environment names."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, environment
from openai_server import openai_server

from ground.loopback import never_proxied

PROXY = "http://127.0.0.1:9"  # where nothing listens


@pytest.mark.parametrize(
    "words", [["conformance"], ["launch", "chat", "--scale", "tiny"]], ids=["conformance", "chat"]
)
def test_a_command_asks_a_server_of_this_machine_itself(words: list[str]) -> None:
    variables = {"http_proxy": PROXY, "HTTP_PROXY": PROXY, "no_proxy": "", "NO_PROXY": ""}
    with openai_server(lambda _: (200, "", "stop")) as server:
        variables["MODEL" if words == ["conformance"] else "ENDPOINT"] = server.url
        done = subprocess.run(
            [sys.executable, "-m", *words], env=environment(**variables), cwd=ROOT,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 2 and "names no model" in done.stderr, done.stderr


def test_what_the_user_excepts_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "example.org,localhost")
    monkeypatch.setenv("NO_PROXY", "")
    never_proxied()
    never_proxied()
    assert os.environ["no_proxy"] == "example.org,localhost,127.0.0.1,::1" == os.environ["NO_PROXY"]
