"""lighteval's model behind servers (served.py): `make eval BACKEND=endpoint`, and BACKEND=vllm."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from lighteval.models.abstract_model import LightevalModel, ModelConfig
from lighteval.models.model_input import GenerationParameters
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.prompt_manager import PromptManager
from transformers import AutoConfig, AutoTokenizer

from eval_tasks.job import Job, Server
from eval_tasks.sampling import seed_of
from eval_tasks.served import echoed, http_client, post
from ground.chat import chat_tokenizer

One = TypeVar("One")
Got = TypeVar("Got")
REQUESTS = 64  # at once, to each server, which batches them itself
STOPS = 4  # texts that end an answer: what the protocol takes, the others are looked for here


class Endpoint(LightevalModel):
    """Servers of one model share the requests; `name` is where its tokenizer and config are.

    Nothing is kept between runs: what a server has loaded cannot be seen from here.
    """

    def __init__(self, name: str, job: Job, key: str = ""):
        self.config = ModelConfig(
            model_name=name, system_prompt=job.system_prompt,
            generation_parameters=GenerationParameters(**job.generation),
            cache_dir=str(Path(job.results).with_name("lighteval")),
        )  # fmt: skip
        self._cache = SimpleNamespace(_init_registry=lambda registry: None)
        self._tokenizer = chat_tokenizer(AutoTokenizer.from_pretrained(name))
        self._max_length = int(AutoConfig.from_pretrained(name).max_position_embeddings)
        self.prompt_manager = PromptManager(job.chat, self._tokenizer, job.system_prompt)
        self.job = job
        self.client = http_client(key, REQUESTS * len(job.servers))

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def add_special_tokens(self) -> bool:
        return True  # as TransformersModel's

    @property
    def max_length(self) -> int:
        return self._max_length

    def greedy_until(self, docs: list[Any]) -> list[ModelResponse]:
        """Answers, `num_samples` of each, drawn with seeds of their own."""
        asked = [self._request(doc, number) for doc in docs for number in range(doc.num_samples)]
        texts = iter(self._shared(self._answer, asked))
        return [
            ModelResponse(text=[self._cut(next(texts), doc) for _ in range(doc.num_samples)])
            for doc in docs
        ]

    def _cut(self, text: str, doc: Any) -> str:
        """The answer up to the first of the texts that end it."""
        for stop in () if self.job.chat else doc.stop_sequences:
            text = text.partition(stop)[0]
        return text

    def _request(self, doc: Any, number: int) -> dict[str, Any]:
        drawn = self.job.generation
        ids = self.tok_encode(self.prompt_manager.prepare_prompt(doc))
        size = drawn.get("max_new_tokens") or doc.generation_size
        room = self.max_length - len(ids)
        payload: dict[str, Any] = {
            "max_tokens": int(min(size, room)) if size else room,
            "temperature": drawn.get("temperature", 0.0), "top_p": drawn.get("top_p", 1.0),
            "seed": seed_of(ids, number),
        }  # fmt: skip
        if doc.stop_sequences and not self.job.chat:  # a chat's answer ends at its turn's end
            payload["stop"] = list(doc.stop_sequences)[:STOPS]
        is_said = self.job.chat and not all(server.takes_tokens for server in self.job.servers)
        messages = self.prompt_manager.prepare_prompt_api(doc) if is_said else []
        return {"ids": ids, "messages": messages, "payload": payload}

    def answer(self, ids: list[int], messages: list[dict[str, str]], max_new_tokens: int) -> str:
        """The greedy answer to a conversation."""
        payload = {"max_tokens": max_new_tokens, "temperature": 0.0}
        asked = {"ids": ids, "messages": messages, "payload": payload}
        return self._answer(self.job.servers[0], asked)

    def _answer(self, server: Server, asked: dict[str, Any]) -> str:
        if server.takes_tokens:
            payload = {"prompt": asked["ids"], **asked["payload"]}
            return str(post(self.client, server, "completions", payload)["choices"][0]["text"])
        payload = {"messages": asked["messages"], **asked["payload"]}
        message = post(self.client, server, "chat/completions", payload)["choices"][0]["message"]
        thought = message.get("reasoning_content") or message.get("reasoning")
        trace = f"<think>\n{thought.strip()}\n</think>\n" if thought else ""
        return trace + (message.get("content") or "")

    def loglikelihood(self, docs: list[Any]) -> list[ModelResponse]:
        """Each choice's summed log-probability, as TransformersModel's: context and choice are
        tokenised apart."""
        pairs = [
            self.tok_encode_pair(
                self.prompt_manager.prepare_prompt(doc), doc.choices, pairwise=True
            )
            for doc in docs
        ]
        asked = [one for contexts, choices in pairs for one in zip(contexts, choices, strict=True)]
        scored = iter(self._shared(self._choice, asked))
        responses = []
        for contexts, choices in pairs:
            sums, greedy = zip(*(next(scored) for _ in choices), strict=True)
            responses.append(
                ModelResponse(
                    input_tokens=contexts[0], output_tokens=choices, logprobs=list(sums),
                    argmax_logits_eq_gold=list(greedy),
                )
            )  # fmt: skip
        return responses

    def _choice(self, server: Server, pair: tuple[list[int], list[int]]) -> tuple[float, bool]:
        """A choice's log-probability after its context, and whether it is the greedy answer."""
        context, choice = pair
        found = echoed(self.client, server, [*context, *choice])
        at = slice(len(context), len(context) + len(choice))
        own, best = found["token_logprobs"][at], found["top_logprobs"][at]
        return sum(own), all(p >= max(top.values()) for p, top in zip(own, best, strict=True))

    def loglikelihood_rolling(self, docs: list[Any]) -> list[ModelResponse]:
        raise NotImplementedError("no suite scores perplexity")

    def _shared(self, ask: Callable[[Server, One], Got], ones: Sequence[One]) -> list[Got]:
        """Each request to the next server, all that they take at once."""
        servers = self.job.servers
        with ThreadPoolExecutor(REQUESTS * len(servers)) as threads:
            at = [servers[number % len(servers)] for number in range(len(ones))]
            return list(threads.map(ask, at, ones))
