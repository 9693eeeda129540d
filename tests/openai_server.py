"""A server on loopback that speaks the chat protocol, for faults that a real one does not have on call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from json_server import json_server

Payload = dict[str, Any]
# (status, text, finish_reason) of a request
Answer = Callable[[Payload], tuple[int, str, str]]


@dataclass
class Served:
    url: str
    requests: list[Payload] = field(default_factory=list)


@contextmanager
def openai_server(
    answer: Answer, reasoning: Callable[[Payload], str] = lambda _: ""
) -> Iterator[Served]:
    served = Served("")

    def answered(_: str, payload: Payload | None) -> tuple[int, Payload]:
        if payload is None:
            return 200, {}
        served.requests.append(payload)
        status, text, reason = answer(payload)
        message = {"role": "assistant", "content": text, "reasoning_content": reasoning(payload)}
        choices = [{"message": message, "finish_reason": reason}]
        return status, {"choices": choices, "usage": {}}

    with json_server(answered) as served.url:
        yield served
