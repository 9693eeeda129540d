"""`make export`: a release, and its variant for twice the window, as other runtimes load it."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ground.errors import UserError, did_you_mean
from ground.files import folder_aside
from launch.run.folder import runs_root
from launch.run.model import checkpoint_folder
from launch.tools.options import Model, Origin, Scale, Text, scale_at

GGUF = ("f32", "f16", "bf16", "q8_0", "q4_k_m")
SMALL = ("int8", "int4")  # transformers folders
# Format: the module that it takes, and the extra of pyproject.toml that installs it.
NEEDS = {
    "q4_k_m": ("llama_cpp", "llama"),
    "int8": ("bitsandbytes", "small"),
    "int4": ("bitsandbytes", "small"),
}


def command(
    scale: Scale,
    text: Text = "",
    origin: Origin = "",
    model: Model = "",
    formats: Annotated[
        str, typer.Option("--format", envvar="FORMAT", help=" ".join(GGUF + SMALL))
    ] = "f16",
) -> None:
    """Write a checkpoint (the release) for llama.cpp, as GGUF, or with small weights."""
    from launch.walk import resolve

    at = scale_at(scale, text, origin)
    release = runs_root() / at.name / "release"
    folder = checkpoint_folder(model or release)
    if folder.resolve() == release.resolve():
        name = resolve("release", at).recipe.recipe.model_name
    else:
        name = folder.parent.name if folder.name == "hf" else folder.resolve().name
    export(folder, runs_root() / at.name / "export", name, formats.split(","))


def export(folder: Path, target: Path, name: str, formats: list[str]) -> None:
    """Write `folder`, and `folder`/yarn where there is one, in each format below `target`.

    GGUF files are `<name>-<format>.gguf` and `<name>-yarn-<format>.gguf`; int8 and int4 are
    transformers folders, the longer window in their yarn/. All is checked before anything is written.
    """
    from runtimes.gguf_file import read_config

    for format in formats:
        check_format(format)
    variants = {name: folder}
    if (folder / "yarn" / "config.json").is_file():
        variants[f"{name}-yarn"] = folder / "yarn"
    for variant in variants.values():
        read_config(variant)
    for format in formats:
        if format in SMALL:
            _write_small(variants, target / format, format)
            continue
        for variant_name, variant in variants.items():
            _write_gguf(variant, target / f"{variant_name}-{format}.gguf", format, variant_name)


def check_format(format: str) -> None:
    """Refuse an unknown format, and one whose package is not installed."""
    if format not in GGUF + SMALL:
        raise UserError(f"FORMAT={format}: {did_you_mean(format, GGUF + SMALL)}")
    module, extra = NEEDS.get(format, ("gguf", ""))
    if find_spec(module) is None:
        time = " (it compiles llama.cpp: minutes), or take FORMAT=q8_0" if extra == "llama" else ""
        raise UserError(
            f"FORMAT={format}: {module} is not installed; run `{sys.executable} -m pip install "
            f"-e '.[{extra}]'`{time}"
        )


def _write_gguf(folder: Path, file: Path, format: str, name: str) -> None:
    from runtimes.gguf_file import DTYPES, write_gguf
    from runtimes.quantise import write_quantised

    (write_gguf if format in DTYPES else write_quantised)(folder, file, format, name)
    print(f"{file}: {file.stat().st_size / 1e6:,.1f} MB")


def _write_small(variants: dict[str, Path], target: Path, format: str) -> None:
    from launch.stages.release import write_yarn
    from runtimes.gguf_file import read_config
    from runtimes.small_weights import write_small

    folder, *longer = variants.values()
    with folder_aside(target) as aside:
        write_small(folder, aside, format)
        for variant in longer:
            write_yarn(aside, read_config(variant).rope_parameters["factor"])
    size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    print(f"{target}: {size / 1e6:,.1f} MB")
