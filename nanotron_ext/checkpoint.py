"""Weights on disk: nanotron's folder of one file per tensor and rank, and what both sides check.

A file's metadata says which slices of the whole tensor it holds, so that any tensor- or
pipeline-parallel layout is read alike, without importing nanotron.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanotron_ext.config import SmolLM3Config

CHECKPOINT_VERSION = "1.2"  # nanotron.constants, 0.4 and main
EMBEDDING = "model.token_position_embeddings.pp_block.token_embedding.weight"


class ConvertError(ValueError):
    """Weights that cannot be converted: file, key, reason and remedy in one line."""


@dataclass(frozen=True)
class Weight:
    """One tensor of nanotron and the tensors of transformers that are stacked in it.

    `split_dim` is the dimension that tensor parallelism cuts, None where it does not (norms).
    """

    name: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]  # transformers' name, shape
    split_dim: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(shape[0] for _, shape in self.parts), *self.parts[0][1][1:])


def weights_of(config: SmolLM3Config) -> list[Weight]:
    """Every tensor of the model: the one table that both directions read."""
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    kv = config.num_key_value_heads * config.head_dim
    attention = {"q_proj": hidden, "k_proj": kv, "v_proj": kv}
    found = [Weight(EMBEDDING, (("model.embed_tokens.weight", (vocab, hidden)),), 0)]
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.decoder.{layer}.pp_block", f"model.layers.{layer}"
        stacked = {
            "attn.qkv_proj": [(f"self_attn.{name}", rows) for name, rows in attention.items()],
            "mlp.gate_up_proj": [("mlp.gate_proj", inner), ("mlp.up_proj", inner)],
        }
        for name, parts in stacked.items():
            shapes = tuple((f"{theirs}.{part}.weight", (rows, hidden)) for part, rows in parts)
            found.append(Weight(f"{ours}.{name}.weight", shapes, 0))
        rows = {
            "attn.o_proj": ("self_attn.o_proj", hidden),
            "mlp.down_proj": ("mlp.down_proj", inner),
        }
        for name, (target, columns) in rows.items():
            matrix = (f"{theirs}.{target}.weight", (hidden, columns))
            found.append(Weight(f"{ours}.{name}.weight", (matrix,), 1))
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm = (f"{theirs}.{name}.weight", (hidden,))
            found.append(Weight(f"{ours}.{name}.weight", (norm,), None))
    norm = ("model.norm.weight", (hidden,))
    found.append(Weight("model.final_layer_norm.pp_block.weight", (norm,), None))
    if not config.tie_word_embeddings:
        head = (("lm_head.weight", (vocab, hidden)),)
        found.append(Weight("model.lm_head.pp_block.weight", head, 0))
    return found


class Checkpoint:
    """A nanotron checkpoint of any layout; whole tensors by parameter name, read when asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / "model_config.json"
        values = read_json(path, "is this a nanotron checkpoint?")
        if not values.get("is_smollm3_config"):
            raise ConvertError(f"{path}: is_smollm3_config is missing: another architecture")
        self.config = config_of(path, values)
        self.files: dict[str, list[Path]] = {}
        for file in sorted((folder / "model").rglob("*.safetensors")):
            leaf = re.sub(r"^model_|_pp-rank.*$", "", file.name.removesuffix(".safetensors"))
            module = ".".join(file.parent.relative_to(folder / "model").parts)
            self.files.setdefault(f"{module}.{leaf}", []).append(file)
        wanted = {weight.name for weight in weights_of(self.config)}
        check_names(folder / "model", wanted, self.files.keys())

    def tensor(self, weight: Weight) -> torch.Tensor:
        """`weight` put together from its ranks' files; a single rank's is mapped, not copied."""
        files, whole, filled = self.files[weight.name], torch.empty(0), 0
        for file in files:
            with open_safetensors(file) as handle:
                part, metadata = tensor_of(file, handle, "data"), handle.metadata() or {}
            pairs = metadata.get("local_global_slices_pairs")
            if len(files) == 1 and (pairs is None or part.shape == weight.shape):
                check_tensor(file, weight.name, part, weight.shape)
                return part
            _check_shape(
                file, weight.name, _integers(metadata.get("unsharded_shape", "")), weight.shape
            )
            check_tensor(file, weight.name, part, tuple(part.shape))
            if not filled:
                whole = torch.empty(weight.shape, dtype=part.dtype)
            for pair in (pairs or "").split(";"):
                local, target = pair.split("#")
                whole[_slices(target)] = part[_slices(local)]
                filled += part[_slices(local)].numel()
        if filled != whole.numel():
            raise ConvertError(
                f"{file.parent}: '{weight.name}' has {filled} of {whole.numel()} values: a rank's "
                "file is missing or of another layout; take another checkpoint"
            )
        return whole


