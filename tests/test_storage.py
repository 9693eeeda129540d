"""Shards that are not on this disk: the same windows from any copy that is whole, through one folder of the node."""

import http.server
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import metrics, train
from test_damage import write_shards

from datatrove_pipelines.shards import check_shards, is_whole, verify_shards
from ground import storage
from ground.errors import Outage, UserError
from ground.storage import NodeCache, open_shards, pull, push, read_range
from nanotron_ext.dataloader import Windows
from nanotron_ext.job import Job, Source

WINDOW = 100  # tokens
BLOCK = 512  # bytes: a shard has 8 blocks, in which no window fits evenly


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("ground.storage", "datatrove_pipelines.shards"):
        monkeypatch.setattr(f"{module}.BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(storage, "PAUSES", (0, 0.01))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sealed shard folder of two shards, 4,000 tokens, not the same."""
    return write_shards(tmp_path / "cache" / "shards" / "web-0123", first=1)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A web server on loopback, over the folder `bucket`; it knows no ranges."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    handler = partial(Quiet, directory=str(tmp_path / "bucket"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def windows(folder: Path, cache: NodeCache | None = None) -> list[list[int]]:
    read = Windows(Source("web", folder, 2), WINDOW, cache)
    return [read.read(index).tolist() for index in range(read.count)]


def moved(folder: Path, *urls: str) -> list[list[int]]:
    """The windows of a folder, whose tokens are then at these URLs alone."""
    whole = windows(folder)
    for url in urls:
        push(folder, url)
    for shard in folder.glob("*.ds"):
        shard.unlink()
    return whole


def cached(cache: NodeCache) -> list[Path]:
    return sorted(cache.folder.glob("[!.]*/[!.]*"))


def node(tmp_path: Path, blocks: float = 100) -> NodeCache:
    return NodeCache(tmp_path / "node", int(blocks * BLOCK))


@pytest.mark.parametrize("kind", ["file", "memory", "http"])
def test_windows_are_the_same_wherever_the_tokens_are(
    folder: Path, tmp_path: Path, web: str, kind: str
) -> None:
    bucket = (tmp_path / "bucket").as_uri() if kind != "memory" else f"memory://{tmp_path.name}"
    whole = moved(folder, bucket)
    if kind == "http":  # nothing is written there
        copy = f"{web}/{folder.name}"
        storage.write_json(folder / storage.COPIES_FILE, {"copies": [copy]})
    assert is_whole(folder)
    check_shards(folder, 255)
    verify_shards([folder])
    cache = node(tmp_path)
    assert not cache.folder.exists()
    assert windows(folder, cache) == whole and len(whole) == 40
    assert len(cached(cache)) == 16
    shutil.rmtree(tmp_path / "bucket", ignore_errors=True)
    assert windows(folder, cache) == whole, "fetched once"


def test_a_start_reads_no_block(folder: Path, tmp_path: Path) -> None:
    moved(folder, "memory://lengths")
    cache = node(tmp_path)
    read = Windows(Source("web", folder, 2), WINDOW, cache)
    assert read.count == 40 and not cached(cache)
    read.read(3)
    assert [file.name for file in cached(cache)] == ["0.ds.00001"], "and a window its own alone"


def test_the_next_copy_is_read_where_one_is_missing_or_damaged(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copies = [tmp_path / name for name in ("damaged", "gone", "cut", "good")]
    whole = moved(folder, *(copy.as_uri() for copy in copies))
    capfd.readouterr()
    for shard in (copies[0] / folder.name).glob("*.ds"):
        shard.write_bytes(bytes(shard.stat().st_size))
    shutil.rmtree(copies[1])
    for shard in (copies[2] / folder.name).glob("*.ds"):
        os.truncate(shard, 100)
    assert windows(folder, node(tmp_path)) == whole
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 3, "each is said once"
    assert "damaged" in lines[0] and "are not what was written" in lines[0]
    assert "gone" in lines[1] and "FileNotFoundError" in lines[1]
    shutil.rmtree(copies[3])
    with pytest.raises(
        UserError, match=r"source web: no copy gives a block: .*push-shards"
    ) as error:
        windows(folder, NodeCache(tmp_path / "other"))
    assert error.value.status == 2 and "\n" not in str(error.value)


def test_a_store_that_does_not_answer_is_waited_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = moved(folder, "memory://waited"), list[str]()

    def unsteady(url: str, start: int, stop: int) -> bytes:
        calls.append(url)
        if len(calls) % 2:
            raise TimeoutError("no answer")
        return read_range(url, start, stop)

    monkeypatch.setattr(storage, "read_range", unsteady)
    assert windows(folder, node(tmp_path)) == whole
    monkeypatch.setattr(storage, "PAUSES", (0,))
    with pytest.raises(Outage, match=r"no copy gives a block: memory://waited/.*TimeoutError"):
        windows(folder, NodeCache(tmp_path / "other"))


@pytest.mark.parametrize(
    "damage", [lambda f: os.truncate(f, 7), lambda f: f.write_bytes(bytes(BLOCK))]
)
def test_what_a_disk_has_damaged_is_fetched_again(
    folder: Path, tmp_path: Path, damage: Any
) -> None:
    whole = moved(folder, "memory://again")
    windows(folder, node(tmp_path))
    damage(cached(node(tmp_path))[3])
    assert windows(folder, node(tmp_path)) == whole


def test_a_full_cache_loses_what_was_not_read_for_the_longest_time(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = moved(folder, "memory://full")
    cache, sizes = node(tmp_path, blocks=4.5), list[int]()
    read = Windows(Source("web", folder, 2), WINDOW, cache)
    for index in (0, 3, 6, 9, 0, 11):  # of the blocks 0, 1, 2, 3, 0, 4
        assert read.read(index).tolist() == whole[index]
        time.sleep(0.02)
        sizes.append(sum(file.stat().st_size for file in cached(cache)))
    assert [file.name[-1] for file in cached(cache)] == ["0", "2", "3", "4"]
    assert max(sizes) <= cache.limit_bytes and "NODE_CACHE_GB" not in capfd.readouterr().out
    assert read.read(3).tolist() == whole[3]
    assert windows(folder, cache) == whole
    out = capfd.readouterr().out
    assert out.count("raise NODE_CACHE_GB") == 1
    Windows(Source("web", folder, 2), WINDOW, node(tmp_path, blocks=1.5)).read(6)
    assert len(cached(cache)) == 1, "of another limit"
    with pytest.raises(UserError, match=r"NODE_CACHE_GB=.*less than a block"):
        windows(folder, NodeCache(tmp_path / "small", 100))


def read_all(folder: Path, bucket: Path, cache: Path, blocks: float, out: Any) -> None:
    """What a process of the node does; it counts the blocks that it asks for."""
    storage.BLOCK_BYTES, asked = BLOCK, list[str]()

    def counted(url: str, start: int, stop: int) -> bytes:
        asked.append(url)
        time.sleep(0.02)
        return read_range(url, start, stop)

    storage.read_range = counted
    out.put((windows(folder, NodeCache(cache, int(blocks * BLOCK))), len(asked)))


@pytest.mark.parametrize("blocks", [100, 1.5])
def test_processes_of_a_node_fetch_each_block_once_and_live_with_little_room(
    folder: Path, tmp_path: Path, blocks: float
) -> None:
    whole = moved(folder, (tmp_path / "bucket").as_uri())
    context = multiprocessing.get_context("fork")
    out: Any = context.Queue()
    words = (folder, tmp_path / "bucket", tmp_path / "node", blocks, out)
    processes = [context.Process(target=read_all, args=words) for _ in range(3)]
    for process in processes:
        process.start()
    results = [out.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert all(read == whole for read, _ in results)
    asked = sum(number for _, number in results)
    assert asked == 16 if blocks > 16 else asked >= 16


def write_slowly(cache: Path, folder: Path) -> None:
    storage.BLOCK_BYTES = BLOCK

    def slow(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:99])
            file.flush()
            time.sleep(60)
        return 0

    Path.write_bytes = slow  # type: ignore[method-assign, assignment]
    windows(folder, NodeCache(cache))


def test_a_kill_in_mid_write_leaves_nothing_that_is_taken_for_a_block(
    folder: Path, tmp_path: Path
) -> None:
    whole = moved(folder, (tmp_path / "bucket").as_uri())
    cache = node(tmp_path)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=write_slowly, args=(cache.folder, folder))
    process.start()
    while not list(cache.folder.glob("web*/.*")):
        time.sleep(0.01)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not cached(cache)
    assert windows(folder, cache) == whole, "its lock is gone with it"
    assert not list(cache.folder.glob("web*/.*")), "and so is what it has left"


def test_shards_are_pushed_once_and_pulled_without_their_tokens(
    folder: Path, tmp_path: Path
) -> None:
    bucket = (tmp_path / "bucket").as_uri()
    assert push(folder, bucket) > 8000 and 0 < push(folder, bucket) < 8000, "tokens are there"
    elsewhere = tmp_path / "other" / "shards" / folder.name
    assert not pull(elsewhere, ["memory://nothing-there"]) and not elsewhere.exists()
    assert pull(elsewhere, ["memory://nothing-there", bucket])
    assert is_whole(elsewhere) and not list(elsewhere.glob("*.ds"))
    assert windows(elsewhere, node(tmp_path)) == windows(folder)
    assert push(elsewhere, bucket) == 0
    with pytest.raises(UserError, match=r"its tokens are at .*bucket.* alone"):
        push(elsewhere, "memory://second")
    (tmp_path / "bucket" / folder.name / "0.ds.rows").write_bytes(bytes(800))
    with pytest.raises(UserError, match=r"0\.ds\.rows: its content is not what was written"):
        pull(tmp_path / "third" / folder.name, [bucket])
    assert not list((tmp_path / "third").iterdir())


@pytest.mark.parametrize("url", ["nonsense://x", "file:///proc/nothing"])
def test_a_url_that_does_not_serve_is_one_line(folder: Path, url: str) -> None:
    with pytest.raises(UserError, match=f"SHARDS: {url}.*give a URL") as error:
        push(folder, url)
    assert "\n" not in str(error.value)
    assert not (folder / storage.COPIES_FILE).exists()


def test_files_of_this_disk_are_mapped_as_before(folder: Path) -> None:
    assert all(isinstance(shard, np.memmap) for shard in open_shards(folder, 2))


@pytest.mark.slow
def test_a_training_run_over_blocks_has_the_bits_of_one_over_files(
    tmp_path: Path, make_job: Callable[..., Path]
) -> None:
    """Two processes, which share the folder of the node."""
    steps = 3
    train(make_job("files", {"parallelism.dp": 2}, steps), processes=2)
    folder, cache = make_job("blocks", {"parallelism.dp": 2}, steps), tmp_path / "node"
    job = Job.read(folder)
    for source in job.sources:
        for shard in source.folder.glob("*.ds"):
            data = shard.read_bytes()
            np.array([len(data) // 2], np.uint64).tofile(f"{shard}.index")
            hashes = {shard.name: [storage.block_hash(data)]}
            storage.write_json(source.folder / storage.BLOCKS_FILE, hashes)
            copy = tmp_path / "bucket" / source.name
            copy.mkdir(parents=True)
            shard.rename(copy / shard.name)
            storage.write_json(source.folder / storage.COPIES_FILE, {"copies": [copy.as_uri()]})
    replace(job, node_cache=(cache, 10**6)).write(folder)
    train(folder, processes=2)
    assert {line["loss"] for line in metrics(folder)} == {
        line["loss"] for line in metrics(tmp_path / "files")
    }
    assert len(metrics(folder)) == steps
    assert [file.name for file in cached(NodeCache(cache, 1))] == ["00000.ds.00000"] * 2


def test_a_folder_of_the_node_that_cannot_be_written_to_is_one_line(
    folder: Path, tmp_path: Path
) -> None:
    moved(folder, (tmp_path / "bucket").as_uri())
    (tmp_path / "file").touch()
    cache = NodeCache(tmp_path / "file" / "node")
    with pytest.raises(UserError, match=r"NODE_CACHE=.*node: .* name a folder"):
        windows(folder, cache)
