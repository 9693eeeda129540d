"""What transformers makes of a SmolLM3 folder, as it is and under each fault of `cases.FAULTS`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from conformance.cases import (
    FAULTS,
    RIGHT,
    Batch,
    Case,
    Chat,
    Greedy,
    Logits,
    Prompt,
    Render,
    Tokens,
)  # fmt: skip
from ground.errors import UserError, first_line
from ground.weights import smollm3_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, SmolLM3ForCausalLM

Floats = npt.NDArray[np.float32]
Ids = Sequence[int]
NEW_TOKENS = 24
NO_SMOLLM3 = "name the transformers folder of a SmolLM3, a GGUF file of one, or a server's URL"


class Expected(Protocol):
    """The right log-probabilities of a case, and those under a fault."""

    def logprobs(
        self, case: Logits | Batch, fault: str = RIGHT
    ) -> Floats: ...  # [prompts, vocabulary]


class Stored:
    """Those of the kit's own model."""

    def __init__(self, file: Path):
        with np.load(file) as arrays:
            self.arrays: dict[str, Floats] = {**arrays}

    def logprobs(self, case: Logits | Batch, fault: str = RIGHT) -> Floats:
        return self.arrays[f"{case.name}/{fault}"]


class Reference:
    """Those of another model, computed when they are asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.models: dict[bool, SmolLM3ForCausalLM] = {}
        self.known: dict[tuple[str, str], Floats] = {}

    def has_yarn(self) -> bool:
        return (self.folder / "yarn/config.json").is_file()

    def model(self, yarn: bool) -> "SmolLM3ForCausalLM":
        if yarn not in self.models:
            self.models[yarn] = load_model(self.folder / "yarn" if yarn else self.folder)
        return self.models[yarn]

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        return load_tokenizer(self.folder)

    def logprobs(self, case: Logits | Batch, fault: str = RIGHT) -> Floats:
        if (case.name, fault) not in self.known:
            model = self.model(case.yarn)
            with under(model, fault):
                rows = [last_logprobs(model, prompt.ids) for prompt in case.prompts]
            self.known[case.name, fault] = np.stack(rows)
        return self.known[case.name, fault]


def expected(case: Case, reference: Reference) -> Case:
    """The case with the tokens that the reference has for its texts and chats."""
    if isinstance(case, Render):
        return replace(case, prompts=[render(reference.tokenizer, chat) for chat in case.chats])
    if not isinstance(case, Logits | Batch | Greedy | Tokens):
        return case
    texts = [prompt.text for prompt in case.prompts]
    ids = reference.tokenizer(texts, add_special_tokens=False)["input_ids"]
    case = replace(case, prompts=[Prompt(*pair) for pair in zip(texts, ids, strict=True)])
    if isinstance(case, Greedy):
        model = reference.model(case.yarn)
        answers = {}
        for fault in (RIGHT, *faults_of(case.yarn)):
            with under(model, fault):
                answers[fault] = [greedy_tokens(model, row, NEW_TOKENS) for row in ids]
        return replace(case, answers=answers)
    return case


def render(tokenizer: "PreTrainedTokenizerFast", chat: Chat) -> Prompt:
    """A chat as the tokenizer's template writes it, up to the opening of the answer."""
    text: str = tokenizer.apply_chat_template(
        chat.messages, tools=chat.tools or None, add_generation_prompt=True, tokenize=False,
        **chat.variables,
    )  # fmt: skip
    return Prompt(text, tokenizer(text, add_special_tokens=False)["input_ids"])


def check_smollm3(folder: Path) -> dict[str, Any]:
    """config.json of a SmolLM3 folder. Raises UserError in one line for anything else."""
    return smollm3_config(folder, NO_SMOLLM3)


def load_model(folder: Path) -> "SmolLM3ForCausalLM":
    check_smollm3(folder)
    from transformers import SmolLM3ForCausalLM

    try:
        return SmolLM3ForCausalLM.from_pretrained(folder, dtype="float32").eval()
    except Exception as error:  # safetensors and transformers each have their own
        raise UserError(f"{folder}: does not load ({first_line(error)}); {NO_SMOLLM3}") from None


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers and transformers each have their own
        raise UserError(f"{folder}: its tokenizer does not load ({first_line(error)})") from None


def log_softmax(logits: Any) -> Floats:
    values = np.asarray(logits, np.float64)
    values = values - values.max(-1, keepdims=True)
    return (values - np.log(np.exp(values).sum(-1, keepdims=True))).astype(np.float32)


def last_logprobs(model: "SmolLM3ForCausalLM", ids: Ids) -> Floats:
    """[vocabulary], behind the last token."""
    import torch

    with torch.no_grad():
        rows = model(torch.tensor([list(ids)]), use_cache=False, logits_to_keep=1).logits[0, -1]
    return log_softmax(rows.float().numpy())


def greedy_tokens(model: "SmolLM3ForCausalLM", ids: Ids, most: int) -> list[int]:
    """The new tokens, at most so many; the end token included."""
    import torch

    prompt = torch.tensor([list(ids)])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=most, do_sample=False,
        temperature=None, top_p=None, repetition_penalty=None,
    )  # fmt: skip
    return out[0, len(ids) :].tolist()


def faults_of(yarn: bool) -> list[str]:
    """The faults that change something of the variant."""
    return [fault for fault in FAULTS if yarn or not fault.startswith("yarn")]


@contextmanager
def under(model: "SmolLM3ForCausalLM", fault: str) -> Iterator[None]:
    """The model with a fault, for a while."""
    layers, rotary = [layer.self_attn for layer in model.model.layers], model.model.rotary_emb
    uses = [int(layer.use_rope) for layer in layers]
    kept = rotary.inv_freq.clone(), rotary.attention_scaling
    rotated = {
        "nope-rotated": [1] * len(uses),
        "nope-inverted": [1 - use for use in uses],
        "nope-shifted": [*uses[-1:], *uses[:-1]],
        "no-positions": [0] * len(uses),
    }
    try:
        for layer, use in zip(layers, rotated.get(fault, uses), strict=True):
            layer.use_rope = use
        if fault == "theta-ignored":
            rotary.inv_freq.copy_(_with_theta(model, 10_000.0))
        elif fault == "yarn-ignored":
            plain = rotary.compute_default_rope_parameters(model.config)[0]
            rotary.inv_freq.copy_(plain)
        if fault in ("yarn-ignored", "yarn-unscaled"):
            rotary.attention_scaling = 1.0
        elif fault == "interleaved":
            _reorder(model, halves_first=True)
        yield
    finally:
        for layer, use in zip(layers, uses, strict=True):
            layer.use_rope = use
        if fault == "interleaved":
            _reorder(model, halves_first=False)
        rotary.inv_freq.copy_(kept[0])
        rotary.attention_scaling = kept[1]


def _with_theta(model: "SmolLM3ForCausalLM", theta: float) -> Any:
    import copy

    config = copy.deepcopy(model.config)
    config.rope_parameters = {**config.rope_parameters, "rope_theta": theta}
    return type(model.model.rotary_emb)(config).inv_freq


def _reorder(model: "SmolLM3ForCausalLM", halves_first: bool) -> None:
    """Reorder each head's rows so that rotating halves turns 2i with 2i + 1, or back.

    Queries and keys alike, so nothing else changes.
    """
    import torch

    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight):
                pair = (-1, 2) if halves_first else (2, -1)
                heads = weight.unflatten(0, (-1, layer.self_attn.head_dim)).unflatten(1, pair)
                weight.copy_(heads.transpose(1, 2).flatten(0, 2))
