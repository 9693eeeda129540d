"""A small SmolLM3 with a trained tokenizer, its variant for twice the window, texts in eight scripts."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from small_models import TEMPLATE, random_model
from transformers import AutoTokenizer

from datatrove_pipelines.tokenizer import SPECIAL_TOKENS, train_bpe
from posttrain.template import configured

SCRIPTS = {
    "Latin": "The river isn't wide; she'll cross it, won't we? Über die Brücke, déjà vu, naïve façade",
    "Cyrillic": "Мы шли по берегу реки, и вода была холодна; старик рассказал нам историю",  # noqa: RUF001
    "Greek": "Ο ποταμός είναι πλατύς και το νερό κρύο, μας είπε ο γέρος στη γέφυρα",  # noqa: RUF001
    "Arabic": "كان الماء باردا والنهر واسعا وقال لنا الشيخ إن الجسر قديم جدا",
    "Hebrew": "הנהר רחב והמים קרים והזקן סיפר לנו סיפור על הגשר הישן",
    "Devanagari": "नदी चौड़ी है और पानी ठंडा था, बूढ़े ने हमें पुल की कहानी सुनाई",
    "Han": "河很宽,水很冷,老人在桥上给我们讲了一个故事。橋の上で老人が話をした",
    "Hangul": "강은 넓고 물은 차가웠다 노인이 다리 위에서 우리에게 이야기를 들려주었다",
}
PIECES = (
    "  ", "\n", "\r\n", "\n\n ", "\t", "\u00a0", "\u3000", "\u200b", "'s", "'LL", "'Re", "'ve", " 'd", "7", "1234567",
    "3.14", "٣٤٥٦", "१२३", "Ⅻ", "½", "🚀", "👩\u200d🔬", "🏳️\u200d🌈", "e\u0301", "!!", "?…", "/*", "=>", "`", "\\n",
    *SPECIAL_TOKENS, "<|im_start", "im_end|>", "<think >", "</tool_call", "< code>", "<|eot_id|>",
)  # fmt: skip
WINDOW, FACTOR = 64, 2


def words() -> list[str]:
    return [word for text in SCRIPTS.values() for word in text.split()] + list(SCRIPTS["Han"])


def strings(count: int, seed: int = 0) -> list[str]:
    """Words of all scripts, cut and joined at random, between spaces, digits, emoji, control tokens."""
    rng, known = random.Random(seed), words()

    def part() -> str:
        if rng.random() < 0.4:
            return rng.choice(PIECES)
        word = rng.choice(known)
        return rng.choice(["", " "]) + word[: rng.randint(1, len(word))]

    return ["".join(part() for _ in range(rng.randint(1, 30))) for _ in range(count)]


def write_release(folder: Path, **more: Any) -> Path:
    """A random model of 8 layers with yarn/, float32; `more` are keys of its config.

    Its values are bfloat16's, as a release's are, so that float16 holds them. At a standard deviation of
    0.2 the layers magnify what float16 rounds, and near-ties fall otherwise in 2 % of the tokens.
    """
    train_bpe(SCRIPTS.values(), 640, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = configured(TEMPLATE, short_system=True)
    shape = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8,
        "no_rope_layers": [1, 1, 1, 0] * 2, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    model = random_model(tokenizer, seed=0, window=WINDOW, std=0.1, **shape | more)
    with torch.no_grad():  # norms are all 1 otherwise
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(torch.rand_like(parameter))
            parameter.copy_(parameter.bfloat16())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_parameters"]
    rope |= {"rope_type": "yarn", "factor": FACTOR, "original_max_position_embeddings": WINDOW}
    config["max_position_embeddings"] = WINDOW * FACTOR
    (folder / "yarn").mkdir()
    for file in folder.iterdir():
        if file.is_file() and file.name not in ("config.json", "checksums.json"):
            (folder / "yarn" / file.name).symlink_to(Path("..") / file.name)
    (folder / "yarn" / "config.json").write_text(json.dumps(config))
    return folder
