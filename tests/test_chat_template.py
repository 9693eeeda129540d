"""The chat template: byte equality with the published one where it applies, rules everywhere."""

import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from small_models import TEMPLATE, make_tokenizer
from transformers import PreTrainedTokenizerFast

from ground.errors import UserError
from posttrain.rows import Lines
from posttrain.template import check_row, configured, render, tokens_and_mask
from posttrain.template_lab import coloured, examples

DATE = "01 January 2025"
EXAMPLES = examples()
USER = {"role": "user", "content": "Hi"}
TOOL = {"name": "get_weather", "description": "Get the weather in a city"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(date_string=DATE)


def row(messages: list[dict[str, Any]], **kwargs: Any) -> dict[str, Any]:
    return {"messages": messages, "chat_template_kwargs": kwargs}


def system(text: str) -> list[dict[str, Any]]:
    return [{"role": "system", "content": text}]


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def digest(text: str) -> tuple[str, int]:
    return hashlib.sha256(text.encode()).hexdigest()[:16], len(text)


NO_THINK = {"enable_thinking": False}
# Hashes of the released model's renderings, first 16 hex digits and length in characters.
OVERRIDES = [
    ([*system("You are X./system_override"), USER], {}, ("26c6959788223d6c", 92)),
    (
        [*system("You are X. /no_think /system_override"), USER],
        {"xml_tools": [TOOL]},
        ("c96646cfb3b3b695", 110),
    ),
]
UNCLOSED = [
    ([*system("Speak like a pirate./think"), USER], NO_THINK, True, ("fe1dd77b3df8acf3", 215)),
    ([*system("/think /no_think Be brief."), USER], {}, True, ("6e5ff80b9c48a0f8", 227)),
    (
        [*system("S"), USER, turn("assistant", "<tool_call>{}</tool_call>"), turn("tool", "18C")],
        NO_THINK, True, ("d2e014439114c1fd", 324),
    ),
    ([USER], {**NO_THINK, "custom_instructions": "Be a bard."}, False, ("19607217229c5f1c", 186)),
    ([*system("S"), USER, *system("LATER"), USER], NO_THINK, False, ("084a70ae4837acad", 207)),
    ([*system("S"), turn("user", [{"type": "text"}])], NO_THINK, False, ("994d90550100e5c9", 175)),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "kwargs", "expected"), OVERRIDES)
def test_an_overridden_system_message_is_byte_equal_to_the_published_one(
    tokenizer: Any, messages: list[dict[str, Any]], kwargs: dict[str, Any], expected: Any
) -> None:
    assert digest(render(tokenizer, row(messages, **kwargs), prompt=True)) == expected


@pytest.mark.parametrize(("messages", "kwargs", "prompt", "expected"), UNCLOSED)
def test_but_for_the_closed_block_a_text_without_defaults_is_the_published_one(
    tokenizer: Any, messages: list[Any], kwargs: dict[str, Any], prompt: bool, expected: Any
) -> None:
    text = render(tokenizer, row(messages, **kwargs), prompt=prompt)
    block, rest = text.split("<|im_end|>\n", 1)
    assert block.endswith("\n\n") and digest(block + rest) == expected


def test_default_texts_name_the_model_and_tell_the_modes_apart(tokenizer: Any) -> None:
    think, no_think = render(tokenizer, row([USER])), render(tokenizer, row([USER], **NO_THINK))
    for text, mode in ((think, "/think"), (no_think, "/no_think")):
        assert f"Today Date: {DATE}\nReasoning Mode: {mode}\n\n## Custom Instructions\n\n" in text
        assert "You are SmolLM3, a helpful assistant." in text
    assert "</think>" in think and "</think>" not in no_think
    named = make_tokenizer(model_name="Ada", date_string=DATE)
    assert render(named, row([USER])) == think.replace("SmolLM3", "Ada")


