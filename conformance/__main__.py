"""`python -m conformance MODEL`: is it SmolLM3 there? A line a case; status 0, 1 (failed) or 2 (a mistake).

MODEL is a transformers folder, a GGUF file or the URL of an OpenAI-compatible server, with the kit's
own model (`conformance/kit`, the default). With --reference, MODEL is any SmolLM3, and the expected
values are what transformers makes of that folder.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

# typer has its own copy of click, whose base class it does not export.
from typer._click.exceptions import ClickException

from conformance.cases import KIT, Answered, Case, Render, read_cases
from conformance.check import FAILED, PASSED, Checker
from conformance.reference import NO_SMOLLM3, Expected, Reference, Stored, check_smollm3, expected
from conformance.runtime import Runtime
from ground.errors import UserError, fail
from ground.loopback import never_proxied

if TYPE_CHECKING:
    from tokenizers import Tokenizer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def command(
    model: Annotated[str, typer.Argument(envvar="MODEL", help="a folder, a GGUF file or a URL")] = str(KIT),
    yarn: Annotated[str, typer.Option(envvar="YARN", help="its YaRN variant, where not beside it")] = "",
    reference: Annotated[str, typer.Option(envvar="REFERENCE", help="the transformers folder of MODEL, where it is not the kit's model")] = "",
) -> None:  # fmt: skip
    """Hold MODEL against the kit's expected values."""
    sys.exit(conform(model or str(KIT), yarn, reference))


def conform(model: str, yarn: str = "", reference: str = "") -> int:
    """Print a line a case; returns 0, or 1 where a case failed. Raises UserError."""
    folder = Path(reference) if reference else KIT
    check_smollm3(folder)
    cases, values = cases_of(folder, is_kit=not reference)
    runtime = runtime_at(model, folder, is_kit=not reference)
    beside = yarn or yarn_beside(model)
    variant = runtime_at(beside, folder / "yarn", is_kit=not reference) if beside else None
    print(f"{runtime.name}: {len(cases)} cases, expected values of {folder}", flush=True)
    outcomes = []
    for result in Checker(runtime, variant, values, _decoder(folder)).results(cases):
        print(result.line(), flush=True)
        outcomes.append(result.outcome)
    passed, failed = outcomes.count(PASSED), outcomes.count(FAILED)
    print(f"{passed} passed, {failed} failed, {len(outcomes) - passed - failed} not applicable")
    return int(failed > 0)


def cases_of(folder: Path, is_kit: bool) -> tuple[list[Case], Expected]:
    """The cases with what is expected of them."""
    cases = read_cases(KIT / "cases.json")
    if is_kit:
        return cases, Stored(KIT / "expected.npz")
    # Only the kit's model has answers that are set.
    reference = Reference(folder)
    kept = [case for case in cases if not isinstance(case, Answered)]
    if not reference.tokenizer.chat_template:  # a base model
        kept = [case for case in kept if not isinstance(case, Render)]
    if not reference.has_yarn():
        kept = [case for case in kept if not getattr(case, "yarn", False)]
    return [expected(case, reference) for case in kept], reference


def runtime_at(model: str, reference: Path, is_kit: bool) -> Runtime:
    """The runtime of a folder, a GGUF file or a URL. Raises UserError."""
    if model.startswith(("http://", "https://")):
        from conformance.url import Url

        tokenizer = _tokenizer(reference)
        return Url(model, tokenizer.get_vocab_size(), tokenizer.get_vocab())
    path = Path(model)
    if path.suffix == ".gguf" and path.is_file():
        from conformance.gguf import Gguf

        return Gguf(path)
    if not path.is_dir():
        raise UserError(f"MODEL={model}: no such folder or GGUF file; {NO_SMOLLM3}")
    from conformance.folder import Folder

    if is_kit:
        _check_is_kit(path)
    return Folder(path)


def _check_is_kit(folder: Path) -> None:
    keys = ("vocab_size", "hidden_size", "num_hidden_layers")
    config, kit = check_smollm3(folder), check_smollm3(KIT)
    if any(config.get(key) != kit[key] for key in keys):
        raise UserError(
            f"MODEL={folder}: a SmolLM3, not the kit's own; give the folder that it is to be held "
            f"against: REFERENCE={folder}"
        )


def yarn_beside(model: str) -> str:
    """The YaRN variant of a folder (yarn/) or a file (name-yarn-f32.gguf of name-f32.gguf)."""
    path = Path(model)
    if (path / "yarn/config.json").is_file():
        return str(path / "yarn")
    name, _, kind = path.stem.rpartition("-")
    file = path.with_name(f"{name}-yarn-{kind}.gguf")
    return str(file) if path.suffix == ".gguf" and file.is_file() else ""


def _tokenizer(folder: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{file}: no such file; {NO_SMOLLM3}")
    return Tokenizer.from_file(str(file))


def _decoder(folder: Path) -> Callable[[Sequence[int]], str]:
    tokenizer = _tokenizer(folder)
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))


def main() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    never_proxied()
    try:
        app(standalone_mode=False)
    except UserError as error:
        sys.exit(fail(str(error)))
    except ClickException as error:
        message = error.format_message().strip().rstrip(".")
        sys.exit(fail(f"{message}; `python -m conformance --help` says what there is"))
    except typer.Abort:
        sys.exit(fail("interrupted", 130))


if __name__ == "__main__":
    main()
