"""Which server runs a release on this machine, and the command that starts it.

    a folder  vLLM's, where `vllm` is installed, else `transformers serve`
    a .gguf   llama.cpp's: `llama-server` where it is on PATH, else the same of the package xllamacpp

All of them take `tools`, `chat_template_kwargs` (the mode) and `stream`, and return reasoning and
tool calls apart. llama-cpp-python's own server does not: it passes nothing on to the template, so
that there is one mode, and leaves tool calls in the text.
"""

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ground.errors import UserError
from ground.files import read_json_object
from ground.weights import smollm3_config

NEEDED = ("fastapi", "openai", "uvicorn")


@dataclass(frozen=True)
class ServerCommand:
    """A server's command line. `model` is its model's name for clients, `remark` a line for people."""

    name: str
    words: tuple[str, ...]
    model: str
    remark: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def server_command(model: Path, host: str, port: int) -> ServerCommand:
    """The server for a folder or a GGUF file. Raises UserError, before anything is loaded."""
    if model.suffix == ".gguf":
        check_gguf(model)
        return _llama_cpp(model, host, port)
    has_response_template = check_folder(model)
    if program := vllm():
        return _vllm(program, model, host, port)
    return _transformers(model, host, port, has_response_template)


def vllm() -> str | None:
    """The program `vllm`, beside this Python or on PATH."""
    return shutil.which("vllm", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def check_folder(folder: Path) -> bool:
    """Raises UserError for what is no SmolLM3 to talk to; whether it has a response_template."""
    smollm3_config(
        folder,
        "name the folder of a SmolLM3, as `make release` writes one, or a .gguf file, as "
        "`make export` does",
    )
    file = folder / "tokenizer_config.json"
    settings = read_json_object(file) if file.is_file() else {}
    if not (folder / "chat_template.jinja").is_file() and not settings.get("chat_template"):
        raise UserError(f"MODEL={folder}: no chat template, a base model; serve a release")
    return bool(settings.get("response_template"))


def check_gguf(file: Path) -> None:
    """Raises UserError for a file that is no SmolLM3 to talk to; reads its metadata alone."""
    if not file.is_file():
        raise UserError(f"MODEL={file}: no such file; `make export` writes one")
    from gguf import GGUFReader

    try:
        fields = GGUFReader(file).fields
        kind = str(fields["general.architecture"].contents())
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"MODEL={file}: no GGUF file, or a damaged one ({error})") from error
    if kind != "smollm3":
        raise UserError(f"MODEL={file}: general.architecture is {kind!r}, not 'smollm3'")
    if "tokenizer.chat_template" not in fields:
        raise UserError(f"MODEL={file}: no chat template, a base model; export a release")


def _llama_cpp(file: Path, host: str, port: int) -> ServerCommand:
    if binary := shutil.which("llama-server"):
        where = ("--host", host, "--port", str(port), "--alias", file.stem)
        return ServerCommand(
            "llama-server", (binary, "-m", str(file), *where, "--jinja"), file.stem
        )
    if importlib.util.find_spec("xllamacpp") is None:
        raise UserError(
            f"MODEL={file}: llama.cpp's server is missing; `pip install -e '.[serve]'`, or "
            "put `llama-server` on PATH"
        )
    words = _python("runtimes.llama_server", file, host, port)
    return ServerCommand("llama.cpp's server", words, file.stem)


def _vllm(binary: str, folder: Path, host: str, port: int) -> ServerCommand:
    name, root = folder.resolve().name, Path(__file__).parent.parent
    # A release has the plugin as one file; ours imports its neighbour, in vLLM's environment too.
    plugin = folder / "vllm_tool_parser.py"
    if not plugin.is_file():
        plugin = Path(__file__).with_name("vllm_tool_parser.py")
    words = (
        binary, "serve", str(folder), "--host", host, "--port", str(port),
        "--served-model-name", name, str(folder), "--enable-auto-tool-choice",
        "--tool-call-parser", "smollm3", "--tool-parser-plugin", str(plugin),
        "--reasoning-parser", "smollm3", "--reasoning-parser-plugin", str(plugin),
        "--allowed-origins", "[]",  # else any web page could ask it
    )  # fmt: skip
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(root)]))
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    return ServerCommand("vllm serve", words, name, environment=environment)


def _transformers(folder: Path, host: str, port: int, parses: bool) -> ServerCommand:
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"transformers serve lacks {', '.join(missing)}: `pip install transformers[serving]`"
        )
    remark = (
        "" if parses else f"{folder / 'tokenizer_config.json'} has no response_template: tool calls "
        "and thoughts stay in the text; `make release` writes one"
    )  # fmt: skip
    return ServerCommand(
        "transformers serve",
        _python("runtimes.transformers_server", folder, host, port),
        folder.resolve().name,
        remark,
        {"HF_HUB_OFFLINE": "1"},
    )


def _python(module: str, model: Path, host: str, port: int) -> tuple[str, ...]:
    return (sys.executable, "-m", module, str(model), host, str(port))
