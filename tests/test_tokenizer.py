"""The tokenizer's ids, its determinism, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from datatrove_pipelines.tokenizer import (
    BOS,
    CONTROL_TOKENS,
    EOS,
    LLAMA_TEXT_IDS,
    PAD,
    SPECIAL_TOKENS,
    llama_tokenizer,
    special_ids,
    train_bpe,
)
from ground.errors import UserError
from ground.files import folder_aside

VOCAB_SIZE = 400
TEXTS = [
    f"Reading {word} takes {n} minutes; don't hurry.\n\n  Encore une {word}, naïve été {n * n}.\n"
    for n, word in enumerate(
        ["bread", "water", "mountain", "river", "sentence", "letter", "hurricane", "glass"] * 8
    )
]
# What Llama 3.2 calls its 256 special slots (the hub's tokenizer.json), reserved ones numbered on.
LLAMA_SLOTS = (
    [BOS, EOS, "<|reserved_special_token_0|>", "<|reserved_special_token_1|>", PAD]
    + ["<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"]
    + ["<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
    + [f"<|reserved_special_token_{n}|>" for n in range(3, 248)]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_bpe(TEXTS, VOCAB_SIZE, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_special_tokens_take_the_last_ids_in_llamas_order(tokenizer):
    ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
    assert ids == list(range(VOCAB_SIZE - len(SPECIAL_TOKENS), VOCAB_SIZE))
    assert list(SPECIAL_TOKENS.values()) == sorted(SPECIAL_TOKENS.values())
    assert len(tokenizer) == VOCAB_SIZE
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, EOS, PAD)


def test_encoding_adds_nothing_and_decoding_returns_the_text(tokenizer):
    for text in ("user", "a  b\n\n\tc", "naïve 東京 🙂 \x00", "x  ", "12345 don't"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert max(ids) < VOCAB_SIZE - len(SPECIAL_TOKENS)


def test_skipping_special_tokens_keeps_the_tags(tokenizer):
    text = f"{BOS}<|im_start|><think>\nso\n</think><tool_call>{{}}</tool_call><|im_end|>{EOS}{PAD}"
    kept = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
    assert kept == "<think>\nso\n</think><tool_call>{}</tool_call>"


def test_digits_split_in_threes_as_llama_3_does(folder: Path):
    from tokenizers import Tokenizer

    split = Tokenizer.from_file(str(folder / "tokenizer.json")).pre_tokenizer
    assert [piece for piece, _ in split.pre_tokenize_str("12345 don't")] == [
        "123",
        "45",
        "Ġdon",
        "'t",
    ]


@pytest.mark.parametrize("threads", ["1", "4"])
def test_the_same_texts_give_the_same_bytes(folder: Path, tmp_path: Path, threads: str):
    code = (
        "from pathlib import Path; from tests.test_tokenizer import TEXTS, VOCAB_SIZE, train_bpe;"
        f"train_bpe(TEXTS, VOCAB_SIZE, Path({str(tmp_path / 'again')!r}))"
    )
    environment = os.environ | {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=root)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_too_little_text_is_one_line_with_the_remedy(tmp_path: Path):
    with pytest.raises(UserError, match="; add text, or write tokenizer") as error:
        train_bpe(TEXTS, 100_000, tmp_path / "bpe")
    assert "\n" not in str(error.value)
    fits = int(str(error.value).split("tokenizer.vocab_size ")[1].split(",")[0])
    train_bpe(TEXTS, fits, tmp_path / "small")
    assert f"eos_token_id {special_ids(fits)[EOS]} " in str(error.value)
    shutil.rmtree(tmp_path / "small")
    with pytest.raises(UserError, match="too small"):
        train_bpe(TEXTS, 256, tmp_path / "bpe")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("texts", [[], ["", " "], ["ab cd " * 9]])
def test_where_no_vocabulary_would_fit_none_is_named(tmp_path: Path, texts: list[str]):
    with pytest.raises(
        UserError, match=r"^the (training text is empty, .*|.* too little .*); add text$"
    ):
        train_bpe(texts, 8192, tmp_path / "bpe")


def test_a_failure_leaves_the_old_folder_and_no_partial_one(tmp_path: Path):
    folder = tmp_path / "bpe"
    with folder_aside(folder) as partial:
        (partial / "old").touch()
    with pytest.raises(RuntimeError), folder_aside(folder) as partial:
        (partial / "new").touch()
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["bpe"]
    assert [path.name for path in folder.iterdir()] == ["old"]
    with folder_aside(folder) as partial:
        (partial / "new").touch()
    assert [path.name for path in folder.iterdir()] == ["new"]


def test_a_tokenizer_of_another_family_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"slot 128000 is for <\|begin_of_text\|>") as error:
        llama_tokenizer(folder, tmp_path / "llama")
    assert "\n" not in str(error.value) and not (tmp_path / "llama").exists()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        llama_tokenizer(tmp_path, tmp_path / "llama")


@pytest.fixture(scope="module")
def llama_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 3.2's tokenizer.json as on the hub, built from the package that carries its ranks."""
    import zipfile

    from tokenizers import AddedToken, processors
    from transformers.convert_slow_tokenizer import TikTokenConverter

    root = tmp_path_factory.mktemp("llama")
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(root)]
    subprocess.run([*fetch, "llama-models==0.3.0"], check=True)
    with zipfile.ZipFile(next(root.glob("*.whl"))) as wheel:
        ranks = wheel.extract("llama_models/llama3/tokenizer.model", root)
    tokenizer = TikTokenConverter(vocab_file=ranks).converted()
    tokenizer.add_special_tokens(
        [AddedToken(name, normalized=False, special=True) for name in LLAMA_SLOTS]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=None, special_tokens=[(BOS, SPECIAL_TOKENS[BOS])]
    )
    tokenizer.save(str(root / "tokenizer.json"))
    return root


@pytest.mark.slow
def test_llama_tokenizer_has_smollm3s_ids_and_no_bos(llama_source: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    llama_tokenizer(llama_source, tmp_path / "smollm3")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smollm3")
    for token, wanted in (SPECIAL_TOKENS | LLAMA_TEXT_IDS).items():
        assert tokenizer(token)["input_ids"] == [wanted]
    assert len(tokenizer) == 128_256
    renamed = set(SPECIAL_TOKENS.values())
    others = {128_000 + n: name for n, name in enumerate(LLAMA_SLOTS) if 128_000 + n not in renamed}
    assert all(tokenizer.convert_ids_to_tokens(n) == name for n, name in others.items())
    text = "".join(CONTROL_TOKENS) + "<think>"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == "<think>"


@pytest.mark.slow
def test_llama_tokenizer_names_the_wrong_id(llama_source: Path, tmp_path: Path):
    table = json.loads((llama_source / "tokenizer.json").read_text("utf-8"))
    vocab = table["model"]["vocab"]
    vocab["user"], vocab["Ġa"] = vocab["Ġa"], vocab["user"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(table), "utf-8")
    with pytest.raises(UserError, match=r"'user' has id \[264\], wanted 882"):
        llama_tokenizer(tmp_path, tmp_path / "smollm3")
    assert not (tmp_path / "smollm3").exists()
