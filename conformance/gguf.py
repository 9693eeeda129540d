"""llama.cpp on a GGUF file, by llama-cpp-python's low-level interface."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conformance.cases import Batch, Chat, Message, Prompt
from conformance.reference import NO_SMOLLM3, Floats, log_softmax
from conformance.runtime import TOLERANCES, UNKNOWN, NotApplicableError, rows
from ground.errors import UserError

WINDOW = 4096  # at most: a key/value cache in float32 has to fit
SEQUENCES = 8
F32 = 0  # ggml's type


class Gguf:
    """A GGUF file of a SmolLM3, with a key/value cache in float32. Raises UserError."""

    def __init__(self, file: Path):
        self.name = f"llama.cpp, {file}"
        try:
            from llama_cpp import Llama
        except ImportError:
            raise UserError(
                f"{file}: llama-cpp-python is not installed; pip install -e '.[llama]' compiles it"
            ) from None
        try:
            self.llama = Llama(str(file), n_ctx=64, verbose=False)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{file}: llama.cpp does not load it ({error}); {NO_SMOLLM3}") from None
        self.metadata: dict[str, str] = self.llama.metadata
        if (kind := self.metadata.get("general.architecture")) != "smollm3":
            raise UserError(f"{file}: general.architecture: {kind}: no SmolLM3; {NO_SMOLLM3}")
        self.window = min(int(self.metadata["smollm3.context_length"]), WINDOW)
        self.tolerance = TOLERANCES.get(str(file_type(self.metadata)), UNKNOWN)
        self.context = _context(self.llama, self.window)

    def _feed(self, sequences: Sequence[Sequence[int]], first: int = 0) -> list[Floats]:
        """Log-probabilities behind each sequence, all in one batch, at positions from `first` on."""
        import llama_cpp

        total = sum(map(len, sequences))
        batch = llama_cpp.llama_batch_init(total, 0, 1)
        lasts = []
        for number, ids in enumerate(sequences):
            for place, token in enumerate(ids):
                row = batch.n_tokens
                batch.token[row], batch.pos[row] = token, first + place
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, number
                batch.logits[row] = place == len(ids) - 1
                batch.n_tokens = row + 1
            lasts.append(batch.n_tokens - 1)
        status = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode: {status}")
        size = self.llama.n_vocab()
        found = [llama_cpp.llama_get_logits_ith(self.context, last) for last in lasts]
        return [log_softmax(np.ctypeslib.as_array(one, (size,))) for one in found]

    def _begin(self, tokens: int) -> None:
        import llama_cpp

        if tokens > self.window:
            raise NotApplicableError(f"{tokens} tokens, a window of {self.window}")
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def logprobs(self, prompt: Prompt) -> Floats:
        self._begin(len(prompt.ids))
        return self._feed([prompt.ids])[0]

    def batch(self, batch: Batch) -> Floats:
        if batch.how != "packed":
            raise NotApplicableError("llama.cpp pads no batch")
        self._begin(sum(len(prompt.ids) for prompt in batch.prompts))
        return rows(self._feed([prompt.ids for prompt in batch.prompts]))

    def greedy(self, prompt: Prompt, most: int) -> list[int] | str:
        """With the key/value cache, as generation uses it."""
        self._begin(len(prompt.ids) + most)
        new, tokens, end = list(prompt.ids), list[int](), self.llama.token_eos()
        while len(tokens) < most and end not in tokens:
            values = self._feed([new], len(prompt.ids) + len(tokens) - len(new) if tokens else 0)[0]
            new = [int(values.argmax())]
            tokens += new
        return tokens

    def tokenize(self, text: str) -> list[int]:
        return self.llama.tokenize(text.encode(), add_bos=False, special=False)

    def render(self, chat: Chat) -> str | list[int] | int:
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        template = self.metadata.get("tokenizer.chat_template")
        if not template:
            raise NotApplicableError("no chat template in the file")
        formatter = Jinja2ChatFormatter(template, eos_token="", bos_token="")
        messages: Any = chat.messages
        tools: Any = chat.tools or None
        return formatter(messages=messages, tools=tools, **chat.variables).prompt

    def parse(self, text: str, chat: Chat) -> Message:
        raise NotApplicableError(
            "llama-cpp-python parses no answers; its server's URL is another MODEL"
        )

    def answer(self, chat: Chat, most: int) -> Message | str:
        text = self.render(chat)
        ids = self.llama.tokenize(str(text).encode(), add_bos=False, special=True)
        tokens = self.greedy(Prompt("", ids), most)
        assert isinstance(tokens, list)
        return self.llama.detokenize(tokens, special=True).decode(errors="replace")


def _context(llama: Any, window: int) -> Any:
    """One whose cache is in float32 and takes several sequences: the class gives no such one."""
    import llama_cpp

    parameters = llama.context_params
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = window
    parameters.type_k = parameters.type_v = F32
    parameters.n_seq_max, parameters.kv_unified = SEQUENCES, True
    context = llama_cpp.llama_init_from_model(llama.model, parameters)
    if not context:
        raise UserError(f"{llama.model_path}: llama.cpp makes no context of {window} tokens")
    return context


def file_type(metadata: dict[str, str]) -> str | None:
    """f32, f16, q8_0 or another; None where the file does not say."""
    try:
        from gguf import LlamaFileType

        return LlamaFileType(int(metadata["general.file_type"])).name.lower().split("_", 1)[1]
    except (ImportError, KeyError, ValueError):
        return None
