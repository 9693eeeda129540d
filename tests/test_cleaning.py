"""Cleaning: what is planted is gone and counted, what is good stays."""

import inspect
import json
import pkgutil
from dataclasses import replace
from pathlib import Path

import pytest
from test_tokenize import TEXTS, VOCAB_SIZE, texts_of

from datatrove_pipelines.cleaning.language import CODES, is_other_language
from datatrove_pipelines.cleaning.steps import STEPS, check_steps, filters, of_own_text
from datatrove_pipelines.cleaning.thresholds import thresholds
from datatrove_pipelines.cleaning.words import WORDS
from datatrove_pipelines.counts import Counts
from datatrove_pipelines.sources import OwnText, SourceJob
from ground.errors import UserError

PROSE = {
    "eng": "The people of the valley have always lived with the river, and that is not to be changed now.",
    "fra": "Les habitants de la vallée ont toujours vécu avec la rivière, et ce n'est pas près de changer.",
    "spa": "Los habitantes del valle siempre han vivido con el río, y eso no va a cambiar ahora.",
    "deu": "Die Menschen im Tal haben immer mit dem Fluss gelebt, und daran wird sich nichts ändern.",
    "ita": "Gli abitanti della valle hanno sempre vissuto con il fiume, e questo non cambierà adesso.",
    "por": "Os habitantes do vale sempre viveram com o rio, e isso não vai mudar agora.",
    "cmn": "山谷里的人们一直与河流生活在一起，这一点现在也不会改变。",
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


def document_strings() -> list[str]:
    """Prose that people wrote: the docstrings of Python's library with 300 characters or more."""
    found = dict[str, None]()
    for name in sorted(module.name for module in pkgutil.iter_modules() if module.name in KNOWN):
        for _, thing in inspect.getmembers(__import__(name)):
            text = inspect.getdoc(thing) or ""
            if len(text) >= 300:
                found[text] = None
    return list(found)


KNOWN = {"argparse", "decimal", "email", "logging", "socket", "statistics", "string", "subprocess", "turtle"}


def put(folder: Path, texts: list[str]) -> OwnText:
    folder.mkdir(parents=True)
    (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return OwnText(folder)


@pytest.mark.parametrize("language", CODES)
def test_a_language_is_told_from_the_others(language: str) -> None:
    is_other = is_other_language(language, None)
    assert [other for other, text in PROSE.items() if not is_other(text)] == [language]


@pytest.mark.parametrize("text", ["Milk, eggs, bread.", "def f(x):\n    return x + 1", "17 x 3 = 51", "", "\x00", "¡Hola!"])
def test_what_is_surely_no_other_language_stays(text: str) -> None:
    assert not any(is_other_language(language, None)(text) for language in CODES)
