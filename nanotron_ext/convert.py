"""nanotron checkpoint <-> transformers folder, tensor by tensor, without importing nanotron.

    python -m nanotron_ext.convert to-hf   runs/full/pretrain-stage1/checkpoints/3450000 smollm3
    python -m nanotron_ext.convert from-hf smollm3 smollm3-nanotron

What `from-hf` writes has one rank and weights alone: a config names it in
`model.init_method.path`, and nanotron cuts it for the layout that reads it. Both directions copy
bits: q and k are not permuted (both sides rotate halves, NeoX), and no dtype changes.
"""

import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nanotron_ext.checkpoint import (
    CHECKPOINT_VERSION,
    Checkpoint,
    ConvertError,
    check_names,
    check_tensor,
    config_of,
    open_safetensors,
    read_json,
    save_weight,
    tensor_of,
    weights_of,
)
from nanotron_ext.config import SmolLM3Config
from nanotron_ext.rope import layer_uses_rope

SHARD_BYTES = 1_000_000_000
SAME_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# What of transformers' SmolLM3 this model has in one form only.
FIXED: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
}


class HfFolder:
    """A transformers folder; tensors by transformers' name, mapped from its shards."""

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / "config.json"
        self.config = nanotron_config(path, read_json(path, "is this a transformers folder?"))
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            weight_map = read_json(index)["weight_map"]
            self.files = {name: folder / file for name, file in weight_map.items()}
        else:
            single = folder / "model.safetensors"
            with open_safetensors(single) as handle:
                self.files = dict.fromkeys(handle.keys(), single)
        wanted = {name for weight in weights_of(self.config) for name, _ in weight.parts}
        if self.config.tie_word_embeddings and "lm_head.weight" in self.files:
            self._check_tied_head()
        check_names(folder, wanted, self.files.keys())

    def tensor(self, name: str) -> torch.Tensor:
        with open_safetensors(self.files[name]) as handle:
            return tensor_of(self.files[name], handle, name)

    def _check_tied_head(self) -> None:
        """Some writers store the tied matrix twice."""
        if not torch.equal(self.tensor("lm_head.weight"), self.tensor("model.embed_tokens.weight")):
            raise ConvertError(
                f"{self.folder / 'config.json'}: tie_word_embeddings is true, but lm_head.weight "
                "differs from the embedding; set it to false"
            )
        del self.files["lm_head.weight"]


def hf_config(config: SmolLM3Config, dtype: str) -> dict[str, Any]:
    """transformers' SmolLM3Config for a nanotron model config, as in config.json."""
    interval, layers = config.no_rope_layer, config.num_hidden_layers
    rope = {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta}
    return {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        **{key: getattr(config, key) for key in SAME_KEYS},
        "rope_parameters": rope,
        # 1 = the layer uses RoPE: transformers' name says the opposite
        "no_rope_layers": [int(layer_uses_rope(i, interval)) for i in range(layers)],
        "no_rope_layer_interval": interval or layers + 1,
        **FIXED,
        "use_cache": True,
        "dtype": dtype,
    }


def nanotron_config(file: Path, values: dict[str, Any]) -> SmolLM3Config:
    """The nanotron model config for transformers' config.json, whose defaults are not ours."""
    if values.get("model_type") != "smollm3":
        raise ConvertError(f"{file}: model_type is {values.get('model_type')!r}, not 'smollm3'")
    for key, only in FIXED.items():
        if values.get(key, only) != only:
            raise ConvertError(f"{file}: {key} is {values[key]!r}; the plugin has {only!r} alone")
    missing = [key for key in SAME_KEYS if key not in values]
    # Left out of config.json where they equal transformers' defaults.
    defaults = {"tie_word_embeddings": True, "pad_token_id": 128004, "rms_norm_eps": 1e-6}
    defaults |= {"bos_token_id": 128000, "eos_token_id": 128001}
    if absent := [key for key in missing if key not in defaults]:
        raise ConvertError(f"{file}: no {absent[0]}; write it out")
    same = {key: values.get(key, defaults.get(key)) for key in SAME_KEYS}
    if isinstance(same["eos_token_id"], list):  # nanotron's has one, and does not use it
        same["eos_token_id"] = same["eos_token_id"][0]
    # transformers 4 wrote rope_theta and rope_scaling; 2M is its default for this model.
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", values.get("rope_theta", 2_000_000.0))
    scaling = None if rope.get("rope_type", "default") == "default" else rope
    interval = _no_rope_interval(file, values)
    same |= {"rope_theta": theta, "rope_scaling": scaling, "no_rope_layer": interval}
    return config_of(file, same)


