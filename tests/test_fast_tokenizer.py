"""The writer's shards are datatrove's own, byte by byte, whoever makes the tokens."""

import ast
import json
import shutil
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from datatrove.data import Document
from datatrove.pipeline.tokens import DocumentTokenizer
from hypothesis import example, given
from hypothesis import strategies as st
from lighteval.tasks.templates.utils import translation_literals
from loguru import logger
from test_tokenize import write_jsonl

from datatrove_pipelines import fast_tokenizer
from datatrove_pipelines.building import tokenize_all
from datatrove_pipelines.fast_tokenizer import encoder, has_long_blank, why_slow
from datatrove_pipelines.shards import content_hash
from datatrove_pipelines.sources import JsonlFile, SourceJob, read_documents
from datatrove_pipelines.token_writer import write_tokens
from datatrove_pipelines.tokenizer import EOS, SPECIAL_TOKENS, plain_text_tokenizer, train_bpe

# Words of some 80 languages in 15 scripts, and code.
REAL = [Path(module.__file__).read_text() for module in (translation_literals, ast, typing, shutil)]
PARTS = [text[n : n + 1500] for text in REAL for n in range(0, len(text), 1500)]
HOSTILE = [
    *SPECIAL_TOKENS,
    f"a{EOS}b <|end_of_text",
    "a\x00b\x00",
    "ſ'ſ 'S 'Ll don't\u2019t",  # noqa: RUF001
    "e\u0301 \u200d👩\u200d👩 ﷺ ŉ ﬆ",
    "\r\n \r\r\n\n\t x\u3000\u2028y\x85z",
    "1234567 ¾ ٣٤٥ Ⅷ",
    "�\ufeff\U0010ffff\ue000",
]
ANY = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("'sſ \n\r\t1aÉ東"))  # noqa: RUF001


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "own"
    train_bpe(PARTS, 4096, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizers(own: Path) -> dict[str, Path]:
    return {"own": own, "as Llama 3": as_llama(own)}


def as_llama(folder: Path) -> Path:
    """The same tokens in the form of Llama 3's: a word that is a token is taken as it is, and the
    merges are all pairs whose bytes are a token."""

    def every_pair(table: dict[str, Any]) -> None:
        vocab = table["model"]["vocab"]
        pairs = ((name[:n], name[n:]) for name in vocab for n in range(1, len(name)))
        merges = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        merges.sort(key=lambda pair: vocab[pair[0] + pair[1]])
        table["model"] |= {"ignore_merges": True, "merges": merges}

    return changed(folder, every_pair)


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    table = json.loads((folder / "tokenizer.json").read_text())
    change(table)
    other = folder.with_name(f"{folder.name}-{abs(hash(json.dumps(table)))}")
    other.mkdir(exist_ok=True)
    (other / "tokenizer.json").write_text(json.dumps(table))
    return other


def same_shards(texts: Iterable[str], tokenizer: Path, folder: Path) -> None:
    """Assert that the writer's files are those of datatrove's DocumentTokenizer."""
    logger.disable("datatrove")
    documents = [Document(text, f"file/{n}") for n, text in enumerate(texts)]
    file = tokenizer / "tokenizer.json"
    stock = DocumentTokenizer(
        str(folder / "stock"), str(file), eos_token=EOS, seed=5, save_final_metadata=False
    )
    stock.__dict__["tokenizer"] = plain_text_tokenizer(tokenizer, content_hash(file))
    stock.run(iter(documents))
    write_tokens(folder / "own", tokenizer, 5).run(iter(documents))
    names = sorted(path.name for path in (folder / "stock").iterdir())
    assert [name.rpartition("shuffled")[2] for name in names] == [".ds", ".ds.index"]
    for name in names:
        assert (folder / "stock" / name).read_bytes() == (folder / "own" / name).read_bytes(), name


@pytest.mark.parametrize("name", ["own", "as Llama 3"])
def test_real_and_hostile_text_gives_the_shards_of_datatrove(
    tokenizers: dict[str, Path], tmp_path: Path, name: str
) -> None:
    assert why_slow(tokenizers[name]) is None
    same_shards(PARTS + HOSTILE, tokenizers[name], tmp_path)


@given(text=ANY)
@example("'ſ 'ſa")  # noqa: RUF001
@pytest.mark.parametrize("name", ["own", "as Llama 3"])
def test_any_text_has_the_ids_of_the_library(
    tokenizers: dict[str, Path], name: str, text: str
) -> None:
    encode = encoder(tokenizers[name])
    assert encode(text) == plain_text_tokenizer(encode.folder, encode.digest).encode(text).ids


SLOW = [pytest.param(of, marks=pytest.mark.slow) for of in ("\u3000", " \n", "é", "東", "1", "!")]


@pytest.mark.parametrize("of", [" ", "a", *SLOW])
def test_a_megabyte_of_one_character_comes_to_its_end(own: Path, of: str) -> None:
    """A million blanks are more than tiktoken's regex takes; letters were quadratic before 0.8."""
    encode = encoder(own)
    text = of * (1_200_000 // len(of.encode()))
    assert has_long_blank(text) == text.isspace()
    assert encode(text) == plain_text_tokenizer(own, encode.digest).encode(text).ids


def shuffle_merges(table: dict[str, Any]) -> None:
    table["model"]["merges"].reverse()


def lose_a_merge(table: dict[str, Any]) -> None:
    """A token stays in the vocabulary that longer ones are made of, and is not made itself."""
    del table["model"]["merges"][0]


def split_otherwise(table: dict[str, Any]) -> None:
    table["pre_tokenizer"] = table["pre_tokenizer"]["pretokenizers"][1] | {"use_regex": True}


def normalize(table: dict[str, Any]) -> None:
    table["normalizer"] = {"type": "NFC"}


def fall_back_to_bytes(table: dict[str, Any]) -> None:
    table["model"]["byte_fallback"] = True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (shuffle_merges, "ids do not rise in the order of its merges"),
        (lose_a_merge, "is not what its merges make of those bytes"),
        (split_otherwise, "does not split words as Llama 3"),
        (normalize, "not a plain byte-level BPE"),
        (fall_back_to_bytes, "not a plain byte-level BPE"),
    ],
)
def test_a_tokenizer_of_another_kind_is_left_to_the_library_which_is_said_once(
    own: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], None],
    reason: str,
) -> None:
    other = changed(own, change)
    assert reason in str(why_slow(other))
    same_shards(PARTS[:40] + HOSTILE, other, tmp_path)
    file = write_jsonl(tmp_path / "web.jsonl.gz", [{"text": text} for text in PARTS[:5]])
    jobs = [SourceJob(name, JsonlFile(file)) for name in ("one", "two")]
    tokenize_all(jobs, other, tmp_path / "cache", workers=1)
    (line,) = capfd.readouterr().out.splitlines()
    assert line.startswith(f"{other}: ") and reason in line


