"""A server that speaks the OpenAI protocol, as a scorer needs it: tokens in, log-probabilities out.

Prompts are rendered and tokenised here, as for a model in this process, so that both see the same
tokens; a server that takes texts alone gets a chat's messages. A choice's log-likelihood is read
from the prompt's echo: vLLM has it, llama.cpp's server and `transformers serve` do not.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose
from typing import Any

import httpx

from eval_tasks.job import Server
from ground.errors import Outage, UserError, first_line

TRIES, ANSWER_SECONDS = 4, 3600.0
# A server's own kernels for a prompt and for an answer differ by less than this; a log-probability
# that stands at another token differs by several nats.
SAME_NATS = 0.25
AS_IDS = {"return_tokens_as_token_ids": True}  # vLLM's; others send a token's text
PROBES = ("The capital of France is", "1, 2, 3, 4,", "def add(a, b):")


@dataclass(frozen=True)
class Able:
    """What a server can do: `echo` is empty, or says why no choice can be scored."""

    server: Server
    echo: str


class Refused(UserError):
    """The server's own refusal of a request."""


def post(client: httpx.Client, server: Server, path: str, payload: dict[str, Any]) -> Any:
    """The answer's JSON. Raises Refused for a request that the server does not take, Outage where it
    answers nothing after TRIES."""
    problem = ""
    for wait in [*(2.0**n for n in range(TRIES - 1)), 0.0]:
        try:
            done = client.post(f"{server.url}/v1/{path}", json={"model": server.model, **payload})
        except httpx.HTTPError as error:
            problem = first_line(error)
        else:
            problem = f"{done.status_code} {' '.join(done.text.split())[:200]}"
            if done.is_success:
                try:
                    return done.json()
                except ValueError:
                    raise Refused(f"{server.url}: no JSON: {problem}") from None
            if done.status_code < 500 and done.status_code != 429:
                raise Refused(f"{server.url}: {problem}")
        time.sleep(wait)
    raise Outage(f"{server.url}: {problem}")


def http_client(key: str, connections: int = 1) -> httpx.Client:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=connections)
    return httpx.Client(headers=headers, timeout=ANSWER_SECONDS, limits=limits)


def name_at(client: httpx.Client, url: str, model: str) -> str:
    """What the server calls its model: the one that it lists, else the name that the user gave."""
    try:
        listed = [row["id"] for row in client.get(f"{url}/v1/models").json()["data"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):  # transformers serve without a hub
        return model
    return model if model in listed or len(listed) != 1 else str(listed[0])


def examine(url: str, model: str, tokenizer: Any, key: str = "") -> Able:
    """Ask a server that is up what it can do. Raises Refused or Outage."""
    with http_client(key) as client:
        server = Server(url, name_at(client, url, model), takes_tokens=True)
        ids = tokenizer.encode(PROBES[0], add_special_tokens=False)
        try:
            post(client, server, "completions", {"prompt": ids, "max_tokens": 1})
        except (Refused, Outage):  # an old server answers 500 to what it does not know
            chat = Server(url, server.model, takes_tokens=False)
            said = [{"role": "user", "content": PROBES[0]}]
            post(client, chat, "chat/completions", {"messages": said, "max_tokens": 1})
            return Able(chat, "it takes texts, not tokens")
        return Able(server, _echo_problem(client, server, tokenizer))


def _echo_problem(client: httpx.Client, server: Server, tokenizer: Any) -> str:
    """Why the echo cannot be used: it is missing, or its log-probabilities stand at other tokens.

    A greedy token's log-probability is asked for twice: as the answer's, and as that of the last
    token of a prompt which it ends.
    """
    for text in PROBES:
        ids = tokenizer.encode(text, add_special_tokens=False)
        asked = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "logprobs": 1, **AS_IDS}
        try:
            answer = post(client, server, "completions", asked)["choices"][0]["logprobs"]
            token = _token_id(answer["tokens"][0], tokenizer)
            if token is None:  # a part of a character
                continue
            again = echoed(client, server, [*ids, token])["token_logprobs"][len(ids)]
        except (Refused, Outage, LookupError, TypeError):
            return "it does not echo a prompt's log-probabilities"
        if isclose(answer["token_logprobs"][0], again, abs_tol=SAME_NATS):
            return ""
        return "the log-probabilities that it echoes belong to other tokens"
    return "its tokens are not those of the tokenizer"


def echoed(client: httpx.Client, server: Server, ids: Sequence[int]) -> dict[str, list[Any]]:
    """`tokens`, `token_logprobs` and `top_logprobs` of a prompt and of one greedy token after it.
    Raises LookupError or TypeError where they are not there."""
    asked = {
        "prompt": list(ids), "max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": 1, **AS_IDS
    }  # fmt: skip
    found: dict[str, list[Any]] = post(client, server, "completions", asked)["choices"][0][
        "logprobs"
    ]
    if len(found["token_logprobs"]) <= len(ids):
        raise LookupError("fewer log-probabilities than tokens")
    return found


def _token_id(text: str, tokenizer: Any) -> int | None:
    """The id of a token that a server names by its id or by its text."""
    if text.startswith("token_id:"):
        return int(text.removeprefix("token_id:"))
    return next((at for at in range(len(tokenizer)) if tokenizer.decode([at]) == text), None)
