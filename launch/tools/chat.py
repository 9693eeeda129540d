"""`make chat`: talk to a checkpoint or a server in the terminal; tools are called."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Protocol

import typer

from ground.errors import UserError, did_you_mean
from ground.tool_calls import parse
from launch.run.folder import runs_root
from launch.tools.chat_models import Asked, Endpoint, Folder, Message, Show, TooLong
from launch.tools.chat_tools import AS_CODE, AS_JSON, SIGNATURES, Session
from launch.tools.options import Model, Origin, Scale, Text, scale_at

MODES = {"think": True, "no_think": False}
CALLS = ("none", "json", "code")
ROUNDS = 5  # of calls, until an answer without one is waited for no longer
HELP = """\
/think, /no_think   answer with or without a trace of thoughts, from now on
/calls              offer tools as JSON, as Python functions, or not at all, one after the other
/new                forget the conversation
/help               this list
Ctrl-C stops an answer. An empty line, Ctrl-D, or Ctrl-C at the prompt ends the chat."""

# What a terminal would obey: neither a model nor a program in the sandbox may write it.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
COMMANDS = ("/think", "/no_think", "/calls", "/new", "/help")


def command(
    scale: Scale,
    text: Text = "",
    origin: Origin = "",
    model: Model = "",
    mode: Annotated[str, typer.Option(envvar="MODE", help="think or no_think")] = "no_think",
    calls: Annotated[
        str, typer.Option(envvar="CALLS", help="offered as json or code, or none")
    ] = "none",
    endpoint: Annotated[
        str, typer.Option(envvar="ENDPOINT", help="a server; MODEL is the model's name there")
    ] = "",
) -> None:
    """Talk to a checkpoint, the scale's release where none is named, or to a server."""
    check_words(mode, calls)
    if endpoint:
        return chat(Endpoint(endpoint, model), mode, calls)
    folder = Path(model) if model else runs_root() / scale_at(scale, text, origin).name / "release"
    return chat(Folder(folder), mode, calls)


def check_words(mode: str, calls: str) -> None:
    """Raises UserError before anything is loaded."""
    if mode not in MODES:
        raise UserError(f"MODE={mode}: use think or no_think")
    if calls not in CALLS:
        raise UserError(f"CALLS={calls}: use json, code or none")


class Speaker(Protocol):
    """Who answers: gives the text of its answer to `show`, piece by piece."""

    name: str

    def stream(self, messages: list[Message], asked: Asked, show: Show) -> None: ...


def chat(speaker: Speaker, mode: str, calls: str = "none") -> None:
    """Read lines, print answers as they are generated; an empty line or end of file ends it.

    The conversation is kept whole. Lines that begin with a slash and are one word are commands.
    """
    check_words(mode, calls)
    talk = Talk(speaker, MODES[mode], calls)
    print(f"{speaker.name}, /{mode}; an empty line ends it, /help says what else there is")
    while text := _ask():
        if re.fullmatch(r"/\w*", text):
            talk.obey(text)
        else:
            talk.answer(text)


def _ask() -> str:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


@dataclass
class Talk:
    """A conversation: who answers, how, and what was said."""

    speaker: Speaker
    thinks: bool
    calls: str = "none"
    messages: list[Message] = field(default_factory=list)
    session: Session = field(default_factory=Session)

    def obey(self, word: str) -> None:
        """Carry out one of HELP's commands, and say so in a line."""
        match word:
            case "/think" | "/no_think":
                self.thinks = MODES[word[1:]]
                print(f"{word} from now on")
            case "/calls":
                self.calls = CALLS[(CALLS.index(self.calls) + 1) % len(CALLS)]
                print(f"tools: {self.calls}")
            case "/new":
                self.messages, self.session = [], Session()
                print("forgotten")
            case "/help":
                print(HELP)
            case _:
                print(f"{word}: no such command; {did_you_mean(word, COMMANDS)}")

    def answer(self, text: str) -> None:
        """Answer a message; the tools that are called are, and their results are answered too."""
        before = len(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            for _ in range(ROUNDS):
                if not self._answer_once():
                    return
            print(f"stopped: {ROUNDS} rounds of calls, and no answer")
        except KeyboardInterrupt:
            print("\nstopped")
        except UserError as error:
            del self.messages[before:]
            remedy = "write a shorter one, or /new" if isinstance(error, TooLong) else "try again"
            print(f"{error}; your message is taken back, {remedy}")
        if len(self.messages) == before + 1:  # nothing was said
            del self.messages[before:]

    def _answer_once(self) -> bool:
        """Print and keep what the model says, call the tools it calls; whether it called any."""
        display, message = Display(), {"role": "assistant", "content": ""}

        def show(piece: str) -> None:
            message["content"] += piece
            display.write(piece)

        asked = Asked(
            self.thinks,
            AS_JSON if self.calls == "json" else (),
            AS_CODE if self.calls == "code" else (),
        )
        try:
            self.speaker.stream(self.messages, asked, show)
        finally:  # what an interrupt cut off is kept, a trace closed
            if message["content"]:
                if message["content"].count("<think>") > message["content"].count("</think>"):
                    message["content"] += "\n</think>\n"
                self.messages.append(message)
        print()
        calls = () if self.calls == "none" else parse(message["content"], SIGNATURES).calls
        for call in calls:
            result = self.session.result(call)
            print(CONTROL.sub("", f"{call.name}: {result}"))
            self.messages.append({"role": "tool", "content": result})
        return bool(calls)


class Display:
    """Prints an answer as it comes; what stands between <think> and </think> is dimmed."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console, self.style = Console(), ""

    def write(self, piece: str) -> None:
        for part in re.split("(</?think>)", CONTROL.sub("", piece)):
            self.style = "dim" if part == "<think>" else self.style
            self.console.out(part, style=self.style, end="", highlight=False)
            self.style = "" if part == "</think>" else self.style
        self.console.file.flush()
