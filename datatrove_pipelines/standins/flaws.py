"""Ways in which the rejected answer of an embedded preference pair is wrong."""

import random
import re
from collections.abc import Callable, Sequence

from datatrove_pipelines.standins.calls import ToolTask, call_text, draw_arguments
from datatrove_pipelines.standins.tasks import Task
from datatrove_pipelines.standins.words import LANGUAGES, NAMES, PLACES


def with_thought(thought: str, answer: str, thinks: bool) -> str:
    """An assistant's text in a mode; the chat template writes the empty block of /no_think."""
    return f"<think>\n{thought}\n</think>\n{answer}" if thinks else answer


def wrong_answer(rng: random.Random, task: Task, thinks: bool) -> str:
    """The reasoning is kept, the answer's result is another of its kind."""
    say = LANGUAGES[task.language]
    others: Sequence[str] = {
        "capital": [city for _, city in say.capitals],
        "opposite": [word for pair in say.opposites for word in pair],
        "day": say.days,
        "document": PLACES,
    }.get(task.kind, ())
    if task.result.isdigit():
        others = [str(int(task.result) + more) for more in (1, 2, 3)]
    wrong = rng.choice([other for other in others if other != task.result])
    head, _, tail = task.answer.rpartition(task.result)  # it comes last in every answer
    return with_thought(task.trace, head + wrong + tail, thinks)


def wrong_mode(rng: random.Random, task: Task, thinks: bool) -> str:
    """Reasons in /no_think, does not in /think."""
    return with_thought(task.trace, task.answer, not thinks)


def wrong_language(rng: random.Random, task: Task, thinks: bool) -> str:
    """Greets in another language instead of answering."""
    other = rng.choice([name for name in LANGUAGES if name != task.language])
    answer = LANGUAGES[other].welcome.format(name=rng.choice(NAMES))
    return with_thought(task.trace, answer, thinks)


def repeats(rng: random.Random, task: Task, thinks: bool) -> str:
    """Repeats the answer many times."""
    return with_thought(task.trace, " ".join([task.answer] * 3), thinks)


def no_think_close(rng: random.Random, task: Task, thinks: bool) -> str:
    """Reasoning that never ends."""
    return f"<think>\n{task.trace}\n{task.answer}"


TASK_FLAWS: dict[str, Callable[[random.Random, Task, bool], str]] = {
    flaw.__name__: flaw
    for flaw in (wrong_answer, wrong_mode, wrong_language, repeats, no_think_close)
}


def wrong_tool(rng: random.Random, task: ToolTask, form: str) -> str:
    """Calls the other tool on offer."""
    (other,) = (tool for tool in task.offered if tool is not task.tool)
    return call_text(other.name, draw_arguments(rng, other), form)


def unlisted_tool(rng: random.Random, task: ToolTask, form: str) -> str:
    """Calls a tool that nobody offered."""
    return call_text(rng.choice(("search", "run", "ask", "lookup")), task.arguments, form)


def broken_call(rng: random.Random, task: ToolTask, form: str) -> str:
    """JSON or code without its closing brackets."""
    return re.sub(r"[)}]+\n", "\n", call_text(task.tool.name, task.arguments, form))


def no_call(rng: random.Random, task: ToolTask, form: str) -> str:
    """Makes an answer up instead of calling."""
    return task.answer


# These replace the call, after the same thought.
TOOL_FLAWS: dict[str, Callable[[random.Random, ToolTask, str], str]] = {
    flaw.__name__: flaw for flaw in (wrong_tool, unlisted_tool, broken_call, no_call)
}
