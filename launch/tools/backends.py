"""BACKEND= and ENDPOINT= of `make eval`: where a model answers, and what is refused before it is asked.

vLLM runs as its own servers, one a GPU: lighteval's class for it takes vLLM before 0.10.2 alone, and
the protocol of its server is what stays the same. Its `vllm` may be of another environment.
"""

import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ground.errors import UserError, did_you_mean, first_line
from launch.machine.gpus import gpus, gpus_for
from launch.recipe.evaluation import Suite, SuiteRow
from launch.tools.serve import is_ready, running
from runtimes.servers import vllm

if TYPE_CHECKING:
    from eval_tasks.job import Server

BACKENDS = ("transformers", "vllm", "endpoint")
VLLM_START_SECONDS = 1800.0  # a large model from a slow disk


def check_backend(backend: str, endpoint: str, models: Sequence[str]) -> None:
    """Raises UserError for values that do not go together."""
    if backend not in BACKENDS:
        raise UserError(f"BACKEND={backend}: {did_you_mean(backend, BACKENDS)}")
    if backend == "endpoint" and not endpoint:
        raise UserError("ENDPOINT is missing: BACKEND=endpoint ENDPOINT=http://<host>:<port>")
    if endpoint and backend != "endpoint":
        raise UserError(
            f"ENDPOINT={endpoint}: BACKEND={backend} asks no server; BACKEND=endpoint does"
        )
    if backend == "endpoint" and len(models) > 1:
        raise UserError(f"MODEL={','.join(models)}: a server has one model; name its folder or id")
    if backend == "vllm" and not vllm():
        raise UserError(
            "BACKEND=vllm: no `vllm` here; install it, in an environment of its own, and put that's "
            "bin/ on the PATH"
        )


def processes(backend: str, device: str) -> int:
    """How many models share the items: one a GPU, or GPUS= of them."""
    if backend == "endpoint":
        return 1
    return gpus_for(device).count if device == "cpu" else gpus().count


@contextmanager
def servers(
    backend: str, endpoint: str, model: str, suite: Suite, folder: Path, device: str
) -> "Iterator[list[Server]]":
    """The servers that `model` is asked on, none for transformers; vLLM's end with the context."""
    urls = [url.strip() for url in endpoint.split(",") if url.strip()]
    count = max(processes(backend, device), 1) if backend == "vllm" else 0
    with _vllm_servers(model, count, folder, device) as own:
        found = [*urls, *own]
        yield _examined(found, model, suite) if found else []


def _examined(urls: Sequence[str], model: str, suite: Suite) -> "list[Server]":
    """Raises Outage for a server that does not answer, UserError for one that cannot do the suite."""
    from transformers import AutoTokenizer

    from datatrove_pipelines.synthetic.server import check_ready, server
    from eval_tasks.served import examine

    at = [server(url, model) for url in urls]
    for one in at:
        check_ready(one)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # tokenizers and transformers each have their own
        raise UserError(f"MODEL={model}: its tokenizer: {first_line(error)}") from None
    examined = [examine(one.url, model, tokenizer, one.key) for one in at]
    for able in examined:
        rows = suite.rows if not (suite.chat or able.server.takes_tokens) else _choices(suite)
        if able.echo and rows:
            remedy = "take a server that has it (vLLM's has), or a suite without these"
            names = ", ".join(row.name for row in rows)
            raise UserError(
                f"ENDPOINT={able.server.url}: {able.echo}, which {names} need; {remedy}"
            )
    return [able.server for able in examined]


def _choices(suite: Suite) -> list[SuiteRow]:
    """The rows that are scored by log-likelihood."""
    from eval_tasks.task_table import expanded, is_choice, read_tasks

    return [row for row in suite.rows if any(map(is_choice, expanded(row.tasks, read_tasks())))]


@contextmanager
def _vllm_servers(model: str, count: int, folder: Path, device: str) -> Iterator[list[str]]:
    """The addresses of `count` times `vllm serve`, one a GPU. Raises UserError with the last line of
    one that ends."""
    with ExitStack() as stack:
        started = [
            stack.enter_context(_vllm_server(model, number, folder, device))
            for number in range(count)
        ]
        for process, url, log in started:
            if not is_ready(process, url, VLLM_START_SECONDS):
                raise UserError(_why(process, log))
        yield [url for _, url, _ in started]


@contextmanager
def _vllm_server(
    model: str, number: int, folder: Path, device: str
) -> "Iterator[tuple[subprocess.Popen[bytes], str, Path]]":
    from eval_tasks.backends import gpu_environment

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / f"vllm-{number}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    dtype = "float32" if device == "cpu" else "bfloat16"
    words = [str(vllm()), "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    words += ["--dtype", dtype, "--served-model-name", model]
    environment = os.environ | (gpu_environment(number) if device != "cpu" else {})
    with log.open("w") as output, running(words, environment, output) as process:
        yield process, f"http://127.0.0.1:{port}", log


def _why(process: "subprocess.Popen[bytes]", log: Path) -> str:
    if process.poll() is None:
        return f"BACKEND=vllm: not ready after {VLLM_START_SECONDS:g} s; see {log}"
    lines = log.read_text(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    return f"BACKEND=vllm: it ended: {last[-200:]}; all of it is in {log}"
