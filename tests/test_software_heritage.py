"""Contents of files by their ids, from a real server on loopback that stands for the bucket."""

import gzip
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from loopback_hub import loopback_hub
from pyarrow import parquet

from datatrove_pipelines import hub_files, software_heritage
from datatrove_pipelines.counts import Counts
from datatrove_pipelines.software_heritage import Blob, blobs, contents
from datatrove_pipelines.sources import HubSplit, SourceJob, read_documents
from datatrove_pipelines.text_files import text_of
from datatrove_pipelines.units import StoredFile, Unit
from ground.errors import Outage, UserError
from launch.recipe.scale import load_scale
from launch.recipe.tables import load_sources
from launch.stages.sources import data_of, source_job


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
    line = r"127.*/content: 21 of 91 contents cannot be had \(the last: status 404\); correct SOFTWARE_H"
    with pytest.raises(UserError, match=line):
        list(contents(wanted, counts))
    assert counts.left_out == {"missing_contents": 21}
    # As many among more are taken down.
    more = fill(bucket, {f"{n:040x}": "x" for n in range(400)})
    bucket.contents = {blob.id: bucket.contents[blob.id] for blob in more if blob.row % 13}
    assert len(list(contents(more, counts))) == 400 - 30


def test_a_bucket_that_does_not_answer_is_an_outage(bucket: Bucket) -> None:
    wanted = fill(bucket, {"a": "x"})
    bucket.troubles = {"a": [503] * 20}
    with pytest.raises(Outage, match=r"/content/a: .*503.*; run the same command again later"):
        list(contents(wanted, Counts()))
    assert bucket.asked["a"] == software_heritage.TRIES + 1


def test_what_is_not_gzip_is_left_out_until_it_is_too_much(bucket: Bucket) -> None:
    wanted = fill(bucket, {f"{n:040x}": "x" for n in range(30)})
    for name, content in (
        (wanted[3].id, b"<html>"),
        (wanted[4].id, bucket.contents["0" * 40][:-9]),
    ):
        bucket.contents[name] = content
    counts = Counts()
    assert len(list(contents(wanted, counts))) == 28
    assert counts.left_out == {"missing_contents": 2}
    bucket.contents = dict.fromkeys(bucket.contents, b"<html>sign in</html>")
    with pytest.raises(UserError, match=r"/content: 21 of 21 .*: not gzip\); correct SOFTWARE_H"):
        list(contents(wanted, Counts()))


def test_a_bucket_that_wants_an_account_is_refused_at_once(bucket: Bucket) -> None:
    wanted = fill(bucket, {"a": "x"})
    bucket.troubles = {"a": [401]}
    with pytest.raises(UserError, match="/content/a: status 401; correct SOFTWARE_HERITAGE"):
        list(contents(wanted, Counts()))


def test_a_repository_is_a_document_a_file_of_the_language() -> None:
    files = [("a", "C#"), ("b", "C++"), ("c", "C-Sharp")]
    listed = [{"blob_id": name, "language": word, "src_encoding": None} for name, word in files]
    rows: list[tuple[int, dict[str, Any]]]
    rows = [(7, {"repo_name": "x/y", "files": listed}), (8, {"files": None}), (9, {"files": []})]
    assert list(blobs(rows, ["C#", "C-Sharp"])) == [Blob(7, "a", "utf-8"), Blob(7, "c", "utf-8")]
    assert [blob.id for blob in blobs(rows)] == ["a", "b", "c"]
    assert list(blobs([(1, {"blob_id": "d", "src_encoding": "GBK"})])) == [Blob(1, "d", "GBK")]


