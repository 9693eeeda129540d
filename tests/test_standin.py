"""The embedded corpus: stable splits, reproducible bytes, nothing half-written, honest rows."""

import gzip
import importlib.metadata
import json
import zipfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from datatrove_pipelines.held_out import document_fraction, in_slice, is_held_out
from datatrove_pipelines.standins import corpus as module
from datatrove_pipelines.standins import readers
from datatrove_pipelines.standins.corpus import CATEGORIES, StandIn, build, fetch
from ground.errors import UserError
from launch.recipe.tables import load_standins
from launch.stages.sources import slices, stand_in_values

RECIPES = Path(__file__).parent.parent / "recipes"
ROWS = yaml.safe_load((RECIPES / "standins.yaml").read_text(encoding="utf-8"))["standins"]
TEXTS = [f"document number {i}" for i in range(4000)]


def stand_in(**changes) -> StandIn:
    """A row on a package that no index has; tests put its archive in place."""
    row = StandIn(
        name="fake",
        category="code",
        language="C",
        licence="none",
        provenance="Made by this test.",
        reader="whole_files",
        files={"fake-pack": ["src/*"]},
        packages=("fake-pack==1.0",),
    )
    return replace(row, **changes)


def put_wheel(cache: Path, files: dict[str, str], version: str = "1.0") -> None:
    (cache / "downloads").mkdir(parents=True, exist_ok=True)
    wheel = cache / "downloads" / f"Fake_Pack-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def rows_of(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_slices_are_disjoint_and_cover_everything():
    slices = [(0.0, 0.3), (0.3, 0.75), (0.75, 1.0)]
    for text in TEXTS:
        assert sum(in_slice(text, *part) for part in slices) == 1


def test_fractions_are_uniform_and_never_change():
    fractions = [document_fraction(text) for text in TEXTS]
    assert 0.48 < sum(fractions) / len(fractions) < 0.52
    # Frozen: another value would move documents between training and held-out text.
    assert document_fraction("a") == pytest.approx(0.9227099936131222, abs=1e-15)


def test_held_out_share_is_the_same_in_every_slice():
    for start in (0.0, 0.25, 0.5, 0.75):
        part = [text for text in TEXTS if in_slice(text, start, start + 0.25)]
        share = sum(is_held_out(text, 0.1) for text in part) / len(part)
        assert 0.06 < share < 0.14


def test_a_larger_held_out_share_contains_the_smaller():
    assert all(is_held_out(text, 0.2) for text in TEXTS if is_held_out(text, 0.05))


def test_building_twice_gives_the_same_bytes(tmp_path):
    contents = []
    for cache in (tmp_path / "a", tmp_path / "b"):
        put_wheel(cache, {f"src/{i}.c": f"int f{i};\n" * 60 for i in range(9)})
        contents.append(build(stand_in(), cache).read_bytes())
    assert contents[0] == contents[1]
    assert contents[0][4:8] == bytes(4)  # gzip's clock: two builds in one second would hide it


def test_an_existing_file_is_returned_without_reading_its_sources(tmp_path):
    put_wheel(tmp_path, {"src/a.c": "int a;\n" * 60})
    path = build(stand_in(), tmp_path)
    (tmp_path / "downloads" / "Fake_Pack-1.0-py3-none-any.whl").unlink()
    assert build(stand_in(), tmp_path) == path


def test_a_changed_row_is_another_file(tmp_path):
    put_wheel(tmp_path, {"src/a.c": "int a;\n" * 60})
    assert build(stand_in(), tmp_path) != build(stand_in(max_bytes=1000), tmp_path)


def test_documents_are_clean_distinct_and_not_too_short(tmp_path):
    long = "caf\u0065\u0301\x00 au lait\r\n" * 30
    put_wheel(tmp_path, {"src/a": long, "src/b": long, "src/c": "short", "other/d": "x" * 300})
    (row,) = rows_of(build(stand_in(), tmp_path))
    assert row == {"id": "fake/0", "text": ("caf\u00e9 au lait\n" * 30).strip()}


def test_the_size_cap_keeps_a_sample_of_all_files(tmp_path):
    put_wheel(tmp_path, {f"src/{i:03}": f"{i:03} " * 100 for i in range(200)})
    kept = [int(row["text"][:3]) for row in rows_of(build(stand_in(max_bytes=20_000), tmp_path))]
    assert 40 <= len(kept) <= 50
    assert kept == sorted(kept)
    assert max(kept) > 150


