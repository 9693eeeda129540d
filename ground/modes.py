"""Does an answer keep the requested mode, /think or /no_think? Pure functions of texts.

`keeps_mode` is the rule. `well_formed` also requires that the answer ends and is written exactly
as the chat template writes one. Training is scored by it, since there every answer has room to end.
"""

import re

END = "<|im_end|>"
OPEN, CLOSE = "<think>", "</think>"


def keeps_mode(answer: str, think: bool) -> bool:
    """Only in /think there is a closed, non-empty trace; then comes text that opens no other.

    The opening tag may be part of the prompt, and the answer may be cut off before `<|im_end|>`.
    """
    trace, _, rest = answer.rpartition(CLOSE)
    trace, rest = re.sub(rf"^\s*{OPEN}", "", trace), rest.replace(END, "")
    return bool(trace.strip()) == think and bool(rest.strip()) and OPEN not in rest


def well_formed(answer: str, thinks: bool) -> bool:
    """`keeps_mode`, ended by `<|im_end|>`, the trace first, and no tag but the trace's own two."""
    text = answer.removesuffix(END)
    tags = int(thinks)
    return (
        answer.endswith(END)
        and text.count(OPEN) == text.count(CLOSE) == tags
        and (not thinks or text.lstrip().startswith(OPEN))
        and keeps_mode(text, thinks)
    )
