"""A transformers folder: the check that a user's path is one, and loading it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ground.checksums import verify_if_sealed
from ground.errors import UserError


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
    """(model, tokenizer) for inference, on the GPU where there is one; `config` replaces its own."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype)
    return model.eval().to(device), AutoTokenizer.from_pretrained(folder)


def encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Text to token ids, without special tokens around it."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return encode
