"""What a runtime is asked, whatever it is: `Runtime`, one class for each in the files beside."""

from collections.abc import Sequence
from typing import Protocol

from conformance.cases import Batch, Chat, Message, Prompt
from conformance.reference import Floats

# How far log-probabilities may be off, as a share of their spread. Measured on the kit's model;
# nothing passes that is nearer to what a fault gives.
TOLERANCES = {"f32": 0.005, "f16": 0.05, "bf16": 0.3, "q8_0": 1.0}
UNKNOWN = TOLERANCES["bf16"]


class NotApplicableError(Exception):
    """What a runtime has no way of being asked, and why."""


class Runtime(Protocol):
    """A model as a runtime has it. What it cannot be asked raises NotApplicableError."""

    name: str
    tolerance: float

    def logprobs(self, prompt: Prompt) -> Floats:
        """[vocabulary] behind the prompt's last token; NaN where the runtime does not say."""

    def batch(self, batch: Batch) -> Floats:
        """[prompts, vocabulary], all prompts in one forward pass."""

    def greedy(self, prompt: Prompt, most: int) -> list[int] | str:
        """The new tokens, or their text."""

    def tokenize(self, text: str) -> list[int]: ...

    def render(self, chat: Chat) -> str | list[int] | int:
        """The prompt of a chat: its text, its tokens, or how many they are."""

    def parse(self, text: str, chat: Chat) -> Message:
        """The parts of an assistant's text."""

    def answer(self, chat: Chat, most: int) -> Message | str:
        """What the model answers, greedily: in parts, or its text where nothing parses it."""


def rows(values: Sequence[Floats]) -> Floats:
    import numpy as np

    return np.stack(list(values))


# What `answer` and `parse` make of a message as OpenAI-compatible servers and transformers have it.
def message_of(values: object) -> Message:
    """The parts of a message of an OpenAI-compatible server. Raises ValueError."""
    import json

    if not isinstance(values, dict):
        raise ValueError("no message")
    calls = []
    for call in values.get("tool_calls") or []:
        function = call["function"]
        arguments = function["arguments"]
        calls.append((function["name"], json.loads(arguments) if isinstance(arguments, str) else arguments))  # fmt: skip
    reasoning = values.get("reasoning_content") or values.get("reasoning") or ""
    content = values.get("content") or ""
    return Message(reasoning.strip() or None, content.strip() or None, calls)