def test_tokens_that_no_merge_makes_are_never_made(own: Path) -> None:
    """tiktoken would take a word that is in its table."""
    other = changed(own, lambda table: table["model"]["vocab"].update({"zqzqz": 4999}))
    encode = encoder(other)
    assert why_slow(other) is None and 4999 not in encode("zqzqz")
    assert encode("zqzqz") == plain_text_tokenizer(other, encode.digest).encode("zqzqz").ids


@pytest.mark.slow
@pytest.mark.parametrize(("vocab_size", "of"), [(8192, 1), (128_000, 8)])
def test_the_corpora_give_the_shards_of_datatrove(vocab_size: int, of: int, tmp_path: Path) -> None:
    """Stand-ins: prose of 15 languages, code and mathematics, 19 MB.

    All of them in tokens of 2 bytes, each eighth document in those of 4.
    """
    from launch.recipe.tables import load_standins
    from launch.stages.sources import build_standins

    files = build_standins(load_standins()).items()
    jobs = [SourceJob(name, JsonlFile(file)) for name, file in files]
    texts = [document.text for job in jobs for document in read_documents(job)]
    train_bpe(texts, vocab_size, tmp_path / "bpe")
    texts = texts[::of]
    for tokenizer in (tmp_path / "bpe", as_llama(tmp_path / "bpe")):
        assert fast_tokenizer.why_slow(tokenizer) is None
        same_shards(texts, tokenizer, tmp_path / f"shards-{tokenizer.name}")