def test_tools_are_json_whichever_way_they_come(tokenizer: Any) -> None:
    texts = [
        render(tokenizer, row([USER], xml_tools=[TOOL])),
        render(tokenizer, row([USER], xml_tools=[json.dumps(TOOL)])),
        tokenizer.apply_chat_template([USER], tools=[TOOL], tokenize=False),
    ]
    assert len(set(texts)) == 1 and f"<tools>\n{json.dumps(TOOL)}\n</tools>\n" in texts[0]
    python = render(tokenizer, row([USER], python_tools=["def f(x: int) -> int: ..."]))
    assert "<tools>\ndef f(x: int) -> int: ...\n</tools>\n" in python and "<code>" in python


def test_a_tool_call_is_rendered_and_its_result_is_a_users_turn(tokenizer: Any) -> None:
    call = {"name": "get_weather", "arguments": {"city": "Köln"}}
    # llama.cpp's server returns what stands before a call, if only a line break, and gets it back.
    for form, content in ((call, None), ({"type": "function", "function": call}, "\n")):
        asked = {"role": "assistant", "content": content, "tool_calls": [form]}
        text = render(tokenizer, row([USER, asked, turn("tool", "18C")], **NO_THINK))
        assert text.endswith(
            "<|im_start|>assistant\n<think>\n\n</think>\n<tool_call>\n"
            '{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call><|im_end|>\n'
            "<|im_start|>user\n18C<|im_end|>\n"
        )


TURNS = {
    "one turn": [USER, turn("assistant", "\n\nHello!")],
    "two turns": [USER, turn("assistant", "<think>\nr\n</think>\nA"), USER, turn("assistant", "B")],
    "a tool": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]},
        turn("tool", "18C /no_think"),
        turn("assistant", "It is 18C."),
    ],
}
SYSTEMS = [None, "Be kind.", "/think", "/no_think", "Be. /think /no_think", "X /system_override"]
SYSTEMS += ["X /no_think /system_override"]
MATRIX = list(
    itertools.product(
        TURNS, SYSTEMS, [None, True, False], ["", "xml", "python", "both"], [False, True]
    )
)


@pytest.mark.parametrize("short", [False, True])
def test_every_combination_follows_the_rules_in_text_and_mask(short: bool) -> None:
    tokenizer = make_tokenizer(date_string=DATE, short_system=short)
    for turns, text_of_system, thinking, tools, custom in MATRIX:
        messages = [*(system(text_of_system) if text_of_system else []), *TURNS[turns]]
        kwargs: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
        if custom:
            kwargs["custom_instructions"] = "CUSTOM"
        if tools in ("xml", "both"):
            kwargs["xml_tools"] = [TOOL]
        if tools in ("python", "both"):
            kwargs["python_tools"] = ["def f(): ..."]
        found = row(messages, **kwargs)
        check_row(found, "row 0")
        text = render(tokenizer, found)
        given = text_of_system or ""
        flag = re.search(r"/no_think", given) or re.search(r"/think", given)
        mode = flag[0] if flag else "/no_think" if thinking is False else "/think"
        _check_system(text, mode, given, tools, custom, short)
        _check_turns(text, mode, messages)
        ids, mask = tokens_and_mask(tokenizer, found)
        assert tokenizer.decode(ids) == text
        trained = tokenizer.decode([i for i, kept in zip(ids, mask, strict=True) if kept])
        assert trained == "".join(_assistant_turns(text))


def _check_system(text: str, mode: str, given: str, tools: str, custom: bool, short: bool) -> None:
    block = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n<\|im_start\|>user\n", text, re.S)
    assert block
    if "/system_override" in given:
        assert block[1] == "X"
        return
    assert f"Reasoning Mode: {mode}\n" in block[1]
    assert not re.search(r"(?<!<)/(no_)?think", block[1].replace(f"Mode: {mode}", ""))
    assert block[1].count("<tools>\n") == {"": 0, "both": 2}.get(tools, 1)
    assert ("CUSTOM" in block[1]) == (custom and not given)
    assert ("## Metadata" in block[1]) != short


