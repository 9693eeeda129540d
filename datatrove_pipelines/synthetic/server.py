"""datatrove's inference runner against any server that speaks the OpenAI protocol.

Its own `EndpointServer` loses the reasoning that a server returns beside the answer, asks
`/v1/models` whether the server is ready, which `transformers serve` cannot answer without a hub, and
needs the openai package for every address but this machine's.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from datatrove.data import Document
from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
from datatrove.pipeline.inference.servers.base import InferenceServer
from datatrove.pipeline.inference.types import InferenceError
from datatrove.pipeline.writers import JsonlWriter

from ground.errors import Outage, UserError, first_line

Generate = Callable[[dict[str, Any]], Awaitable[Any]]
Rollout = Callable[[Document, Generate], Awaitable[Any]]
READY_SECONDS = 10.0
# Documents of one file, which is written again from its start after a stop, without new requests.
DOCUMENTS_PER_CHUNK = 1000
RESULT = "result"


@dataclass(frozen=True)
class Server:
    """Where a model answers. `key` is a bearer token; empty: none is sent."""

    url: str  # without /v1
    model: str  # as the server names it
    requests: int = 64  # at once
    answer_seconds: float = 3600.0  # the longest that one answer may take
    key: str = ""

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


def server(url: str, model: str) -> Server:
    """A server by its address, with or without /v1; OPENAI_API_KEY is its key."""
    key = os.environ.get("OPENAI_API_KEY", "")
    return Server(url.rstrip("/").removesuffix("/v1"), model, key=key)


def check_ready(one: Server) -> None:
    """Raises UserError for an address that is none, Outage where no server answers."""
    try:
        answer = httpx.get(f"{one.url}/health", headers=one.headers, timeout=READY_SECONDS)
        if answer.status_code == 404:  # vLLM and SGLang have it, others may not
            answer = httpx.get(f"{one.url}/v1/models", headers=one.headers, timeout=READY_SECONDS)
    except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        remedy = "write http://<host>:<port>"
        raise UserError(f"ENDPOINT={one.url}: {first_line(error)}; {remedy}") from error
    except httpx.HTTPError as error:
        problem = f"no server answers ({first_line(error)}); start one, then run the same again"
        raise Outage(f"ENDPOINT={one.url}: {problem}") from error
    if answer.status_code in (401, 403):
        raise UserError(f"ENDPOINT={one.url}: answers {answer.status_code}; set OPENAI_API_KEY")
    if answer.status_code >= 500:
        raise Outage(f"ENDPOINT={one.url}: answers {answer.status_code}; run the same later")


class Endpoint(InferenceServer):
    """A server that somebody else has started."""

    def __init__(self, config: InferenceConfig, rank: int, one: Server):
        super().__init__(config, rank)
        self.one = one
        limits = httpx.Limits(max_connections=one.requests)
        self.client = httpx.AsyncClient(
            headers=one.headers, timeout=one.answer_seconds, limits=limits
        )

    async def start_server(self) -> None: ...

    async def monitor_health(self) -> None:
        await asyncio.Future()  # a request tells

    async def is_ready(self) -> bool:
        return True  # asked by check_ready

    def get_base_url(self) -> str:
        return self.one.url

    async def __aexit__(self, *error: Any) -> None:
        await super().__aexit__(*error)
        await self.client.aclose()

    async def _make_request(self, payload: dict[str, Any]) -> Any:
        """The server's answer. Raises ConnectionError for what the runner tries again."""
        url = f"{self.one.url}/v1/chat/completions"
        try:
            answer = await self.client.post(url, json=payload)
        except httpx.HTTPError as error:
            raise ConnectionError(f"{type(error).__name__}: {first_line(error)}") from error
        if answer.status_code == 429 or answer.status_code >= 500:
            raise ConnectionError(f"status {answer.status_code}")
        if answer.status_code != 200:
            kind = "BadRequestError" if answer.status_code in (400, 422) else "status"
            raise InferenceError(None, f"{kind} {answer.status_code}: {answer.text[:200]}")
        return answer.json()


class Runner(InferenceRunner):
    def __init__(self, one: Server, rollout: Rollout, folder: Path, sampling: dict[str, Any]):
        self.one = one
        config = InferenceConfig(
            server_type="endpoint",
            model_name_or_path=one.model,
            endpoint_url=one.url,
            default_generation_params=sampling,
            max_concurrent_generations=one.requests,
            metric_interval=10**6,
        )
        writer = JsonlWriter(
            str(folder / "answers"), "${rank}_${chunk_index}.jsonl", compression=None
        )
        super().__init__(
            rollout,
            config,
            writer,
            checkpoints_local_dir=str(folder / "progress"),
            records_per_chunk=DOCUMENTS_PER_CHUNK,
            metadata_key=RESULT,
        )

    def _init_server(self, rank: int) -> Endpoint:
        return Endpoint(self.config, rank, self.one)


def run(
    one: Server,
    rollout: Rollout,
    documents: Iterable[Document],
    folder: Path,
    sampling: dict[str, Any],
) -> list[Path]:
    """Ask the server about each document; the files of answers, `DOCUMENTS_PER_CHUNK` each, in order.

    A run that was stopped goes on: what was answered is in `folder`. Raises UserError for a request
    that the server refuses, Outage where it has stopped to answer.
    """
    from loguru import logger

    logger.disable("datatrove")
    try:
        Runner(one, rollout, folder, sampling).run(documents)
    except InferenceError as error:
        line = first_line(
            error.error if isinstance(error.error, Exception) else Exception(error.error)
        )
        if "after" in line and "attempts" in line:
            problem = "does not answer any more; the same command goes on from what is answered"
            raise Outage(f"{one.url}: {problem}") from error
        raise UserError(f"{one.url}: {one.model}: {line}") from error
    finally:
        logger.enable("datatrove")
    files = (folder / "answers").glob("*.jsonl")
    return sorted(files, key=lambda file: int(file.stem.rpartition("_")[2]))
