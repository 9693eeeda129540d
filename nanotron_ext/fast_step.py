"""The fast step: what a training step on CUDA does otherwise than the plain model, chosen in one place.

The recipe's `nanotron.fast_step` turns each part off by itself. All give the plain model's loss and
gradients (fp32: 1e-6; bf16: fewer roundings). Legend: T tokens of a micro-batch, C hidden, V vocabulary
entries of a rank, W weights of a rank. What each part changes in memory, in bf16:

    compile_layer           drops the fp32 copies that RMSNorm, rotation and SwiGLU keep for backward;
                            the loss' kernels are compiled with it, and hold none for a moment
    plain_linears           nothing, but the fused gradients below are off without it
    in_place_loss           T*V * 2 bytes of logits; the plain loss keeps T*V * 4 more and holds
                            T*V * 4 for a moment
    whole_logits_gib        above it no logits are kept: `fast_loss.HEAD_CHUNK_BYTES` for a moment
    fused_weight_gradients  no gradient of a linear layer in bf16 (W * 2), no bucket of DDP (W * 2)

The order of `apply` matters: layers are compiled last, with what the parts before put into them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from nanotron_ext import compat
from nanotron_ext.attention import Backend, choose_backend, sdpa
from nanotron_ext.fast_loss import HeadCrossEntropy, InPlaceCrossEntropy
from nanotron_ext.job import FastStep
from nanotron_ext.linear import ColumnLinear, RowLinear
from nanotron_ext.model import Attention, DecoderLayer, LayerInputs, SmolLM3ForTraining
from nanotron_ext.reduction import OverlappedReduction


@dataclass(frozen=True)
class Setting:
    """What decides beside the recipe's options."""

    device_type: str  # cuda | cpu
    has_c_compiler: bool
    tp: int
    pp: int
    accumulates_in_fp32: bool  # nanotron has an fp32 gradient buffer
    logits_bytes: int  # of a micro-batch on one rank


@dataclass(frozen=True)
class Choice:
    """What the step does; `lines` say what was chosen and why, for the log."""

    attention: Backend = sdpa
    compile_layer: bool = False
    plain_linears: bool = False
    loss: Literal["plain", "in place", "head in chunks"] = "plain"
    fused_weight_gradients: bool = False
    lines: tuple[str, ...] = ()


OFF = "off: nanotron.fast_step.{} is false"


def choose(options: FastStep, at: Setting) -> Choice:
    name, attention, why = choose_backend(compat.device(), options.attention)
    kernel = f"attention kernel: {name} ({why})"
    if at.device_type != "cuda":
        off = "fast step: off (no GPU; a CPU runs the plain model)"
        return Choice(attention, lines=(kernel, off))
    loss, why_loss = _loss(options, at)
    fused, why_fused = _fused_weight_gradients(options, at)
    plain, why_plain = _plain_linears(options, at, fused)
    compiled, why_compiled = _compile_layer(options, at)
    lines = (
        kernel,
        f"fast step, decoder layer: {why_compiled}",
        f"fast step, linear layers: {why_plain}",
        f"fast step, loss: {why_loss}",
        f"fast step, weight gradients: {why_fused}",
    )
    return Choice(attention, compiled, plain, loss, fused, lines)


def _compile_layer(options: FastStep, at: Setting) -> tuple[bool, str]:
    if not options.compile_layer:
        return False, OFF.format("compile_layer")
    if not at.has_c_compiler:
        return False, "off: neither CC nor gcc nor clang is there for torch.compile; install gcc"
    return True, "compiled, once for each kind of layer"


def _plain_linears(options: FastStep, at: Setting, fused: bool) -> tuple[bool, str]:
    if not options.plain_linears:
        return False, OFF.format("plain_linears")
    if at.tp == 1:
        return True, "F.linear (tp 1)"
    if fused:
        return True, f"F.linear between nanotron's collectives (tp {at.tp})"
    return False, f"off: nanotron's own (tp {at.tp}, and weight gradients are not fused)"


