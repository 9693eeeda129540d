"""The step `language`: documents that are surely in another language than their source's."""

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ground.errors import UserError

# ISO 639-3, as a source's row has it, to the codes of py3langid and of fastText's lid.176; after the
# first come varieties that are hardly told from it in writing.
CODES = {
    "eng": "en pcm", "fra": "fr", "spa": "es", "deu": "de", "ita": "it", "por": "pt", "cmn": "zh wuu yue",
    "rus": "ru", "fas": "fa", "arb": "ar ary arz", "jpn": "ja", "kor": "ko", "hin": "hi", "tha": "th",
    "vie": "vi", "ell": "el",
}  # fmt: skip
# FineWeb keeps what is English with a probability of 0.65. Short texts, lists and names get no such
# probability for any language: here the other language needs it, and what is neither stays.
SURE = 0.65
READ_CHARACTERS = 2_000  # of a document
LID_FILES = ("lid.176.bin", "lid.176.ftz")
NO_LANGUAGE = "zxx"  # py3langid's name for numbers, markup and identifiers
Identify = Callable[[str], tuple[str, float]]


def language_model(cache_folder: Path) -> Path | None:
    """fastText's lid: LID=<file>, or one of LID_FILES in the cache; None: py3langid is taken."""
    named = os.environ.get("LID")
    files = [Path(named)] if named else [cache_folder / name for name in LID_FILES]
    file = next((file for file in files if file.is_file()), None)
    if named and not file:
        raise UserError(f"LID={named}: no such file; name fastText's {LID_FILES[0]}")
    if file and not find_spec("fasttext"):
        remedy = "pip install fasttext-numpy2-wheel, or take the file away"
        raise UserError(f"{file}: fastText is not installed; {remedy}")
    return file


def is_other_language(language: str, model: Path | None) -> Callable[[str], bool]:
    """Whether a text is surely in another language than `language` (ISO 639-3)."""
    identify = _fasttext(model) if model else _py3langid()
    kept = (*CODES[language].split(), NO_LANGUAGE)

    def is_other(text: str) -> bool:
        code, probability = identify(text[:READ_CHARACTERS])
        return probability >= SURE and code not in kept

    return is_other


@cache
def _py3langid() -> Identify:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    classify: Identify = identifier.classify
    return classify


@cache
def _fasttext(model: Path) -> Identify:
    from fasttext.FastText import _FastText

    identifier = _FastText(str(model))

    def classify(text: str) -> tuple[str, float]:
        labels, probabilities = identifier.predict(text.replace("\n", " "))
        return labels[0].removeprefix("__label__"), float(probabilities[0])

    return classify