@pytest.mark.parametrize("step", ["gzip.GzipFile.write", "os.replace"])
def test_a_failure_leaves_no_file_behind(tmp_path, monkeypatch, step):
    put_wheel(tmp_path, {"src/a.c": "int a;\n" * 60})

    def fail(*_args, **_kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(step, fail)
    with pytest.raises(OSError, match="no space"):
        build(stand_in(), tmp_path)
    assert list((tmp_path / "standin").iterdir()) == []


def fake_pip(monkeypatch, returncode: int, stderr: str) -> None:
    def run(command, **_options):
        folder = Path(command[command.index("--dest") + 1])
        (folder / "half-1.0-py3-none-any.whl").write_bytes(b"half")
        return module.subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(module.subprocess, "run", run)


def test_a_failed_download_says_what_to_do_and_leaves_nothing(tmp_path, monkeypatch):
    fake_pip(monkeypatch, 1, "Looking\nERROR: No matching distribution\n[notice] new pip\n")
    with pytest.raises(UserError) as error:
        build(stand_in(), tmp_path)
    message = str(error.value)
    assert message == (
        "stand-in 'fake': pip could not fetch fake-pack==1.0: ERROR: No matching distribution; "
        "check the package index, then run again"
    )
    assert list((tmp_path / "downloads").iterdir()) == []


def test_what_is_there_is_not_fetched_again(tmp_path, monkeypatch):
    put_wheel(tmp_path, {"src/a": "a"})
    monkeypatch.setattr(module.subprocess, "run", None)
    assert fetch(["fake.pack==1.0"], tmp_path) == tmp_path / "downloads"
    with pytest.raises(TypeError):  # another version is another archive
        fetch(["fake.pack==2.0"], tmp_path)


def test_another_version_of_an_installed_package_is_refused(tmp_path):
    row = stand_in(packages=(), installed=("pyyaml==0.1",), files={"pyyaml": ["yaml/*.py"]})
    with pytest.raises(UserError, match=r"'fake': pyyaml is .* wants pyyaml==0.1; install"):
        build(row, tmp_path)


@pytest.mark.parametrize(("key", "value"), [("reader", "nosuch"), ("category", "web")])
def test_unknown_readers_and_categories_are_refused(tmp_path, key, value):
    with pytest.raises(UserError, match=f"{key} '{value}' is unknown; use one of"):
        build(stand_in(**{key: value}), tmp_path)


def test_a_row_that_finds_nothing_is_an_error(tmp_path):
    put_wheel(tmp_path, {"src/a": "short"})
    with pytest.raises(UserError, match="'fake': no document in fake-pack; check `files`"):
        build(stand_in(), tmp_path)


def test_the_standard_library_gives_documents(tmp_path):
    row = stand_in(files={"stdlib": ["json/*.py"]}, packages=())
    texts = [row["text"] for row in rows_of(build(row, tmp_path))]
    assert any("class JSONDecoder" in text for text in texts)
    assert all(200 <= len(text) <= 8000 for text in texts)


def test_boolq_drops_every_article_of_the_dev_set():
    dev = [{"question": "q1", "title": "Moon", "answer": "True", "passage": "It orbits."}]
    combined = [
        {"question": "q1", "passage": "Moon -- It orbits."},
        {"question": "q2", "passage": "Moon -- Another passage of the article."},
        {"question": "q3", "passage": "Luna -- It orbits."},
        {"question": "q4", "passage": "Sun -- It shines."},
        {"question": "q1", "passage": "Satellite -- Same question, other words."},
    ]
    files = [
        ("x/combined.jsonl", "\n".join(map(json.dumps, combined))),
        ("x/dev.jsonl", "\n".join(map(json.dumps, dev))),
    ]
    assert list(readers.boolq_passages(files)) == ["Sun\n\nIt shines."]


def test_quac_answers_are_the_first_span_alone():
    row = {
        "passage": "In May 1983, she married Nikos, I read, a Composer.",
        "question": "question1: when?\nquestion2: why?",
        "answer": "possible answers for question1:\nIn May 1983, she married Nikos, In May 1983\n"
        "possible answers for question2:\nCANNOTANSWER CANNOTANSWER",
    }
    (text,) = readers.quac_dialogues([("t", json.dumps(row))])
    assert "Question: when?\nAnswer: In May 1983, she married Nikos\n" in text
    assert text.endswith("Question: why?\nAnswer: The passage does not say.")


def test_catalogues_give_translations_and_neither_source_nor_guesses():
    po = 'msgid ""\nmsgstr "Language: fr"\n\nmsgid "Yes"\nmsgstr "O"\n"ui"\n\n'
    po += (
        '#, fuzzy\nmsgid "No"\nmsgstr "Nu"\n\nmsgid "%d day"\nmsgstr[0] "jour"\nmsgstr[1] "jours"\n'
    )
    catalogue = {"": {"language": "fr"}, "Open": ["Ouvrir"], "Same": ["Same"], "Empty": [""]}
    files = [("a.po", po), ("b.json", json.dumps(catalogue))]
    assert list(readers.message_catalogues(files)) == ["Oui\njour\njours", "Ouvrir"]


def test_code_readers_agree_with_the_source_they_read():
    source = (
        'def double(x):\n    """Twice the number that is given.\n\n    >>> double(2)\n    4\n    """\n'
        "    # gh-1234: no loop\n    return 2 * x\n"
    )
    files = [("pack/m.py", source)]
    (question,) = readers.doctest_questions(files)
    assert question == "About pack.m.double.\nQuestion: What is\n\ndouble(2)\n\nAnswer: 4\n"
    (script,) = readers.doctest_scripts(files)
    assert script.endswith("double(2)\n# > 4\n")
    (task,) = readers.instructions(files)
    assert "```python\ndef double(x):\n    # gh-1234: no loop\n    return 2 * x\n```" in task
    files[0] = ("pack/m.py", source + "\n\ndef other():\n    return 0\n")
    (block,) = readers.functions(files, mentions="gh-[0-9]+")
    assert "def double" in block
    assert "def other" not in block
    assert list(readers.functions(files, mentions="issue")) == []


def test_packing_loses_no_line_and_respects_the_limit():
    parts = [f"line {i} " * (i % 40 + 1) for i in range(300)]
    documents = list(readers.pack(parts, "\n", 200))
    assert max(map(len, documents)) <= 200
    assert " ".join(documents).split() == " ".join(parts).split()


def test_a_licence_header_is_dropped_and_another_comment_kept():
    licensed, plain = "/* Copyright X */\nint a;", "/* A queue. */\nint b;"
    assert list(readers.whole_files([("a", licensed), ("b", plain)])) == ["\nint a;", plain]


@pytest.mark.parametrize("name", ROWS)
def test_rows_state_licence_provenance_and_what_exists(name):
    row = StandIn(name=name, **stand_in_values(load_standins()[name]))
    assert row.licence
    assert row.provenance.endswith(".")
    assert row.reader in readers.READERS
    assert row.category in CATEGORIES
    pinned = {module._normal(pin.split("==")[0]) for pin in (*row.packages, *row.installed)}
    assert {module._normal(package) for package in row.files} - {"stdlib"} == pinned
    assert all(pin.count("==") == 1 for pin in (*row.packages, *row.installed))


@pytest.mark.parametrize("name", [name for name in ROWS if "shared_by" in ROWS[name]])
def test_a_shared_stand_in_is_split_between_its_sources_and_read_whole(name):
    shares = load_standins()[name].shared_by
    parts = sorted(slices(shares).values())
    assert parts[0][0] == 0 and parts[-1][1] == 1
    assert all(before[1] == after[0] for before, after in pairwise(parts))
    total = sum(shares.values())
    for source, (start, stop) in slices(shares).items():
        assert stop - start == pytest.approx(shares[source] / total)


def test_one_package_has_one_version_in_all_rows():
    pins = {pin for row in ROWS.values() for pin in row.get("packages", [])}
    assert len({pin.split("==")[0] for pin in pins}) == len(pins)


def test_installed_pins_are_what_the_project_installs():
    pins = {pin for row in ROWS.values() for pin in row.get("installed", [])}
    for name, version in (pin.split("==") for pin in pins):
        assert importlib.metadata.version(name).partition("+")[0] == version


def test_every_category_and_all_rows_of_the_languages_are_there():
    assert {row["category"] for row in ROWS.values()} == set(CATEGORIES)
    languages = {r["language"] for r in ROWS.values() if r["category"] == "web-multilingual"}
    wanted = "fra spa deu ita por cmn rus arb fas jpn kor hin tha vie ell multi"
    assert languages == set(wanted.split())
