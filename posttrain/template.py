"""Chat rows to text, tokens and the training mask, through the one Jinja template.

A row is smoltalk2's: `messages` of `role` and `content` (and `tool_calls`), and
`chat_template_kwargs` {custom_instructions, enable_thinking, python_tools, xml_tools}.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ground.chat import chat_tokenizer
from ground.errors import UserError

Row = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
# What a recipe may set once for all rows; it is written into the template that a model carries.
SETTINGS = ("model_name", "short_system", "date_string")


def configured(template: Path, **settings: str | bool) -> str:
    """The template's text with defaults of its variables: what is stored beside the weights."""
    for name in settings:
        if name not in SETTINGS:
            raise UserError(f"template.{name}: unknown; a recipe may set {', '.join(SETTINGS)}")
    defaults = (
        f"{{%- set {name} = {name} | default({json.dumps(value)}) -%}}\n"
        for name, value in settings.items()
    )
    return "".join(defaults) + template.read_text("utf-8")


def check_row(row: Mapping[str, Any], where: str) -> None:
    """Refuse what a template would drop or misread silently; `where` names the row.

    Raises UserError for an unknown role, content that is not text, tools that are not JSON,
    null settings, and for messages without an assistant's turn.
    """
    kwargs = row.get("chat_template_kwargs")
    if not isinstance(kwargs, Mapping):
        raise UserError(
            f"{where}: chat_template_kwargs: {kwargs!r}: write a mapping, empty for the defaults"
        )
    if not isinstance(kwargs.get("enable_thinking", True), bool):
        raise UserError(
            f"{where}: chat_template_kwargs.enable_thinking: {kwargs['enable_thinking']!r}: "
            "write true or false"
        )
    for name in ("xml_tools", "python_tools"):
        _check_tools(kwargs.get(name) or [], name, where)
    messages = row.get("messages")
    if not isinstance(messages, Sequence) or not messages:
        raise UserError(f"{where}: messages: none; drop the row")
    for index, message in enumerate(messages):
        _check_message(message, f"{where}: messages[{index}]")
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{where}: no assistant's turn, nothing to train on; drop the row")


def _check_tools(tools: Any, name: str, where: str) -> None:
    where = f"{where}: chat_template_kwargs.{name}"
    if isinstance(tools, str) or not isinstance(tools, Sequence):
        raise UserError(f"{where}: {tools!r}: write a list of tools")
    for index, tool in enumerate(tools):
        if name == "python_tools" and isinstance(tool, str):
            continue
        try:
            schema = _parsed(tool)
        except ValueError:
            schema = None
        if not isinstance(schema, Mapping):
            raise UserError(f"{where}[{index}]: {str(tool)[:60]!r} is not a JSON object")


def _check_message(message: Any, where: str) -> None:
    role = message.get("role")
    if role not in ROLES:
        raise UserError(f"{where}: role {role!r}: use one of {', '.join(ROLES)}")
    calls, content = message.get("tool_calls"), message.get("content")
    if calls and role != "assistant":
        raise UserError(f"{where}: tool_calls of the {role}: only the assistant calls")
    if not isinstance(content, str) and not (content is None and calls):
        raise UserError(f"{where}: content {content!r} is no text; write a string")
    for call in calls or ():
        function = call.get("function") or call
        arguments = function.get("arguments")
        try:
            _parsed(arguments)
        except ValueError:
            raise UserError(
                f"{where}: arguments of '{function.get('name')}' are not JSON: {arguments[:60]!r}"
            ) from None


def _parsed(value: Any) -> Any:
    """A JSON value, which some rows hold as text: a column of a dataset has only one type."""
    return json.loads(value) if isinstance(value, str) else value


def with_settings(row: Row, settings: Mapping[str, str], where: str) -> Row:
    """The row, checked, with `settings` as defaults; the row's own values win."""
    check_row(row, where)
    return row | {"chat_template_kwargs": {**settings, **row["chat_template_kwargs"]}}


def template_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    """The template variables of a row; empty values are left to the template's defaults."""
    kwargs = row["chat_template_kwargs"]
    kwargs = {name: value for name, value in kwargs.items() if value not in (None, "", [])}
    if "xml_tools" in kwargs:
        kwargs["xml_tools"] = [_parsed(tool) for tool in kwargs["xml_tools"]]
    return kwargs


def render(tokenizer: Any, row: Mapping[str, Any], prompt: bool = False) -> str:
    """The row's text, for people; with `prompt`, its messages and the opening of an answer.

    Its tokens are those of `token_ids`: the text does not tell the template's control tokens from
    a message's control strings.
    """
    reader = chat_tokenizer(tokenizer)
    return reader.marks.off(_marked(reader, row, prompt))


def _marked(reader: Any, row: Mapping[str, Any], prompt: bool) -> str:
    return reader.apply_chat_template(
        row["messages"], tokenize=False, add_generation_prompt=prompt, **template_kwargs(row)
    )


def token_ids(tokenizer: Any, row: Mapping[str, Any], prompt: bool = False) -> list[int]:
    """Ids of `render`'s text, of which only the template's control tokens are control tokens."""
    reader = chat_tokenizer(tokenizer)
    return reader(_marked(reader, row, prompt), add_special_tokens=False)["input_ids"]


def opening_and_answer(
    tokenizer: Any, prompt: Mapping[str, Any], chat: Mapping[str, Any]
) -> tuple[list[int], list[int]] | None:
    """Ids of `prompt`'s messages with the opening of an answer, and of what follows it in `chat`.

    None where the chat's text does not begin with the prompt's.
    """
    reader = chat_tokenizer(tokenizer)
    opening, text = _marked(reader, prompt, True), _marked(reader, chat, False)
    if not text.startswith(opening):
        return None
    ids = reader([opening, text.removeprefix(opening)], add_special_tokens=False)["input_ids"]
    return ids[0], ids[1]


def tokens_and_mask(tokenizer: Any, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Token ids of the row and 1 for each token that is trained, else 0.

    The mask is the template's `generation` blocks: each assistant's turn from its header to the
    newline after `<|im_end|>`, the pre-filled empty think block included.
    """
    kwargs = {"return_dict": True, "return_assistant_tokens_mask": True, **template_kwargs(row)}
    out = chat_tokenizer(tokenizer).apply_chat_template(row["messages"], **kwargs)
    return list(out["input_ids"]), list(out["assistant_masks"])
