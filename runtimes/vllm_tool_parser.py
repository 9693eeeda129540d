"""vLLM's tool parser and reasoning parser for SmolLM3, both named `smollm3` (vLLM 0.33).

    vllm serve MODEL --enable-auto-tool-choice --tool-call-parser smollm3 --reasoning-parser smollm3 \
        --tool-parser-plugin vllm_tool_parser.py --reasoning-parser-plugin vllm_tool_parser.py

A release has it as a file that needs nothing else of ours (`for_servers.vllm_plugin`). A call is sent when it
is whole. Functions that are to be called from Python go into the request twice: into `tools`, or
vLLM does not look for calls, and as signatures into `chat_template_kwargs.python_tools`.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
)
from vllm.entrypoints.generate.base.protocol import ToolCall as ToolCallOfVllm
from vllm.reasoning import ReasoningParser, ReasoningParserManager
from vllm.renderers.chat_utils import make_tool_call_id
from vllm.tool_parsers import ToolParser, ToolParserManager

from ground.tool_calls import CLOSE, OPEN, Calls, Thought, ToolCall, signatures_of

TURN = "<|im_start|>"


def written(call: ToolCall) -> str:
    """The arguments as a client gets them."""
    return json.dumps(call.arguments, ensure_ascii=False)


def visible(request: Any) -> Any:
    """The request, with the tags in the text that the parsers get: they may be special tokens."""
    request.skip_special_tokens = False
    return request


class SmolLM3ToolParser(ToolParser):
    # What it holds back is asked for at the end of the stream (`finish_streaming`).
    engine_based_streaming = True

    def __init__(self, tokenizer: Any, tools: Any = None):
        super().__init__(tokenizer, tools)
        self.stream: Calls | None = None
        self.count = 0

    def adjust_request(self, request: Any) -> Any:
        return visible(super().adjust_request(request))

    def extract_tool_calls(self, model_output: str, request: Any) -> ExtractedToolCallInformation:
        if request.tool_choice == "none":
            content, calls = model_output, list[ToolCall]()
        else:
            content, calls = Calls(signatures(request)).feed(model_output, last=True)
        return ExtractedToolCallInformation(
            tools_called=bool(calls),
            tool_calls=[
                ToolCallOfVllm(function=FunctionCall(name=call.name, arguments=written(call)))
                for call in calls
            ],
            content=content or None,
        )

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: Any,
    ) -> DeltaMessage | None:
        if request.tool_choice == "none":
            return DeltaMessage(content=delta_text) if delta_text else None
        self.stream = self.stream or Calls(signatures(request))
        return self._message(*self.stream.feed(delta_text))

    def finish_streaming(self) -> DeltaMessage | None:
        return self._message(*self.stream.feed("", last=True)) if self.stream else None

    def _message(self, content: str, calls: list[ToolCall]) -> DeltaMessage | None:
        if not content and not calls:
            return None
        first, self.count = self.count, self.count + len(calls)
        deltas = [
            DeltaToolCall(
                index=index,
                id=make_tool_call_id(),
                type="function",
                function=DeltaFunctionCall(name=call.name, arguments=written(call)),
            )
            for index, call in enumerate(calls, start=first)
        ]
        return DeltaMessage(content=content or None, tool_calls=deltas)


def signatures(request: Any) -> dict[str, list[str]] | None:
    """The functions that code may call: those that the request lists."""
    kwargs = getattr(request, "chat_template_kwargs", None) or {}
    tools = [tool.model_dump() for tool in request.tools or ()]
    listed = signatures_of([*tools, *(kwargs.get("python_tools") or ())])
    return listed or None


class SmolLM3ReasoningParser(ReasoningParser):
    """Reasoning is what an answer begins with in `<think>`; an answer without it is content.

    Only the last turn tells whether reasoning has ended: earlier ones keep theirs in the prompt.
    """

    engine_based_streaming = True

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any):
        super().__init__(tokenizer, *args, **kwargs)
        self.stream = Thought()

    @property
    def reasoning_start_str(self) -> str:
        return OPEN

    @property
    def reasoning_end_str(self) -> str:
        return CLOSE

    def adjust_request(self, request: Any) -> Any:
        return visible(request)

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        turn = _after_last(input_ids, self.vocab.get(TURN))
        text = self.model_tokenizer.decode(turn, skip_special_tokens=False)
        thought = Thought()
        thought.feed(text.partition("\n")[2] if len(turn) < len(input_ids) else text)
        return thought.ended

    def is_reasoning_end_streaming(
        self, input_ids: Sequence[int], delta_ids: Iterable[int]
    ) -> bool:
        return self.vocab.get(CLOSE) in [*delta_ids] or self.is_reasoning_end(input_ids)

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        return _after_last(input_ids, self.vocab.get(CLOSE))

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        ids = [*token_ids]
        if self.vocab.get(OPEN) not in ids:
            return 0
        ids = ids[ids.index(self.vocab[OPEN]) + 1 :]
        return ids.index(self.vocab[CLOSE]) if self.vocab.get(CLOSE) in ids else len(ids)

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        reasoning, content = Thought().feed(model_output, last=True)
        return reasoning or None, content or None

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        return self._message(*self.stream.feed(delta_text))

    def has_engine_confirmed_reasoning_end(self) -> bool:
        return self.stream.ended

    def finish_streaming(self) -> DeltaMessage | None:
        return self._message(*self.stream.feed("", last=True))

    def _message(self, reasoning: str, content: str) -> DeltaMessage | None:
        if not reasoning and not content:
            return None
        return DeltaMessage(reasoning=reasoning or None, content=content or None)


def _after_last(ids: Sequence[int], token: int | None) -> list[int]:
    """What follows the last `token`; all where there is none."""
    ids = [*ids]
    return ids[len(ids) - ids[::-1].index(token) :] if token in ids else ids


ToolParserManager.register_module("smollm3", module=SmolLM3ToolParser)
ReasoningParserManager.register_module("smollm3", module=SmolLM3ReasoningParser)
