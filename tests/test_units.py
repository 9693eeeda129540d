"""Parts of stored files: each row once, the same tokens whoever reads them, kills and all."""

import gzip
import io
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from string import ascii_lowercase

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from loopback_hub import Fault, Hub, loopback_hub
from test_tokenize import TEXTS, VOCAB_SIZE, documents

from datatrove_pipelines import building, hub_files
from datatrove_pipelines import progress as module
from datatrove_pipelines.building import tokenize_all, tokenize_source
from datatrove_pipelines.counts import Counts
from datatrove_pipelines.hub_files import Listing, list_files, texts
from datatrove_pipelines.shards import UNIT_FILE, UnitInfo, read_info, shard_folder
from datatrove_pipelines.sources import (
    HubSplit,
    SourceJob,
    check_readable,
    ratio_of,
    read_documents,
    units_of,
)
from datatrove_pipelines.tokenizer import train_bpe
from datatrove_pipelines.units import MOST_TOKENS, StoredFile, Unit
from ground.errors import Outage, UserError
from ground.files import write_json

LETTERS = random.Random(0)
ROWS = [f"{n} " + "".join(LETTERS.choices(ascii_lowercase, k=100 + n % 300)) for n in range(600)]


def jsonl(rows: list[str]) -> bytes:
    return b"".join(json.dumps({"text": row, "n": 1}).encode() + b"\n" for row in rows)


def parquet(rows: list[str], row_group_size: int = 70) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": rows, "n": rows}), file, row_group_size=row_group_size)
    return file.getvalue()


def zst(rows: list[str]) -> bytes:
    """Several frames, as pzstd writes them."""
    frames = (jsonl(rows[start : start + 10]) for start in range(0, len(rows), 10))
    return b"".join(map(zstandard.ZstdCompressor().compress, frames))


