"""A server on loopback that speaks the chat protocol, for faults that a real one does not have on call."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

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

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            self._send(200, {})

        def do_POST(self) -> None:
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.requests.append(payload)
            status, text, reason = answer(payload)
            message = {
                "role": "assistant",
                "content": text,
                "reasoning_content": reasoning(payload),
            }
            choices = [{"message": message, "finish_reason": reason}]
            self._send(status, {"choices": choices, "usage": {}})

        def _send(self, status: int, value: Any) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
