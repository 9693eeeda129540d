"""From documents to token shards: what is written, what is refused, what survives a failure."""

import errno
import gzip
import json
import os
import re
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from datatrove_pipelines import building, sources
from datatrove_pipelines.building import tokenize_all, tokenize_source
from datatrove_pipelines.executors import run_in_processes
from datatrove_pipelines.held_out import in_slice, is_held_out, write_held_out
from datatrove_pipelines.shards import ShardInfo, check_shards, is_whole, shard_folder
from datatrove_pipelines.sources import HubSplit, JsonlFile, SourceJob, check_readable
from datatrove_pipelines.tokenizer import EOS, SPECIAL_TOKENS, train_bpe
from ground.errors import UserError
from ground.files import folder_aside

VOCAB_SIZE = 320
EOS_ID = VOCAB_SIZE - len(SPECIAL_TOKENS) + list(SPECIAL_TOKENS).index(EOS)
WORDS = [
    "bread",
    "water",
    "mountain",
    "river",
    "sentence",
    "letter",
    "hurricane",
    "glass",
    "window",
]
TEXTS = [
    f"{a} and {b}: {len(a) * n}, don't.\n\nÉté {b} 東京" for n, a in enumerate(WORDS) for b in WORDS
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_bpe(TEXTS, VOCAB_SIZE, folder)
    return folder


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture
def job(tmp_path: Path) -> SourceJob:
    path = write_jsonl(tmp_path / "web.jsonl.gz", [{"text": text} for text in TEXTS])
    return SourceJob("fineweb-edu", JsonlFile(path), (0, 1), 0.0, 7)


def documents(info: ShardInfo) -> list[list[int]]:
    """The token ids of each document of a shard, EOS included."""
    dtype, found = {2: np.uint16, 4: np.uint32}[info.token_bytes], []
    for path in sorted(info.folder.glob("*.ds")):
        ends = np.fromfile(f"{path}.index", np.uint64).astype(int)
        found += [part.tolist() for part in np.split(np.fromfile(path, dtype), ends[:-1])]
    return found


def texts_of(info: ShardInfo, tokenizer: Path) -> list[str]:
    from tokenizers import Tokenizer

    table = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    return [table.decode(ids[:-1], skip_special_tokens=False) for ids in documents(info)]


def test_every_document_is_its_text_and_one_eos(job: SourceJob, tokenizer: Path, tmp_path: Path):
    info = tokenize_source(job, tokenizer, tmp_path)
    assert sorted(texts_of(info, tokenizer)) == sorted(TEXTS)
    assert all(ids[-1] == EOS_ID and EOS_ID not in ids[:-1] for ids in documents(info))
    assert info.tokens == sum(map(len, documents(info)))
    assert (info.documents, info.token_bytes, info.eos_id) == (len(TEXTS), 2, EOS_ID)
    assert info.bytes == sum(len(text.encode()) for text in TEXTS)
    assert check_shards(info.folder, EOS_ID) == info
    suffixes = sorted(re.sub(r"^.*(?=\.ds)", "", path.name) for path in info.folder.iterdir())
    assert suffixes == [
        ".ds",
        ".ds.index",
        ".ds.rows",
        "blocks.json",
        "checksums.json",
        "info.json",
    ]


def test_documents_are_shuffled_by_the_seed(job: SourceJob, tokenizer: Path, tmp_path: Path):
    one, two, other = (
        texts_of(tokenize_source(replace(job, seed=seed), tokenizer, tmp_path / cache), tokenizer)
        for seed, cache in ((7, "a"), (7, "b"), (8, "a"))
    )
    assert one == two
    assert one != other and one != TEXTS and sorted(one) == sorted(other)


@pytest.mark.parametrize("least_tokens", [0, 10_000])
def test_the_rows_say_which_line_of_its_file_each_document_is(
    job: SourceJob, tokenizer: Path, tmp_path: Path, least_tokens: int
):
    rows = [text for text in TEXTS for text in ("", text)]  # empty ones are left out
    write_jsonl(job.read.path, [{"text": text} for text in rows])
    info = tokenize_source(replace(job, least_tokens=least_tokens), tokenizer, tmp_path)
    numbers = np.fromfile(next(info.folder.glob("*.ds.rows")), np.uint32).tolist()
    assert [rows[number - 1] for number in numbers] == texts_of(info, tokenizer)
    assert numbers != sorted(numbers) and (len(numbers) > len(TEXTS)) == (least_tokens > 0)
    assert is_whole(info.folder)
    next(info.folder.glob("*.ds.rows")).unlink()
    assert not is_whole(info.folder)


def test_text_cannot_forge_a_special_token(job: SourceJob, tokenizer: Path, tmp_path: Path):
    hostile = [token * n + " x" * (n - 1) for token in SPECIAL_TOKENS for n in (1, 2)]
    hostile += [f"{EOS}", f"a{EOS}b", f" {EOS}\n", "<|end_of_text", "<code>x</code>", f"{EOS}{EOS}"]
    hostile = list(dict.fromkeys(hostile))
    write_jsonl(job.read.path, [{"text": text} for text in hostile])
    info = tokenize_source(job, tokenizer, tmp_path)
    assert sorted(texts_of(info, tokenizer)) == sorted(hostile)
    ids = [token for document in documents(info) for token in document[:-1]]
    assert max(ids) < VOCAB_SIZE - len(SPECIAL_TOKENS)


def test_nuls_are_stripped_and_empty_documents_dropped(
    job: SourceJob, tokenizer: Path, tmp_path: Path
):
    rows = [{"text": text} for text in ("a\x00b", "", " \n", "\x00", "half \ud83d", "last")]
    write_jsonl(job.read.path, rows)
    info = tokenize_source(job, tokenizer, tmp_path)
    assert sorted(texts_of(info, tokenizer)) == ["ab", "half ?", "last"]
    assert info.bytes == len("abhalf ?last")


def test_slices_are_disjoint_and_held_out_documents_are_never_written(
    job: SourceJob, tokenizer: Path, tmp_path: Path
):
    bounds = [(0.0, 0.3), (0.3, 0.75), (0.75, 1.0)]
    jobs = [replace(job, slice=bound, held_out_fraction=0.2) for bound in bounds]
    parts = [texts_of(tokenize_source(part, tokenizer, tmp_path), tokenizer) for part in jobs]
    assert sorted(text for part in parts for text in part) == sorted(
        t for t in TEXTS if not is_held_out(t, 0.2)
    )
    assert 0 < sum(map(len, parts)) < len(TEXTS)
    for part, (start, stop) in zip(parts, bounds, strict=True):
        assert part and all(in_slice(text, start, stop) for text in part)


def test_a_large_vocabulary_takes_four_bytes(job: SourceJob, tokenizer: Path, tmp_path: Path):
    table = json.loads((tokenizer / "tokenizer.json").read_text("utf-8"))
    fill = {f"<|fill_{n}|>": n for n in range(len(table["model"]["vocab"]), 1 << 16)}
    table["model"]["vocab"] |= fill
    large = tmp_path / "large"
    large.mkdir()
    (large / "tokenizer.json").write_text(json.dumps(table), "utf-8")
    info = tokenize_source(job, large, tmp_path)
    assert info.token_bytes == 4
    assert sorted(texts_of(info, large)) == sorted(TEXTS)
    assert info.eos_id == (1 << 16) + 1 == documents(info)[0][-1]  # wraps in two bytes


@pytest.fixture
def hub_job(tmp_path: Path) -> SourceJob:
    """A dataset repository's layout (a card with two configs, parquet files) in a local folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tmp_path / "dataset"
    for part, rows in enumerate((TEXTS[:40], TEXTS[40:])):
        (root / "main").mkdir(parents=True, exist_ok=True)
        columns = {"question": rows, "answer": [f"A{part}"] * (len(rows) - 1) + [None], "n": rows}
        pq.write_table(pa.table(columns), root / "main" / f"train-{part}.parquet")
    pq.write_table(pa.table({"text": ["wrong config"]}), root / "other.parquet")
    card = "---\nconfigs:\n- config_name: main\n  data_files: main/*.parquet\n"
    card += "- config_name: other\n  data_files: other.parquet\n---\n"
    (root / "README.md").write_text(card)
    read = HubSplit(str(root), "main", "train", "abc", text_field=["question", "answer"])
    return SourceJob("finemath-qa", read, (0, 1), 0.0, 7)


def test_a_hub_dataset_streams_and_joins_its_fields_by_a_blank_line(
    hub_job: SourceJob, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    info = tokenize_source(hub_job, tokenizer, tmp_path)
    joined = [f"{text}\n\nA{n >= 40:d}" for n, text in enumerate(TEXTS)]
    joined[39], joined[-1] = TEXTS[39], TEXTS[-1]
    assert sorted(texts_of(info, tokenizer)) == sorted(joined)


def test_a_hub_failure_is_one_line_with_source_and_remedy(
    hub_job: SourceJob, tokenizer: Path, tmp_path: Path
):
    absent = replace(hub_job, read=replace(hub_job.read, split="absent"))
    field = replace(hub_job, read=replace(hub_job.read, text_field="absent"))
    for broken, what in ((absent, "absent"), (field, "no field 'absent'")):
        with pytest.raises(UserError, match=f"source finemath-qa: .*{what}.*sources.yaml") as error:
            tokenize_source(broken, tokenizer, tmp_path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="has no revision"):
        tokenize_source(
            replace(hub_job, read=replace(hub_job.read, revision=None)), tokenizer, tmp_path
        )
    assert list((tmp_path / "shards").glob("finemath*[!k]")) == []


def test_the_folder_depends_on_every_value_and_not_on_the_place(
    job: SourceJob, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = shard_folder(job, tokenizer, tmp_path)
    assert shard_folder(replace(job, slice=(0.0, 1.0)), tokenizer, tmp_path) == first
    moved = shutil.copy(job.read.path, tmp_path / "moved.jsonl.gz")
    assert shard_folder(replace(job, read=JsonlFile(moved)), tokenizer, tmp_path) == first
    changed = [
        replace(job, seed=8),
        replace(job, slice=(0, 0.5)),
        replace(job, held_out_fraction=0.1),
    ]
    changed.append(replace(job, name="other"))
    folders = {shard_folder(one, tokenizer, tmp_path) for one in changed}
    write_jsonl(job.read.path, [{"text": "changed"}])
    folders.add(shard_folder(job, tokenizer, tmp_path))
    other = Path(shutil.copytree(tokenizer, tmp_path / "other"))
    (other / "tokenizer.json").write_text("{}")
    folders.add(shard_folder(job, other, tmp_path))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "another")
    folders.add(shard_folder(job, tokenizer, tmp_path))
    assert len(folders | {first}) == 8


def test_a_shard_is_built_once(
    job: SourceJob, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    info = tokenize_source(job, tokenizer, tmp_path)
    monkeypatch.setattr(building, "build_unit", None)
    assert tokenize_source(job, tokenizer, tmp_path) == info
    assert tokenize_all([job, job], tokenizer, tmp_path, workers=2) == [info, info]


def test_processes_write_what_one_process_writes(job: SourceJob, tokenizer: Path, tmp_path: Path):
    jobs = [replace(job, name=f"s{n}", slice=(n / 3, (n + 1) / 3)) for n in range(3)]
    many = tokenize_all(jobs, tokenizer, tmp_path / "many", workers=2)
    one = tokenize_all(jobs, tokenizer, tmp_path / "one", workers=1)
    assert [info.name for info in many] == ["s0", "s1", "s2"]
    for a, b in zip(many, one, strict=True):
        assert documents(a) == documents(b) and a == replace(b, folder=a.folder)


def test_a_failure_in_a_process_arrives_as_it_is(job: SourceJob, tokenizer: Path, tmp_path: Path):
    jobs = [replace(job, name="empty", slice=(0, 1e-9)), job]
    with pytest.raises(UserError, match="source empty: no document is left"):
        tokenize_all(jobs, tokenizer, tmp_path, workers=2)


def until_the_end(folder: Path) -> None:
    """A job: a long one in `long`, that fails once the long one works in another."""
    if folder.name == "long":
        with folder_aside(folder) as aside:
            (aside / "working").touch()
            time.sleep(20)
    give_up = time.monotonic() + 20
    while not folder.with_name("long.partial").is_dir() and time.monotonic() < give_up:
        time.sleep(0.01)
    raise UserError("source b: cannot be read")


def test_a_failure_stops_the_sources_that_others_work_on(tmp_path: Path):
    """It was seen only when those before it had ended, which takes days at full size."""
    jobs = [tmp_path / name for name in ("long", "failing", "after")]
    with pytest.raises(UserError, match="source b"):
        run_in_processes(until_the_end, jobs, workers=2)
    assert list(tmp_path.iterdir()) == [], "neither ended nor left half-written"


def test_no_source_is_written_before_all_can_be_read(
    job: SourceJob, hub_job: SourceJob, tokenizer: Path, tmp_path: Path
):
    absent = replace(hub_job, read=replace(hub_job.read, split="absent", portion=(10**9, 10**9)))
    with pytest.raises(UserError, match=r"source finemath-qa: .*absent"):
        tokenize_all([job, absent], tokenizer, tmp_path, workers=1)
    assert not (tmp_path / "shards").exists()
    with pytest.raises(UserError, match=r"source finemath-qa: .*absent"):
        write_held_out(
            [("a", replace(job, held_out_fraction=1.0), 100), ("b", absent, 100)],
            tmp_path / "out",
            tmp_path,
        )
    assert not list(tmp_path.glob("out*"))


def test_all_sources_are_asked_at_once(job: SourceJob, monkeypatch: pytest.MonkeyPatch):
    """One that does not answer keeps no other's failure back."""
    given_up, ended = threading.Event(), list[str]()

    def check(job: SourceJob):
        if job.name == "slow":
            given_up.wait(5)
            ended.append(job.name)
            return
        raise UserError(f"source {job.name}: needs a licence")

    monkeypatch.setattr(sources, "_check", check)
    hub = replace(job, read=HubSplit("a/b", None, "train", "abc"))
    slow = [replace(hub, name="slow")] * 3
    with pytest.raises(UserError, match="source gated: needs a licence"):
        check_readable([*slow, replace(hub, name="gated")])
    assert not ended
    given_up.set()


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(UserError, match=r"a worker process died on one of 2 jobs.*kept") as error:
        run_in_processes(os._exit, [1, 1], workers=2)
    assert "\n" not in str(error.value)


def test_nothing_is_printed(
    job: SourceJob, tokenizer: Path, tmp_path: Path, capfd: pytest.CaptureFixture
):
    tokenize_source(job, tokenizer, tmp_path)
    with pytest.raises(UserError):
        tokenize_source(replace(job, slice=(0, 1e-9)), tokenizer, tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("call", [0, 5, 90])
def test_a_full_disk_leaves_no_folder(
    job: SourceJob,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: int,
):
    from datatrove.pipeline.tokens.tokenizer import TokenizedFile

    write, calls = TokenizedFile.write_bytes, iter(range(10_000))

    def full(self, *args, **kwargs):
        if next(calls) == call:  # 90: while the documents are copied in their shuffled order
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *args, **kwargs)

    monkeypatch.setattr(TokenizedFile, "write_bytes", full)
    with pytest.raises(
        UserError, match=r"source fineweb-edu: no space left .*/shards/.*free"
    ) as error:
        tokenize_source(job, tokenizer, tmp_path)
    assert "\n" not in str(error.value)
    assert [path for path in (tmp_path / "shards").iterdir() if path.is_dir()] == []
    monkeypatch.undo()
    assert tokenize_source(job, tokenizer, tmp_path).documents == len(TEXTS)


@pytest.mark.parametrize(
    "content",
    [
        b'{"text": "a"}\n{"text": "b',
        b'{"txt": "a"}\n',
        b'{"text": 1}\n',
        b'{"text": "\xff"}\n',
        b"[1]\n",
    ],
)
def test_a_broken_line_is_refused_not_skipped(
    job: SourceJob, tokenizer: Path, tmp_path: Path, content: bytes
):
    path = job.read.path
    path.write_bytes(gzip.compress(content))
    with pytest.raises(UserError, match=f"source fineweb-edu: .*{path.name}, line") as error:
        tokenize_source(job, tokenizer, tmp_path)
    assert "\n" not in str(error.value)


def test_a_truncated_or_missing_input_is_refused(job: SourceJob, tokenizer: Path, tmp_path: Path):
    path = job.read.path
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=f"source fineweb-edu: .*{path.name}"):
        tokenize_source(job, tokenizer, tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=f"source fineweb-edu: .*{path.name} cannot be read"):
        tokenize_source(job, tokenizer, tmp_path)


