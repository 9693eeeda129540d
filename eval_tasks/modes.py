"""Does a model switch its mode when a conversation asks for it? Greedy answers, no data needed.

Each conversation goes on with the mode of its last turn's system message, whatever came before: its
earlier answers have a trace or none, the other way round half of the time.
"""

import re
from dataclasses import dataclass
from typing import Any

TURNS = (
    ("What is 17 plus 3?",),
    ("Hello!", "Hello, how can I help?", "What is 40 plus 2?"),
    ("Count to three.", "1, 2, 3", "And what is 20 plus 5?"),
    ("Is it warm?", "Yes.", "How warm?", "31 degrees.", "What is 31 plus 4?"),
)


@dataclass(frozen=True)
class Conversation:
    """`messages` end with a user's turn; `think` is the mode that the system message asks for."""

    messages: list[dict[str, str]]
    think: bool


def conversations() -> list[Conversation]:
    """Every history in both modes, with earlier answers of the same and of the other mode."""
    found = []
    for turns in TURNS:
        for think in (True, False):
            for before in (True, False):
                messages = [{"role": "system", "content": "/think" if think else "/no_think"}]
                for index, text in enumerate(turns):
                    trace = "<think>\nI answer.\n</think>\n" if index % 2 and before else ""
                    role = "assistant" if index % 2 else "user"
                    messages.append({"role": role, "content": trace + text})
                found.append(Conversation(messages, think))
    return found


def keeps_mode(answer: str, think: bool) -> bool:
    """A closed, non-empty trace exactly in /think, a non-empty text after it, and no tag in that."""
    trace, _, said = answer.rpartition("</think>")
    trace = re.sub(r"^\s*<think>", "", trace)
    said = said.replace("<|im_end|>", "")
    return bool(trace.strip()) == think and bool(said.strip()) and "<think>" not in said


def mode_switch(model: Any, tokenizer: Any, max_new_tokens: int = 128) -> list[bool]:
    """Whether each conversation's answer keeps its mode; `model` is a transformers causal LM."""
    import torch

    found = []
    for conversation in conversations():
        prompt = tokenizer.apply_chat_template(
            conversation.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        start = prompt["input_ids"].shape[1]
        with torch.no_grad():
            out = model.generate(
                **prompt, max_new_tokens=max_new_tokens, do_sample=False,
                pad_token_id=tokenizer.pad_token_id, temperature=None, top_p=None,
            )  # fmt: skip
        found.append(keeps_mode(tokenizer.decode(out[0, start:]), conversation.think))
    return found
