"""Small SmolLM3 folders as a post-training stage leaves them: weights, tokenizer, template."""

import json
from pathlib import Path
from typing import Any

import torch
from conftest import edit
from safetensors.torch import load_file, save_file
from test_chat_template import make_tokenizer
from transformers import SmolLM3Config, SmolLM3ForCausalLM

WINDOW = 64


def write_model(folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """A random model of 4 layers, each with its seed."""
    tokenizer = make_tokenizer(short_system=True)
    torch.manual_seed(seed)
    config = SmolLM3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6},
        no_rope_layers=[1, 1, 1, 0],
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
        tie_word_embeddings=True,
    )
    model = SmolLM3ForCausalLM(config).to(dtype)
    with torch.no_grad():  # norms are all 1 otherwise
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generation = {"bos_token_id": None, "eos_token_id": 0, "repetition_penalty": 1.0 + seed}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def spoil(folder: Path, **tensors: Any) -> None:
    """Replace tensors of `model.safetensors`; None drops one. `__` stands for a dot."""
    found = weights(folder)
    for name, tensor in tensors.items():
        key = name.replace("__", ".")
        assert key in found or tensor is not None
        found.pop(key, None)
        if tensor is not None:
            found[key] = tensor
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: Path, old: str, new: str) -> None:
    edit(folder / "config.json", old, new)