def repositories() -> list[dict[str, Any]]:
    """Rows as those of the-stack-v2-train-smol-ids, with columns that need not be read."""
    languages = ("Python", "Markdown")
    return [
        {
            "repo_name": f"x/{row}",
            "files": [
                {"blob_id": f"{row}-{n}", "path": "x" * 99, "language": languages[n % 2],
                 "src_encoding": "UTF-8", "detected_licenses": ["MIT"] * 9}
                for n in range(row % 4)
            ],
        }
        for row in range(1, 41)
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_source_of_ids_is_read_as_the_texts_of_its_language(
    bucket: Bucket, tmp_path: Path, form: str
) -> None:
    rows = repositories()
    names = [file["blob_id"] for row in rows for file in row["files"]]
    fill(bucket, {name: f"text of {name}" for name in names})
    if form == "parquet":
        parquet.write_table(
            pa.Table.from_pylist(rows), tmp_path / "train.parquet", row_group_size=7
        )
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "train.jsonl").write_text(lines)
    split = HubSplit(
        str(tmp_path), None, "train", "abc", contents="software-heritage", file_language="Markdown"
    )
    of_row = {name: int(name.split("-")[0]) for name in names if name.endswith("-1")}
    found = [(document.id, document.text) for document in read_documents(SourceJob("s", split))]
    assert found == [(f"train.{form}/{row}", f"text of {name}") for name, row in of_row.items()]
    # Cut anywhere, its units are the whole.
    size = (tmp_path / f"train.{form}").stat().st_size
    borders = [0, 0.3, 0.31, 0.8, 1]
    units = [Unit(0, f"train.{form}", a, b, size) for a, b in pairwise(borders)]
    parts = [part for unit in units for part in hub_files.texts(split, unit, Counts())]
    assert [text for _, text in parts] == [text for _, text in found]


def test_ids_come_from_the_hub_without_what_else_a_row_says(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = repositories()
    for row in rows:
        row["other"] = random.Random(row["repo_name"]).randbytes(100_000)
    (tmp_path / "set/data").mkdir(parents=True)
    file = tmp_path / "set/data/train-00000-of-00001.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), file)
    names = [file["blob_id"] for row in rows for file in row["files"]]
    fill(bucket, {name: f"text of {name}" for name in names})
    split = HubSplit("of/ids", None, "train", "main", contents="software-heritage")
    with loopback_hub({"datasets/of/ids": tmp_path / "set"}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        found = [document.text for document in read_documents(SourceJob("s", split))]
        assert found == [f"text of {name}" for name in names]
        assert hub.bytes_of("datasets/of/ids") < 0.05 * file.stat().st_size


def test_of_a_table_of_ids_no_other_column_is_read(tmp_path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist(repositories()), tmp_path / "train.parquet")
    split = HubSplit(str(tmp_path), None, "train", "abc", contents="software-heritage")
    size = (tmp_path / "train.parquet").stat().st_size
    _, row = next(hub_files.Reading(split, Unit(0, "train.parquet", 0, 1, size)).until(1))
    assert row == {"files": [{"blob_id": "1-0", "language": "Python", "src_encoding": "UTF-8"}]}


def test_rows_without_ids_are_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "train.parquet")
    split = HubSplit(str(tmp_path), None, "train", "abc", contents="software-heritage")
    file = StoredFile("train.parquet", (tmp_path / "train.parquet").stat().st_size)
    with pytest.raises(UserError, match=r"train.parquet: no field 'blob_id' among .*sources.yaml"):
        hub_files.check_file(split, file)


def test_messages_become_text() -> None:
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    assert text_of({"messages": turns}, "messages", "plain") == "2+2?\n\n4"
    chatml = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>"
    assert text_of({"messages": turns}, "messages", "chatml") == chatml
    with pytest.raises(ValueError, match="no list of messages"):
        text_of({"messages": [{"from": "human", "value": "2+2?"}]}, "messages", "plain")
    with pytest.raises(ValueError, match="field 'messages' holds list, not text"):
        text_of({"messages": turns}, "messages")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("stack-v2-C-Sharp", {"contents": "software-heritage", "file_language": ("C#", "C-Sharp")}),
        ("stack-edu-real-shuffled-Go", {"contents": "software-heritage", "file_language": None}),
        ("tulu-3-chatml", {"contents": None, "text_field": "messages", "messages": "chatml"}),
    ],
)
def test_what_a_row_says_reaches_the_reader(name: str, said: dict[str, Any]) -> None:
    data = data_of(name, load_sources()[name], load_scale("full"), name)
    assert data
    read = source_job(name, data, {}, 0.0).read
    assert {key: getattr(read, key) for key in said} == said