def _no_rope_interval(file: Path, values: dict[str, Any]) -> int:
    layers, given = values["num_hidden_layers"], values.get("no_rope_layer_interval", 4)
    wanted = values.get("no_rope_layers")
    for interval in (given, 0, *range(1, layers + 1)):
        found = [int(layer_uses_rope(i, interval)) for i in range(layers)]
        if wanted is None or found == wanted:
            return 0 if interval == layers + 1 else int(interval)
    raise ConvertError(f"{file}: no_rope_layers is not one layer in every n; nanotron has no other")


def to_hf(checkpoint_folder: Path, folder: Path, tokenizer: Path | None = None) -> None:
    """Write the transformers folder `folder`, replacing what is there; all or nothing."""
    checkpoint = Checkpoint(checkpoint_folder)
    with _written_aside(folder) as aside:
        if tokenizer:
            _copy_tokenizer(tokenizer, aside)
        dtype = _save_shards(_split(checkpoint), aside)
        config = hf_config(checkpoint.config, dtype)
        (aside / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        generation = {f"{token}_token_id": config[f"{token}_token_id"] for token in ("bos", "eos")}
        (aside / "generation_config.json").write_text(json.dumps(generation) + "\n")


def from_hf(hf_folder: Path, folder: Path) -> None:
    """Write the nanotron checkpoint `folder`, as one rank would; replaces what is there."""
    source = HfFolder(hf_folder)
    with _written_aside(folder) as aside:
        for weight in weights_of(source.config):
            parts = []
            for name, shape in weight.parts:
                parts.append(source.tensor(name))
                check_tensor(source.files[name], name, parts[-1], shape)
            save_weight(weight, parts, aside / "model")
        metas = {"last_train_step": 0, "consumed_train_samples": 0}
        metadata = {"dp": 1, "metas": metas, "tp": 1, "version": CHECKPOINT_VERSION}
        (aside / "checkpoint_metadata.json").write_text(json.dumps(metadata, indent=2))
        (aside / "model_config.json").write_text(json.dumps(asdict(source.config)))


def _split(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of transformers' state dict, a weight at a time; a tied head is left out."""
    for weight in weights_of(checkpoint.config):
        rows = [shape[0] for _, shape in weight.parts]
        tensors = checkpoint.tensor(weight).split(rows)
        for (name, _), tensor in zip(weight.parts, tensors, strict=True):
            yield name, tensor.contiguous()


def _save_shards(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> str:
    """Shards of at most SHARD_BYTES (a larger tensor alone) and their index; the dtype's name."""
    shard: dict[str, torch.Tensor] = {}
    shard_bytes = total_bytes = count = 0
    weight_map: dict[str, int] = {}
    dtype = ""

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
        if shard_bytes >= SHARD_BYTES:
            flush()
    if shard:
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


def _copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    if not (tokenizer / "tokenizer_config.json").is_file():
        raise ConvertError(f"{tokenizer}: no tokenizer_config.json; name a tokenizer's folder")
    model = ("config.json", "generation_config.json", "*.safetensors*", "*.bin*", ".*")
    ignore = shutil.ignore_patterns(*model)
    shutil.copytree(tokenizer, folder, ignore=ignore, dirs_exist_ok=True)


@contextlib.contextmanager
def _written_aside(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its place when all is written, and is gone otherwise."""
    aside, old = (folder.with_name(f"{folder.name}.{end}") for end in ("partial", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nanotron_ext.convert",
        description="nanotron checkpoint <-> transformers folder, bit for bit",
    )
    parser.add_argument("direction", choices=["to-hf", "from-hf"])
    parser.add_argument("source", type=Path, help="the folder to read")
    parser.add_argument("target", type=Path, help="the folder to write; must not exist")
    parser.add_argument("--tokenizer", type=Path, help="to-hf: folder whose tokenizer to add")
    chosen = parser.parse_args(arguments)
    if chosen.tokenizer and chosen.direction == "from-hf":
        parser.error("--tokenizer: a nanotron checkpoint has none")
    try:
        if chosen.target.exists():
            raise ConvertError(f"{chosen.target}: exists; remove it or name another folder")
        if chosen.direction == "to-hf":
            to_hf(chosen.source, chosen.target, chosen.tokenizer)
        else:
            from_hf(chosen.source, chosen.target)
    except (ConvertError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
