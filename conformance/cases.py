"""What a runtime is asked, and what it is to answer: the cases of `kit/cases.json`.

Expected log-probabilities are in `kit/expected.npz`, [prompts, vocabulary] for each case,
as it should be (`<case>/right`) and under each fault that a runtime is known to make
(`<case>/<fault>`): which of them an answer equals says what is wrong there.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from ground.errors import UserError
from ground.files import read_json_object, write_json

KIT = Path(__file__).parent / "kit"
RIGHT = "right"
# A fault of a runtime, and what to look for there.
FAULTS = {
    "nope-rotated": "RoPE is applied in the NoPE layers (every 4th), too",
    "nope-inverted": "NoPE is inverted: RoPE in every 4th layer alone (no_rope_layers: 1 is RoPE)",
    "nope-shifted": "the NoPE layers are off by one: they are the 4th, 8th, ..., not the 1st, 5th, ...",
    "no-positions": "no layer is rotated",
    "theta-ignored": "rope_theta is ignored: 10,000 is used",
    "interleaved": "the rotation pairs 2i with 2i + 1 where the weights are for i with i + D/2",
    "yarn-ignored": "YaRN is ignored: plain RoPE is used",
    "yarn-unscaled": "YaRN's attention factor (0.1 ln(factor) + 1 on cos and sin) is left out",
}


@dataclass(frozen=True)
class Prompt:
    text: str
    ids: list[int]


@dataclass(frozen=True)
class Logits:
    """The log-probabilities behind each prompt. With `faults`, a case of these alone."""

    name: str
    says: str
    prompts: list[Prompt]
    faults: list[str] = field(default_factory=list)
    yarn: bool = False


@dataclass(frozen=True)
class Batch:
    """Prompts that share one forward pass: `packed`, `padded left` or `padded right`."""

    name: str
    says: str
    how: str
    prompts: list[Prompt]
    yarn: bool = False


@dataclass(frozen=True)
class Greedy:
    """Greedy tokens: {right or a fault: the new tokens of each prompt}."""

    name: str
    says: str
    prompts: list[Prompt]
    answers: dict[str, list[list[int]]]
    yarn: bool = False


@dataclass(frozen=True)
class Tokens:
    name: str
    says: str
    prompts: list[Prompt]


@dataclass(frozen=True)
class Chat:
    """A conversation with the template's variables; `tools` as servers take them."""

    messages: list[dict[str, Any]]
    variables: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Render:
    """Chats as the template writes them, up to the opening of the answer; `ids` its tokens."""

    name: str
    says: str
    chats: list[Chat]
    prompts: list[Prompt]


@dataclass(frozen=True)
class Message:
    """An assistant's text in its parts; `calls` are pairs of name and arguments."""

    reasoning: str | None = None
    content: str | None = None
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


@dataclass(frozen=True)
class Parse:
    """A text that a model may write, and its parts."""

    name: str
    says: str
    text: str
    parts: Message


@dataclass(frozen=True)
class Answered:
    """A chat that the kit's model answers with `text`: rendered, generated, ended and parsed."""

    name: str
    says: str
    chat: Chat
    prompt: Prompt
    text: str
    parts: Message


Case: TypeAlias = Logits | Batch | Greedy | Tokens | Render | Parse | Answered
KINDS: dict[str, type[Case]] = {
    kind.__name__.lower(): kind for kind in (Logits, Batch, Greedy, Tokens, Render, Parse, Answered)
}


def write_cases(file: Path, cases: list[Case]) -> None:
    rows = [{"kind": type(case).__name__.lower()} | asdict(case) for case in cases]
    write_json(file, {"cases": rows}, indent=None)


def read_cases(file: Path) -> list[Case]:
    """The cases of a kit. Raises UserError for a file that holds none."""
    from pydantic import TypeAdapter, ValidationError

    rows = read_json_object(file, "check the kit out again")["cases"]
    try:
        return [TypeAdapter(KINDS[row.pop("kind")]).validate_python(row) for row in rows]
    except (KeyError, ValidationError) as error:
        raise UserError(
            f"{file}: damaged ({type(error).__name__}); check the kit out again"
        ) from None
