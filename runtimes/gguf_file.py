"""A release as a GGUF file, which llama.cpp and all that stands on it read.

What llama.cpp does for the architecture `smollm3` (src/models/smollm3.cpp) and the file cannot say
is checked here: NoPE in every 4th layer, YaRN with the usual betas, no biases, no sliding window.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ground.errors import UserError, did_you_mean
from ground.files import read_json_object, written_aside
from ground.weights import (
    check_floats,
    check_names,
    check_shape,
    read_tensor,
    smollm3_config,
    weight_files,
)
from runtimes.gguf_tokenizer import write_tokenizer

if TYPE_CHECKING:
    import torch
    from gguf import GGMLQuantizationType, GGUFWriter
    from transformers import SmolLM3Config

DTYPES = ("f32", "f16", "bf16", "q8_0")
NOPE_INTERVAL = 4  # hparams.n_no_rope_layer_step of smollm3 in llama.cpp


def write_gguf(release: Path, target: Path, dtype: str, name: str = "SmolLM3") -> None:
    """Write a transformers folder as the GGUF file `target`, written aside and then renamed.

    `dtype` is that of the matrices: f32, f16, bf16, or q8_0 (blocks of 32 values; a row that is no
    multiple of 32 stays f16). Norms are f32 always. One tensor at a time is in memory. Raises
    UserError for an unknown dtype and for a model that llama.cpp would not run as transformers does.
    """
    from gguf import GGUFWriter

    if dtype not in DTYPES:
        raise UserError(f"{dtype}: no dtype of a GGUF file; {did_you_mean(dtype, DTYPES)}")
    config = read_config(release)
    with written_aside(target) as aside:
        writer = GGUFWriter(aside, "smollm3")
        writer.add_name(name)
        _write_shape(writer, config)
        _write_rope(writer, config.rope_parameters, release / "config.json")
        _write_sampling(writer, release)
        write_tokenizer(writer, release, config.vocab_size)
        _write_tensors(writer, release, config, dtype)


def read_config(release: Path) -> "SmolLM3Config":
    """The config of a SmolLM3 that llama.cpp runs. Raises UserError that names file, key and value."""
    from transformers import SmolLM3Config

    file = release / "config.json"
    remedy = "name the folder of a SmolLM3, as `make release` writes one"
    smollm3_config(release, remedy)
    try:
        config = SmolLM3Config.from_pretrained(release)
    except Exception as error:  # of transformers' own checks, whose text has several lines
        raise UserError(f"{file}: {' '.join(str(error).split())}; {remedy}") from error
    nope = [int((layer + 1) % NOPE_INTERVAL != 0) for layer in range(config.num_hidden_layers)]
    if list(config.no_rope_layers)[: len(nope)] != nope:
        raise UserError(
            f"{file}: no_rope_layers: {config.no_rope_layers}: llama.cpp has NoPE in every "
            f"{NOPE_INTERVAL}th layer of a SmolLM3, whatever its file says; this model cannot be a GGUF"
        )
    fixed = {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False, "hidden_act": "silu"}  # fmt: skip
    for key, value in fixed.items():
        if getattr(config, key) != value:
            raise UserError(
                f"{file}: {key}: {getattr(config, key)}: llama.cpp runs a SmolLM3 with {value} "
                "alone; this model cannot be a GGUF"
            )
    return config


def _write_shape(writer: "GGUFWriter", config: "SmolLM3Config") -> None:
    head_dim = _head_dim(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)


def _head_dim(config: "SmolLM3Config") -> int:
    own: int | None = getattr(config, "head_dim", None)
    return own or int(config.hidden_size // config.num_attention_heads)


def _write_rope(writer: "GGUFWriter", rope: dict[str, Any], file: Path) -> None:
    """Theta, and YaRN's factor and original window.

    llama.cpp multiplies cos and sin by 0.1 ln(factor) + 1, as transformers does; the file holds what
    another attention factor is of that.
    """
    from gguf import Keys, RopeScalingType

    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind == "default":
        return
    if kind != "yarn":
        raise UserError(f"{file}: rope_parameters.rope_type: {kind}; use default or yarn")
    for key, value in {"beta_fast": 32, "beta_slow": 1, "truncate": True}.items():
        if (given := rope.get(key)) not in (None, value):
            raise UserError(
                f"{file}: rope_parameters.{key}: {given}: llama.cpp has {value} for a SmolLM3, "
                "whatever its file says; this model cannot be a GGUF"
            )
    factor = rope["factor"]
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if attention := rope.get("attention_factor"):
        key = Keys.Rope.SCALING_ATTN_FACTOR.format(arch=writer.arch)
        writer.add_float32(key, attention / (0.1 * math.log(factor) + 1))


def _write_sampling(writer: "GGUFWriter", release: Path) -> None:
    """The release's sampling defaults, which llama.cpp's programs take."""
    file = release / "generation_config.json"
    values = read_json_object(file) if file.is_file() else {}
    for key in ("temperature", "top_p"):
        if (value := values.get(key)) is not None:
            add = {"temperature": writer.add_sampling_temp, "top_p": writer.add_sampling_top_p}[key]
            add(value)


def _write_tensors(
    writer: "GGUFWriter", release: Path, config: "SmolLM3Config", dtype: str
) -> None:
    import numpy as np
    from gguf import GGML_QUANT_VERSION, MODEL_ARCH, LlamaFileType, get_tensor_name_map
    from gguf.quants import quant_shape_to_byte_shape, quantize

    writer.add_file_type(LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    names = get_tensor_name_map(MODEL_ARCH.SMOLLM3, config.num_hidden_layers)
    shapes = weight_shapes(config)
    files = weight_files(release)
    tied = {"lm_head.weight"} - set(shapes)  # some writers store it all the same
    check_names(release, set(shapes), set(files) - tied, "config.json")
    for name, shape in shapes.items():
        kind = _kind(dtype, shape)
        stored = quant_shape_to_byte_shape(shape, kind)
        target = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor_info(
            str(target), stored, np.dtype(np.uint8), math.prod(stored), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in shapes.items():
        tensor = read_tensor(files[name], name)
        check_shape(files[name], name, tensor.shape, shape, "config.json")
        check_floats(files[name], name, tensor)
        if heads := _rotated_heads(name, config):
            tensor = _interleaved(tensor, heads)
        writer.write_tensor_data(quantize(tensor.float().numpy(), _kind(dtype, shape)))
    writer.close()


def weight_shapes(config: "SmolLM3Config") -> dict[str, tuple[int, ...]]:
    """{tensor: shape} of a transformers folder; a tied head is none of its own."""
    import torch
    from transformers import SmolLM3ForCausalLM

    with torch.device("meta"):
        model = SmolLM3ForCausalLM(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def _kind(dtype: str, shape: tuple[int, ...]) -> "GGMLQuantizationType":
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1:
        return GGMLQuantizationType.F32
    kind = GGMLQuantizationType[dtype.upper()]
    return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16


def _rotated_heads(name: str, config: "SmolLM3Config") -> int:
    """The heads of a query or key projection, 0 for any other tensor."""
    kind = name.split(".")[-2]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return int(heads.get(kind) or 0)


def _interleaved(weight: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Rows of each head from transformers' order (i pairs with i + D/2) to llama.cpp's (2i with 2i + 1).

    NoPE layers too: what both projections permute alike, their product does not see.
    """
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
