"""The embedded corpus: real text from pinned packages, for machines without a dataset hub.

A stand-in takes the place of published sources of its category and language. Its row (in recipes/)
says which files of which packages, and which reader of readers.py turns them into
documents. Three origins, one vocabulary of paths (relative to site-packages, or to the root of a
source distribution or of the standard library):

    packages    pip-downloaded archives, read in place, never installed
    installed   packages that the project pins itself; another version is refused, as it would be
                another corpus under the same name
    stdlib      differs between Python minor versions, hence the minor version in the folder's hash
"""

import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sysconfig
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from datatrove_pipelines.standins.readers import READERS
from ground.errors import UserError
from ground.files import written_aside
from ground.processes import command

CORPUS_VERSION = 1  # raise it when a reader gives other documents for the same row
CATEGORIES = ("web-en", "web-multilingual", "code", "math", "reasoning")
MIN_CHARACTERS = 200  # shorter documents are mostly headings and stubs
# The wheels of these lack the files we read; for all others the wheel is the smaller download.
SOURCE_DISTRIBUTIONS = ("pygments", "pythonnet")
PIP_TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class StandIn:
    """One row of the stand-in table.

    `files` maps a package (or `stdlib`) to path patterns, in which `*` also matches `/` and a
    leading `!` excludes. `packages` and `installed` are exact pins, `name==version`.
    """

    name: str
    category: str
    language: str
    licence: str
    provenance: str
    reader: str
    files: Mapping[str, Sequence[str]]
    packages: Sequence[str] = ()
    installed: Sequence[str] = ()
    max_bytes: int = 1_500_000
    options: Mapping[str, Any] = field(default_factory=dict)


def fetch(pins: Sequence[str], cache: Path) -> Path:
    """Download the pinned archives that are missing, all in one call of pip.

    Returns the folder that holds them. It never holds half an archive: pip writes into a sibling
    folder, and finished files are renamed.
    """
    downloads = cache / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    missing = sorted({pin for pin in pins if _archive(pin, downloads) is None})
    if not missing:
        return downloads
    with tempfile.TemporaryDirectory(dir=downloads, prefix=".fetch-") as folder:
        words = command("pip", "download", "--quiet", "--no-deps", "--no-input")
        words += ["--disable-pip-version-check", "--dest", folder]
        words += ["--no-binary", ",".join(SOURCE_DISTRIBUTIONS), *missing]
        _run_pip(words, missing)
        for path in Path(folder).iterdir():
            os.replace(path, downloads / path.name)
    return downloads