def _loss(options: FastStep, at: Setting) -> tuple[Any, str]:
    gib = at.logits_bytes / 2**30
    size = (
        f"{gib:.2f} GiB of logits, nanotron.fast_step.whole_logits_gib {options.whole_logits_gib:g}"
    )
    if not options.in_place_loss:
        return "plain", OFF.format("in_place_loss")
    if gib <= options.whole_logits_gib:
        return "in place", f"turns the logits into their gradient ({size})"
    if at.pp > 1:  # nanotron may put the head and the loss on two ranks
        return "in place", f"turns the logits into their gradient ({size}, but pp {at.pp})"
    return "head in chunks", f"computes the logits twice, in chunks of tokens ({size})"


def _fused_weight_gradients(options: FastStep, at: Setting) -> tuple[bool, str]:
    if not options.fused_weight_gradients:
        return False, OFF.format("fused_weight_gradients")
    if not options.plain_linears:
        return False, "off: they need the plain linear layers, nanotron.fast_step.plain_linears"
    if not at.accumulates_in_fp32:
        return False, "off: nanotron.optimizer.accumulate_grad_in_fp32 is false, so no fp32 buffer"
    if at.pp > 1:
        # Autograd refuses a saved tensor that was written to since: the buffer, by a micro-batch
        # whose backward pass comes before this one's.
        return False, f"off: several micro-batches are in flight (pp {at.pp})"
    return True, "added to nanotron's fp32 buffer inside the matrix product, no DDP"


def apply(
    model: SmolLM3ForTraining, choice: Choice, accumulator: Any, micro_batches: int = 1
) -> None:
    """Make `model` take the chosen step, of `micro_batches` a rank.

    `accumulator` is nanotron's FP32GradientAccumulator.
    """
    for layer in model.modules():
        if isinstance(layer, Attention):
            layer.backend = choice.attention
    linears = [x for x in model.modules() if isinstance(x, ColumnLinear | RowLinear)]
    for linear in linears:
        linear.is_fast = choice.plain_linears
    if choice.fused_weight_gradients:
        assert choice.plain_linears  # nanotron's do not know of the buffer
        names = {id(weight): name for name, weight in model.get_named_params_with_correct_tied()}
        fused = {names[id(linear.weight)]: linear for linear in linears}
        compat.expect_gradients_in_buffer(accumulator, fused.keys())
        for name, linear in fused.items():
            linear.accumulated_OC = accumulator.get_grad_buffer(name)
        if model.parallel_context.dp_pg.size() > 1:
            layers = [x for x in model.modules() if isinstance(x, DecoderLayer)]
            dp_pg = model.parallel_context.dp_pg
            OverlappedReduction(accumulator, layers, dp_pg, micro_batches)
    _replace_loss(model, choice)
    if choice.compile_layer:
        _compile_layers(model)


def _replace_loss(model: SmolLM3ForTraining, choice: Choice) -> None:
    head = getattr(model.model.lm_head, "pp_block", None)
    loss = getattr(model.loss, "pp_block", None)
    compiled = choice.compile_layer
    if choice.loss == "in place" and loss is not None:
        loss.cross_entropy = lambda *inputs: InPlaceCrossEntropy.apply(*inputs, compiled)
    if choice.loss == "head in chunks":
        assert head is not None and loss is not None  # pp 1
        # It hands on the hidden states in place of logits.
        head.forward = head.gathered
        loss.cross_entropy = lambda h_TC, labels_T, group: HeadCrossEntropy.apply(
            h_TC, head.weight, head.accumulated_OC, labels_T, group, compiled
        )


def _compile_layers(model: SmolLM3ForTraining) -> None:
    compiled = torch.compile(DecoderLayer._layer, dynamic=False)
    for layer in model.modules():
        if isinstance(layer, DecoderLayer):
            if layer.attn.backend is sdpa:
                # It loops over documents in Python: one graph for each list of lengths otherwise.
                layer.attn.backend = torch.compiler.disable(sdpa)
            layer._layer = partial(_run, compiled, layer)  # type: ignore[method-assign]


def _run(
    compiled: Callable[..., torch.Tensor],
    layer: DecoderLayer,
    h_TC: torch.Tensor,
    inputs: LayerInputs,
) -> torch.Tensor:
    # One graph for any number of documents; all other shapes are the run's.
    torch._dynamo.mark_dynamic(inputs.documents.cu_seqlens, 0)
    return compiled(layer, h_TC, inputs)
