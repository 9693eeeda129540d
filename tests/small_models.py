"""Small SmolLM3 folders as a post-training stage leaves them: weights, tokenizer, template."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT, edit
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, SmolLM3Config, SmolLM3ForCausalLM

from eval_tasks.package_data import write_dataset
from posttrain.start import model_shapes
from posttrain.template import configured

TEMPLATE = ROOT / "recipes/posttrain/chat_template.jinja"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
WINDOW = 64
# Of the released 3B (tests/published.yaml holds the recipe to the same numbers).
SHAPE_3B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
NORM, INDEX = "model.norm.weight", "model.safetensors.index.json"


def make_tokenizer(template: Path = TEMPLATE, **settings: Any) -> PreTrainedTokenizerFast:
    """Bytes and the control tokens: every character is a token of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    tokenizer.chat_template = configured(template, **settings)
    return tokenizer


def random_model(
    tokenizer: Any, seed: int, window: int = WINDOW, std: float = 0.2, **more: Any
) -> SmolLM3ForCausalLM:
    """4 layers for the tokenizer's vocabulary; `more` are keys of the config."""
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": window,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6},
        "no_rope_layers": [1, 1, 1, 0],
        "initializer_range": std,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
        "tie_word_embeddings": True,
    }
    return SmolLM3ForCausalLM(SmolLM3Config(**values | more))


def write_model(folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """A random model of 4 layers, each with its seed."""
    tokenizer = make_tokenizer(short_system=True)
    model = random_model(tokenizer, seed).to(dtype)
    with torch.no_grad():  # norms are all 1 otherwise
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generation = {"bos_token_id": None, "eos_token_id": 0, "repetition_penalty": 1.0 + seed}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def save_model(folder: Path, seed: int, window: int = 512) -> Path:
    """A random model to be scored: it can pad, and its answers end where a turn does."""
    tokenizer = make_tokenizer()
    ids = {"pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    random_model(tokenizer, seed, window, std=0.5, **ids).save_pretrained(folder)
    tokenizer.pad_token = "<|im_end|>"
    tokenizer.save_pretrained(folder)
    return folder


def piqa_data(folder: Path) -> Path:
    """200 questions in the columns of PIQA, for a suite's local data."""
    rows = [
        {"goal": f"item {n} of the list is", "sol1": f"w{n * 7 % 90}", "sol2": f"word {n}", "label": n % 2}
        for n in range(200)
    ]  # fmt: skip
    write_dataset(folder / "ybisk--piqa", "plain_text", {"validation": rows})
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def spoil(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Replace tensors of `model.safetensors`; None drops one."""
    before = weights(folder)
    assert all(name in before for name, tensor in changes.items() if tensor is None)
    tensors: dict[str, Any] = {**before, **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path) -> None:
    """The same weights in several files with an index."""
    model = SmolLM3ForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def set_config(folder: Path, old: str, new: str) -> None:
    edit(folder / "config.json", old, new)


def write_3b(folder: Path, tokenizer_of: Path) -> Path:
    """A checkpoint of the 3B's shapes in two files of zeros that take no room on the disk."""
    folder.mkdir()
    config = json.loads((tokenizer_of / "config.json").read_text())
    for key in ("layer_types", "no_rope_layers", "head_dim"):
        config.pop(key, None)
    config |= SHAPE_3B | {"max_position_embeddings": 65536, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = model_shapes(config)
    names, table = sorted(shapes), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        header, end = {}, 0
        for name in part:
            size = 2
            for length in shapes[name]:
                size *= length
            header[name] = {
                "dtype": "BF16",
                "shape": shapes[name],
                "data_offsets": [end, end + size],
            }
            end += size
            table[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as content:
            content.write(struct.pack("<Q", len(text)) + text)
            content.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer_of / name, folder)
    _write_vocabulary(folder, tokenizer_of)
    return folder


def _write_vocabulary(folder: Path, tokenizer_of: Path) -> None:
    """The small tokenizer, with unused tokens up to the released model's 128,256."""
    table = json.loads((tokenizer_of / "tokenizer.json").read_text())
    first = max(row["id"] for row in table["added_tokens"]) + 1
    row = table["added_tokens"][0]
    table["added_tokens"] += [
        row | {"id": number, "content": f"<|reserved_{number}|>"}
        for number in range(first, SHAPE_3B["vocab_size"])
    ]
    (folder / "tokenizer.json").write_text(json.dumps(table))
