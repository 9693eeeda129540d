"""SmolLM3 for nanotron: a Llama-like decoder, with these differences:

- NoPE: every 4th layer has no rotary positions (arXiv:2501.18795; `rope.layer_uses_rope`)
- GQA with 4 queries per kv head, no biases, no QK-norm; SwiGLU; RMSNorm in fp32
- input embedding and output head are one matrix, never decayed (`optimizer.py`)
- no token attends across a document border (`attention.py`), and labels there are masked
- weights are drawn the same for every parallel layout (`init_model_randomly`)

Initialisation (nanotron branch smollm3, released std 0.02):

    embedding (= head), qkv_proj, gate_up_proj   N(0, std)
    o_proj, down_proj                            N(0, std / sqrt(2 * layers))
    RMSNorm weights                              1

Legend: B windows, S tokens per window, T = B*S flattened (per rank T/tp between the linears under
sequence parallelism), C hidden, H query heads, K kv heads, D head dim, V vocabulary per rank.
`linear` holds the options that nanotron's tensor-parallel layers share.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nanotron_ext import compat
from nanotron_ext.attention import Backend, Documents, choose_backend, documents_of
from nanotron_ext.config import SmolLM3Config
from nanotron_ext.linear import ColumnLinear, RowLinear
from nanotron_ext.loss import ShardedCrossEntropy
from nanotron_ext.micro_batch import MicroBatch
from nanotron_ext.rope import layer_uses_rope, rope_tables, rotate
from nanotron_ext.weight_table import EMBEDDING, HEAD

compat.activate()

from nanotron.models.base import NanotronModel  # noqa: E402  (only after activate)
from nanotron.parallel.pipeline_parallel.block import PipelineBlock  # noqa: E402
from nanotron.parallel.pipeline_parallel.p2p import P2P  # noqa: E402
from nanotron.parallel.tensor_parallel.nn import TensorParallelEmbedding  # noqa: E402


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the rms in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.eps = eps

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        x = x_TC.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(x_TC.dtype)


@dataclass(frozen=True)
class LayerInputs:
    """What each layer needs beside the hidden states."""

    cos_T1D: torch.Tensor
    sin_T1D: torch.Tensor
    documents: Documents


def layer_inputs(
    position_ids_BS: torch.Tensor, cu_seqlens: torch.Tensor, config: SmolLM3Config
) -> LayerInputs:
    cos_T1D, sin_T1D = rope_tables(
        position_ids_BS.reshape(-1), config.head_dim, config.rope_theta, config.rope_scaling
    )
    return LayerInputs(cos_T1D, sin_T1D, documents_of(cu_seqlens, position_ids_BS.shape[1]))


class Shared:
    """Where all layers of a pipeline rank find the LayerInputs of the current micro-batch.

    They are not inputs of a PipelineBlock: the loader gives positions and borders to every pipeline
    rank, so that only hidden states cross a pipeline border (with two tensors, 1f1b deadlocks on gloo).
    """

    inputs: LayerInputs


class Attention(nn.Module):
    def __init__(
        self, config: SmolLM3Config, linear: dict[str, Any], layer_index: int, backend: Backend
    ):
        super().__init__()
        tp = linear["pg"].size()
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads // tp
        self.num_kv_heads = config.num_key_value_heads // tp
        self.use_rope = layer_uses_rope(layer_index, config.no_rope_layer)
        self.backend = backend
        q = config.num_attention_heads * config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        self.qkv_proj = ColumnLinear(
            config.hidden_size, q + 2 * kv, contiguous_chunks=(q, kv, kv), **linear
        )
        self.o_proj = RowLinear(q, config.hidden_size, **linear)

    def forward(self, x_TC: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        # view: torch.compile does not trace unflatten.
        qkv = self.qkv_proj(x_TC).view(-1, sum(heads), self.head_dim)
        q_THD, k_TKD, v_TKD = qkv.split(heads, dim=1)
        if self.use_rope:
            q_THD, k_TKD = (rotate(x, inputs.cos_T1D, inputs.sin_T1D) for x in (q_THD, k_TKD))
        return self.o_proj(self.backend(q_THD, k_TKD, v_TKD, inputs.documents).flatten(1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: SmolLM3Config, linear: dict[str, Any]):
        super().__init__()
        inner = config.intermediate_size
        self.gate_up_proj = ColumnLinear(
            config.hidden_size, 2 * inner, contiguous_chunks=(inner, inner), **linear
        )
        self.down_proj = RowLinear(inner, config.hidden_size, **linear)

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x_TC).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    def __init__(
        self,
        config: SmolLM3Config,
        linear: dict[str, Any],
        layer_index: int,
        backend: Backend,
        shared: Shared,
    ):
        super().__init__()
        self.shared = shared
        self.recompute = config.recompute_layer
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, linear, layer_index, backend)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, linear)

    def _layer(self, h_TC: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        h_TC = h_TC + self.attn(self.input_layernorm(h_TC), inputs)
        return h_TC + self.mlp(self.post_attention_layernorm(h_TC))

    def forward(self, hidden_states: torch.Tensor) -> dict[str, torch.Tensor]:
        # Read now: under 1f1b the next micro-batch replaces them before the recomputation.
        inputs = self.shared.inputs
        if self.recompute and self.training:
            h_TC = checkpoint(self._layer, hidden_states, inputs, use_reentrant=False)
        else:
            h_TC = self._layer(hidden_states, inputs)
        return {"hidden_states": h_TC}


class Embedding(nn.Module):
    def __init__(self, config: SmolLM3Config, linear: dict[str, Any]):
        super().__init__()
        self.token_embedding = TensorParallelEmbedding(
            config.vocab_size, config.hidden_size, pg=linear["pg"], mode=linear["mode"]
        )

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"hidden_states": self.token_embedding(input_ids.reshape(-1))}


class Loss(nn.Module):
    """Cross-entropy of the unmasked labels (nats), its mean over a micro-batch's labels or tokens.

    Published is the mean over the micro-batch's own labels. A step's mean of such means depends on
    how its windows are cut into micro-batches; a sum divided by the number of tokens does not.

    With z-loss the gradient is that of cross-entropy + coefficient * mean(logsumexp^2) (PaLM,
    arXiv:2204.02311), which keeps the logits from drifting; off in the published run.
    """

    def __init__(self, tp_pg: Any, z_loss_coefficient: float, mean_over: str):
        super().__init__()
        self.tp_pg, self.z_loss_coefficient = tp_pg, z_loss_coefficient
        self.mean_over = mean_over
        # (logits, labels, group) -> (loss, logsumexp) of each token; fast_step.py may put another.
        self.cross_entropy: Callable[..., tuple[torch.Tensor, torch.Tensor]]
        self.cross_entropy = ShardedCrossEntropy.apply

    def forward(
        self, sharded_logits: torch.Tensor, label_ids: torch.Tensor, label_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        mask = label_mask.reshape(-1)
        labels = label_ids.reshape(-1)
        losses, logsumexp = self.cross_entropy(sharded_logits, labels, self.tp_pg)
        if self.z_loss_coefficient:
            z_losses = self.z_loss_coefficient * logsumexp.square()
            # Only in the gradient: the loss stays comparable with runs that have no z-loss.
            losses = losses + (z_losses - z_losses.detach())
        count = mask.sum() if self.mean_over == "labels" else mask.numel()
        return {"loss": (losses * mask).sum() / count}


class SmolLM3Model(nn.Module):
    def __init__(self, config: SmolLM3Config, parallel_context: Any, parallel_config: Any):
        super().__init__()
        self.config = config
        self.p2p = P2P(parallel_context.pp_pg, device=compat.device())
        self.shared = Shared()
        _, backend, _ = choose_backend(compat.device())  # fast_step.py puts a recipe's choice
        linear = {
            "pg": parallel_context.tp_pg,
            "mode": parallel_config.tp_mode,
            "bias": False,
            "async_communication": parallel_config.tp_linear_async_communication,
        }
        base = {"config": config, "linear": linear}
        layer = base | {"backend": backend, "shared": self.shared}
        hidden = {"hidden_states"}
        self.token_position_embeddings = PipelineBlock(
            self.p2p, Embedding, base, {"input_ids"}, hidden
        )
        self.decoder = nn.ModuleList(
            PipelineBlock(self.p2p, DecoderLayer, layer | {"layer_index": i}, hidden, hidden)
            for i in range(config.num_hidden_layers)
        )
        norm = {"hidden_size": config.hidden_size, "eps": config.rms_norm_eps}
        self.final_layer_norm = PipelineBlock(self.p2p, RMSNorm, norm, {"x_TC"}, hidden)
        head = {"in_features": config.hidden_size, "out_features": config.vocab_size}
        self.lm_head = PipelineBlock(self.p2p, ColumnLinear, head | linear, {"x_TC"}, {"logits"})

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> torch.Tensor:
        """Logits [T, V/tp] of the flattened micro-batch; the inputs are MicroBatch's."""
        self.shared.inputs = layer_inputs(position_ids, cu_seqlens, self.config)
        states = self.token_position_embeddings(input_ids=input_ids)
        for block in self.decoder:
            states = block(**states)
        h_TC = self.final_layer_norm(x_TC=states["hidden_states"])["hidden_states"]
        return self.lm_head(x_TC=h_TC)["logits"]


