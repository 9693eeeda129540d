"""`make serve`: a release or a GGUF file behind the OpenAI protocol, with tools and both modes."""

import json
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from math import inf
from pathlib import Path
from typing import IO, Annotated

import typer

from ground.checksums import verify_if_sealed
from ground.errors import UserError
from ground.processes import Stopped, end_with
from launch.run.folder import runs_root
from launch.tools.options import Model, Origin, Scale, Text, scale_at

END_SECONDS = 5.0  # for answers that are on their way


def command(
    scale: Scale,
    text: Text = "",
    origin: Origin = "",
    model: Model = "",
    # Not from the environment: shells and conda set a HOST of their own.
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="PORT", min=1, max=65535)] = 8000,
) -> None:
    """Serve a folder or a .gguf file, the scale's release where none is named."""
    folder = Path(model) if model else runs_root() / scale_at(scale, text, origin).name / "release"
    serve(folder, host, port)


def serve(model: Path, host: str, port: int) -> None:
    """Serve until a signal ends it; its children end with it. Raises UserError."""
    from runtimes.servers import server_command

    server = server_command(model, host, port)
    check_port(host, port)
    if model.is_dir():
        verify_if_sealed(model)
    print(f"{model}: {server.name}", *filter(None, [server.remark]), sep="\n", flush=True)
    try:
        with running(server.words, os.environ | server.environment) as process:
            # Who listens on all addresses is asked on this machine's own.
            here = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # fmt: skip
            url = f"http://{here}:{port}"
            if not is_ready(process, url):
                status = f"status {process.returncode}"
                raise UserError(f"the server ended with {status} while it started; see above")
            print(f"ready: {url}/v1\n  {example(url, server.model)}", flush=True)
            process.wait()
    except (KeyboardInterrupt, Stopped):
        print("served, and stopped", flush=True)
        return
    raise UserError(f"{server.name} ended by itself with status {process.returncode}; see above")


def check_port(host: str, port: int) -> None:
    """Raises UserError where nothing can listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:  # of a name that no host can have
        why = getattr(error, "strerror", None) or "not a host's name"
        raise UserError(f"HOST={host}: {why}; write an address of this machine") from error
    with socket.socket(family, kind, protocol) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(address)
        except OSError as error:
            said = (error.strerror or str(error)).lower()
            raise UserError(f"PORT={port}: {said} on {host}; choose another, PORT=<number>") from error  # fmt: skip


@contextmanager
def running(
    words: Sequence[str], environment: dict[str, str], output: IO[str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, which ends with the `with`, and with this process."""
    process = subprocess.Popen(
        words, env=environment, stdout=output, stderr=output, start_new_session=True,
        preexec_fn=partial(end_with, os.getpid()),
    )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
        with suppress(ProcessLookupError):  # what it started, too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_ready(process: subprocess.Popen[bytes], url: str, seconds: float = inf) -> bool:
    """Wait until /health answers 200; False where the server ends before, or the time does."""
    import httpx

    end = time.monotonic() + seconds
    with httpx.Client(timeout=5) as client:
        while process.poll() is None and time.monotonic() < end:
            with suppress(httpx.HTTPError):
                if client.get(f"{url}/health").status_code == 200:
                    return True
            time.sleep(0.2)
    return False


def example(url: str, model: str) -> str:
    """A command line that asks the server something."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is 17 plus 3?"}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
