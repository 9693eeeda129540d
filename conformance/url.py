"""A server on the OpenAI protocol: transformers serve, vLLM, llama.cpp's."""

import re
from typing import Any

import httpx
import numpy as np

from conformance.cases import Batch, Chat, Message, Prompt
from conformance.reference import Floats
from conformance.runtime import UNKNOWN, NotApplicableError, message_of
from ground.errors import UserError, first_line

TOP = 20  # log-probabilities for a token: vLLM's most
SECONDS = 600


class Url:
    """A server; of several models its first. Raises UserError."""

    def __init__(self, url: str, vocabulary: int, ids: dict[str, int]):
        self.name, self.tolerance = url, UNKNOWN
        self.root = re.sub(r"/v1/?$", "", url.rstrip("/"))
        self.vocabulary, self.ids = vocabulary, ids
        limits = httpx.Limits(max_keepalive_connections=0)  # a server may close one after an error
        try:
            self.client = httpx.Client(base_url=self.root, timeout=SECONDS, limits=limits)
        except httpx.InvalidURL as error:
            raise UserError(f"MODEL={url}: {first_line(error)}; write http://<host>:<port>") from None  # fmt: skip
        self.model = self._first_model()

    def _first_model(self) -> str:
        try:
            listed = self.client.get("/v1/models")
        except httpx.HTTPError as error:
            raise UserError(f"MODEL={self.name}: no server answers there ({first_line(error)})") from None  # fmt: skip
        try:
            return str(listed.raise_for_status().json()["data"][0]["id"])
        except httpx.HTTPStatusError:
            problem = f"answers {listed.status_code}"
        except (ValueError, LookupError, TypeError):
            problem = "names no model"
        raise UserError(f"MODEL={self.name}: /v1/models {problem}; name the address of an OpenAI-compatible server")  # fmt: skip

    def _ask(self, path: str, **values: Any) -> Any:
        """The JSON of an answer; a request that the server does not know is not applicable."""
        answer = self.client.post(path, json={"model": self.model} | values)
        if answer.status_code in (400, 404, 405, 422, 501):
            raise NotApplicableError(f"{path}: the server answers {answer.status_code}: {answer.text[:120]!r}")  # fmt: skip
        answer.raise_for_status()
        return answer.json()

    def logprobs(self, prompt: Prompt) -> Floats:
        answer = self._ask(
            "/v1/completions", prompt=prompt.text, max_tokens=1, temperature=0, logprobs=TOP,
            return_tokens_as_token_ids=True,
        )  # fmt: skip
        self._check_count(answer, prompt)
        return self._row(answer["choices"][0].get("logprobs"))

    def _check_count(self, answer: Any, prompt: Prompt) -> None:
        count = (answer.get("usage") or {}).get("prompt_tokens")
        if count not in (None, len(prompt.ids)):
            raise ValueError(f"{count} tokens of a prompt that has {len(prompt.ids)}: a BOS, or another tokenizer")  # fmt: skip

    def _row(self, values: Any) -> Floats:
        """[vocabulary], NaN where nothing is said; in the shapes of llama.cpp and of vLLM.
        llama.cpp's server says nothing of an answer that ends at once."""
        row = np.full(self.vocabulary, np.nan, np.float32)
        for entry in (values or {}).get("content") or []:  # llama.cpp
            for one in entry["top_logprobs"]:
                row[one["id"]] = one["logprob"]
        for table in (values or {}).get("top_logprobs") or []:  # vLLM
            for token, value in table.items():
                number = token.removeprefix("token_id:")
                place = int(number) if number != token else self.ids.get(token)
                if place is not None:
                    row[place] = value
        return row

    def batch(self, batch: Batch) -> Floats:
        raise NotApplicableError("a server makes its batches itself")

    def greedy(self, prompt: Prompt, most: int) -> list[int] | str:
        answer = self._ask("/v1/completions", prompt=prompt.text, max_tokens=most, temperature=0)
        self._check_count(answer, prompt)
        text: str = answer["choices"][0]["text"]
        return text

    def tokenize(self, text: str) -> list[int]:
        # llama.cpp's words, then vLLM's
        answer = self._ask("/tokenize", content=text, prompt=text, add_special=False, add_special_tokens=False, parse_special=False)  # fmt: skip
        tokens: list[int] = answer["tokens"]
        return tokens

    def render(self, chat: Chat) -> str | list[int] | int:
        for ask in (self._applied, self._tokenized):
            try:
                return ask(chat)
            except NotApplicableError:
                pass
        answer = self._chat(chat, 1)
        count: int = answer["usage"]["prompt_tokens"]
        return count

    def _applied(self, chat: Chat) -> str:
        text: str = self._ask("/apply-template", **_request(chat))["prompt"]  # llama.cpp
        return text

    def _tokenized(self, chat: Chat) -> list[int]:
        tokens: list[int] = self._ask("/tokenize", add_generation_prompt=True, **_request(chat))["tokens"]  # vLLM  # fmt: skip
        return tokens

    def parse(self, text: str, chat: Chat) -> Message:
        raise NotApplicableError("a server parses what its model writes alone; see answer-*")

    def _chat(self, chat: Chat, most: int) -> Any:
        return self._ask("/v1/chat/completions", max_tokens=most, temperature=0, **_request(chat))

    def answer(self, chat: Chat, most: int) -> Message | str:
        return message_of(self._chat(chat, most)["choices"][0]["message"])


def _request(chat: Chat) -> dict[str, Any]:
    tools = {"tools": chat.tools} if chat.tools else {}
    return {"messages": chat.messages, "chat_template_kwargs": chat.variables} | tools
