"""SmolLM3 on nanotron inside the test's own process: one gloo rank, no torchrun."""

import contextlib
import dataclasses
import os
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from nanotron_ext.config import SmolLM3Config

CPU = torch.device("cpu")
TINY = SmolLM3Config(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=48,
    bos_token_id=None,
    eos_token_id=0,
)


def tiny(**changes: Any) -> SmolLM3Config:
    return dataclasses.replace(TINY, **changes)


@contextlib.contextmanager
def single_process() -> Iterator[Any]:
    """nanotron's ParallelContext over one process; group and environment are gone afterwards."""
    from nanotron_ext import compat

    compat.activate()
    from nanotron.parallel.context import ParallelContext

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ours = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **address}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    compat.init_distributed()
    context = ParallelContext(1, 1, 1)
    try:
        yield context
    finally:
        context.destroy()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def build(
    config: SmolLM3Config,
    context: Any,
    seed: int = 0,
    std: float = 0.1,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> Any:
    """SmolLM3ForTraining, initialised as a run would."""
    from nanotron.config import ParallelismArgs
    from nanotron.models import build_model
    from nanotron.parallel.pipeline_parallel.engine import OneForwardOneBackwardPipelineEngine
    from nanotron.parallel.tensor_parallel.enum import TensorParallelLinearMode
    from nanotron.trainer import mark_tied_parameters

    from nanotron_ext.model import SmolLM3ForTraining

    layout = ParallelismArgs(
        dp=1,
        pp=1,
        tp=1,
        pp_engine=OneForwardOneBackwardPipelineEngine(),
        tp_mode=TensorParallelLinearMode.ALL_REDUCE,
        tp_linear_async_communication=False,
    )
    model = build_model(
        model_builder=lambda: SmolLM3ForTraining(config, context, layout),
        parallel_context=context,
        dtype=dtype,
        device=device,
    )
    mark_tied_parameters(model, context, layout)
    model.init_model_randomly(init_config(seed, std))
    return model


def init_config(seed: int, std: float) -> Any:
    """The part of nanotron's Config that the initialisation reads."""
    return SimpleNamespace(
        general=SimpleNamespace(seed=seed),
        model=SimpleNamespace(init_method=SimpleNamespace(std=std)),
    )


def randomise_norms(model: Any, seed: int = 1) -> None:
    """Norm weights away from 1, so that a norm left out or misplaced shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(torch.rand(weight.shape, generator=generator) + 0.5)


def as_transformers(named: dict[str, torch.Tensor], config: SmolLM3Config) -> dict[str, Any]:
    """Our tensors (weights or their gradients) under transformers' names.

    Written apart from nanotron_ext/convert.py on purpose: a mistake there must not hide here.
    """
    q, kv = (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
    split = {
        "qkv_proj": (("q_proj", "k_proj", "v_proj"), (q, kv, kv)),
        "gate_up_proj": (("gate_proj", "up_proj"), (config.intermediate_size,) * 2),
    }
    out = {}
    for name, tensor in named.items():
        name = name.replace(".pp_block", "").replace(
            "token_position_embeddings.token_embedding", "embed_tokens"
        )
        name = name.replace("decoder", "layers").replace("attn", "self_attn")
        name = name.replace("final_layer_norm", "norm").replace("model.lm_head", "lm_head")
        fused = name.split(".")[-2]
        if fused in split:
            parts, rows = split[fused]
            for part, piece in zip(parts, tensor.split(rows), strict=True):
                out[name.replace(fused, part)] = piece
        else:
            out[name] = tensor
    return out


def transformers_model(
    config: SmolLM3Config, weights: dict[str, torch.Tensor] | None = None
) -> Any:
    """SmolLM3ForCausalLM of the same architecture, configured by hand, with `weights` in it."""
    from transformers import SmolLM3Config as TheirConfig
    from transformers import SmolLM3ForCausalLM

    interval, layers = config.no_rope_layer, config.num_hidden_layers
    rope = {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta}
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    same += ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings")
    model = SmolLM3ForCausalLM(
        TheirConfig(
            **{key: getattr(config, key) for key in same},
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=rope,
            no_rope_layers=[int(not interval or (i + 1) % interval != 0) for i in range(layers)],
            pad_token_id=None,
            attn_implementation="sdpa",
        )
    )
    if weights is not None:
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
        model.tie_weights()
    return model.train()
