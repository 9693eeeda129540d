"""What is planted in a source is gone from its shards and counted; of clean documents none is lost."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_cleaning import ARTICLE, PROSE, document_strings, nearly, put
from test_tokenize import TEXTS, VOCAB_SIZE, texts_of

from datatrove_pipelines.building import tokenize_all, tokenize_source
from datatrove_pipelines.cleaning.education import train
from datatrove_pipelines.cleaning.steps import in_order, of_own_text
from datatrove_pipelines.held_out import held_out_texts
from datatrove_pipelines.shards import shard_folder
from datatrove_pipelines.sources import HubSplit, SourceJob
from datatrove_pipelines.tokenizer import train_bpe
from launch.recipe.tables import load_standins
from launch.stages.sources import build_standins

PII = "Write to jane.doe@corp.co or to 8.8.4.4. "
FRENCH = PROSE["fra"] + " Le marché a lieu le samedi, et tout le monde y va à pied."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_bpe(TEXTS, VOCAB_SIZE, folder)
    return folder


def own(folder: Path, texts: list[str], name: str = "mine") -> SourceJob:
    """Own text in English as launch makes a job of it."""
    return SourceJob(name, put(folder, texts), clean=of_own_text("eng"), language="eng", seed=3)


def test_what_is_planted_is_gone_and_counted_and_200_documents_stay(
    tokenizer: Path, tmp_path: Path
) -> None:
    clean = document_strings()
    long = max(clean, key=len)
    planted = [clean[3], f"\n{clean[100]} ", nearly(long), FRENCH, PII + ARTICLE]
    info = tokenize_source(own(tmp_path / "x", [*clean, *planted]), tokenizer, tmp_path)
    texts = texts_of(info, tokenizer)
    (replaced,) = set(texts) - set(clean)
    assert len(texts) == 201 and set(clean) < set(texts)
    assert replaced == f"Write to email@example.com or to 22.214.171.124. {ARTICLE}"
    counted = {reason: n for reason, n in info.left_out.items() if n}
    assert counted == {"language": 1, "duplicates": 2, "near_duplicates": 1}
    assert info.changed == {"pii": 1} and info.read == 205


def test_a_folder_of_short_notes_lists_code_and_poems_is_kept_whole(
    tokenizer: Path, tmp_path: Path
) -> None:
    notes = [
        f"Call {name} about the boat on {day}."
        for name in ("Ann", "Bo")
        for day in ("Monday", "Friday")
    ]
    notes += [
        "milk\neggs\nbread",
        "def f(x):\n    return {x: x + 1}",
        "Row, row, row your boat\n" * 3,
        "42",
        "¿Qué?",
    ]
    notes += [PROSE[language] for language in ("rus", "cmn", "ell")]
    job = replace(own(tmp_path / "x", notes), language="multi", clean=of_own_text("multi"))
    info = tokenize_source(job, tokenizer, tmp_path)
    assert sorted(texts_of(info, tokenizer)) == sorted(note.strip() for note in notes)
    assert not any((*info.left_out.values(), *info.changed.values()))


def test_the_earlier_source_keeps_what_a_later_one_repeats(tokenizer: Path, tmp_path: Path) -> None:
    texts = [text for text in document_strings() if len(text) > 500][:6]
    first = own(tmp_path / "a", texts[:4], "a")
    second = own(tmp_path / "b", [texts[5], nearly(texts[0]), texts[1]], "b")
    untouched = replace(own(tmp_path / "c", texts[:2], "c"), clean=("pii",))
    jobs = in_order([first, untouched, second])
    infos = tokenize_all(jobs, tokenizer, tmp_path, 1)
    assert [info.documents for info in infos] == [4, 2, 1]
    assert infos[2].left_out["near_duplicates"] == 2
    alone = tokenize_source(second, tokenizer, tmp_path)
    assert alone.documents == 3 and alone.folder != infos[2].folder


def test_a_shard_is_named_by_how_its_text_was_cleaned(tokenizer: Path, tmp_path: Path) -> None:
    job = own(tmp_path / "x", [ARTICLE])
    (tmp_path / "model").write_bytes(b"1")
    others = [
        job,
        replace(job, clean=()),
        replace(job, clean=("pii",)),
        replace(job, language="fra"),
        replace(job, language_model=tmp_path / "model"),
        replace(job, earlier=(replace(job, name="other"),)),
    ]
    assert len({shard_folder(one, tokenizer, tmp_path) for one in others}) == len(others)
    plain = replace(job, clean=())
    assert shard_folder(replace(plain, language="fra"), tokenizer, tmp_path) == shard_folder(
        plain, tokenizer, tmp_path
    )


def test_held_out_text_is_cleaned_and_shares_nothing_with_what_is_trained_on(
    tokenizer: Path, tmp_path: Path
) -> None:
    long = [text for text in document_strings() if len(text) > 500][:40]
    job = own(tmp_path / "x", [*long, *map(nearly, long), FRENCH, PII + ARTICLE])
    job = replace(job, held_out_fraction=0.4)
    held_out = held_out_texts(job, 1 << 20, tmp_path)
    trained = texts_of(tokenize_source(job, tokenizer, tmp_path), tokenizer)
    assert len(held_out) + len(trained) == len(long) + 1 and len(held_out) > 5
    kept = {text for text in (*held_out, *trained) if "example." not in text}
    assert kept == set(long)
    everything = held_out_texts(replace(job, held_out_fraction=1.0), 1 << 20, tmp_path)
    assert len(everything) == len(long) + 1 and "jane" not in "".join(everything)


@pytest.mark.slow
def test_a_set_of_many_units_is_cleaned_across_them_whoever_builds_them(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    long = [text for text in document_strings() if len(text) > 500][:30]
    (tmp_path / "set").mkdir()
    rows = [*long, FRENCH, *map(nearly, long)]
    for number in range(4):
        lines = [json.dumps({"text": text}) + "\n" for text in rows[number::4]]
        (tmp_path / f"set/{number}.jsonl").write_text("".join(lines))
    split = HubSplit(str(tmp_path / "set"), None, "train", "main", portion=(0, 10**6))
    job = SourceJob("web", split, clean=("language", "near_duplicates", "pii"), language="eng")
    one, two = (tokenize_all([job], tokenizer, tmp_path / str(n), workers=n)[0] for n in (1, 2))
    assert len(one.units) == 4
    assert texts_of(one, tokenizer) == texts_of(two, tokenizer) and one.left_out == two.left_out
    assert (one.left_out["language"], one.left_out["near_duplicates"]) == (1, 30)
    assert (one.read, one.documents) == (61, 30)


# ---- on text of the stand-ins


def stand_ins(*names: str) -> dict[str, list[str]]:
    rows = {name: load_standins()[name] for name in names}
    texts = {}
    for name, path in build_standins(rows).items():
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            texts[name] = [json.loads(line)["text"] for line in lines]
    return texts


@pytest.mark.slow
def test_of_200_real_documents_of_a_kind_none_is_lost(tokenizer: Path, tmp_path: Path) -> None:
    kinds = stand_ins("pubmed-abstracts", "web-narratives", "code-python", "lang-rus", "math-web")
    for name, texts in kinds.items():
        language = {"lang-rus": "rus", "code-python": "Python"}.get(name, "eng")
        clean = of_own_text(language)
        job = replace(own(tmp_path / name, texts[:200], name), clean=clean, language=language)
        info = tokenize_source(job, tokenizer, tmp_path)
        assert {k: n for k, n in info.left_out.items() if n} == {}, name
        assert info.documents == min(200, len(texts))


@pytest.mark.slow
def test_a_classifier_tells_papers_and_articles_from_interface_text_and_changelogs() -> None:
    good = stand_ins("pubmed-abstracts", "boolq-passages")
    bad = stand_ins("changelogs", "code-javascript", "api-answers", "quac-dialogues")
    rows = [(text, True) for texts in good.values() for text in texts[:600]]
    rows += [(text, False) for texts in bad.values() for text in texts[:300]]
    measures = train(rows).measures
    assert measures.rows > 100 and 0.4 < measures.share < 0.8
    assert measures.accuracy > 0.95, measures