def _assistant_turns(text: str) -> list[str]:
    return re.findall(r"<\|im_start\|>assistant\n.*?<\|im_end\|>\n", text, re.S)


def _check_turns(text: str, mode: str, messages: list[dict[str, Any]]) -> None:
    turns, spoken = _assistant_turns(text), [m for m in messages if m["role"] == "assistant"]
    assert len(turns) == len(spoken)
    prefix = "<think>\n\n</think>\n" if mode == "/no_think" else ""
    for rendered, message in zip(turns, spoken, strict=True):
        body = message["content"].lstrip("\n")
        assert rendered.startswith(f"<|im_start|>assistant\n{prefix}{body}")
        assert ("<tool_call>" in rendered) == bool(message.get("tool_calls"))


def test_the_prompt_opens_the_answer_that_training_goes_on_with(tokenizer: Any) -> None:
    for kwargs in ({}, NO_THINK):
        asked, answered = row([USER], **kwargs), row([USER, turn("assistant", "Yes.")], **kwargs)
        prompt = render(tokenizer, asked, prompt=True)
        assert render(tokenizer, answered) == prompt + "Yes.<|im_end|>\n"


def test_mid_training_is_plain_chatml() -> None:
    tokenizer = make_tokenizer(ROOT / "recipes/posttrain/chatml.jinja")
    messages = [USER, turn("assistant", "<think>\nr\n</think>\nA")]
    assert render(tokenizer, row(messages)) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\nr\n</think>\nA<|im_end|>\n"
    )


ANSWER = turn("assistant", "A")
BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": [USER, ANSWER], "chat_template_kwargs": None}, "chat_template_kwargs: None"),
    ({"messages": [USER, ANSWER]}, "chat_template_kwargs: None"),
    (row([USER]), "no assistant's turn"),
    (row([]), "messages: none"),
    (row([USER, turn("bot", "A")]), r"messages\[1\]: role 'bot'"),
    (row([turn("user", None), ANSWER]), r"messages\[0\]: content None is no text"),
    (row([USER, ANSWER], xml_tools=["not json"]), r"xml_tools\[0\]: 'not json' is not a JSON"),
    (row([USER, ANSWER], xml_tools="[]"), r"xml_tools: '\[\]': write a list"),
    (row([USER, ANSWER], enable_thinking="no"), "enable_thinking: 'no': write true or false"),
    (
        row([USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "{x"}]}]),
        "arguments of 'f' are not JSON",
    ),
    (row([{**USER, "tool_calls": [{"name": "f"}]}, ANSWER]), "only the assistant calls"),
]


@pytest.mark.parametrize(("bad", "words"), BAD)
def test_a_row_that_a_template_would_misread_is_named(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=rf"^sft/x\.jsonl row 7: .*{words}"):
        check_row(bad, "sft/x.jsonl row 7")


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(UserError, match=r"template\.modelname: unknown"):
        configured(TEMPLATE, modelname="x")


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_lab_colours_the_assistants_turns_alone(tokenizer: Any, name: str) -> None:
    check_row(EXAMPLES[name], name)
    text = coloured(tokenizer, EXAMPLES[name])
    assert text.plain == render(tokenizer, EXAMPLES[name])
    green = "".join(text.plain[s.start : s.end] for s in text.spans if "green" in str(s.style))
    turns = _assistant_turns(text.plain)
    assert turns and green == "".join(turns)


def test_the_lab_names_a_row_that_is_not_there(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(EXAMPLES["think"]) + "\n")
    assert Lines(file).row(0) == (EXAMPLES["think"], f"{file}:1")
    for path, number, words in (
        (file, 1, "no row 1"),
        (tmp_path / "none.jsonl", 0, "no such file"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            Lines(path).row(number)
        assert str(path) in str(caught.value)
