"""A hub of models and data sets on this machine's loopback: what it holds, what it sent, what goes wrong.

hub_protocol.py speaks what huggingface_hub, HfFileSystem and datasets ask. A repository is a folder:
"owner/name" a model's, "datasets/owner/name" a data set's. It has the branch main and the revisions of
`revisions`. A commit gives main another id; the ids before it then give the same files.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, Literal

COMMIT = "0123456789abcdef0123456789abcdef01234567"  # of main before the first commit
# As on the hub, large files are in another store, to which resolve redirects.
LARGE = (".parquet", ".gz", ".zst", ".safetensors", ".bin", ".arrow", ".npy", ".gguf", ".png")


@dataclass
class Fault:
    """What the first `times` requests for `of` meet; -1: all of them.

    `of` is a part of "<repository>/<file>", or of "<repository>/" where it is not a file that is asked
    for. cut: the body breaks off in its middle. short: half of the body, as if it were all. silence: no
    answer.
    """

    of: str
    kind: Literal["status", "cut", "short", "silence"] = "status"
    times: int = -1
    status: int = 429
    retry_after: int | None = None  # seconds


@dataclass
class Hub:
    """`sent`: bytes of content by "<repository>/<file>"; `fetched`: names of the files that were sent."""

    repositories: dict[str, Path]
    revisions: dict[tuple[str, str], Path] = field(default_factory=dict)  # other than main
    gated: dict[str, set[str]] = field(default_factory=dict)  # the tokens that accepted its licence
    writers: set[str] | None = None  # the tokens that may write; None: any
    private: set[str] = field(default_factory=set)  # made so; a token is asked for
    faults: list[Fault] = field(default_factory=list)
    contents: Path | None = None  # Software Heritage's bucket: a file for each blob id
    created: Path | None = None  # the folder of new repositories
    page: int = 1000  # entries of a listing; a twentieth where it is expanded
    endpoint: str = ""
    store: str = ""  # of large files: another host
    fetched: list[str] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)  # of content, by the same names
    asked: list[str] = field(default_factory=list)  # "GET /api/..."
    uploads: dict[str, bytes] = field(default_factory=dict)  # by sha256
    commits: Counter[str] = field(
        default_factory=Counter
    )  # by repository, or <repository>@<branch>
    lock: Lock = field(default_factory=Lock)
    closed: Event = field(default_factory=Event)

    def commit(self, repo: str, revision: str = "main") -> str:
        if len(revision) == len(COMMIT):
            return revision
        if revision == "main":
            return _commit(repo, self.commits[repo]) if self.commits[repo] else COMMIT
        count = self.commits[f"{repo}@{revision}"]
        return _commit(repo, f"{revision} {count}" if count else revision)

    def folder(self, repo: str, revision: str) -> tuple[Path, str] | None:
        """The files of a revision and its commit; `revision` is a name or a commit."""
        ids = {self.commit(repo): "main", COMMIT: "main"}
        ids |= {_commit(repo, count): "main" for count in range(1, self.commits[repo])}
        ids |= {self.commit(repo, name): name for of, name in self.revisions if of == repo}
        name = ids.get(revision, revision)
        folder = self.repositories[repo] if name == "main" else self.revisions.get((repo, name))
        return folder and (folder, self.commit(repo, name))

    def fault(self, repo: str, file: str, kinds: set[str]) -> Fault | None:
        """The fault that this request meets."""
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.kind in kinds and fault.of in f"{repo}/{file}":
                    fault.times -= 1
                    return fault
        return None

    def bytes_of(self, repo: str) -> int:
        return sum(size for name, size in self.sent.items() if name.startswith(f"{repo}/"))

    def forget(self) -> None:
        """Count from here."""
        for counted in (self.fetched, self.sent, self.requests, self.asked):
            counted.clear()

    def variables(self, home: Path, token: str = "") -> dict[str, str]:
        """The environment of a process that knows no other hub."""
        names = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        names["SOFTWARE_HERITAGE"] = f"{self.endpoint}/contents"
        return names | ({"HF_TOKEN": token} if token else {})


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is killed is no fault of the hub's."""


@contextmanager
def loopback_hub(repositories: Mapping[str, Path], **more: Any) -> Iterator[Hub]:
    """`more`: fields of Hub."""
    from hub_protocol import Handler

    hub = Hub(dict(repositories), **more)
    server = _Server(("127.0.0.1", 0), type("OfHub", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    hub.store = f"http://localhost:{server.server_address[1]}"
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.closed.set()
        server.shutdown()
        server.server_close()


def _commit(repo: str, name: object) -> str:
    return hashlib.sha1(f"{repo} {name}".encode()).hexdigest()


def digests(file: Path) -> tuple[str, str]:
    """The ids of a file's content: git's, and that of the store of large files."""
    status = file.stat()
    return _digests(file, status.st_size, status.st_mtime_ns)


@cache
def _digests(file: Path, size: int, time: int) -> tuple[str, str]:
    content = file.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content)
    return blob.hexdigest(), hashlib.sha256(content).hexdigest()


def is_large(name: str) -> bool:
    return name.endswith(LARGE)
