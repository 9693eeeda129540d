"""`python -m conformance.make [FOLDER]`: the kit's model, cases and expected values, from a seed.

The same on every machine up to rounding. All texts and answers are the kit's own.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance import model as kit_model
from conformance import texts
from conformance.cases import (
    KIT,
    RIGHT,
    Answered,
    Batch,
    Case,
    Greedy,
    Logits,
    Prompt,
    Render,
    Tokens,
    write_cases,
)  # fmt: skip
from conformance.reference import Floats, Reference, expected, faults_of, render
from ground.files import folder_aside

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SEED = 4
LONG_TOKENS, YARN_TOKENS = 400, 800  # of windows of 512 and 1,024


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else KIT
    template = (KIT / "chat_template.jinja").read_text("utf-8")
    with folder_aside(target) as folder:
        make(folder, template)


def make(folder: Path, template: str) -> None:
    """Write the kit for a chat template into an empty folder."""
    import numpy as np

    tokenizer = _tokenizer(template)
    told = answered(tokenizer)
    answers = [
        kit_model.Answer(case.prompt.ids, ids_of(tokenizer, case.text + "<|im_end|>"))
        for case in told
    ]
    model = kit_model.make_model(tokenizer, answers, SEED)
    kit_model.write_kit_model(folder, model, tokenizer)
    reference = Reference(folder)
    cases = [expected(case, reference) for case in definitions(tokenizer)]
    write_cases(folder / "cases.json", [*cases, *told])
    # No safetensors: vLLM takes every such file of a folder for weights.
    values: dict[str, Any] = arrays(cases, reference)
    np.savez_compressed(folder / "expected.npz", **values)


def _tokenizer(template: str) -> "PreTrainedTokenizerFast":
    """Trained on what is written with it: of the template what it renders, not how it is put."""
    writer = kit_model.make_tokenizer(texts.SAMPLES, template)
    chats = [chat for _, chats in texts.CONVERSATIONS.values() for chat in chats]
    rendered = [render(writer, chat).text for chat in chats]
    answers = [answer[3] for answer in texts.ANSWERS]
    return kit_model.make_tokenizer([*texts.PASSAGES, *texts.SAMPLES, *rendered, *answers * 30], template)  # fmt: skip


def ids_of(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def answered(tokenizer: "PreTrainedTokenizerFast") -> list[Answered]:
    """The cases of chats whose answers are set."""
    cases = []
    for name, says, chat, text, parts in texts.ANSWERS:
        prompt = render(tokenizer, chat)
        cases.append(Answered(name, says, chat, prompt, text, parts))
    return cases


def definitions(tokenizer: "PreTrainedTokenizerFast") -> list[Case]:
    """The cases with their texts; `reference.expected` adds what a model and a tokenizer say."""

    def prompts(*words: str) -> list[Prompt]:
        return [Prompt(text, []) for text in words]

    def cut(text: str, tokens: int) -> str:
        return str(tokenizer.decode(ids_of(tokenizer, text)[:tokens]))

    long = prompts(cut(texts.LONG, LONG_TOKENS), cut(texts.LONG[300:], LONG_TOKENS))
    short = prompts(*texts.PROMPTS[:4])
    beyond = prompts(cut(texts.LONG * 2, YARN_TOKENS), cut(texts.LONG[300:] * 2, YARN_TOKENS))
    uneven = prompts(texts.PROMPTS[0], cut(texts.LONG, 60), texts.PROMPTS[3])
    some = prompts(*texts.PROMPTS)
    return [
        Tokens("tokens", "ids of strings in many scripts", prompts(*texts.SAMPLES)),
        Logits("tied-head", "single tokens: embeddings, MLPs, the tied head", prompts(*texts.SINGLE)),
        Logits("logits", "short and long prompts", [*short, *long]),
        Logits("rotation", "dimension i is paired with i + D/2", short, ["interleaved"]),
        Logits("theta", "rope_theta, at a distance", long, ["theta-ignored"]),
        Logits("nope", "NoPE layers are not rotated, the others are", short, ["nope-rotated", "no-positions"]),
        Logits("nope-order", "NoPE is in every 4th layer", short, ["nope-inverted", "nope-shifted"]),
        Logits("yarn", "YaRN, beyond the original window", beyond, ["yarn-ignored", "yarn-unscaled"], yarn=True),
        Batch("packed", "documents in one row, with positions of their own", "packed", uneven),
        Batch("padded-left", "a batch that is padded on the left", "padded left", uneven),
        Batch("padded-right", "a batch that is padded on the right", "padded right", uneven),
        Greedy("greedy", "greedy tokens behind short prompts", some, {}),
        Greedy("greedy-long", "greedy tokens behind long prompts", long, {}),
        Greedy("greedy-yarn", "greedy tokens beyond the original window", beyond, {}, yarn=True),
        *(Render(name, says, chats, []) for name, (says, chats) in texts.CONVERSATIONS.items()),
        *texts.parsings(),
    ]  # fmt: skip


def arrays(cases: Sequence[Case], reference: Reference) -> dict[str, Floats]:
    """Log-probabilities, {case/right or a fault: [prompts, vocabulary]}."""
    values = {}
    for case in cases:
        if isinstance(case, Batch):
            values[f"{case.name}/{RIGHT}"] = reference.logprobs(case)
        elif isinstance(case, Logits):
            for fault in (RIGHT, *faults_of(case.yarn)):
                values[f"{case.name}/{fault}"] = reference.logprobs(case, fault)
    return values


if __name__ == "__main__":
    main()
