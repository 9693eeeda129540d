"""Contents of files by their ids, from a real server on loopback that stands for the bucket."""

import gzip
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from typing import Any

import pytest

from datatrove_pipelines import software_heritage
from datatrove_pipelines.counts import Counts
from datatrove_pipelines.software_heritage import Blob, blobs, contents
from ground.errors import Outage, UserError


class Bucket(ThreadingHTTPServer):
    """`contents` by id; `troubles`: statuses that are answered first, or seconds of delay."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.contents: dict[str, bytes] = {}
        self.troubles: dict[str, list[int | float]] = {}
        self.asked = Counter[str]()
        self.at_once, self.most_at_once, self.lock = 0, 0, threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Bucket

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        bucket, name = self.server, self.path.rpartition("/")[2]
        with bucket.lock:
            bucket.asked[name] += 1
            bucket.at_once += 1
            bucket.most_at_once = max(bucket.most_at_once, bucket.at_once)
            trouble = (bucket.troubles.get(name) or [0.0]).pop(0)
        if isinstance(trouble, float):
            time.sleep(trouble)
        with bucket.lock:
            bucket.at_once -= 1
        body = bucket.contents.get(name)
        status = trouble if isinstance(trouble, int) else 404 if body is None else 200
        body = (body if status == 200 else None) or b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if trouble == 0.25 else body)
        self.close_connection = trouble == 0.25


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    server = Bucket()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("SOFTWARE_HERITAGE", f"http://127.0.0.1:{server.server_port}/content/")
    monkeypatch.setattr(software_heritage, "FIRST_WAIT_SECONDS", 0.01)
    software_heritage._client.cache_clear()
    yield server
    software_heritage._client.cache_clear()
    server.shutdown()
    server.server_close()


def fill(bucket: Bucket, texts: dict[str, str], encoding: str = "utf-8") -> list[Blob]:
    bucket.contents |= {name: gzip.compress(text.encode(encoding)) for name, text in texts.items()}
    return [Blob(row, name, encoding) for row, name in enumerate(texts, start=1)]


def test_texts_keep_their_order_and_encoding_whatever_the_bucket_does(bucket: Bucket) -> None:
    wanted = fill(bucket, {f"{n:040x}": f"print({n})\n" for n in range(200)})
    wanted += [Blob(201, "latin", "ISO-8859-1"), Blob(202, "odd", "no-such-encoding")]
    bucket.contents |= {
        "latin": gzip.compress("déjà".encode("latin-1")),
        "odd": gzip.compress(b"\xffx"),
    }
    # The first is slow, two are refused twice and then given, one breaks off, one is not there.
    bucket.troubles = {wanted[0].id: [0.3], wanted[3].id: [503, 429], wanted[9].id: [503, 503]}
    bucket.troubles |= {wanted[20].id: [0.25]}
    del bucket.contents[wanted[5].id]
    counts = Counts()
    found = list(contents(wanted, counts))
    there = [n for n in range(200) if n != 5]
    assert found == [*((n + 1, f"print({n})\n") for n in there), (201, "déjà"), (202, "x")]
    assert counts.left_out == {"missing_contents": 1}
    assert [bucket.asked[wanted[n].id] for n in (3, 5, 9, 20)] == [3, 1, 3, 2]
    assert 1 < bucket.most_at_once <= software_heritage.THREADS


def test_no_more_is_in_memory_than_what_is_asked_for_ahead(bucket: Bucket) -> None:
    taken = 0

    def wanted() -> Iterator[Blob]:
        nonlocal taken
        for blob in fill(bucket, {f"{n:040x}": "x" for n in range(1000)}):
            taken += 1
            yield blob

    texts = contents(wanted(), Counts())
    for read, _ in enumerate(islice(texts, 300), start=1):
        assert taken - read < software_heritage.AHEAD
    texts.close()  # type: ignore[attr-defined]
    assert taken < 300 + software_heritage.AHEAD


def test_a_bucket_without_the_contents_is_one_line(bucket: Bucket) -> None:
    wanted = fill(bucket, {f"{n:040x}": "x" for n in range(100)})
    bucket.contents = {blob.id: bucket.contents[blob.id] for blob in wanted[:70]}
    counts = Counts()
    line = r"127.*/content: 21 of 91 contents are not there \(status 404\); correct SOFTWARE_H"
    with pytest.raises(UserError, match=line):
        list(contents(wanted, counts))
    assert counts.left_out == {"missing_contents": 21}


def test_a_bucket_that_does_not_answer_is_an_outage(bucket: Bucket) -> None:
    wanted = fill(bucket, {"a": "x"})
    bucket.troubles = {"a": [503] * 20}
    with pytest.raises(Outage, match=r"/content/a: .*503.*; run the same command again later"):
        list(contents(wanted, Counts()))
    assert bucket.asked["a"] == software_heritage.TRIES + 1


def test_what_is_not_gzip_is_refused_by_its_address(bucket: Bucket) -> None:
    bucket.contents = {"a": b"<html>", "b": gzip.compress(b"text" * 99)[:-9]}
    for name in bucket.contents:
        with pytest.raises(UserError, match=f"/content/{name}: not gzip: .*; correct"):
            list(contents([Blob(1, name, "utf-8")], Counts()))


def test_a_repository_is_a_document_a_file_of_the_language() -> None:
    files = [("a", "C#"), ("b", "C++"), ("c", "C-Sharp")]
    listed = [{"blob_id": name, "language": word, "src_encoding": None} for name, word in files]
    rows: list[tuple[int, dict[str, Any]]]
    rows = [(7, {"repo_name": "x/y", "files": listed}), (8, {"files": None}), (9, {"files": []})]
    assert list(blobs(rows, ["C#", "C-Sharp"])) == [Blob(7, "a", "utf-8"), Blob(7, "c", "utf-8")]
    assert [blob.id for blob in blobs(rows)] == ["a", "b", "c"]
    assert list(blobs([(1, {"blob_id": "d", "src_encoding": "GBK"})])) == [Blob(1, "d", "GBK")]
