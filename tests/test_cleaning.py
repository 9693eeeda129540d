"""Cleaning: what is planted is gone and counted, what is good stays."""

import argparse
import decimal
import email.message
import inspect
import json
import logging
import socket
import statistics
import subprocess
import tarfile
import typing
import unittest
import zipfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from datatrove.pipeline.dedup import MinhashDedupSignature

from datatrove_pipelines.cleaning import language as language_module
from datatrove_pipelines.cleaning import near_duplicates
from datatrove_pipelines.cleaning.language import CODES, is_other_language, language_model
from datatrove_pipelines.cleaning.steps import STEPS, check_steps, filters, of_own_text
from datatrove_pipelines.cleaning.thresholds import thresholds
from datatrove_pipelines.cleaning.words import WORDS
from datatrove_pipelines.counts import Counts
from datatrove_pipelines.sources import OwnText, SourceJob
from ground.errors import UserError
from launch.recipe.tables import CleaningStep, SourceRow
from launch.stages.cleaning import cleaning_of
from launch.tools.train_quality import train_quality

PROSE = {
    "eng": "The people of the valley have always lived with the river, and that is not to be changed now.",
    "fra": "Les habitants de la vallée ont toujours vécu avec la rivière, et ce n'est pas près de changer.",
    "spa": "Los habitantes del valle siempre han vivido con el río, y eso no va a cambiar ahora.",
    "deu": "Die Menschen im Tal haben immer mit dem Fluss gelebt, und daran wird sich nichts ändern.",
    "ita": "Gli abitanti della valle hanno sempre vissuto con il fiume, e questo non cambierà adesso.",
    "por": "Os habitantes do vale sempre viveram com o rio, e isso não vai mudar agora.",
    "cmn": "山谷里的人们一直与河流生活在一起，这一点现在也不会改变。",  # noqa: RUF001
    "rus": "Люди долины всегда жили у реки, и теперь это уже не изменится.",  # noqa: RUF001
    "fas": "مردم دره همیشه با رودخانه زندگی کرده‌اند و این اکنون تغییر نخواهد کرد.",
    "arb": "لقد عاش سكان الوادي دائمًا مع النهر، ولن يتغير ذلك الآن.",
    "jpn": "谷の人々はいつも川とともに暮らしてきたが、それは今も変わらない。",
    "kor": "골짜기 사람들은 언제나 강과 함께 살아왔고, 그것은 지금도 변하지 않을 것이다.",
    "hin": "घाटी के लोग हमेशा नदी के साथ रहे हैं, और अब यह बदलने वाला नहीं है।",
    "tha": "ชาวหุบเขาอาศัยอยู่กับแม่น้ำมาโดยตลอด และสิ่งนี้จะไม่เปลี่ยนแปลงในตอนนี้",
    "vie": "Người dân trong thung lũng luôn sống cùng con sông, và điều đó sẽ không thay đổi bây giờ.",
    "ell": "Οι άνθρωποι της κοιλάδας ζούσαν πάντα με το ποτάμι, και αυτό δεν θα αλλάξει τώρα.",  # noqa: RUF001
}


MODULES = (
    argparse,
    decimal,
    email.message,
    logging,
    socket,
    statistics,
    subprocess,
    tarfile,
    typing,
    unittest,
    zipfile,
)


@cache
def document_strings() -> list[str]:
    """Prose that people wrote: 200 docstrings of Python's library, of 200 to 2,000 characters."""
    found = dict[str, None]()
    for module in MODULES:
        classes = [thing for _, thing in inspect.getmembers(module, inspect.isclass)]
        for owner in (module, *classes):
            for _, thing in inspect.getmembers(owner):
                text = (inspect.getdoc(thing) or "").strip()
                if 200 <= len(text) <= 2000 and text.isascii():
                    found[text] = None
    return sorted(found)[:200]


