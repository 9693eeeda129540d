"""nanotron checkpoint <-> transformers folder, tensor by tensor, without importing nanotron.

    python -m nanotron_ext.convert to-hf   runs/full/pretrain-stage1/checkpoints/3450000 smollm3
    python -m nanotron_ext.convert from-hf smollm3 smollm3-nanotron

What `from-hf` writes has one rank and only weights: a config names it in
`model.init_method.path`, and nanotron cuts it for the layout that reads it. Both directions copy
bits: q and k are not permuted (both sides rotate halves, NeoX), and no dtype changes.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ground.checksums import seal, verify_if_sealed
from ground.errors import UserError, disk_error, fail
from ground.files import folder_aside, read_json_object
from ground.weights import INDEX, check_floats, check_names, check_shape, read_tensor, weight_files
from nanotron_ext.checkpoint import CHECKPOINT_VERSION, MODEL, Checkpoint, config_of, save_weight
from nanotron_ext.config import SIZES, SmolLM3Config
from nanotron_ext.rope import layer_uses_rope
from nanotron_ext.weight_table import weights_of

SHARD_BYTES = 1_000_000_000
REMEDY = "fetch the folder again"
SAME_KEYS = (
    *SIZES,
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# Options of transformers' SmolLM3 that are fixed in this model.
FIXED: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
}
# transformers' defaults, which its config.json may leave out.
DEFAULTS: dict[str, Any] = {
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "pad_token_id": 128004,
    "rope_theta": 2_000_000.0,
}


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
        raise UserError(f"{file}: model_type is {values.get('model_type')!r}, not 'smollm3'")
    for key, only in FIXED.items():
        if values.get(key, only) != only:
            raise UserError(f"{file}: {key} is {values[key]!r}; the plugin has {only!r} alone")
    values = DEFAULTS | values
    for key in SAME_KEYS:
        if key not in values:
            raise UserError(f"{file}: no {key}; write it out")
    same = {key: values[key] for key in SAME_KEYS}
    if isinstance(same["eos_token_id"], list):  # nanotron's has one, and does not use it
        same["eos_token_id"] = same["eos_token_id"][0]
    # transformers 4 wrote rope_theta and rope_scaling at the top level.
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", values["rope_theta"])
    scaling = None if rope.get("rope_type", "default") == "default" else rope
    interval = _no_rope_interval(file, values)
    same |= {"rope_theta": theta, "rope_scaling": scaling, "no_rope_layer": interval}
    return config_of(file, same)


def _no_rope_interval(file: Path, values: dict[str, Any]) -> int:
    layers, given = values["num_hidden_layers"], values.get("no_rope_layer_interval", 4)
    pattern = values.get("no_rope_layers")
    for interval in (given, 0, *range(1, layers + 1)):
        if pattern in (None, [int(layer_uses_rope(i, interval)) for i in range(layers)]):
            return 0 if interval == layers + 1 else int(interval)
    raise UserError(f"{file}: no_rope_layers is not one layer in every n; nanotron has no other")


def to_hf(checkpoint_folder: Path, folder: Path, tokenizer: Path | None = None) -> None:
    """Write the transformers folder `folder`, replacing what is there; all or nothing."""
    checkpoint = Checkpoint(checkpoint_folder)
    with folder_aside(folder) as aside:
        if tokenizer:
            _copy_tokenizer(tokenizer, aside)
        dtype = _save_shards(_split(checkpoint), aside)
        config = hf_config(checkpoint.config, dtype)
        (aside / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        generation = {f"{token}_token_id": config[f"{token}_token_id"] for token in ("bos", "eos")}
        (aside / "generation_config.json").write_text(json.dumps(generation) + "\n")
        seal(aside)


def from_hf(hf_folder: Path, folder: Path) -> None:
    """Write the nanotron checkpoint `folder`, as one rank would; replaces what is there."""
    path = hf_folder / "config.json"
    config = nanotron_config(path, read_json_object(path, "is this a transformers folder?"))
    files = _hf_weights(hf_folder, config)
    with folder_aside(folder) as aside:
        for weight in weights_of(config):
            parts = []
            for name, shape in weight.parts.items():
                file, tensor = files[name], read_tensor(files[name], name, REMEDY)
                check_shape(file, name, tensor.shape, shape, MODEL)
                check_floats(file, name, tensor)
                parts.append(tensor)
            save_weight(weight, parts, aside / "model")
        metas = {"last_train_step": 0, "consumed_train_samples": 0}
        metadata = {"dp": 1, "metas": metas, "tp": 1, "version": CHECKPOINT_VERSION}
        (aside / "checkpoint_metadata.json").write_text(json.dumps(metadata, indent=2))
        (aside / "model_config.json").write_text(json.dumps(asdict(config)))
        seal(aside)


def _hf_weights(folder: Path, config: SmolLM3Config) -> dict[str, Path]:
    """{tensor: its file} of a transformers folder, without a head that repeats the embedding."""
    files = weight_files(folder, REMEDY)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    # Some writers store the tied matrix twice.
    head_file = files.pop(head, None) if config.tie_word_embeddings else None
    check_names(folder, {name for w in weights_of(config) for name in w.parts}, files, MODEL)
    if head_file and not torch.equal(
        read_tensor(head_file, head, REMEDY), read_tensor(files[embedding], embedding, REMEDY)
    ):
        raise UserError(
            f"{folder / 'config.json'}: tie_word_embeddings is true, but lm_head.weight differs "
            "from the embedding; set it to false"
        )
    return files


def _split(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of transformers' state dict, one weight at a time; a tied head is left out."""
    for weight in weights_of(checkpoint.config):
        rows = [shape[0] for shape in weight.parts.values()]
        tensors = checkpoint.tensor(weight).split(rows)
        for name, tensor in zip(weight.parts, tensors, strict=True):
            yield name, tensor.contiguous()


