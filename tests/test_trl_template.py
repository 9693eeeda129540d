"""TRL trains on a release's template as it is, and knows none for SmolLM3 where a template lacks it."""

import re

import pytest
from small_models import make_tokenizer
from trl.chat_template_utils import (
    get_training_chat_template,
    is_chat_template_prefix_preserving,
    is_chat_template_stop_token_trained,
    parse_response,
    supports_tool_calling,
)

from runtimes.for_servers import response_template

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'


def test_trl_needs_to_patch_nothing() -> None:
    tokenizer = make_tokenizer()
    assert get_training_chat_template(tokenizer) is None
    assert supports_tool_calling(tokenizer) and is_chat_template_prefix_preserving(tokenizer)
    assert is_chat_template_stop_token_trained(tokenizer)


def test_trl_has_no_template_for_a_smollm3_without_generation_markers() -> None:
    """docs/upstream/trl-training-template.md"""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = re.sub(
        r"{%- (?:end)?generation -%}", "", str(tokenizer.chat_template)
    )
    with pytest.raises(ValueError, match="patching is not supported"):
        get_training_chat_template(tokenizer)


def test_trl_reads_calls_by_the_response_template() -> None:
    tokenizer = make_tokenizer()
    tokenizer.response_template = response_template()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
    )
    found = parse_response(tokenizer, tokenizer(CALL)["input_ids"], prefix=prompt)
    assert found["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
