"""Who answers in `make chat`: a folder in this process, or a server. Both stream one text.

The text is what SmolLM3 writes, tags and all. A server that takes reasoning and tool calls apart has
them put back, so that one parser and one display serve both.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ground.chat import chat_tokenizer
from ground.errors import Outage, UserError, first_line
from ground.tool_calls import ToolCall, parse, split_reasoning
from launch.run.model import checkpoint_folder, load_checkpoint

Message = dict[str, str]  # role: user | assistant | tool, and content
Show = Callable[[str], object]


class TooLong(UserError):
    """The conversation does not fit: it can go on once it is shorter."""


@dataclass(frozen=True)
class Asked:
    """How an answer is to be: in which mode, with which tools in the prompt (chat_tools.py)."""

    thinks: bool
    tools: tuple[dict[str, Any], ...] = ()
    python_tools: tuple[str, ...] = ()


class Folder:
    """A checkpoint in this process. Sampling is that of its generation config."""

    def __init__(self, folder: Path):
        if folder.suffix == ".gguf":
            raise UserError(
                f"MODEL={folder}: a GGUF file is talked to over HTTP: `make serve MODEL={folder}`, "
                "then `make chat ENDPOINT=http://127.0.0.1:8000`"
            )
        self.name = str(folder)
        self.model, self.tokenizer = load_checkpoint(checkpoint_folder(folder))
        if not self.tokenizer.chat_template:
            raise UserError(f"MODEL={folder}: no chat template, a base model; take a release")

    def stream(self, messages: list[Message], asked: Asked, show: Show) -> None:
        """Give the answer's text to `show` piece by piece. Raises TooLong."""
        from transformers import TextStreamer

        end = self.tokenizer.decode([self.tokenizer.eos_token_id])

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                show(text.removesuffix(end) if stream_end else text)

        prompt = chat_tokenizer(self.tokenizer).apply_chat_template(
            messages if asked.thinks else without_traces(messages), add_generation_prompt=True, enable_thinking=asked.thinks, return_tensors="pt",
            return_dict=True, tools=list(asked.tools) or None,
            python_tools=list(asked.python_tools),
        ).to(self.model.device)  # fmt: skip
        start, window = prompt["input_ids"].shape[1], self.model.config.max_position_embeddings
        if start >= window:
            raise TooLong(f"the conversation has {start} tokens, the model's window is {window}")
        streamer = Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=False)
        self.model.generate(**prompt, max_new_tokens=window - start, streamer=streamer)


def without_traces(messages: Iterable[Message]) -> list[Message]:
    """In /no_think the template opens each answer with an empty trace: a second one is never trained."""
    return [
        {**one, "content": split_reasoning(one["content"])[1]}
        if one["role"] == "assistant"
        else one
        for one in messages
    ]


class Endpoint:
    """A server that speaks the OpenAI protocol. OPENAI_API_KEY is its key, where it wants one."""

    def __init__(self, url: str, model: str):
        import openai

        if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", url):
            raise UserError(f"ENDPOINT={url}: no address; write http://<host>:<port>")
        self.name = url
        base = url.rstrip("/").removesuffix("/v1") + "/v1"
        key = os.environ.get("OPENAI_API_KEY") or "none"
        try:
            self.client = openai.OpenAI(base_url=base, api_key=key, max_retries=0)
        except Exception as error:  # of its HTTP package, such as a port that is no number
            raise UserError(f"ENDPOINT={url}: {first_line(error)}; write http://<host>:<port>") from error  # fmt: skip
        self.model = model or self._first_model()

    def _first_model(self) -> str:
        import openai

        try:
            return next(iter(self.client.models.list())).id
        except StopIteration:
            problem = "it names no model"
        except openai.APIConnectionError as error:
            cause = first_line(error.__cause__ or error)
            raise Outage(
                f"ENDPOINT={self.name}: no server answers ({cause}); `make serve` starts one"
            ) from error
        except openai.APIError as error:
            problem = first_line(error)
        raise UserError(f"ENDPOINT={self.name}: {problem}; name its model: MODEL=<name there>")

    def stream(self, messages: list[Message], asked: Asked, show: Show) -> None:
        """Give the answer's text to `show` piece by piece. Raises TooLong, Outage, UserError."""
        import openai

        more: dict[str, Any] = {"tools": list(asked.tools)} if asked.tools else {}
        variables: dict[str, Any] = {"enable_thinking": asked.thinks}
        if asked.python_tools:
            variables["python_tools"] = list(asked.python_tools)
        try:
            with self.client.chat.completions.create(
                model=self.model, messages=cast(Any, as_openai(messages)), stream=True,
                extra_body={"chat_template_kwargs": variables}, **more,
            ) as chunks:  # fmt: skip
                for piece in as_text(chunk.choices[0].delta for chunk in chunks if chunk.choices):
                    show(piece)
        except openai.BadRequestError as error:
            raise TooLong(f"the server refused: {first_line(error)[:300]}") from error
        except openai.APIError as error:  # another status, the connection, or within the stream
            raise UserError(f"ENDPOINT={self.name}: {first_line(error)[:300]}") from error


def as_text(deltas: Iterable[Any]) -> Iterator[str]:
    """Deltas of a streamed answer as the text that the model wrote."""
    calls: dict[int, list[str]] = {}  # name, arguments
    is_thinking = False
    for delta in deltas:
        thought = getattr(delta, "reasoning_content", None) or getattr(delta, "reasoning", None)
        if thought:
            yield thought if is_thinking else f"<think>\n{thought.lstrip()}"
            is_thinking = True
        if is_thinking and (delta.content or delta.tool_calls):
            yield "\n</think>\n"
            is_thinking = False
        if delta.content:
            yield delta.content
        for call in delta.tool_calls or []:
            parts = calls.setdefault(call.index, ["", ""])
            parts[0] += call.function.name or ""
            parts[1] += call.function.arguments or ""
    if is_thinking:
        yield "\n</think>\n"
    for name, arguments in calls.values():
        yield f'\n<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {arguments or "{}"}}}\n</tool_call>'


def as_openai(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """The conversation as the protocol has it: reasoning and calls beside the content, ids on both.

    Calls that are Python code stay in the content: the protocol has none but those in JSON.
    """
    sent: list[dict[str, Any]] = []
    waiting: list[str] = []  # ids of calls without a result yet
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            said, (_, rest) = parse(message["content"]), split_reasoning(message["content"])
            calls = () if "<code>" in rest else said.calls
            waiting = [f"call_{number}_{place}" for place in range(len(calls))]
            content = (said.content or "") if calls else rest
            sent.append({"role": "assistant", "content": content})
            sent[-1] |= {"reasoning_content": said.reasoning} if said.reasoning else {}
            sent[-1] |= {"tool_calls": [*map(_call, waiting, calls)]} if calls else {}
        elif message["role"] == "tool" and waiting:
            sent.append({**message, "tool_call_id": waiting.pop(0)})
        else:
            sent.append(dict(message))
    return sent


def _call(call_id: str, call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    function = {"name": call.name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}
