"""Text of the user's own: every kind of file is read, nothing is skipped in silence or trained on twice."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tokenize import TEXTS, VOCAB_SIZE, texts_of

from datatrove_pipelines import text_files as module
from datatrove_pipelines.building import tokenize_all, tokenize_source
from datatrove_pipelines.duplicates import SeenTexts
from datatrove_pipelines.held_out import held_out_texts, is_held_out
from datatrove_pipelines.shards import INFO_FILE, check_shards, shard_folder
from datatrove_pipelines.sources import JsonlFile, OwnText, SourceJob, read_documents
from datatrove_pipelines.text_files import KNOWN, fingerprint, other_files
from datatrove_pipelines.tokenizer import train_bpe
from ground.errors import UserError

SCRIPTS = ["東京は日本の首都です。", "नमस्ते दुनिया", "สวัสดีชาวโลก", "Γειά σου Κόσμε", "مرحبا بالعالم"]  # noqa: RUF001


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_bpe(TEXTS, VOCAB_SIZE, folder)
    return folder


def put(file: Path, content: bytes | str | list[object]) -> Path:
    """Write bytes, a text, or rows as the file's name says; .gz is packed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet" and isinstance(content, list):
        pq.write_table(pa.Table.from_pylist(content), file)
        return file
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    data = content.encode() if isinstance(content, str) else content
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


def own(path: Path, field: str | list[str] = "text", fraction: float = 0.0) -> SourceJob:
    clean = ("duplicates",)
    return SourceJob("mine", OwnText(path, field), (0, 1), fraction, seed=3, clean=clean)


def refusal(job: SourceJob, tokenizer: Path, cache: Path) -> str:
    """The one line that a source is refused with; no shard is left."""
    with pytest.raises(UserError) as error:
        tokenize_source(job, tokenizer, cache)
    assert not list((cache / "shards").glob("mine*[!k]"))
    assert "\n" not in str(error.value) and str(error.value).startswith("source mine: ")
    return str(error.value)


# ---- what is read


def test_every_kind_of_file_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    rows: list[object] = [{"text": "one"}, {"text": None}, {"text": "two"}]
    for kind in KNOWN:
        is_table = "json" in kind or kind == ".parquet"
        put(tmp_path / "text" / f"b{kind}", rows if is_table else "one\r\n\r\ntwo\n")
    put(tmp_path / "text/a/deep/x.TXT", "first")
    put(tmp_path / "text/z.pdf", b"\xff")
    put(tmp_path / "text/.git/x.txt", "hidden")
    put(tmp_path / "text/.x.txt", "hidden")
    (tmp_path / "elsewhere").mkdir()
    put(tmp_path / "elsewhere/x.txt", "linked")
    (tmp_path / "text/c").symlink_to(tmp_path / "elsewhere")
    assert other_files(tmp_path / "text") == {".pdf": 1}
    assert not other_files(tmp_path / "text/a/deep/x.TXT")
    documents = list(read_documents(own(tmp_path / "text")))
    names = ["a/deep/x.TXT", *sorted(f"b{kind}" for kind in KNOWN), "c/x.txt"]
    assert list(dict.fromkeys(document.id.rpartition("/")[0] for document in documents)) == names
    texts = [document.text for document in documents]
    assert (texts[0], texts[-1]) == ("first", "linked")
    assert texts.count("one\n\ntwo") == 4
    assert [texts.count(text) for text in ("one", "two", "")] == [4, 4, 4]


def test_a_single_file_is_a_source(tmp_path: Path) -> None:
    file = put(tmp_path / "x.jsonl", '{"text": "one"}\n\n\ufeff{"text": "two"}')
    assert [document.text for document in read_documents(own(file))] == ["one", "two"]


@pytest.mark.parametrize("kind", [".jsonl.gz", ".parquet"])
def test_several_fields_are_joined_by_a_blank_line(tmp_path: Path, kind: str) -> None:
    rows: list[object] = [{"q": "why", "n": 1, "a": "so"}, {"q": "how", "n": 2, "a": None}]
    file = put(tmp_path / f"x{kind}", rows)
    texts = [document.text for document in read_documents(own(file, ["q", "a"]))]
    assert texts == ["why\n\nso", "how"]


def test_any_script_returns_from_the_shard_as_it_was(tokenizer: Path, tmp_path: Path) -> None:
    for number, text in enumerate(SCRIPTS):
        put(tmp_path / f"text/{number}.txt", f"\ufeff {text}\n")
    jobs = [own(tmp_path / "text"), own(put(tmp_path / "x.md", "# one"))]
    info, other = tokenize_all(jobs, tokenizer, tmp_path / "cache", workers=2)
    assert sorted(texts_of(info, tokenizer)) == sorted(SCRIPTS)
    assert texts_of(other, tokenizer) == ["# one"]


