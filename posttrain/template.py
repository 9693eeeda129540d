"""Chat rows to text, tokens and the training mask, through the one Jinja template.

A row is smoltalk2's: `messages` of `role` and `content` (and `tool_calls`), and
`chat_template_kwargs` {custom_instructions, enable_thinking, python_tools, xml_tools}.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.errors import PosttrainError

ROLES = ("system", "user", "assistant", "tool")
# What a recipe may set once for all rows; it is written into the template that a model carries.
SETTINGS = ("model_name", "short_system", "date_string")


def configured(template: Path, **settings: str | bool) -> str:
    """The template's text with defaults of its variables: what is stored beside the weights."""
    for name in settings:
        if name not in SETTINGS:
            raise PosttrainError(
                f"template.{name}: unknown; a recipe may set {', '.join(SETTINGS)}"
            )
    lines = [
        f"{{%- set {name} = {name} | default({json.dumps(value)}) -%}}\n"
        for name, value in settings.items()
    ]
    return "".join(lines) + template.read_text("utf-8")


def check_row(row: Mapping[str, Any], where: str) -> None:
    """Refuse what a template would drop or misread silently; `where` names the row.

    Raises PosttrainError for an unknown role, content that is no text, tools that are not JSON,
    null settings, and for messages without an assistant's turn.
    """
    kwargs = row.get("chat_template_kwargs")
    if not isinstance(kwargs, Mapping):
        raise PosttrainError(
            f"{where}: chat_template_kwargs: {kwargs!r}: write a mapping, empty for the defaults"
        )
    if not isinstance(kwargs.get("enable_thinking", True), bool):
        raise PosttrainError(
            f"{where}: chat_template_kwargs.enable_thinking: {kwargs['enable_thinking']!r}: "
            "write true or false"
        )
    for name in ("xml_tools", "python_tools"):
        _check_tools(kwargs.get(name) or [], name, where)
    messages = row.get("messages")
    if not isinstance(messages, Sequence) or not messages:
        raise PosttrainError(f"{where}: messages: none; drop the row")
    for index, message in enumerate(messages):
        _check_message(message, f"{where}: messages[{index}]")
    if not any(message["role"] == "assistant" for message in messages):
        raise PosttrainError(f"{where}: no assistant's turn, nothing to train on; drop the row")


def _check_tools(tools: Any, name: str, where: str) -> None:
    where = f"{where}: chat_template_kwargs.{name}"
    if isinstance(tools, str) or not isinstance(tools, Sequence):
        raise PosttrainError(f"{where}: {tools!r}: write a list of tools")
    for index, tool in enumerate(tools):
        if name == "python_tools" and isinstance(tool, str):
            continue
        try:
            value = json.loads(tool) if isinstance(tool, str) else tool
        except ValueError:
            value = None
        if not isinstance(value, Mapping):
            raise PosttrainError(f"{where}[{index}]: {str(tool)[:60]!r} is not a JSON object")


def _check_message(message: Any, where: str) -> None:
    role = message.get("role")
    if role not in ROLES:
        raise PosttrainError(f"{where}: role {role!r}: use one of {', '.join(ROLES)}")
    calls, content = message.get("tool_calls"), message.get("content")
    if calls and role != "assistant":
        raise PosttrainError(f"{where}: tool_calls of the {role}: only the assistant calls")
    if not isinstance(content, str) and not (content is None and calls):
        raise PosttrainError(f"{where}: content {content!r} is no text; write a string")
    for call in calls or ():
        function = call.get("function") or call
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                json.loads(arguments)
            except ValueError:
                raise PosttrainError(
                    f"{where}: arguments of '{function.get('name')}' are not JSON: {arguments[:60]!r}"
                ) from None


def template_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says to the template; empty values are left to its defaults."""
    given = row["chat_template_kwargs"]
    kept = {name: value for name, value in given.items() if value not in (None, "", [])}
    for name in ("xml_tools",):
        if name in kept:
            kept[name] = [json.loads(t) if isinstance(t, str) else t for t in kept[name]]
    return kept


def render(tokenizer: Any, row: Mapping[str, Any], prompt: bool = False) -> str:
    """The row's text; with `prompt`, its messages followed by the opening of an answer."""
    text: str = tokenizer.apply_chat_template(
        row["messages"], tokenize=False, add_generation_prompt=prompt, **template_kwargs(row)
    )
    return text


def tokens_and_mask(tokenizer: Any, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Token ids of the row and 1 for each token that is trained, else 0.

    The mask is the template's `generation` blocks: each assistant's turn from its header to the
    newline behind `<|im_end|>`, the pre-filled empty think block included.
    """
    out = tokenizer.apply_chat_template(
        row["messages"], return_dict=True, return_assistant_tokens_mask=True,
        **template_kwargs(row),
    )  # fmt: skip
    return list(out["input_ids"]), list(out["assistant_masks"])
