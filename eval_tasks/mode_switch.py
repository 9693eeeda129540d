"""Does a model switch its mode when a conversation asks for it? Greedy answers, no data needed.

The system message of each conversation asks for one mode, /think or /no_think. Its earlier answers
have a think trace or none: in half of the conversations they contradict the system message.
ground/modes.py says when an answer keeps the mode.
"""

from dataclasses import dataclass
from typing import Any

from ground.chat import chat_tokenizer
from ground.modes import keeps_mode

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
    histories = []
    for turns in TURNS:
        for think in (True, False):
            for earlier_traces in (True, False):
                messages = [{"role": "system", "content": "/think" if think else "/no_think"}]
                for index, text in enumerate(turns):
                    is_answer = index % 2 == 1
                    trace = "<think>\nI answer.\n</think>\n" if is_answer and earlier_traces else ""
                    role = "assistant" if is_answer else "user"
                    messages.append({"role": role, "content": trace + text})
                histories.append(Conversation(messages, think))
    return histories


def mode_switch(model: Any, max_new_tokens: int = 128) -> list[bool]:
    """Whether each conversation's answer keeps its mode; `model` is lighteval's."""
    return [
        keeps_mode(_answer(model, conversation.messages, max_new_tokens), conversation.think)
        for conversation in conversations()
    ]


def _answer(model: Any, messages: list[dict[str, str]], max_new_tokens: int) -> str:
    prompt = chat_tokenizer(model.tokenizer).apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    if hasattr(model, "answer"):  # a server's
        return str(model.answer(prompt["input_ids"][0].tolist(), messages, max_new_tokens))
    import torch

    prompt, start = prompt.to(model.model.device), prompt["input_ids"].shape[1]
    with torch.no_grad():
        out = model.model.generate(
            **prompt, max_new_tokens=max_new_tokens, do_sample=False,
            pad_token_id=model.tokenizer.pad_token_id, temperature=None, top_p=None,
        )  # fmt: skip
    return str(model.tokenizer.decode(out[0, start:]))
