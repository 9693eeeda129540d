"""`make chat`: talk to a checkpoint in the terminal."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ground.chat import chat_tokenizer
from ground.errors import UserError
from launch.run.folder import runs_root
from launch.run.model import checkpoint_folder, load_checkpoint
from launch.tools.options import Model, Origin, Scale, Text, scale_at

MODES = {"think": True, "no_think": False}


def command(
    scale: Scale,
    text: Text = "",
    origin: Origin = "",
    model: Model = "",
    mode: Annotated[str, typer.Option(envvar="MODE", help="think or no_think")] = "no_think",
) -> None:
    """Talk to a checkpoint; the scale's release where none is named."""
    chat(
        Path(model) if model else runs_root() / scale_at(scale, text, origin).name / "release", mode
    )


def chat(model_folder: Path, mode: str) -> None:
    """Read lines, print answers as they are generated; an empty line or end of file ends it.

    Sampling is that of the checkpoint's generation config; the conversation is kept whole.
    """
    if mode not in MODES:
        raise UserError(f"MODE={mode}: use think or no_think")
    model, tokenizer = load_checkpoint(checkpoint_folder(model_folder))
    if not tokenizer.chat_template:
        raise UserError(f"MODEL={model_folder}: no chat template, a base model; take a release")
    print(f"{model_folder}, /{mode}; an empty line ends it")
    messages: list[dict[str, str]] = []
    while text := _ask():
        messages.append({"role": "user", "content": text})
        answer = _answer(model, tokenizer, messages, MODES[mode])
        messages.append({"role": "assistant", "content": answer})


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _answer(model: Any, tokenizer: Any, messages: list[dict[str, str]], think: bool) -> str:
    from transformers import TextStreamer

    prompt = chat_tokenizer(tokenizer).apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=think, return_tensors="pt",
        return_dict=True,
    ).to(model.device)  # fmt: skip
    start = prompt["input_ids"].shape[1]
    room = model.config.max_position_embeddings - start
    if room < 1:
        raise UserError(
            f"the conversation has {start} tokens, the model's whole window; begin anew"
        )
    out = model.generate(
        **prompt,
        max_new_tokens=room,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=False),
    )
    answer = out[0, start:]
    if answer[-1] == tokenizer.eos_token_id:
        answer = answer[:-1]
    text: str = tokenizer.decode(answer)
    return text
