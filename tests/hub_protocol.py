"""What clients ask of the hub, answered from folders: the protocol of loopback_hub.py."""

import base64
import json
import re
import shutil
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub_cards import card_problems
from loopback_hub import Fault, Hub, digests, is_large

REPO = r"(?P<repo>(datasets/)?[^/]+/[^/]+)"
API = r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
BLOCK = 1 << 16
DATE = "2026-01-01T00:00:00.000Z"
MESSAGES = {
    "GatedRepo": "Access to this repository is restricted.",
    "RepoNotFound": "Repository not found",
    "RevisionNotFound": "Invalid rev id",
    "EntryNotFound": "Entry not found",
}


class Refused(Exception):
    def __init__(self, status: int, code: str = "", retry_after: int | None = None) -> None:
        self.status, self.code, self.retry_after = status, code, retry_after


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append(f"{self.command} {self.path}")
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for asked, pattern, answer in ROUTES:
                if asked == method and (match := re.fullmatch(pattern, address.path)):
                    names = {name: unquote(part or "") for name, part in match.groupdict().items()}
                    if names.pop("kind", "models") == "datasets":
                        names["repo"] = f"datasets/{names['repo']}"
                    repo = "uploads" if "oid" in names else names.get("repo", "")
                    self._meet_fault(repo, names.get("file", ""))
                    return answer(self, **names)
            raise Refused(404)
        except Refused as refused:
            self._refuse(refused)

    def _meet_fault(self, repo: str, file: str) -> None:
        fault = self.hub.fault(repo, file, {"status", "silence"})
        if fault and fault.kind == "silence":
            self.hub.closed.wait()
            self.close_connection = True
        if fault:
            code = "EntryNotFound" if file and fault.status == 404 else ""
            raise Refused(fault.status, code, fault.retry_after)

    def _refuse(self, refused: Refused) -> None:
        headers = {"X-Error-Code": refused.code, "X-Error-Message": MESSAGES.get(refused.code, "")}
        if refused.retry_after is not None:
            headers["Retry-After"] = str(refused.retry_after)
        error = {"error": headers["X-Error-Message"] or "refused"}
        self._json(error, refused.status, {name: text for name, text in headers.items() if text})

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        about = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        self._head(status, about | (headers or {}))
        if self.command != "HEAD":
            self.wfile.write(content)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()

    # what is there

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _repository(self, repo: str) -> Path:
        is_closed = repo in self.hub.private and not self._token()
        if (
            repo not in self.hub.repositories or is_closed
        ):  # the hub tells nobody whether a private one is there
            raise Refused(404 if self._token() else 401, "RepoNotFound")
        return self.hub.repositories[repo]

    def _revision(self, repo: str, revision: str) -> tuple[Path, str]:
        self._repository(repo)
        if not (found := self.hub.folder(repo, revision or "main")):
            raise Refused(404, "RevisionNotFound")
        return found

    def _check_access(self, repo: str) -> None:
        """A gated repository's files are listed for everyone, and read by who accepted its licence."""
        self._repository(repo)
        if repo in self.hub.gated and self._token() not in self.hub.gated[repo]:
            raise Refused(403 if self._token() else 401, "GatedRepo")

    def auth_check(self, repo: str) -> None:
        self._check_access(repo)
        self._json({})

    def info(self, repo: str, revision: str = "") -> None:
        folder, commit = self._revision(repo, revision)
        siblings = [_entry(folder, file) | {"rfilename": file} for file in _below(folder)]
        for one in siblings:
            one["blobId"] = one.pop("oid")
        name, gated = repo.removeprefix("datasets/"), "auto" if repo in self.hub.gated else False
        state = {"private": False, "gated": gated, "disabled": False, "lastModified": DATE}
        self._json({"_id": commit[:24], "id": name, "sha": commit, "siblings": siblings, **state})

    def refs(self, repo: str) -> None:
        self._repository(repo)
        names = ["main", *(name for of, name in self.hub.revisions if of == repo)]
        branches = [
            {
                "name": name,
                "ref": f"refs/heads/{name}",
                "targetCommit": self.hub.commit(repo, name),
            }
            for name in names
        ]
        self._json({"branches": branches, "converts": [], "tags": []})

    def tree(self, repo: str, revision: str, path: str = "") -> None:
        folder, _ = self._revision(repo, revision)
        files = [file for file in _below(folder) if file.startswith(f"{path}/" if path else "")]
        if path and not files:
            raise Refused(404, "EntryNotFound")
        names = _with_folders(files, path, self._is_asked("recursive"))
        begin = int(self.query.get("cursor", ["0"])[0])
        expand = self._is_asked("expand")
        end = begin + max(self.hub.page // (20 if expand else 1), 1)
        headers = {}
        if end < len(names):
            more = f"recursive={self._is_asked('recursive')}&expand={expand}&cursor={end}"
            place = f"{self.hub.endpoint}{urlsplit(self.path).path}"
            headers["Link"] = f'<{place}?{more}>; rel="next"'
        page = [_entry(folder, name, expand) for name in names[begin:end]]
        self._json(page, headers=headers)

    def _is_asked(self, option: str) -> bool:
        return self.query.get(option, ["false"])[0].lower() == "true"

    def paths_info(self, repo: str, revision: str) -> None:
        folder, _ = self._revision(repo, revision)
        asked = parse_qs(self.body.decode())
        expand = asked.get("expand", ["false"])[0].lower() == "true"
        names = [name for name in asked.get("paths", []) if (folder / name).exists()]
        self._json([_entry(folder, name, expand) for name in names])

    # content

    def resolve(self, repo: str, revision: str, file: str) -> None:
        self._check_access(repo)
        folder, commit = self._revision(repo, revision)
        if not (folder / file).is_file():
            raise Refused(404, "EntryNotFound")
        headers = {"X-Repo-Commit": commit}
        blob, oid = digests(folder / file)
        if not is_large(file):
            return self._content(repo, file, folder / file, {**headers, "ETag": f'"{blob}"'})
        headers |= {"X-Linked-Size": str((folder / file).stat().st_size)}
        place = f"{self.hub.store}/store/{commit}/{quote(repo)}/file/{quote(file)}"
        linked = {"X-Linked-ETag": f'"{oid}"', "Location": place, "Content-Length": "0"}
        return self._head(302, headers | linked)

    def blob(self, file: str) -> None:
        if not self.hub.contents or not (self.hub.contents / file).is_file():
            raise Refused(403)
        self._content("contents", file, self.hub.contents / file, {})

    def stored(self, repo: str, commit: str, file: str) -> None:
        found = self.hub.folder(repo, commit)
        assert found  # resolve gave the address, which needs no token
        folder, _ = found
        _, oid = digests(folder / file)
        self._content(repo, file, folder / file, {"ETag": f'"{oid}"'})

    def _content(self, repo: str, name: str, file: Path, headers: dict[str, str]) -> None:
        content = file.read_bytes()
        begin, end = _range(self.headers.get("Range"), len(content))
        if self.command == "GET" and self.hub.fault(repo, name, {"short"}):
            end -= (end - begin) // 2
        headers |= {"Content-Length": str(end - begin), "Accept-Ranges": "bytes"}
        if self.headers.get("Range"):
            if begin >= len(content):
                return self._head(
                    416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"}
                )
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
        self._head(206 if "Content-Range" in headers else 200, headers)
        if self.command != "HEAD":
            self.hub.fetched.append(name)
            self._send(f"{repo}/{name}", content[begin:end])
        return None

    def _send(self, name: str, content: bytes) -> None:
        fault: Fault | None = self.hub.fault(name, "", {"cut"})
        self.hub.requests[name] += 1
        for start in range(0, len(content) // 2 if fault else len(content), BLOCK):
            block = content[start : start + BLOCK]
            if fault:
                block = block[: max(len(content) // 2 - start, 0)]
            with self.hub.lock:  # before the client can have it
                self.hub.sent[name] += len(block)
            self.wfile.write(block)
        if fault:
            self.close_connection = True

    # uploads

    def _check_writer(self) -> None:
        if not self._token():
            raise Refused(401)
        if self.hub.writers is not None and self._token() not in self.hub.writers:
            raise Refused(403)

    def create(self) -> None:
        self._check_writer()
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        repo = f"datasets/{name}" if asked.get("type") == "dataset" else name
        address = f"{self.hub.endpoint}/{repo}"
        if repo in self.hub.repositories:
            return self._json({"url": address, "error": "You already created this repo"}, 409)
        assert self.hub.created, "a hub without a folder for new repositories"
        place = self.hub.created / repo.replace("/", "--")
        place.mkdir(parents=True)
        self.hub.repositories[repo] = place
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(repo)
        return self._json({"url": address, "name": name, "id": name})

    def check_card(self) -> None:
        problems = card_problems(json.loads(self.body)["content"])
        errors = [{"message": problem} for problem in problems]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def branch(self, repo: str, revision: str) -> None:
        """A branch that begins with main's files."""
        self._check_writer()
        folder, _ = self._revision(repo, "main")
        if (repo, revision) in self.hub.revisions:
            raise Refused(409)
        place = folder.with_name(f"{folder.name}@{revision}")
        shutil.copytree(folder, place)
        self.hub.revisions[repo, revision] = place
        self._json({})

    def preupload(self, repo: str, revision: str) -> None:
        self._check_writer()
        folder, _ = self._revision(repo, revision)
        modes = [
            {"path": one["path"], "shouldIgnore": False, "oid": _oid(folder / one["path"]),
             "uploadMode": "lfs" if is_large(one["path"]) else "regular"}
            for one in json.loads(self.body)["files"]
        ]  # fmt: skip
        self._json({"files": modes})

    def batch(self, repo: str) -> None:
        """Where the contents are to be put that are not here yet."""
        self._check_writer()
        self._repository(repo)
        objects = [
            {"oid": one["oid"], "size": one["size"]} for one in json.loads(self.body)["objects"]
        ]
        for one in objects:
            if one["oid"] not in self.hub.uploads:
                one["actions"] = {"upload": {"href": f"{self.hub.store}/uploads/{one['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        self.hub.uploads[oid] = self.body
        self._json({})

    def commit(self, repo: str, revision: str) -> None:
        self._check_writer()
        folder, _ = self._revision(repo, revision)
        for line in self.body.splitlines():
            asked = json.loads(line)
            value = asked["value"]
            if asked["key"] in ("file", "lfsFile"):
                large = asked["key"] == "lfsFile"
                content = (
                    self.hub.uploads[value["oid"]] if large else base64.b64decode(value["content"])
                )
                (folder / value["path"]).parent.mkdir(parents=True, exist_ok=True)
                (folder / value["path"]).write_bytes(content)
            elif asked["key"] == "deletedFile":
                (folder / value["path"]).unlink()
        self.hub.commits[repo if revision == "main" else f"{repo}@{revision}"] += 1
        commit = self.hub.commit(repo, revision)
        address = f"{self.hub.endpoint}/{repo}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": address})


ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", rf"/{REPO}/resolve/{REVISION}/(?P<file>.+)", Handler.resolve),
    ("GET", rf"/store/(?P<commit>[^/]+)/{REPO}/file/(?P<file>.+)", Handler.stored),
    ("GET", r"/contents/(?P<file>[0-9a-f]+)", Handler.blob),
    ("GET", API, Handler.info),
    ("GET", rf"{API}/revision/{REVISION}", Handler.info),
    ("GET", rf"{API}/auth-check", Handler.auth_check),
    ("GET", rf"{API}/refs", Handler.refs),
    ("GET", rf"{API}/tree/{REVISION}(/(?P<path>.+))?", Handler.tree),
    ("POST", rf"{API}/paths-info/{REVISION}", Handler.paths_info),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.check_card),
    ("POST", rf"{API}/preupload/{REVISION}", Handler.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/uploads/(?P<oid>\w+)", Handler.upload),
    ("POST", rf"{API}/commit/{REVISION}", Handler.commit),
    ("POST", rf"{API}/branch/{REVISION}", Handler.branch),
]


def _below(folder: Path) -> list[str]:
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(file.as_posix() for file in files)


def _oid(file: Path) -> str | None:
    return digests(file)[is_large(file.name)] if file.is_file() else None


def _with_folders(files: list[str], path: str, recursive: bool) -> list[str]:
    """The entries below `path`: its files and folders, or those of all folders in it."""
    names = {*files}
    for file in files:
        names |= {str(parent) for parent in PurePosixPath(file).parents}
    depth = len(PurePosixPath(path).parts) if path else 0
    below = [name for name in names if len(PurePosixPath(name).parts) > depth and name != "."]
    inside = [name for name in below if not path or name.startswith(f"{path}/")]
    return sorted(one for one in inside if recursive or len(PurePosixPath(one).parts) == depth + 1)


def _entry(folder: Path, name: str, expand: bool = False) -> dict[str, Any]:
    file = folder / name
    if not file.is_file():
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    blob, oid = digests(file)
    size = file.stat().st_size
    entry: dict[str, Any] = {"type": "file", "path": name, "oid": blob, "size": size}
    if is_large(name):
        entry["lfs"] = {"oid": oid, "sha256": oid, "size": size, "pointerSize": 134}
    if expand:
        entry["lastCommit"] = {"id": "0" * 40, "title": "a commit", "date": DATE}
        scans = {"avScan": None, "pickleImportScan": None}
        entry["securityFileStatus"] = {"status": "safe", **scans}
    return entry


def _range(asked: str | None, size: int) -> tuple[int, int]:
    """[begin, end) of what a Range header asks for."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "bytes=0-")
    assert match, asked
    first, last = match.groups()
    if not first:
        return max(size - int(last), 0), size
    return int(first), min(int(last) + 1, size) if last else size