# ---- what is refused


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"text": "b', "not JSON at character 11 ("),
        (
            b'{"txt": "a"}',
            r"no field 'text' among ['txt']: name the column in the source's text_field",
        ),
        (b'{"text": 1}', "field 'text' holds int, not text"),
        (b'{"text": "\xff"}', "invalid start byte"),
        (b"[1]", "list where an object is wanted"),
    ],
)
@pytest.mark.parametrize("kind", [".jsonl", ".json.gz"])
def test_a_broken_line_is_named(
    tokenizer: Path, tmp_path: Path, line: bytes, what: str, kind: str
) -> None:
    file = put(tmp_path / f"text/x{kind}", b'{"text": "a"}\n\n' + line + b'\n{"text": "c"}\n')
    message = refusal(own(tmp_path / "text"), tokenizer, tmp_path)
    assert f"{file}, line 3: " in message and what in message
    assert message.endswith("; correct it, or take the file out of the source")


def test_a_text_that_is_not_utf_8_is_named_with_its_line(tokenizer: Path, tmp_path: Path) -> None:
    file = put(tmp_path / "text/x.txt", b"one\ntwo\ncaf\xe9\n")
    message = refusal(own(tmp_path / "text"), tokenizer, tmp_path)
    assert f"{file}: not UTF-8 in line 3" in message and "take the file out" in message


def test_a_file_that_is_cut_off_is_named(tokenizer: Path, tmp_path: Path) -> None:
    rows: list[object] = [{"text": "some text"}] * 50
    for kind in (".jsonl.gz", ".txt.gz", ".parquet"):
        file = put(tmp_path / kind[1:] / f"x{kind}", rows)
        file.write_bytes(file.read_bytes()[:-20])
        message = refusal(own(file.parent), tokenizer, tmp_path)
        assert str(file) in message and "take the file out" in message


