"""nanotron checkpoint -> transformers folder, tensor by tensor, without importing nanotron.

A checkpoint keeps one safetensors file per tensor and rank; the file's metadata says which slices
of the whole tensor it holds, so that any tensor- or pipeline-parallel layout is read alike.
q and k are not permuted: both sides rotate halves (NeoX).
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

SHARD_BYTES = 1_000_000_000


class ConvertError(ValueError):
    """A checkpoint that cannot be converted: file, reason and remedy in one line."""


class Checkpoint:
    """Whole tensors of a nanotron checkpoint, by parameter name, read when asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        config = folder / "model_config.json"
        if not config.is_file():
            raise ConvertError(f"{config}: no such file; is this a nanotron checkpoint?")
        self.config: dict[str, Any] = json.loads(config.read_text())
        self.files: dict[str, list[Path]] = {}
        for file in sorted((folder / "model").rglob("*.safetensors")):
            leaf = re.sub(r"^model_|_pp-rank.*$", "", file.name.removesuffix(".safetensors"))
            module = ".".join(file.parent.relative_to(folder / "model").parts)
            self.files.setdefault(f"{module}.{leaf}", []).append(file)

    def tensor(self, name: str) -> torch.Tensor:
        """Parameter `name`, put together from its shards."""
        if name not in self.files:
            raise ConvertError(f"{self.folder}: no tensor '{name}'; another architecture?")
        whole, filled = None, 0
        for file in self.files[name]:
            with safe_open(file, "pt") as handle:
                part, metadata = handle.get_tensor("data"), handle.metadata() or {}
            if "local_global_slices_pairs" not in metadata:
                return part
            if whole is None:
                whole = torch.empty(_integers(metadata["unsharded_shape"]), dtype=part.dtype)
            for pair in metadata["local_global_slices_pairs"].split(";"):
                local, target = pair.split("#")
                whole[_slices(target)] = part[_slices(local)]
                filled += part[_slices(local)].numel()
        assert whole is not None
        if filled != whole.numel():
            raise ConvertError(
                f"{self.folder}: '{name}' has {filled} of {whole.numel()} values; a rank's file "
                "is missing"
            )
        return whole


def _slices(text: str) -> tuple[slice, ...]:
    return tuple(
        slice(*(None if bound == "None" else int(bound) for bound in part.split(",")))
        for part in text.split("|")
    )


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def hf_config(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """transformers' SmolLM3Config for a nanotron model config, as in config.json."""
    interval = config["no_rope_layer"]
    layers = config["num_hidden_layers"]
    same = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"]
    return {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        **{key: config[key] for key in same},
        "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]},
        # 1 = the layer uses RoPE: transformers' name says the opposite
        "no_rope_layers": [int(not interval or (i + 1) % interval != 0) for i in range(layers)],
        "no_rope_layer_interval": interval or layers + 1,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "use_cache": True,
        "dtype": dtype,
    }


def hf_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of transformers' state dict, a layer at a time; the tied head is left out."""
    config = checkpoint.config
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    inner = config["intermediate_size"]
    embedding = "model.token_position_embeddings.pp_block.token_embedding.weight"
    yield "model.embed_tokens.weight", checkpoint.tensor(embedding)
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"model.decoder.{layer}.pp_block", f"model.layers.{layer}"
        fused = {
            "attn.qkv_proj": (("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)),
            "mlp.gate_up_proj": (("mlp.gate_proj", inner), ("mlp.up_proj", inner)),
        }  # fmt: skip
        for name, parts in fused.items():
            tensors = checkpoint.tensor(f"{ours}.{name}.weight").split([rows for _, rows in parts])
            for (part, _), tensor in zip(parts, tensors, strict=True):
                yield f"{theirs}.{part}.weight", tensor.contiguous()
        same = {
            "attn.o_proj": "self_attn.o_proj",
            "mlp.down_proj": "mlp.down_proj",
            "input_layernorm": "input_layernorm",
            "post_attention_layernorm": "post_attention_layernorm",
        }
        for name, target in same.items():
            yield f"{theirs}.{target}.weight", checkpoint.tensor(f"{ours}.{name}.weight")
    yield "model.norm.weight", checkpoint.tensor("model.final_layer_norm.pp_block.weight")
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", checkpoint.tensor("model.lm_head.pp_block.weight")


def to_hf(checkpoint_folder: Path, folder: Path, tokenizer: Path | None = None) -> None:
    """Write the transformers folder `folder`; written aside, then renamed."""
    checkpoint = Checkpoint(checkpoint_folder)
    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    if tokenizer:
        shutil.copytree(tokenizer, aside)
    aside.mkdir(parents=True, exist_ok=True)
    dtype = _save_shards(hf_tensors(checkpoint), aside)
    config = hf_config(checkpoint.config, dtype)
    (aside / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    generation = {f"{token}_token_id": config[f"{token}_token_id"] for token in ("bos", "eos")}
    (aside / "generation_config.json").write_text(json.dumps(generation) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)


def _save_shards(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path) -> str:
    """Shards of at most SHARD_BYTES and their index; returns the dtype's name."""
    shard: dict[str, torch.Tensor] = {}
    shard_bytes = total_bytes = 0
    weight_map: dict[str, int] = {}
    dtype, count = "", 0

    def flush() -> None:
        nonlocal shard, shard_bytes, count
        save_file(shard, folder / f"{count}.safetensors", metadata={"format": "pt"})
        shard, shard_bytes, count = {}, 0, count + 1

    for name, tensor in tensors:
        if shard and shard_bytes + tensor.nbytes > SHARD_BYTES:
            flush()
        shard[name], weight_map[name] = tensor, count
        shard_bytes, total_bytes = shard_bytes + tensor.nbytes, total_bytes + tensor.nbytes
        dtype = str(tensor.dtype).removeprefix("torch.")
    flush()
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = ["model.safetensors"] if count == 1 else names
    for i, name in enumerate(names):
        (folder / f"{i}.safetensors").rename(folder / name)
    if count > 1:
        index = {
            "metadata": {"total_size": total_bytes},
            "weight_map": {name: names[i] for name, i in weight_map.items()},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return dtype
