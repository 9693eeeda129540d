"""A transformers folder: the check that a user's path is one, and loading it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ground.chat import text_ids
from ground.checksums import verify_if_sealed
from ground.errors import UserError, first_line


def checkpoint_folder(named: str | Path) -> Path:
    """The folder that MODEL= names. Raises UserError where it holds no checkpoint."""
    folder = Path(named)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"MODEL={folder}: no config.json there; name a transformers folder, as `make release` writes one"
        )
    verify_if_sealed(folder)
    return folder


def load_checkpoint(folder: Path, config: Any = None, dtype: Any = "auto") -> tuple[Any, Any]:
    """(model, tokenizer) for inference, on the GPU where there is one; `config` replaces its own.
    Raises UserError for a folder that does not load."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: does not load ({first_line(error)}); name a transformers folder") from error  # fmt: skip
    return model.eval().to(device), tokenizer


def encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Text to token ids, as in pretraining: none around it, and whatever it spells is text."""
    return partial(text_ids, tokenizer)
