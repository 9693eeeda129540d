"""A hub that gives nothing: licence, revision and outage told apart, in one line, before anything starts."""

import errno
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from conftest import environment

from ground import hub
from ground.errors import Outage, UserError
from ground.hub import Repository, ask, end_silence, refusal

Answer = Callable[[BaseHTTPRequestHandler], None]
SET = Repository("dataset", "owner/name", "v1", "recipes/sources.yaml: sources.a")


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def says(status: int, code: str = "", of: str = "") -> Answer:
    """Answers `status` to addresses that hold `of`, 200 to the others."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        is_asked = of in request.path
        request.send_response(status if is_asked else 200)
        if code and is_asked:
            request.send_header("X-Error-Code", code)
        request.send_header("Content-Length", "2")
        request.end_headers()
        request.wfile.write(b"{}")

    return answer


def slowly(seconds: float, parts: int) -> Answer:
    """A byte every so many seconds."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(parts))
        request.end_headers()
        for _ in range(parts):
            request.wfile.write(b"x")
            time.sleep(seconds)

    return answer


def silent(request: BaseHTTPRequestHandler) -> None:
    time.sleep(3)


@pytest.fixture(autouse=True)
def _own_client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.3)
    yield
    set_client_factory(default_client_factory)


def told(monkeypatch: pytest.MonkeyPatch, endpoint: str, *more: Repository) -> UserError:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    with pytest.raises(UserError) as caught:
        ask([SET, *more])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("recipes/sources.yaml: sources.a: owner/name@v1: ")
    return caught.value


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (says(403, "GatedRepo", "auth-check"), 2, "licence is not accepted; .* `hf auth login`"),
        (says(401, "GatedRepo", "auth-check"), 2, "licence is not accepted; .* `hf auth login`"),
        (says(404, "RevisionNotFound", "revision"), 2, "no such revision; correct it"),
        (says(404, "RepoNotFound"), 2, "no such repository, or not for you"),
        (says(401), 2, "the hub answers 401; run `hf auth login`"),
        (says(503), 69, "the hub answers 503; run the same command again"),
        (says(429), 69, "the hub answers 429; run the same command again"),
        (silent, 69, "the hub does not answer .*; run the same command again"),
    ],
)
def test_what_the_hub_refuses_is_told_apart(
    answer: Answer, status: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(answer) as endpoint:
        error = told(monkeypatch, endpoint)
    assert error.status == status and re.search(words, str(error)), error


def test_a_port_that_nobody_listens_to_is_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert isinstance(told(monkeypatch, f"http://127.0.0.1:{port}"), Outage)


def test_a_hub_is_asked_once_for_each_repository_and_not_for_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        asked.append(request.path)
        says(404, of="auth-check")(request)  # a mirror without that check

    others = [Repository("model", f"owner/m{n}", "main", "FROM=") for n in range(3)]
    with serving(answer) as endpoint:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        ask([SET, *others, SET, Repository("dataset", str(tmp_path), "main", "")])
        ask([])
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        ask([SET])
    assert len(asked) == len(set(asked)) == 2 * 4


def test_a_silent_hub_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        asked.append(request.path)
        silent(request)

    with serving(answer) as endpoint:
        told(monkeypatch, endpoint, Repository("dataset", "owner/other", "main", "x"))
        assert len(asked) == 1


@pytest.mark.parametrize(("pause", "is_cut"), [(0.1, False), (1.0, True)])
def test_a_slow_download_goes_on_and_a_silent_one_is_ended(
    pause: float, is_cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six times as long as the limit of silence in all."""
    from huggingface_hub.utils import _http
    from huggingface_hub.utils._http import get_session

    end_silence()
    monkeypatch.setattr(hub, "SILENCE_SECONDS", 0.4)
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT", None)  # the next one has this limit
    with serving(slowly(pause, 24 if not is_cut else 2)) as endpoint:
        if not is_cut:
            assert get_session().get(endpoint).text == "x" * 24
            return
        with pytest.raises(Exception, match="timed out") as caught:
            get_session().get(endpoint)
    assert isinstance(refusal(caught.value, "here", ""), Outage)


def test_the_limit_of_silence_closes_no_client_that_is_in_use() -> None:
    from huggingface_hub.utils._http import get_session

    end_silence()
    client = get_session()
    end_silence()
    assert get_session() is client and not client.is_closed


def test_a_full_disk_is_not_the_hubs() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache/a")
    try:
        try:
            raise full
        except OSError as error:
            raise RuntimeError("Couldn't reach the hub") from error
    except RuntimeError as error:
        told = refusal(error, "a/b@main", "check the name")
    assert "no space left on device (/cache/a)" in str(told) and not isinstance(told, Outage)


@pytest.mark.parametrize(("answer", "status"), [(says(503), 69), (says(403, "GatedRepo"), 2)])
def test_a_stage_is_refused_before_it_begins(answer: Answer, status: int, tmp_path: Path) -> None:
    more = {"RUNS": str(tmp_path / "runs"), "CACHE": str(tmp_path / "cache")}
    with serving(answer) as endpoint:
        done = subprocess.run(
            [sys.executable, "-m", "launch", "run", "data-chats"],
            capture_output=True, text=True, check=False, timeout=120,
            env=environment(SCALE="tiny", ORIGIN="hub", HF_ENDPOINT=endpoint, **more),
        )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert re.fullmatch(r"error: recipes/posttrain/splits\.yaml: dataset: [^\n]+\n", done.stderr)
    assert not list((tmp_path / "runs").iterdir()) and not list((tmp_path / "cache").iterdir())
