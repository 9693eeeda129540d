"""In a process of its own, with vLLM's own classes: what its parsers make of texts.

stdin: {"plugin", "tokenizer", "turns": [{"prompt", "text", "pieces", "tools", "variables"}]}; the last
line of stdout: by parser [[reasoning, content, calls], …], and `old_trace`, `hf`, see the test.
"""

import json
import sys
from typing import Any

from transformers import AutoTokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser.parser_manager import ParserManager
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

Said = list[Any]


def parsers(name: str | None, reasoning: str | None, tokenizer: Any) -> Any:
    return ParserManager.get_parser(
        tool_parser_name=name, reasoning_parser_name=reasoning, enable_auto_tools=True,
        model_name="smollm3", tokenizer=tokenizer,
    )  # fmt: skip


def request_of(turn: dict[str, Any]) -> ChatCompletionRequest:
    return ChatCompletionRequest(
        model="m", messages=[{"role": "user", "content": "x"}], tools=turn["tools"],
        chat_template_kwargs=turn["variables"],
    )  # fmt: skip


def call(function: Any) -> list[Any]:
    return [function.name, json.loads(function.arguments)]


def whole(parser: Any, tokenizer: Any, turn: dict[str, Any]) -> Said:
    request = request_of(turn)
    made = parser(tokenizer, request.tools)
    made.set_prompt_token_ids(tokenizer(turn["prompt"])["input_ids"])
    reasoning, content, calls = made.parse(turn["text"], request, enable_auto_tools=True)
    return [reasoning, content, [call(one) for one in calls or ()]]


def streamed(parser: Any, tokenizer: Any, turn: dict[str, Any]) -> Said:
    request, prompt = request_of(turn), tokenizer(turn["prompt"])["input_ids"]
    made, reasoning, content, calls = parser(tokenizer, request.tools), "", "", []
    for number, piece in enumerate(turn["pieces"]):
        ids = tokenizer(piece, add_special_tokens=False)["input_ids"]
        last = number == len(turn["pieces"]) - 1
        delta = made.parse_delta(piece, ids, request, prompt, finished=last)
        if delta:
            reasoning, content = (
                reasoning + (delta.reasoning or ""),
                content + (delta.content or ""),
            )
            calls += [call(one.function) for one in delta.tool_calls]
    return [reasoning or None, content or None, calls]


def main() -> None:
    asked = json.load(sys.stdin)
    ToolParserManager.import_tool_parser(asked["plugin"])
    ReasoningParserManager.import_reasoning_parser(asked["plugin"])
    tokenizer = AutoTokenizer.from_pretrained(asked["tokenizer"])
    ours = parsers("smollm3", "smollm3", tokenizer)
    hermes, stock = parsers("hermes", None, tokenizer), parsers(None, "deepseek_r1", tokenizer)
    prompt = tokenizer(asked["old_trace"])["input_ids"]
    try:
        hf = str(parsers("hf", "hf", tokenizer))
    except TypeError as error:
        hf = str(error)
    answers = {
        "whole": [whole(ours, tokenizer, turn) for turn in asked["turns"]],
        "streamed": [streamed(ours, tokenizer, turn) for turn in asked["turns"]],
        "hermes": [whole(hermes, tokenizer, turn) for turn in asked["turns"]],
        "old_trace": [parser(tokenizer).is_reasoning_end(prompt) for parser in (ours, stock)],
        "hf": hf,
    }
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
