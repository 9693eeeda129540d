"""A server of a transformers folder that answers as vLLM 0.32's does: tokens in, echoed log-probabilities.

    python tests/completion_server.py serve <model> --host H --port P ...    (as `vllm serve`)

`fault` makes it another server: `no echo` refuses it as llama.cpp's does, `next token` echoes each
log-probability one token early, as llama-cpp-python's does for a model without a BOS token, `texts`
takes no tokens, as `transformers serve`.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import Any

import torch
from json_server import json_server
from transformers import AutoModelForCausalLM, AutoTokenizer

Json = dict[str, Any]
MOST_STOPS = 4


class RefusedError(Exception):
    pass


@dataclass
class Served:
    model: Any
    tokenizer: Any
    name: str
    fault: str = ""
    url: str = ""
    requests: list[Json] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    def completion(self, asked: Json) -> Json:
        ids = asked["prompt"]
        if isinstance(ids, str) or self.fault == "texts":
            raise RefusedError("prompt must be a string")
        if len(asked.get("stop", ())) > MOST_STOPS:
            raise RefusedError("stop: too long")
        if asked.get("echo") and self.fault == "no echo":
            raise RefusedError("Only no echo is supported")
        new = self._generated(ids, asked)
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        for stop in asked.get("stop", ()):
            text = text.partition(stop)[0]
        choice: Json = {"index": 0, "text": text, "logprobs": None}
        if asked.get("logprobs"):
            as_ids = bool(asked.get("return_tokens_as_token_ids"))
            shift = 0 if self.fault == "next token" and asked.get("echo") else 1
            found = self._log_probabilities([*ids, *new], as_ids, shift)
            begin = 0 if asked.get("echo") else len(ids)
            choice["logprobs"] = {key: values[begin:] for key, values in found.items()}
        return {"choices": [choice]}

    def _generated(self, ids: list[int], asked: Json) -> list[int]:
        torch.manual_seed(asked.get("seed", 0))
        heat = asked.get("temperature", 1.0)
        drawn = {"do_sample": True, "temperature": heat} if heat else {"do_sample": False}
        with torch.no_grad():
            out = self.model.generate(
                torch.tensor([ids]), max_new_tokens=asked["max_tokens"], pad_token_id=0, **drawn
            )
        return [int(one) for one in out[0, len(ids) :]]

    def _log_probabilities(self, ids: list[int], as_ids: bool, shift: int) -> Json:
        with torch.no_grad():
            log_p = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
        for at, one in enumerate(ids):
            found["tokens"].append(f"token_id:{one}" if as_ids else self.tokenizer.decode([one]))
            row = log_p[at - shift]
            best = int(row.argmax())
            own = {f"token_id:{one}": float(row[one]), f"token_id:{best}": float(row[best])}
            found["token_logprobs"].append(float(row[one]) if at else None)
            found["top_logprobs"].append(own if at else None)
        return found

    def chat(self, asked: Json) -> Json:
        text = f"{asked['messages'][-1]['content'][:9]} is 42."
        message = {"role": "assistant", "content": text, "reasoning_content": "I think."}
        return {"choices": [{"index": 0, "message": message}]}

    def answer(self, path: str, asked: Json | None) -> tuple[int, Json]:
        if asked is None:
            return 200, {"data": [{"id": self.name}]}
        try:
            with self.lock:
                self.requests.append(asked)
                return 200, (self.chat if "chat" in path else self.completion)(asked)
        except RefusedError as error:
            return 400, {"error": {"message": str(error)}}


@contextmanager
def completion_server(
    folder: Path, fault: str = "", host: str = "127.0.0.1", port: int = 0
) -> Iterator[Served]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    served = Served(model, AutoTokenizer.from_pretrained(folder), "served-name", fault)
    with json_server(served.answer, host, port) as served.url:
        yield served


if __name__ == "__main__":
    words = dict(zip(sys.argv[3::2], sys.argv[4::2], strict=False))
    with completion_server(Path(sys.argv[2]), host=words["--host"], port=int(words["--port"])):
        Event().wait()