class SmolLM3ForTraining(NanotronModel):
    def __init__(
        self,
        config: SmolLM3Config,
        parallel_context: Any,
        parallel_config: Any,
        random_states: Any = None,
    ):
        super().__init__()
        self.config = config
        self.parallel_context = parallel_context
        self.parallel_config = parallel_config
        self.model = SmolLM3Model(config, parallel_context, parallel_config)
        loss = {
            "tp_pg": parallel_context.tp_pg,
            "z_loss_coefficient": config.z_loss_coefficient,
            "mean_over": config.loss_mean_over,
        }
        inputs = {"sharded_logits", "label_ids", "label_mask"}
        self.loss = PipelineBlock(self.model.p2p, Loss, loss, inputs, {"loss"})

    def forward(self, **fields: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss of a micro-batch, whose fields nanotron passes by name."""
        batch = MicroBatch(**fields)
        logits = self.model(batch.input_ids, batch.position_ids, batch.cu_seqlens)
        return self.loss(
            sharded_logits=logits, label_ids=batch.label_ids, label_mask=batch.label_mask
        )

    @torch.no_grad()
    def init_model_randomly(self, config: Any) -> None:
        """The table in this file's header. Each tensor is drawn whole from (seed, name), then cut.

        nanotron 0.4 gives tensor-parallel ranks one seed, so that their shards start equal. This
        fault cost the published run its first 1T tokens.
        """
        std = config.model.init_method.std
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            module = self.get_submodule(name.rpartition(".")[0])
            if isinstance(module, RMSNorm):
                parameter.fill_(1.0)
                continue
            scale = residual_std if isinstance(module, RowLinear) else std
            tensor_name = parameter.get_tied_info().name if parameter.is_tied else name
            generator = torch.Generator().manual_seed(
                config.general.seed + zlib.crc32(tensor_name.encode())
            )
            info = parameter.get_sharded_info()
            whole = torch.empty(tuple(info.unsharded_shape)).normal_(0, scale, generator=generator)
            for pair in info.local_global_slices_pairs:
                parameter[pair.local_slices] = whole[pair.global_slices].to(parameter)

    def get_embeddings_lm_head_tied_names(self) -> list[str]:
        return [EMBEDDING, HEAD] if self.config.tie_word_embeddings else []

    def get_block_compute_costs(self) -> dict[type, int]:
        """Multiply-adds per token; nanotron calls this to spread blocks over pipeline stages."""
        c = self.config
        kv = c.num_key_value_heads * c.head_dim
        attention = 2 * c.hidden_size**2 + 2 * c.hidden_size * kv
        return {
            DecoderLayer: attention + 3 * c.hidden_size * c.intermediate_size,
            ColumnLinear: c.hidden_size * c.vocab_size,
        }