def test_a_column_that_a_table_lacks_is_named(tokenizer: Path, tmp_path: Path) -> None:
    file = put(tmp_path / "x.parquet", [{"title": "a", "n": 1}])
    assert "no field 'text' among ['n', 'title']" in refusal(own(file), tokenizer, tmp_path)
    message = refusal(own(file, "n"), tokenizer, tmp_path)
    assert f"{file}, row 1: field 'n' holds int" in message


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_a_document_that_no_memory_holds_is_named(
    tokenizer: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_ROW_BYTES", 50_000)
    rows, file = [{"text": "short"}, {"text": "long " * 12_000}], tmp_path / f"text/x.{kind}"
    if kind == "parquet":
        put(file, ""), pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        put(file, "".join(json.dumps(row) + "\n" for row in rows))
    message = refusal(own(tmp_path / "text"), tokenizer, tmp_path)
    assert f"x.{kind}, " in message and "more than 50,000 bytes in one document; correct" in message
    assert kind == "txt" or f"{'row' if kind == 'parquet' else 'line'} 2: " in message


@pytest.mark.parametrize(
    ("fill", "what"),
    [
        (lambda folder: None, "no such file or folder; correct the source's path"),
        (lambda folder: folder.mkdir(), "no file in it; known: .jsonl, "),
        (lambda folder: put(folder / "x.pdf", "x"), "none of its 1 files holds text; known: "),
        (lambda folder: put(folder / "x.jsonl.zst", "x"), "unknown compression; pack it with gzip"),
        (lambda folder: put(folder / "x.txt", " \n"), "no document is left (1 empty, "),
    ],
)
def test_a_source_without_text_is_refused(
    tokenizer: Path, tmp_path: Path, fill: Callable[[Path], None], what: str
) -> None:
    fill(tmp_path / "text")
    assert what in refusal(own(tmp_path / "text"), tokenizer, tmp_path)


def test_a_dangling_link_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    put(tmp_path / "text/a.txt", "a")
    (tmp_path / "text/b.txt").symlink_to(tmp_path / "absent")
    assert "b.txt: No such file" in refusal(own(tmp_path / "text"), tokenizer, tmp_path)


# ---- duplicates and held-out documents


def test_duplicates_are_dropped_and_counted(tokenizer: Path, tmp_path: Path) -> None:
    put(tmp_path / "text/a.txt", TEXTS[0])
    put(tmp_path / "text/b.txt", f"\n {TEXTS[0]}\x00 \n")
    rows: list[object] = [{"text": text} for text in (TEXTS[0], TEXTS[1], TEXTS[1], " ", "", "x")]
    put(tmp_path / "text/c.jsonl", rows)
    info = tokenize_source(own(tmp_path / "text"), tokenizer, tmp_path)
    assert sorted(texts_of(info, tokenizer)) == sorted([TEXTS[0], TEXTS[1], "x"])
    reasons = {"empty": 2, "duplicates": 3, "held_out": 0, "outside_slice": 0, "overlong": 0}
    assert (info.documents, info.left_out) == (3, reasons)
    assert json.loads((info.folder / INFO_FILE).read_text())["left_out"] == reasons


def test_other_sources_keep_their_duplicates(tokenizer: Path, tmp_path: Path) -> None:
    file = put(tmp_path / "x.jsonl", [{"text": "one"}, {"text": "one"}])
    info = tokenize_source(SourceJob("mine", JsonlFile(file)), tokenizer, tmp_path)
    assert info.documents == 2 and "duplicates" not in info.left_out


def test_a_document_that_equals_a_held_out_one_is_never_trained_on(
    tokenizer: Path, tmp_path: Path
) -> None:
    forms = ("{}", "\n{}", "{} \n", "\x00{}", "\t{}\x00\n")
    rows: list[object] = [{"text": form.format(text)} for form in forms for text in TEXTS]
    put(tmp_path / "text/x.jsonl.gz", rows)
    job = own(tmp_path / "text", fraction=0.3)
    info = tokenize_source(job, tokenizer, tmp_path)
    held_out = held_out_texts(job, 1 << 20, tmp_path)
    assert sorted(held_out) == sorted(text for text in TEXTS if is_held_out(text, 0.3))
    assert sorted(held_out + texts_of(info, tokenizer)) == sorted(TEXTS)
    assert info.left_out["held_out"] == len(held_out)


@given(st.lists(st.text("ab ", max_size=4)))
def test_a_text_is_seen_once(texts: list[str]) -> None:
    seen, known = SeenTexts(), set()
    for text in texts:
        assert seen.has(text) == (text.strip() in known)
        known.add(text.strip())


def test_seen_texts_take_24_bytes_each_at_most() -> None:
    seen = SeenTexts()
    assert not any(seen.has(str(number)) for number in range(20_000))
    assert all(seen.has(str(number)) for number in range(20_000))
    assert seen._slots.itemsize * len(seen._slots) <= 24 * 20_000


# ---- what a shard is named by


def test_the_fingerprint_is_of_names_and_contents_wherever_they_lie(tmp_path: Path) -> None:
    def print_of(where: str, **files: str) -> str:
        for name, content in files.items():
            put(tmp_path / where / f"{name}.txt", content)
        return fingerprint(tmp_path / where, tmp_path / "cache")

    first = print_of("a", x="one", y="two")
    assert print_of("b", x="one", y="two") == first
    put(tmp_path / "b/y.pdf", "not read")
    assert print_of("b") == first
    others = {
        print_of("c", x="two", y="one"),
        print_of("d", x="one"),
        print_of("e", x="one", z="two"),
        print_of("a", y="owt"),  # the same size
    }
    assert len({first, *others}) == 5


def test_files_that_are_all_empty_have_no_fingerprint(tmp_path: Path) -> None:
    put(tmp_path / "text/a.txt", ""), put(tmp_path / "text/b.jsonl", "")
    with pytest.raises(UserError, match=r"/text: empty; name files that hold text$"):
        fingerprint(tmp_path / "text", tmp_path / "cache")
    put(tmp_path / "text/c.md", "one")
    assert fingerprint(tmp_path / "text", tmp_path / "cache")


def test_a_second_run_reads_only_what_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "text/a.txt", "one"), put(tmp_path / "text/b.txt", "two")
    first = fingerprint(tmp_path / "text", tmp_path / "cache")
    digest, read = module.digest, []
    monkeypatch.setattr(
        module, "digest", lambda file, size: read.append(file.name) or digest(file, size)
    )
    assert fingerprint(tmp_path / "text", tmp_path / "cache") == first
    assert read == []
    put(tmp_path / "text/b.txt", "three")
    assert fingerprint(tmp_path / "text", tmp_path / "cache") != first
    assert read == ["b.txt"]
    assert fingerprint(tmp_path / "text", tmp_path / "other") and len(read) == 3


def test_a_shard_is_named_by_the_text_and_its_field(tokenizer: Path, tmp_path: Path) -> None:
    file = put(tmp_path / "text/x.jsonl", [{"text": "one", "title": "two"}])
    jobs = [own(file), own(file.parent), own(file, "title"), own(file, fraction=0.5)]
    folders = [shard_folder(job, tokenizer, tmp_path) for job in jobs]
    assert folders[0] == folders[1] and len(set(folders)) == 3


def test_a_shard_from_before_counts_is_still_read(tokenizer: Path, tmp_path: Path) -> None:
    info = tokenize_source(own(put(tmp_path / "x.txt", "one")), tokenizer, tmp_path)
    values = json.loads((info.folder / INFO_FILE).read_text())
    del values["left_out"]
    (info.folder / INFO_FILE).write_text(json.dumps(values))
    assert check_shards(info.folder, info.eos_id).left_out == {}