def save_weight(weight: Weight, parts: list[torch.Tensor], root: Path) -> None:
    """One file, named and described as nanotron does at tp 1, pp 1."""
    *path, leaf = weight.name.split(".")
    metadata, suffix = {}, ""
    if weight.split_dim is not None:
        suffix = "_pp-rank-0-of-1_tp-rank-0-of-1"
        metadata = {
            "version": CHECKPOINT_VERSION,
            "unsharded_shape": str(weight.shape),
            "local_global_slices_pairs": _slice_pairs(weight),
        }
    file = root.joinpath(*path, f"model_{leaf}{suffix}.safetensors")
    file.parent.mkdir(parents=True)
    data = torch.cat(parts) if len(parts) > 1 else parts[0]
    save_file({"data": data}, file, metadata=metadata)


def _slice_pairs(weight: Weight) -> str:
    """Which rows or columns of the whole the file holds: all of them, chunk by chunk."""
    every = "None,None,None"
    if len(weight.parts) == 1:
        cut = f"0,{weight.shape[weight.split_dim or 0]},None"
        return f"{every}|{every}#" + (f"{every}|{cut}" if weight.split_dim else f"{cut}|{every}")
    pairs, start = [], 0
    for _, shape in weight.parts:
        cut = f"{start},{start + shape[0]},None|{every}"
        pairs.append(f"{cut}#{cut}")
        start += shape[0]
    return ";".join(pairs)


def read_json(path: Path, hint: str = "fetch the folder again") -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConvertError(f"{path}: no such file; {hint}") from None
    except ValueError as error:
        raise ConvertError(f"{path}: not JSON ({error}); {hint}") from None
    return values


def config_of(file: Path, values: dict[str, Any]) -> SmolLM3Config:
    try:
        return SmolLM3Config(**values)
    except (TypeError, ValueError) as error:
        raise ConvertError(f"{file}: {error}: another architecture?") from None


@contextlib.contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as handle:
            yield handle
    except FileNotFoundError:
        raise ConvertError(f"{file}: no such file; fetch the folder again") from None
    except SafetensorError as error:
        raise ConvertError(f"{file}: truncated or corrupt ({error}); fetch it again") from None


def tensor_of(file: Path, handle: Any, name: str) -> torch.Tensor:
    if name not in handle.keys():  # noqa: SIM118  (a safetensors handle has no __contains__)
        raise ConvertError(f"{file}: no tensor '{name}'; fetch the folder again")
    tensor: torch.Tensor = handle.get_tensor(name)
    return tensor


def check_names(folder: Path, wanted: set[str], found: Iterable[str]) -> None:
    if missing := sorted(wanted - set(found)):
        raise ConvertError(
            f"{folder}: no tensor '{missing[0]}' ({len(missing)} missing); take a whole folder of "
            "this architecture"
        )
    if extra := sorted(set(found) - wanted):
        raise ConvertError(f"{folder}: tensor '{extra[0]}' is not SmolLM3's: another architecture")


def check_tensor(file: Path, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    _check_shape(file, name, tuple(tensor.shape), shape)
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise ConvertError(f"{file}: '{name}' is {tensor.dtype}; take the unquantised weights")
    for part in tensor.flatten().split(2**24):  # in parts: the test makes copies
        if not torch.isfinite(part).all():
            raise ConvertError(f"{file}: '{name}' is not finite; take an earlier checkpoint")


def _check_shape(file: Path, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise ConvertError(
            f"{file}: '{name}' has shape {found}, the config asks for {wanted}; one of the two is "
            "another model's"
        )


def _slices(text: str) -> tuple[slice, ...]:
    return tuple(
        slice(*(None if bound == "None" else int(bound) for bound in part.split(",")))
        for part in text.split("|")
    )


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text.replace("np.int64", "")))
