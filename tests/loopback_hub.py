"""A model hub on this machine's loopback: what huggingface_hub's client asks for, and no more."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/(revision|tree)/(?P<revision>[^/?]+))?.*")


@dataclass
class Hub:
    """`repositories`: name to the folder of its files. `fetched`: files whose content was sent."""

    repositories: dict[str, Path]
    endpoint: str = ""
    fetched: list[str] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, with_content: bool) -> None:
        if match := RESOLVE.fullmatch(self.path):
            self._file(match["repo"], match["revision"], match["file"], with_content)
        elif (match := API.fullmatch(self.path)) and match["repo"] in self.hub.repositories:
            folder = self.hub.repositories[match["repo"]]
            files = sorted(path for path in folder.iterdir() if path.is_file())
            if "/tree/" in self.path:
                self._json([
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _etag(f)}
                    for f in files
                ])  # fmt: skip
                return
            siblings = [{"rfilename": file.name} for file in files]
            self._json({"id": match["repo"], "sha": COMMIT, "siblings": siblings})
        else:
            self._missing("RepoNotFound")

    def _file(self, repo: str, revision: str, name: str, with_content: bool) -> None:
        if repo not in self.hub.repositories:
            return self._missing("RepoNotFound")
        if revision not in ("main", COMMIT):
            return self._missing("RevisionNotFound")
        file = self.hub.repositories[repo] / name
        if not file.is_file():
            return self._missing("EntryNotFound")
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{_etag(file)}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_content:
            self.hub.fetched.append(name)
            self.wfile.write(content)
        return None

    def _json(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _missing(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def loopback_hub(repositories: dict[str, Path]) -> Iterator[Hub]:
    hub = Hub(repositories)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfHub", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