def _shards(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Shards of at most SHARD_BYTES, in order; a larger tensor has its own."""
    shard: dict[str, torch.Tensor] = {}
    room = SHARD_BYTES
    for name, tensor in tensors:
        if shard and tensor.nbytes > room:
            yield shard
            shard.clear()  # not a new dict: the caller would keep the written shard in memory
            room = SHARD_BYTES
        shard[name] = tensor
        room -= tensor.nbytes
    yield shard


def _save_shards(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> str:
    """Write shards and, if there are several, their index; returns the name of the dtype."""
    shard_of: dict[str, int] = {}
    count = total_bytes = 0
    dtype = ""
    for count, shard in enumerate(_shards(tensors), start=1):
        save_file(shard, folder / f"{count}.safetensors", metadata={"format": "pt"})
        shard_of |= dict.fromkeys(shard, count)
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
        dtype = str([*shard.values()][-1].dtype).removeprefix("torch.")
    # The names hold the number of shards, which is known only now.
    names = {i: f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)}
    if count == 1:
        names = {1: "model.safetensors"}
    else:
        table = {name: names[i] for name, i in shard_of.items()}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": table}
        (folder / INDEX).write_text(json.dumps(index, indent=1))
    for i, name in names.items():
        (folder / f"{i}.safetensors").rename(folder / name)
    return dtype


def _copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    if not (tokenizer / "tokenizer_config.json").is_file():
        raise UserError(f"{tokenizer}: no tokenizer_config.json; name a tokenizer's folder")
    ignored = ("config.json", "generation_config.json", "*.safetensors*", "*.bin*", ".*")
    ignore = shutil.ignore_patterns(*ignored)
    shutil.copytree(tokenizer, folder, ignore=ignore, dirs_exist_ok=True)


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
            raise UserError(f"{chosen.target}: exists; remove it or name another folder")
        verify_if_sealed(chosen.source, REMEDY)
        if chosen.direction == "to-hf":
            to_hf(chosen.source, chosen.target, chosen.tokenizer)
        else:
            from_hf(chosen.source, chosen.target)
    except (UserError, OSError) as error:
        sys.exit(fail(disk_error(error) or str(error)))


if __name__ == "__main__":
    main()
