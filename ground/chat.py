"""What somebody wrote into a conversation is text, whatever it spells: it opens and ends no turn.

A template writes control tokens and messages into one string, where an `<|im_end|>` in a message
looks like the template's own. So before the template runs, messages get a mark behind each
character that a token could begin with. A tokenizer looks for added tokens before it normalises:
the marked ones are not found. Then its normalizer takes the marks out, and the rest is encoded as
any text is, merges included. Messages without control strings keep the tokens that they had.
"""

import copy
import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache, partial
from typing import Any

# Unicode reserves it for a program's own use, so that texts do not have it; where one does, it stays.
MARK = "\ufdd0"
# The tags that an assistant's message is made of; in calls and in other messages they are text.
SPOKEN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<code>", "</code>")


class Marks:
    """Marks against the added tokens of one tokenizer."""

    def __init__(self, added: Iterable[str]):
        tokens = [token for token in added if len(token) > 1 and not token.isspace()]
        first = f"[{re.escape(''.join(sorted({token[0] for token in tokens}))) or '<'}]"
        self.tokens = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        self.pattern = f"(?<={first}){MARK}"
        self.places = re.compile(first)
        # Not at the end: a mask may end there, at a character that has to be found in a token.
        self.spoken_places = re.compile(rf"(?!{'|'.join(SPOKEN)}){first}(?!\Z)")

    def on(self, value: Any, spoken: bool = False) -> Any:
        """`value` with marks in all its strings; in `spoken` ones the assistant's tags stay tokens."""
        if isinstance(value, str):
            return (self.spoken_places if spoken else self.places).sub(rf"\g<0>{MARK}", value)
        if isinstance(value, Mapping):
            return {self.on(key): self.on(item, spoken) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.on(item, spoken) for item in value]
        return value

    def on_messages(self, messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages with marks in whatever their writers wrote."""
        return [
            {
                key: self.on(item, spoken=key == "content" and message["role"] == "assistant")
                for key, item in message.items()
            }
            for message in messages
        ]

    def off(self, text: str) -> str:
        """The text as it is without marks."""
        return re.sub(self.pattern, "", text)

    def count(self, marked: str) -> int:
        """Control strings in a marked text that would be tokens without the marks."""
        if MARK not in marked:
            return 0
        return len(self.tokens.findall(self.off(marked))) - len(self.tokens.findall(marked))


def chat_tokenizer(tokenizer: Any) -> Any:
    """A copy for reading conversations: control tokens are those that its template writes.

    Its `apply_chat_template` with `tokenize=False` leaves the marks in the text, which the copy then
    encodes without them; `marks.off` is for people. The copy is not to be saved. A tokenizer that is
    not of the tokenizers library is returned as it is.
    """
    if hasattr(tokenizer, "marks") or not tokenizer.is_fast:
        return tokenizer
    return _copied(tokenizer, len(tokenizer), str(tokenizer.chat_template))


@lru_cache(maxsize=4)
def _copied(tokenizer: Any, size: int, template: str) -> Any:
    marks, backend = Marks(tokenizer.get_added_vocab()), tokenizer.backend_tokenizer
    table = json.loads(backend.to_str())
    for entry in table["added_tokens"]:
        entry["normalized"] = False  # or it would be looked for when the marks are gone
    normalizers = [{"type": "Replace", "pattern": {"Regex": marks.pattern}, "content": ""}]
    normalizers += [table["normalizer"]] if table["normalizer"] else []
    table["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    copied = copy.copy(tokenizer)
    copied._tokenizer = type(backend).from_str(json.dumps(table))
    copied.marks = marks
    copied.apply_chat_template = partial(_apply, tokenizer, copied)
    return copied


def _apply(
    tokenizer: Any, copied: Any, messages: Any, *, tokenize: bool = True, **options: Any
) -> Any:
    marks, apply = copied.marks, type(tokenizer).apply_chat_template
    marked = {
        name: value if name == "chat_template" else marks.on(value)
        for name, value in options.items()
    }
    return apply(copied, marks.on_messages(messages), tokenize=tokenize, **marked)


def text_ids(tokenizer: Any, text: str | list[str]) -> Any:
    """Token ids of a text, or of each of a list, in which nothing is a control token."""
    reader = chat_tokenizer(tokenizer)
    marked = reader.marks.on(text) if hasattr(reader, "marks") else text
    return reader(marked, add_special_tokens=False, verbose=False)["input_ids"]


def holds_control_strings(
    tokenizer: Any, messages: Iterable[Mapping[str, Any]], variables: Mapping[str, Any]
) -> bool:
    """Whether messages or the template's variables spell a token that the template alone writes."""
    marks: Marks = chat_tokenizer(tokenizer).marks
    marked = [marks.on_messages(messages), marks.on(variables)]
    return marks.count(json.dumps(marked, ensure_ascii=False)) > 0