def put(folder: Path, texts: list[str]) -> OwnText:
    folder.mkdir(parents=True)
    (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return OwnText(folder)


@pytest.mark.parametrize("language", CODES)
def test_a_language_is_told_from_the_others(language: str) -> None:
    is_other = is_other_language(language, None)
    assert [other for other, text in PROSE.items() if not is_other(text)] == [language]


@pytest.mark.parametrize(
    "text",
    ["Milk, eggs, bread.", "def f(x):\n    return x + 1", "17 x 3 = 51", "", "\x00", "¡Hola!"],
)
def test_what_is_surely_no_other_language_stays(text: str) -> None:
    assert not any(is_other_language(language, None)(text) for language in CODES)


def run_filters(texts: list[str], *clean: str, **values: object) -> tuple[list[str], Counts]:
    from datatrove.data import Document

    counts, job = Counts(), SourceJob("mine", OwnText(Path("x")), clean=clean, **values)  # type: ignore[arg-type]
    documents = (Document(text, str(number)) for number, text in enumerate(texts))
    for step in filters(job, counts):
        documents = step(documents)
    return [document.text for document in documents], counts


def test_fasttext_is_taken_where_its_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LID", raising=False)
    assert language_model(tmp_path) is None
    monkeypatch.setenv("LID", str(tmp_path / "x.bin"))
    with pytest.raises(
        UserError, match=r"^LID=.*x.bin: no such file; name fastText's lid.176.bin$"
    ):
        language_model(tmp_path)
    monkeypatch.delenv("LID")
    (tmp_path / "lid.176.ftz").write_bytes(b"")
    monkeypatch.setattr(language_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lid.176.ftz: fastText is not installed; pip install "):
        language_model(tmp_path)
    monkeypatch.setattr(language_module, "find_spec", lambda name: name == "fasttext")
    assert language_model(tmp_path) == tmp_path / "lid.176.ftz"


# ---- what each step drops

ARTICLE = """The bridge over the river was built in the spring of 1902, when the old ferry had become too small for the market.
It took four masons and their sons most of two summers, and the stones came from a quarry behind the mill.
People say that the first cart to cross it carried apples, and that its driver would not stop for anyone.
In later years the road was made wider, and a lamp was put on each side, so that nobody should fall into the water at night.
The town has kept the bridge as it was, with the exception of one arch that had to be rebuilt after the flood.
Children still meet there after school, and on market days you can hardly get from one end of it to the other."""
JUNK = {
    "gopher": ["Buy now!", "win big " * 80, "\n".join(f"- item {n}" for n in range(80))],
    "c4": [
        ARTICLE + "\nfunction () { return 1; }",
        "One short page. Of three sentences. And no more.",
    ],
    "fineweb": [ARTICLE.replace(".", "").replace("\n", "\n\n"), "\n".join([ARTICLE] * 3)],
}


@pytest.mark.parametrize("step", JUNK)
def test_a_filter_drops_junk_and_keeps_an_article(step: str) -> None:
    kept, counts = run_filters([*JUNK[step], ARTICLE], step, language="eng")
    assert kept == [ARTICLE]
    assert counts.left_out == {step: len(JUNK[step])}


def test_lines_that_c4_drops_are_a_change_that_is_counted() -> None:
    (kept,), counts = run_filters(
        [ARTICLE + "\nPlease enable Javascript in your browser."], "c4", language="eng"
    )
    assert kept == ARTICLE
    assert (counts.left_out, counts.changed) == ({"c4": 0}, {"c4": 1})


def test_every_language_of_the_recipe_has_thresholds() -> None:
    assert set(thresholds()) == set(CODES) - {"eng"}
    for language in thresholds():
        kept, counts = run_filters([PROSE[language][:40]], "gopher", language=language)
        assert (kept, counts.left_out) == ([], {"gopher": 1}), "fewer than 50 words"
        text = PROSE[language] * 3  # terminal marks, no line twice
        assert run_filters([text], "fineweb", language=language)[0] == [text]


# ---- near duplicates


def numbers(folder: Path, *sources: list[str]) -> list[list[int]]:
    from datatrove.data import Document

    from datatrove_pipelines.cleaning.near_duplicates import find_near_duplicates, write_signatures

    folders = [folder / str(number) for number in range(len(sources))]
    for target, texts in zip(folders, sources, strict=True):
        write_signatures([Document(text, "") for text in texts], target)
    return [found.tolist() for found in find_near_duplicates(folders)]


def nearly(text: str) -> str:
    """The text with its last words changed."""
    return text.rsplit(" ", 3)[0] + " and so on."


def test_the_earlier_of_near_duplicates_stays_within_and_across_sources(tmp_path: Path) -> None:
    first, second, third = [text for text in document_strings() if len(text) > 900][:3]
    assert numbers(tmp_path / "a", [first, second, nearly(first), third]) == [[2]]
    assert numbers(tmp_path / "b", [nearly(first), second], [third, first, nearly(second)]) == [
        [],
        [1, 2],
    ]
    assert numbers(tmp_path / "c", [], [first], [], [nearly(first)]) == [[], [], [], [0]]


def test_what_comes_later_changes_nothing(tmp_path: Path) -> None:
    texts = [form(text) for text in document_strings()[:40] for form in (str, nearly)]
    (whole,) = numbers(tmp_path / "whole", texts)
    (part,) = numbers(tmp_path / "part", texts[:30])
    assert part == [number for number in whole if number < 30]
    assert len(whole) > 20


def test_a_source_is_cut_into_files_and_found_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datatrove_pipelines.cleaning import near_duplicates

    texts = [*document_strings()[:15], *map(nearly, document_strings()[:15])]
    (whole,) = numbers(tmp_path / "whole", texts)
    monkeypatch.setattr(near_duplicates, "DOCUMENTS_A_FILE", 7)
    assert numbers(tmp_path / "cut", texts) == [whole]
    assert len(list((tmp_path / "cut/0").iterdir())) == 5


def test_a_long_document_has_datatroves_hashes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    signatures = near_duplicates.Signatures("unused", near_duplicates.CONFIG, language=WORDS)
    shingles = signatures.get_shingles(" ".join(f"word{n * n % 997}" for n in range(1100)))
    whole = MinhashDedupSignature.get_signature(signatures, shingles)
    sizes, ask = list[int](), MinhashDedupSignature.get_signature
    monkeypatch.setattr(near_duplicates, "NGRAMS_A_PART", 100)
    monkeypatch.setattr(
        MinhashDedupSignature,
        "get_signature",
        lambda self, part: [sizes.append(len(part)), ask(self, part)][1],
    )
    assert signatures.get_signature(shingles) == whole and max(sizes) == 100


def test_short_notes_and_tables_of_other_numbers_are_no_near_duplicates(tmp_path: Path) -> None:
    notes = [f"Call {name} about the boat, then feed the cat." for name in ("Ann", "Ben", "Cy")]
    tables = [" ".join(f"paid {n * k} to account {n + k}" for n in range(30)) for k in (3, 5, 7)]
    assert numbers(tmp_path, notes + tables + [nearly(tables[0])]) == [[6]]


def test_scripts_without_spaces_are_compared_by_characters(tmp_path: Path) -> None:
    assert WORDS.word_tokenize("東京 is big, नमस्ते") == ["東", "京", "is", "big", ",", "नमस्ते"]
    texts = [
        PROSE["jpn"] * 3 + PROSE["cmn"],
        PROSE["tha"] * 2,
        PROSE["jpn"] * 3 + PROSE["cmn"] + "東京",
    ]
    assert numbers(tmp_path, texts) == [[2]]


# ---- the classifier


def test_a_classifier_learns_what_can_be_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datatrove_pipelines.cleaning import education
    from datatrove_pipelines.cleaning.education import Classifier, train

    monkeypatch.setattr(education, "FEATURES", 1 << 12)
    good = [
        (f"The theorem {n} proves that every prime has a root {n % 7}.", True) for n in range(150)
    ]
    bad = [(f"Win {n} coins now, click here to play {n % 7} games!", False) for n in range(150)]
    classifier = train([*good, *bad])
    assert classifier.measures.accuracy == 1.0 and classifier.measures.rows > 10
    classifier.write(tmp_path / "x.safetensors")
    read = Classifier.read(tmp_path / "x.safetensors")
    assert read.measures == classifier.measures
    assert read.are_below([good[0][0], bad[0][0], good[1][0]]) == [False, True, False]
    kept, counts = run_filters(
        [text for text, _ in (*good, *bad)] * 2,
        "educational",
        quality_model=tmp_path / "x.safetensors",
    )
    assert kept == [text for text, _ in good] * 2
    assert counts.left_out == {"educational": 300}


def test_a_classifier_needs_rows_of_both_kinds_and_a_file_that_is_one(tmp_path: Path) -> None:
    from datatrove_pipelines.cleaning.education import Classifier, train

    with pytest.raises(UserError, match=r"^0 rows of the rarer class"):
        train([(f"text {n}", True) for n in range(99)])
    (tmp_path / "x").write_bytes(b"{}")
    with pytest.raises(UserError, match=r"no classifier of this kind .*make train-quality"):
        Classifier.read(tmp_path / "x")


# ---- what a row may ask for


@pytest.mark.parametrize(
    ("clean", "language", "what"),
    [
        (("languages",), "eng", "clean: languages: unknown; did you mean 'language'?"),
        (("language",), "Python", "clean: language: not for language Python; it is for arb, cmn, "),
        (("gopher",), "multi", "clean: gopher: not for language multi"),
        (("c4",), "fra", "clean: c4: not for language fra; it is for eng"),
        (("educational",), "eng", "x.safetensors: no such file; `make train-quality ROWS="),
    ],
)
def test_a_step_that_cannot_be_had_is_refused(
    clean: tuple[str, ...], language: str, what: str
) -> None:
    with pytest.raises(UserError) as error:
        check_steps(clean, language, Path("x.safetensors"))
    assert what in str(error.value)


def test_a_recipe_knows_the_steps() -> None:
    assert typing.get_args(CleaningStep) == STEPS


def test_own_text_has_the_steps_that_drop_nothing_good() -> None:
    assert of_own_text("eng") == ("language", "duplicates", "near_duplicates", "pii")
    assert of_own_text("multi") == of_own_text("Python") == ("duplicates", "near_duplicates", "pii")
    for language in ("eng", "fra", "multi"):
        check_steps(of_own_text(language), language, None)
    assert set(of_own_text("eng")) < set(STEPS)


def test_a_row_says_its_steps_and_own_text_without_has_the_gentle_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHE", str(tmp_path))
    own = SourceRow(path="notes/", language="eng")
    assert cleaning_of(own, "x").clean == of_own_text("eng")
    assert cleaning_of(replace(own, clean="published"), "x").values() == {}
    asked = cleaning_of(replace(own, clean=("pii", "gopher")), "x")
    assert asked.values() == {"clean": ("pii", "gopher"), "language": "eng"}
    for clean, what in (
        ("c4", "clean: c4: not for language fra; it is for eng"),
        ("educational", f"clean: educational: {tmp_path}/quality/fra.safetensors: no such file; "),
    ):
        with pytest.raises(UserError, match=f"^my.yaml: sources.notes: {what}"):
            cleaning_of(replace(own, language="fra", clean=(clean,)), "my.yaml: sources.notes")


@pytest.mark.slow
def test_scored_rows_make_the_classifier_that_a_row_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CACHE", str(tmp_path))
    rows: list[dict[str, object]] = [
        {"text": f"theorem {n} of Gauss", "score": 3 + n % 3} for n in range(99)
    ]
    rows += [{"text": f"buy {n} shoes now", "score": n % 3} for n in range(99)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_quality(str(file), "eng", None)
    assert "accuracy 100.0%" in capsys.readouterr().out
    asked = cleaning_of(SourceRow(path="notes/", language="eng", clean=("educational",)), "x")
    texts = ["theorem 100 of Gauss", "buy 100 shoes now"]
    kept, _ = run_filters(texts, "educational", quality_model=asked.quality_model)
    assert kept == texts[:1] and "quality_model" in asked.values()
    file.write_text('{"text": "x", "points": 1}\n')
    with pytest.raises(UserError, match=r"row 1: no text with a number as score or label among"):
        train_quality(str(file), "eng", None)
    with pytest.raises(UserError, match=r"^ROWS=.*absent"):
        train_quality(str(tmp_path / "absent.jsonl"), "eng", None)
