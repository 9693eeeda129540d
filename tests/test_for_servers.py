"""What a release carries for servers: transformers reads what `tool_calls.parse` says, served too."""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from conftest import environment
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import free_port
from small_models import make_tokenizer, random_model
from test_tool_calls import ADD, AS_TEXT, JSON, PARTS
from transformers import AutoConfig
from transformers.utils.chat_parsing import ResponseParser, parse_response
from transformers.utils.chat_parsing.response_templates import load_response_template

from ground.tool_calls import END, Parsed, ToolCall, parse
from nanotron_ext.convert import nanotron_config
from nanotron_ext.rope import yarn_config
from runtimes.for_servers import response_template, with_older_spellings

LOADED = load_response_template(response_template())
# Python is no JSON: the template leaves it in the content.
TEXTS = [text for text in (*PARTS, *AS_TEXT) if len(text) < 10_000]
WITHOUT_CODE = [text for text in TEXTS if not text.startswith("<code>")]


def as_parsed(message: dict[str, Any]) -> Parsed:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return Parsed(
        message.get("reasoning_content"),
        message.get("content"),
        tuple(ToolCall(call["name"], call["arguments"]) for call in calls),
    )


@pytest.mark.parametrize("prefix", ["", "<|im_start|>assistant\n"])
@pytest.mark.parametrize("text", WITHOUT_CODE, ids=lambda text: text[:40])
def test_transformers_reads_what_the_parser_says(text: str, prefix: str) -> None:
    assert as_parsed(parse_response(text, LOADED, prefix=prefix)) == parse(text)


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.sampled_from(WITHOUT_CODE), max_size=4), length=st.integers(1, 40))
def test_streamed_too(parts: list[str], length: int) -> None:
    text = "".join(parts).replace(END, "") + END
    parser = ResponseParser(LOADED, prefix="")
    for start in range(0, len(text), length):
        parser.feed(text[start : start + length])
    assert as_parsed(parser.finalize()[0]) == parse(text)


def test_python_stays_in_the_content() -> None:
    code = "<code>\nprint(add(a=1))\n</code>"
    assert parse_response(code, LOADED, prefix="") == {"role": "assistant", "content": code}


def test_both_spellings_of_rope_say_the_same(tmp_path: Path) -> None:
    config = random_model(make_tokenizer(), seed=0).config.to_dict()
    for plain in (config, yarn_config(config)):
        both = with_older_spellings(plain)
        assert both["rope_theta"] == 5e6 and both["rope_parameters"] == plain["rope_parameters"]
        older = {key: value for key, value in both.items() if key != "rope_parameters"}
        ours = nanotron_config(tmp_path, plain)
        for values in (plain, both, older):
            (tmp_path / "config.json").write_text(json.dumps(values))
            read = AutoConfig.from_pretrained(tmp_path)
            assert read.rope_parameters == plain["rope_parameters"]
            assert nanotron_config(tmp_path, values) == ours


# ---- a real server, of a model whose answers are settled by the bias on its next token

F = '<tool_call>{"name": "f", "arguments": {"x": "<b>"}}</tool_call>'
G = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
SAID = {
    "think": f"<think>\nAdd <b>them</b>.\n</think>\nSo:\n{F}\n{G}",
    "no_think": f"Yes.\n{JSON}\n<tool_call>{{}}</tool_call> Done.",
}
CONTEXT = 30  # tokens, which are characters here: after so many only one can come
MODES = {"think": "<|im_start|>assistant\n", "no_think": "<think>\n\n</think>\n"}


def write_scripted(folder: Path, template: dict[str, Any] | None) -> Path:
    """A folder whose model says SAID: after each beginning of it comes its next token."""
    tokenizer = make_tokenizer(short_system=True)
    tokenizer.response_template = template
    tokenizer.save_pretrained(folder)
    model = random_model(tokenizer, seed=0, window=1024, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    bias = []
    for mode, prompt in MODES.items():
        ids = tokenizer(prompt + SAID[mode] + END)["input_ids"]
        first = len(tokenizer(prompt)["input_ids"])
        starts = [max(0, end - CONTEXT) for end in range(first, len(ids))]
        bias += [[ids[s : end + 1], 1e4] for end, s in enumerate(starts, first)]
    generation = {"sequence_bias": bias, "eos_token_id": tokenizer.eos_token_id}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@contextmanager
def transformers_serve(folder: Path) -> Iterator[openai.OpenAI]:
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    with subprocess.Popen([*command, "--port", str(port)], env=environment()) as server:
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health").read()
                    break
                except OSError:
                    time.sleep(0.5)
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        finally:
            server.terminate()


def answer(client: openai.OpenAI, folder: Path, mode: str, stream: bool) -> Parsed:
    function = {"name": "add", "parameters": {"type": "object", "properties": {}}}
    request: dict[str, Any] = {
        "model": str(folder),
        "messages": [{"role": "system", "content": f"/{mode}"}, {"role": "user", "content": "Hi"}],
        "tools": [{"type": "function", "function": function}],
        "max_tokens": 500,
    }
    if not stream:
        message = client.chat.completions.create(**request).choices[0].message
        parts = [message]
    else:
        chunks = [*client.chat.completions.create(stream=True, **request)]
        parts = [chunk.choices[0].delta for chunk in chunks]
    calls = [call.function for part in parts for call in part.tool_calls or ()]
    return Parsed(
        "".join(getattr(part, "reasoning_content", None) or "" for part in parts) or None,
        "".join(part.content or "" for part in parts) or None,
        tuple(ToolCall(call.name, json.loads(call.arguments)) for call in calls),
    )


@pytest.mark.slow
def test_transformers_serve_reads_reasoning_and_calls_with_the_template_alone(
    tmp_path: Path,
) -> None:
    ours, bare = (
        write_scripted(tmp_path / name, template)
        for name, template in (("ours", response_template()), ("bare", None))
    )
    assert parse(SAID["think"]).calls == (ToolCall("f", {"x": "<b>"}), ToolCall("g", {}))
    assert parse(SAID["no_think"]).calls == (ADD,)
    with transformers_serve(ours) as client:
        for mode, text in SAID.items():
            assert answer(client, ours, mode, stream=False) == parse(text)
            assert answer(client, ours, mode, stream=True) == parse(text)
    with transformers_serve(bare) as client:
        found = answer(client, bare, "think", stream=False)
        assert found.calls == () and found.reasoning is None
        assert "Add" in str(found.content) and '"name": "f"' in str(found.content)
