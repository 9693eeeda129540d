"""What a release carries for those who serve it: in its configs, and as vLLM's plugin.

`response_template` of tokenizer_config.json is how transformers (5.13 and later) takes reasoning
and calls off what a model wrote: transformers serve, pipelines, `tokenizer.parse_response`. It says
what `tool_calls.parse` says, but for Python in `<code>`, which it has no parser for: that stays in
the content.

A call opens only where all of it is there, as JSON: so no half or malformed call reaches a client,
and none makes the server answer with an error. The patterns are of the `regex` package, which has
recursion, and partial matches while text is streamed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_HEX = "[0-9a-fA-F]"
# A code unit, or a pair of surrogates: half of one is no text.
_UNIT = rf"u(?:(?![dD][89a-fA-F]){_HEX}{{4}}|[dD][89abAB]{_HEX}{{2}}\\u[dD][c-fC-F]{_HEX}{{2}})"
_STRING = rf'"(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|{_UNIT}))*+"'
_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2}(?![0-9]))?"
_BLANK = r"[ \t\n\r]*"


def _listed(item: str) -> str:
    return f"{_BLANK}(?:{item}(?:{_BLANK},{_BLANK}{item})*+{_BLANK})?"


_OBJECT = rf"\{{{_listed(f'{_STRING}{_BLANK}:{_BLANK}(?&value)')}\}}"
_VALUE = rf"(?P<value>{_STRING}|{_NUMBER}|true|false|null|\[{_listed('(?&value)')}\]|{_OBJECT})"
_NAME = rf'"name"{_BLANK}:{_BLANK}(?!""){_STRING}'
_ARGUMENTS = rf'"arguments"{_BLANK}:{_BLANK}{_OBJECT}'
_MEMBERS = rf"(?:{_NAME}{_BLANK},{_BLANK}{_ARGUMENTS}|{_ARGUMENTS}{_BLANK},{_BLANK}{_NAME})"
# The value of any kind is defined where it matches nothing.
_CALL = rf"(?(DEFINE){_VALUE})(?=\{{{_BLANK}{_MEMBERS}{_BLANK}\}}\s*</tool_call>)"
# The closing tag, seen backwards: between it and the opening one every string is whole. An argument
# may spell the tags, but no brace with a quote behind it, since quotes in strings are escaped.
_NOT_IN_A_STRING = r'(?<=<tool_call>\s*\{\s*(?:[^"]|"(?:[^"\\]|\\.)*")*\}\s*</tool_call>)'


def response_template() -> dict[str, Any]:
    """The template, in the schema of transformers 5.23 (`utils/chat_parsing`)."""
    return {
        "version": 1,
        "defaults": {"role": "assistant"},
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            # Only where the text begins with it; in /no_think the prompt has it, empty.
            "reasoning_content": {
                "open_pattern": r"^\s*<think>\s*",
                "close_pattern": r"\s*(?:</think>|<\|im_end\|>)\s*",
            },
            "tool_calls": {
                "open_pattern": rf"\s*<tool_call>\s*{_CALL}",
                "close_pattern": rf"\s*</tool_call>{_NOT_IN_A_STRING}",
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
                "repeats": True,
            },
            # Joined, or what follows a call would replace what was said before it.
            "content": {"close_pattern": r"\s*<\|im_end\|>\s*", "repeats": True, "join": "\n"},
        },
    }


def with_older_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json that also has RoPE as transformers 4 wrote it, which older runtimes read.

    `rope_theta` always, and `rope_scaling` where there is any, equal to `rope_parameters`:
    transformers 5 takes either.
    """
    rope = config["rope_parameters"]
    older = {"rope_theta": rope["rope_theta"]}
    return {**config, **older, **({} if rope["rope_type"] == "default" else {"rope_scaling": rope})}


def vllm_plugin() -> str:
    """The text of `vllm_tool_parser.py` as one file, which needs nothing of ours."""
    root = Path(__file__).parent.parent
    plugin, parser = (
        (root / f"{name}.py").read_text("utf-8")
        for name in ("runtimes/vllm_tool_parser", "ground/tool_calls")
    )
    before, _, after = plugin.partition("from ground.tool_calls import ")
    return before + parser + after.partition("\n")[2]
