"""transformers on a folder."""

from pathlib import Path
from typing import Any

from conformance.cases import Batch, Chat, Message, Prompt
from conformance.reference import (
    Floats,
    greedy_tokens,
    last_logprobs,
    load_model,
    load_tokenizer,
    log_softmax,
    render,
)  # fmt: skip
from conformance.runtime import TOLERANCES, NotApplicableError, message_of, rows


class Folder:
    """A transformers folder, in float32 on the CPU."""

    def __init__(self, folder: Path, model: Any = None):
        self.name = f"transformers, {folder}"
        self.tolerance = TOLERANCES["f32"]
        self.model = model or load_model(folder)
        self.tokenizer = load_tokenizer(folder)

    def logprobs(self, prompt: Prompt) -> Floats:
        return last_logprobs(self.model, prompt.ids)

    def batch(self, batch: Batch) -> Floats:
        import torch

        ids, mask, positions, lasts = laid_out(batch)
        with torch.no_grad():
            out = self.model(
                torch.tensor(ids), use_cache=False, position_ids=torch.tensor(positions),
                attention_mask=torch.tensor(mask) if mask else None,
            )  # fmt: skip
        return rows([log_softmax(out.logits[row, place].float().numpy()) for row, place in lasts])

    def greedy(self, prompt: Prompt, most: int) -> list[int] | str:
        return greedy_tokens(self.model, prompt.ids, most)

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def render(self, chat: Chat) -> str | list[int] | int:
        if not self.tokenizer.chat_template:
            raise NotApplicableError("no chat template: a base model")
        return render(self.tokenizer, chat).text

    def parse(self, text: str, chat: Chat) -> Message:
        if getattr(self.tokenizer, "response_template", None) is None:
            raise NotApplicableError("tokenizer_config.json has no response_template")
        prefix = render(self.tokenizer, chat).text
        return message_of(self.tokenizer.parse_response(text, prefix=prefix))

    def answer(self, chat: Chat, most: int) -> Message | str:
        prompt = render(self.tokenizer, chat)
        text: str = self.tokenizer.decode(greedy_tokens(self.model, prompt.ids, most))
        try:
            return self.parse(text, chat)
        except NotApplicableError:
            return text


Table = list[list[int]]


def laid_out(batch: Batch) -> tuple[Table, Table, Table, list[tuple[int, int]]]:
    """Ids, mask, positions, and the place of each prompt's last token, for one forward pass."""
    prompts = [prompt.ids for prompt in batch.prompts]
    if batch.how == "packed":
        lasts, end = [], 0
        for ids in prompts:
            end += len(ids)
            lasts.append((0, end - 1))
        positions_of = [place for ids in prompts for place in range(len(ids))]
        return [[token for ids in prompts for token in ids]], [], [positions_of], lasts
    longest = max(map(len, prompts))
    table, mask, positions, lasts = [], [], [], []
    for row, ids in enumerate(prompts):
        pad, here = longest - len(ids), len(ids)
        left = batch.how == "padded left"
        empty, ones = [0] * pad, [1] * here
        table.append(empty + ids if left else ids + empty)
        mask.append(empty + ones if left else ones + empty)
        positions.append(empty + list(range(here)) if left else list(range(here)) + empty)
        lasts.append((row, longest - 1 if left else here - 1))
    return table, mask, positions, lasts
