"""`make export`: a release, and its variant for twice the window, as other runtimes load it."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ground.errors import UserError, did_you_mean
from ground.files import copy_aside, folder_aside
from launch.run.folder import runs_root
from launch.run.model import checkpoint_folder
from launch.tools.options import Model, Origin, Scale, Text, scale_at

GGUF = ("f32", "f16", "bf16", "q8_0", "q4_k_m")
SMALL = ("int8", "int4")  # transformers folders
FORMATS = (*GGUF, *SMALL, "onnx")
# Format: the module that it takes, and the extra of pyproject.toml that installs it.
NEEDS = {
    "q4_k_m": ("llama_cpp", "llama"),
    "int8": ("bitsandbytes", "small"),
    "int4": ("bitsandbytes", "small"),
    "onnx": ("onnxscript", "onnx"),
}


def command(
    scale: Scale,
    text: Text = "",
    origin: Origin = "",
    model: Model = "",
    formats: Annotated[
        str, typer.Option("--format", envvar="FORMAT", help=" ".join(FORMATS))
    ] = "f16",
) -> None:
    """Write a checkpoint (the release) for llama.cpp, as GGUF, or with small weights."""
    from launch.walk import resolve

    at = scale_at(scale, text, origin)
    release = runs_root() / at.name / "release"
    folder = checkpoint_folder(model or release)
    name, own = folder.resolve().name, resolve("release", at).recipe.recipe.model_name
    if folder.resolve() == release.resolve():
        name = own
    elif folder.name == "hf":
        name = folder.parent.name
    elif name == own:
        raise UserError(
            f"MODEL={folder}: its files would have the names of the release's; rename it"
        )
    export(folder, runs_root() / at.name / "export", name, formats.split(","))


def export(folder: Path, target: Path, name: str, formats: list[str]) -> None:
    """Write `folder`, and `folder`/yarn where there is one, in each format below `target`.

    Each is `<name>-<format>`, a .gguf file or a folder; of the longer window `<name>-yarn-<format>`,
    or yarn/ in an int8 or int4 folder. All is checked before anything is written.
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
            _write_small(variants, target / f"{name}-{format}", format)
        elif format == "onnx":
            _write_onnx(variants, target)
        else:
            for variant_name, variant in variants.items():
                _write_gguf(variant, target / f"{variant_name}-{format}.gguf", format, variant_name)


def check_format(format: str) -> None:
    """Refuse an unknown format, and one whose package is not installed."""
    if format not in FORMATS:
        raise UserError(f"FORMAT={format}: {did_you_mean(format, FORMATS)}")
    if format in NEEDS and find_spec(NEEDS[format][0]) is None:
        module, extra = NEEDS[format]
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


def _write_onnx(variants: dict[str, Path], target: Path) -> None:
    from runtimes.onnx_file import write_onnx
    from runtimes.small_weights import COPIED

    for name, folder in variants.items():
        place = target / f"{name}-onnx"
        with folder_aside(place) as aside:
            write_onnx(folder, aside / "model.onnx")
            for file in {one for kind in (*COPIED, "*config.json") for one in folder.glob(kind)}:
                copy_aside(file, aside / file.name)
        size = sum(file.stat().st_size for file in place.glob("model.onnx*"))
        print(f"{place}: {size / 1e6:,.1f} MB")