def damage_eos(folder: Path) -> None:
    shard = next(folder.glob("*.ds"))
    tokens = np.fromfile(shard, np.uint16)
    tokens[-1] = 5
    tokens.tofile(shard)


def damage_index(folder: Path) -> None:
    index = next(folder.glob("*.index"))
    ends = np.fromfile(index, np.uint64)
    ends[[3, 4]] = ends[[4, 3]]
    ends.tofile(index)


def truncate(pattern: str, size: int):
    def damage(folder: Path) -> None:
        path = next(folder.glob(pattern))
        path.write_bytes(path.read_bytes()[:size])

    return damage


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda folder: next(folder.glob("*.ds")).unlink(), r"\.ds: the file is missing"),
        (lambda folder: next(folder.glob("*.index")).unlink(), r"\.index: the file is missing"),
        (lambda folder: (folder / "info.json").unlink(), r"info\.json: no such file"),
        (truncate("info.json", 9), r"info\.json: not JSON"),
        (truncate("*.ds", -2), r"\.ds: \d+ bytes, the index says \d+"),
        (truncate("*.index", -3), r"\.index: \d+ bytes are no list"),
        (truncate("*.index", 0), r"\.index: 0 bytes are no list"),
        (truncate("*.index", -8), r"\.ds: \d+ bytes, the index says"),
        (damage_index, r"\.index: the document ends do not increase"),
        (damage_eos, r"\.ds: document 80 ends in token 5, not in EOS"),
        (
            lambda folder: [path.unlink() for path in folder.glob("*.ds*")],
            "0 tokens in 0 documents",
        ),
    ],
)
def test_a_damaged_shard_is_named(
    job: SourceJob, tokenizer: Path, tmp_path: Path, damage, what: str
):
    folder = tokenize_source(job, tokenizer, tmp_path).folder
    check_shards(folder, EOS_ID)
    damage(folder)
    with pytest.raises(
        UserError, match=f"^source fineweb-edu: .*{what}.*make data-stage1"
    ) as error:
        check_shards(folder, EOS_ID)
    assert "\n" not in str(error.value)


def test_shards_of_another_tokenizer_are_refused(job: SourceJob, tokenizer: Path, tmp_path: Path):
    folder = tokenize_source(job, tokenizer, tmp_path).folder
    with pytest.raises(UserError, match=f"EOS id is {EOS_ID}, wanted 128001"):
        check_shards(folder, 128001)