def _run_pip(command: Sequence[str], pins: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=PIP_TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        reason = f"no answer within {PIP_TIMEOUT_SECONDS} seconds"
    else:
        if done.returncode == 0:
            return
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        # pip's last lines may be notices; the error itself is the last line that says so.
        errors = [line for line in lines if line.lstrip().startswith("ERROR")]
        reason = (errors or lines or ["no message"])[-1].strip()
    raise UserError(
        f"pip could not fetch {' '.join(pins)}: {reason}; check the package index, then run again"
    )


def target(standin: StandIn, cache: Path) -> Path:
    """Where `build` writes the stand-in; the hash covers its row and the Python minor version."""
    row = [asdict(standin), sysconfig.get_python_version(), CORPUS_VERSION]
    identity = json.dumps(row, sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return cache / "standin" / f"{standin.name}-{digest}.jsonl.gz"


def build(standin: StandIn, cache: Path) -> Path:
    """Write the stand-in's documents to `<cache>/standin/<name>-<hash>.jsonl.gz`, once.

    Rows are {"id": str, "text": str}; the same row gives the same bytes.
    """
    _check(standin)
    path = target(standin, cache)
    if path.exists():
        return path
    try:
        documents = _documents(standin, fetch(standin.packages, cache))
    except UserError as error:
        raise UserError(f"stand-in {standin.name!r}: {error}") from error
    _write(path, standin.name, documents)
    return path


def _check(standin: StandIn) -> None:
    """Refuse a row that names an unknown reader or category, before anything is downloaded."""
    for key, known in (("reader", tuple(READERS)), ("category", CATEGORIES)):
        value = getattr(standin, key)
        if value not in known:
            raise UserError(
                f"stand-in {standin.name!r}: {key} {value!r} is unknown; use one of "
                f"{', '.join(known)}"
            )


def _documents(standin: StandIn, downloads: Path) -> list[str]:
    """Clean, distinct documents in the order read, at most `max_bytes` of UTF-8."""
    read = READERS[standin.reader](_files(standin, downloads), **standin.options)
    cleaned = (clean(text) for text in read)
    documents = list(dict.fromkeys(text for text in cleaned if len(text) >= MIN_CHARACTERS))
    if not documents:
        raise UserError(
            f"no document in {', '.join(standin.files)}; check `files` and `options` of its row"
        )
    return _capped(documents, standin.max_bytes)


def clean(text: str) -> str:
    """NFC, line feeds only, no control characters that a text file would not have."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ufeff]", "", text)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip()


def _capped(documents: list[str], max_bytes: int) -> list[str]:
    """The first `max_bytes` in an order by hash: a sample of all files, not only the first ones."""
    salted = partial(hashlib.blake2b, digest_size=8, salt=b"cap")
    kept, used_bytes = set(), 0
    for text in sorted(documents, key=lambda text: salted(text.encode()).digest()):
        used_bytes += len(text.encode())
        if used_bytes > max_bytes:
            break
        kept.add(text)
    return [text for text in documents if text in kept]


def _write(target: Path, name: str, documents: Iterable[str]) -> None:
    with (
        written_aside(target) as aside,
        aside.open("wb") as raw,
        # With an empty name and mtime 0 the bytes do not depend on machine or time.
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0, compresslevel=6) as out,
    ):
        for index, text in enumerate(documents):
            row = {"id": f"{name}/{index}", "text": text}
            out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _files(standin: StandIn, downloads: Path) -> Iterator[tuple[str, str]]:
    """(path, text) of every file that the row names, in a fixed order."""
    pins = {_normal(pin.partition("==")[0]): pin for pin in (*standin.packages, *standin.installed)}
    for package, patterns in standin.files.items():
        name = _normal(package)
        if name == "stdlib":
            members = _folder_members(Path(sysconfig.get_path("stdlib")), patterns)
        elif name not in pins:
            raise UserError(f"`files` names {package}; add its pin to `packages`")
        elif pins[name] in standin.installed:
            members = _installed_members(pins[name], patterns)
        else:
            members = _archive_members(_archive(pins[name], downloads), patterns)
        for path, data in members:
            try:
                yield path, data.decode("utf-8")
            except UnicodeDecodeError:
                continue  # test files in legacy encodings, on purpose


def _matches(path: str, patterns: Sequence[str]) -> bool:
    excluded = [p[1:] for p in patterns if p.startswith("!")]
    included = [p for p in patterns if not p.startswith("!")]
    return any(fnmatchcase(path, p) for p in included) and not any(
        fnmatchcase(path, p) for p in excluded
    )


def _folder_members(root: Path, patterns: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    # Packages installed without a virtual environment lie inside the standard library's folder.
    patterns = [*patterns, "!site-packages/*", "!dist-packages/*"]
    paths = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.*"))
    for path in paths:
        if _matches(path, patterns) and (root / path).is_file():
            yield path, (root / path).read_bytes()


def _installed_members(pin: str, patterns: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    name, _, version = pin.partition("==")
    remedy = "install the project's pinned requirements again"
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{pin} is not installed; {remedy}") from None
    # torch's builds differ in a local suffix (`+cpu`); the files we read are the same in all.
    if distribution.version.partition("+")[0] != version:
        raise UserError(f"{name} is {distribution.version}, the corpus wants {pin}; {remedy}")
    paths = sorted(file.as_posix() for file in distribution.files or ())
    for path in paths:
        if _matches(path, patterns):
            yield path, Path(str(distribution.locate_file(path))).read_bytes()


def _archive_members(archive: Path | None, patterns: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    assert archive is not None, "fetch() returns only when every pin has its archive"
    try:
        yield from _members(archive, patterns)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{archive}: damaged ({error}); delete it, it is fetched again") from None


def _members(archive: Path, patterns: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for path in sorted(wheel.namelist()):
                if _matches(path, patterns):
                    yield path, wheel.read(path)
        return
    with tarfile.open(archive) as source:
        # A source distribution wraps everything in `<name>-<version>/`.
        members = {m.name.partition("/")[2]: m for m in source.getmembers() if m.isfile()}
        for path in sorted(members):
            if _matches(path, patterns):
                stream = source.extractfile(members[path])
                assert stream is not None, "a regular file has a stream"
                yield path, stream.read()


def _archive(pin: str, downloads: Path) -> Path | None:
    """The pin's archive, if it is there: `Name_X-1.2-py3-none-any.whl` or `name-x-1.2.tar.gz`."""
    name, _, version = pin.partition("==")
    for path in sorted(downloads.iterdir()):
        if path.suffix == ".whl":
            archive_name, archive_version = path.name.split("-")[:2]
        elif path.name.endswith(".tar.gz"):
            archive_name, _, archive_version = path.name.removesuffix(".tar.gz").rpartition("-")
        else:
            continue
        if (_normal(archive_name), archive_version) == (_normal(name), version):
            return path
    return None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
