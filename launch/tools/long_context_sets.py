"""`make eval-longctx`: which long-context set is scored, on what."""

from pathlib import Path
from typing import Annotated

import typer

from ground.errors import UserError
from launch.run.folder import runs_root
from launch.tools.options import Model, Origin, Scale, Text, scale_at


def command(
    scale: Scale,
    text: Text = "",
    origin: Origin = "",
    model: Model = "",
    corpus: Annotated[
        str, typer.Option(envvar="CORPUS", help="jsonl file or folder of texts")
    ] = "",
    limit: Annotated[int, typer.Option(envvar="LIMIT", help="samples a cell; 0: the suite's")] = 0,
    chat: Annotated[
        bool, typer.Option(envvar="CHAT", help="in the model's chat template: 1 or 0")
    ] = False,
    suite: Annotated[
        str, typer.Option(envvar="SUITE", help="longctx, ours, or ruler, as published")
    ] = "longctx",
) -> None:
    """Score a long-context set; the scale's release and held-out text where none is named."""
    from launch.tools.long_context import evaluate_long_context
    from launch.tools.ruler import evaluate_ruler

    score = {"longctx": evaluate_long_context, "ruler": evaluate_ruler}.get(suite)
    if score is None:
        raise UserError(f"SUITE={suite}: not a long-context set; use longctx or ruler")
    runs = runs_root() / scale_at(scale, text, origin).name
    texts = Path(corpus) if corpus else runs / "held-out" / "held_out.jsonl"
    folder = Path(model) if model else runs / "release"
    name = f"{folder.parent.name}-hf" if folder.name == "hf" else folder.name
    parts = [name, *(["chat"] if chat else []), *(["ruler"] if suite == "ruler" else [])]
    print(score(folder, texts, runs / "longctx" / "-".join(parts), limit, chat))