FORMATS: dict[str, Callable[[list[str]], bytes]] = {
    "jsonl": jsonl,
    "json": lambda rows: jsonl(rows).removesuffix(b"\n"),
    "jsonl.gz": lambda rows: gzip.compress(jsonl(rows[:200])) + gzip.compress(jsonl(rows[200:])),
    "jsonl.zst": zst,
    "json.gz": lambda rows: gzip.compress(jsonl(rows)),
    "parquet": parquet,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_bpe(TEXTS, VOCAB_SIZE, folder)
    return folder


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def write_set(root: Path, kind: str, files: int = 1) -> SourceJob:
    """A data set of ROWS in `files` files."""
    root.mkdir()
    size = len(ROWS) // files
    for n in range(files):
        content = FORMATS[kind](ROWS[n * size : (n + 1) * size])
        (root / f"train-{n}.{kind}").write_bytes(content)
    return SourceJob("web", HubSplit(str(root), None, "train", "abc"), seed=3)


def split_of(job: SourceJob) -> HubSplit:
    assert isinstance(job.read, HubSplit)
    return job.read


def portion(job: SourceJob, skip: int, take: int) -> SourceJob:
    return replace(job, read=replace(split_of(job), portion=(skip, take)))


@pytest.mark.parametrize("kind", FORMATS)
def test_units_of_a_file_have_each_row_once_with_its_number(tmp_path: Path, kind: str) -> None:
    split = split_of(write_set(tmp_path / "set", kind))
    (file,) = list_files(split).files
    borders = [0.0, 0.1, 1 / 3, 0.34, 0.5, 0.9, 1.0]
    parts = [
        Unit(n, file.name, start, stop, file.bytes)
        for n, (start, stop) in enumerate(pairwise(borders))
    ]
    in_turn = [list(texts(split, unit, Counts())) for unit in parts]
    assert [row for part in in_turn for row in part] == list(enumerate(ROWS, start=1))
    assert all(in_turn)
    for unit in reversed(parts):  # each by itself
        assert list(texts(split, unit, Counts())) == in_turn[unit.number]


@pytest.mark.parametrize("kind", FORMATS)
def test_no_more_is_fetched_than_the_units_need(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = split_of(write_set(tmp_path / "set", kind))
    (file,) = list_files(split).files
    read, fetched = hub_files.StoredRange._local, list[int]()
    monkeypatch.setattr(
        hub_files.StoredRange, "_local", lambda self, n: [fetched.append(n), read(self, n)][1]
    )
    for part in range(4):  # a half, in turn
        assert list(
            texts(split, Unit(part, file.name, part / 8, (part + 1) / 8, file.bytes), Counts())
        )
    footer = 1 << 16 if kind == "parquet" else 0  # pyarrow's first guess of its size
    assert sum(fetched) - footer < 0.6 * file.bytes


@pytest.mark.parametrize("kind", ["jsonl.zst", "parquet"])
def test_shards_do_not_depend_on_workers_kills_and_order(
    tmp_path: Path, tokenizer: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = portion(write_set(tmp_path / "set", kind, files=4), 9_000, 60_000)
    undisturbed = tokenize_source(job, tokenizer, tmp_path / "a")
    assert 60_000 <= undisturbed.tokens < 70_000 and len(undisturbed.units) > 5
    jobs = [job, replace(job, name="other")]
    assert documents(tokenize_all(jobs, tokenizer, tmp_path / "b", 2)[0]) == documents(undisturbed)

    build, calls = building.build_unit, iter(range(100))

    def killed(*args: object) -> object:
        if next(calls) in (2, 4):
            raise KeyboardInterrupt
        return build(*args)

    monkeypatch.setattr(building, "build_unit", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            tokenize_source(job, tokenizer, tmp_path / "c")
        assert not shard_folder(job, tokenizer, tmp_path / "c").exists()
    again = tokenize_source(job, tokenizer, tmp_path / "c")
    assert next(calls) == len(undisturbed.units) + 2  # nothing was built twice
    for file in undisturbed.folder.iterdir():
        assert (again.folder / file.name).read_bytes() == file.read_bytes()
    assert not list(again.folder.parent.glob("*.building"))


def test_a_unit_says_what_it_holds_and_where_it_is_from(tmp_path: Path, tokenizer: Path) -> None:
    job = portion(write_set(tmp_path / "set", "jsonl.gz", files=3), 0, 30_000)
    info = tokenize_source(job, tokenizer, tmp_path)
    assert read_info(info.folder) == info
    assert [unit.number for unit in info.units] == list(range(len(info.units)))
    for unit in info.units:
        shard = info.folder / f"{unit.number:05}.ds"
        assert (shard.stat().st_size if shard.exists() else 0) == 2 * unit.tokens
    assert sum(unit.tokens for unit in info.units) == info.tokens
    # The shortest prefix that has the tokens.
    assert info.tokens - info.units[-1].tokens < 30_000 <= info.tokens


def test_a_source_that_is_asked_for_more_is_read_whole_once(
    tmp_path: Path, tokenizer: Path
) -> None:
    job = write_set(tmp_path / "set", "parquet", files=3)
    whole = tokenize_source(job, tokenizer, tmp_path)
    more = tokenize_source(portion(job, 5_000, 10**6), tokenizer, tmp_path)
    assert sorted(documents(more)) == sorted(documents(whole)) and len(documents(whole)) == 600


def test_a_file_that_fails_costs_no_other(tmp_path: Path, tokenizer: Path) -> None:
    job = write_set(tmp_path / "set", "jsonl", files=3)
    other = replace(write_set(tmp_path / "other", "parquet"), name="other")
    check_readable([job, other])
    bad = tmp_path / "set" / "train-1.jsonl"
    lines = bad.read_bytes().splitlines(keepends=True)
    bad.write_bytes(b"".join([*lines[:150], b"{" * (len(lines[150]) - 1) + b"\n", *lines[151:]]))
    where = r"^source web: .*: train-1\.jsonl, row 151: not JSON.*sources\.yaml$"
    with pytest.raises(UserError, match=where):
        tokenize_all([job, other], tokenizer, tmp_path / "c", 2)
    assert shard_folder(other, tokenizer, tmp_path / "c").is_dir()
    kept = list((tmp_path / "c").glob("shards/web*.building/*/unit.json"))
    assert len(kept) == 2
    bad.write_bytes(b"".join(lines))
    assert tokenize_source(job, tokenizer, tmp_path / "c").documents == 600


def test_other_formats_and_files_without_the_column_are_refused_before_the_start(
    tmp_path: Path, tokenizer: Path
) -> None:
    job = write_set(tmp_path / "set", "parquet")
    text = replace(job, read=replace(split_of(job), text_field="content"))
    with pytest.raises(UserError, match=r"source web: .*train-0\.parquet: no field 'content'"):
        tokenize_all([text], tokenizer, tmp_path / "c", 1)
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train.csv").write_text("text\na\n")
    csv = replace(job, read=replace(split_of(job), hub_id=str(tmp_path / "csv")))
    with pytest.raises(UserError, match=r"source web: .*train\.csv: not parquet or lines of JSON"):
        tokenize_all([csv], tokenizer, tmp_path / "c", 1)
    assert not (tmp_path / "c" / "shards").exists()


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet"])
def test_a_row_of_too_many_bytes_is_left_out_and_counted(
    tmp_path: Path, tokenizer: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_files, "MOST_ROW_BYTES", 10_000)
    root = tmp_path / "set"
    root.mkdir()
    rows = [*TEXTS[:20], "long " * 5_000, *TEXTS[20:]]
    (root / f"train.{kind}").write_bytes(FORMATS[kind](rows))
    info = tokenize_source(
        SourceJob("web", HubSplit(str(root), None, "train", "a")), tokenizer, root
    )
    assert info.documents == len(TEXTS) and info.left_out["too_large"] == 1


def test_a_source_is_read_in_its_order_without_building_it(tmp_path: Path) -> None:
    job = write_set(tmp_path / "set", "parquet", files=5)
    texts = [document.text for document in read_documents(job)]
    assert texts != ROWS and sorted(texts) == sorted(ROWS)
    assert [d.text for d in read_documents(job)] == texts


def test_a_file_that_is_shorter_than_it_was_listed_is_named(tmp_path: Path) -> None:
    split = split_of(write_set(tmp_path / "set", "jsonl"))
    unit = Unit(0, "train-0.jsonl", 0.0, 1.0, list_files(split).files[0].bytes + 9)
    with pytest.raises(UserError, match=r"train-0\.jsonl.*: ends after [\d,]+ of [\d,]+ bytes"):
        list(texts(split, unit, Counts()))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of two sets of ROWS, whose clients do not wait between their tries."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    for kind in ("parquet", "jsonl.zst"):
        write_set(tmp_path / kind, kind, files=6)
    sets = {f"datasets/of/{kind}": tmp_path / kind for kind in ("parquet", "jsonl.zst")}
    with loopback_hub(sets) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


def of_hub(kind: str) -> SourceJob:
    return SourceJob(kind, HubSplit(f"of/{kind}", None, "train", "main"), seed=3)


@pytest.mark.parametrize("kind", ["parquet", "jsonl.zst"])
def test_the_hub_gives_what_a_folder_gives_and_is_asked_for_little_more(
    hub: Hub, tmp_path: Path, tokenizer: Path, kind: str
) -> None:
    folder = SourceJob(kind, HubSplit(str(tmp_path / kind), None, "train", "a"), seed=3)
    hub.faults.append(Fault("train-1", "cut", times=2))
    hub.faults.append(Fault("train-2", times=1, retry_after=7))
    for wanted in (None, 50_000):
        hub.forget()
        one, other = (
            tokenize_source(portion(job, 0, wanted) if wanted else job, tokenizer, tmp_path / where)
            for job, where in ((folder, "a"), (of_hub(kind), "b"))
        )
        assert documents(one) == documents(other) and one.units == other.units


def test_a_file_that_the_hub_does_not_give_costs_no_other(
    hub: Hub, tmp_path: Path, tokenizer: Path
) -> None:
    order = [
        unit.file for unit in units_of(of_hub("parquet"), list_files(split_of(of_hub("parquet"))))
    ]
    hub.faults.append(Fault(order[3], status=500))
    jobs = [of_hub("parquet"), of_hub("jsonl.zst")]
    where = rf"^source parquet: of/parquet@\w+ .*: {order[3]}: the hub answers 500; run the same"
    with pytest.raises(Outage, match=where):
        tokenize_all(jobs, tokenizer, tmp_path / "c", 1)
    assert shard_folder(jobs[1], tokenizer, tmp_path / "c").is_dir()
    assert len(list((tmp_path / "c").glob("shards/parquet*.building/*/unit.json"))) == 5
    hub.faults.clear()
    hub.forget()
    assert tokenize_source(jobs[0], tokenizer, tmp_path / "c").documents == len(ROWS)
    assert {Path(name).name for name in hub.fetched} <= {Path(order[3]).name, Path(order[0]).name}


def test_a_hub_that_stops_to_answer_is_left_alone(
    hub: Hub, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [of_hub("parquet"), of_hub("jsonl.zst")]
    check_readable(jobs)
    monkeypatch.setattr(building, "check_readable", list)
    hub.faults.append(Fault("datasets/", status=503))
    with pytest.raises(Outage, match=r"the hub answers 503.*\(and 3 more"):
        tokenize_all(jobs, tokenizer, tmp_path / "c", 1)


def test_progress_says_rate_and_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "LINE_SECONDS", 0.05)
    with module.progress({tmp_path: 2_000.0}, 2):
        time.sleep(0.02)
        (tmp_path / "00000").mkdir()
        (tmp_path / "00000" / "unit.json").write_text('{"tokens": 900}')
        (tmp_path / "00001.partial").mkdir()
        (tmp_path / "00001.partial" / "0_unshuffled.ds").write_bytes(bytes(200))
        time.sleep(0.2)
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"1,000 of about 2,000 tokens, [\d,]+ a second, 0:00:0\d left", line)


def test_files_by_name_are_found_whatever_configs_the_card_has(tmp_path: Path) -> None:
    names = ["math/x/a.jsonl", "math/b.jsonl", "20231101.fr/c.jsonl", "20231101.de/c.jsonl"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    configs = ("default", "*/*"), ("math", "math/**"), ("20231101.fr", "20231101.fr/*")
    card = "".join(f'- config_name: {name}\n  data_files: "{files}"\n' for name, files in configs)
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    for patterns, found in (
        ("math/x/**/*.jsonl", names[:1]),
        (("20231101.fr/*.jsonl", "20231101.de/*.jsonl"), names[3:1:-1]),
    ):
        split = HubSplit(str(tmp_path), None, "train", "abc", data_files=patterns)
        assert [file.name for file in list_files(split).files] == found


def test_a_task_looks_at_each_unit_of_its_source_a_few_times(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source at the published size has tens of thousands of units: looking at all that come before
    each would be hundreds of millions of reads."""
    count = 400
    files = tuple(hub_files.StoredFile(f"{n:03}.parquet", 1000) for n in range(count))
    split = HubSplit("set", None, "train", "main", portion=(0, 450 * count))
    folder = shard_folder(SourceJob("web", split), tokenizer, tmp_path)
    source = building.Source(SourceJob("web", split), folder, hub_files.Listing("main", files))
    looked, finished = list[int](), building.Source.finished

    def counted(self: building.Source, unit: Unit) -> object:
        looked.append(unit.number)
        return finished(self, unit)

    monkeypatch.setattr(building.Source, "finished", counted)
    needed = 0
    for unit in source.units():
        if not source.is_needed(unit, 1.0):
            break
        needed += 1
        if unit.number == 3:  # which fails
            continue
        info = UnitInfo(unit.number, unit.file, unit.start, unit.stop, 500, 0, 0, {})
        source.unit_folder(unit.number).mkdir(parents=True)
        write_json(source.unit_folder(unit.number) / UNIT_FILE, asdict(info))
    assert needed == 0.9 * count and len(looked) < 3 * count
    looked.clear()
    assert len(list(source.needed())) == needed == len(looked)


def test_ids_of_files_are_no_measure_of_their_tokens() -> None:
    """Shards of a set that lists ids are of the size of others, though a row stands for a whole file."""
    files = [StoredFile("ids.parquet", 1 << 30)]
    ids = HubSplit("a/b", None, "train", "1", contents="software-heritage")
    assert ratio_of(ids, files) > 10 * ratio_of(replace(ids, contents=None), files)
    assert ratio_of(replace(ids, file_language="C"), files) < ratio_of(ids, files)
    assert ratio_of(replace(ids, tokens=1 << 34), files) == 16
    job = SourceJob("ids", replace(ids, tokens=1 << 34))
    sizes = [unit.stored_bytes * 16 for unit in units_of(job, Listing("1", tuple(files)))]
    assert max(sizes) <= MOST_TOKENS < 2 * min(sizes)
