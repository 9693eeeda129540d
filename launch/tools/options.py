"""Options that several commands share; each is read from a variable of `make` too."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

from ground.errors import UserError

if TYPE_CHECKING:
    from launch.recipe.scale import Scale as ScaleOf

Stage = Annotated[
    str, typer.Argument(help="a stage of recipes/pipeline.yaml, or a recipe file of your own")
]
Scale = Annotated[str, typer.Option(envvar="SCALE", help="a file of recipes/scales/, or a path")]
Text = Annotated[
    str, typer.Option(envvar="TEXT", help="text of your own, in place of every mixture")
]
Origin = Annotated[
    str, typer.Option(envvar="ORIGIN", help="hub or standin, in place of the scale file's")
]
Start = Annotated[
    str,
    typer.Option(
        "--from", envvar="FROM", help="a SmolLM3 folder or hub id, in place of the stage before"
    ),
]
Model = Annotated[str, typer.Option(envvar="MODEL", help="a transformers folder")]


def scale_at(scale: str, text: str, origin: str) -> "ScaleOf":
    """The scale with what the command line gives in place of its file's. Raises UserError."""
    from launch.recipe.scale import load_scale

    given = os.environ.get("SUBSTITUTES", "")
    if given not in ("", "0", "1"):
        raise UserError(f"SUBSTITUTES={given[:100]}: write 1 or 0, or leave it out")
    return load_scale(scale, text, origin, bool(int(given)) if given else None)
