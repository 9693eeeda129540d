"""Causal attention inside each document of a packed micro-batch, with every kernel.

Legend: T tokens of the micro-batch, H query heads, K kv heads, D head dim, N documents.
A backend maps (q_THD, k_TKD, v_TKD, Documents) to o_THD; no token sees another document.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ground import packed_attention
from ground.errors import UserError
from ground.packed_attention import by_document
from nanotron_ext import compat
from nanotron_ext.compat import has_module


@dataclass(frozen=True)
class Documents:
    """Borders of the documents in a flattened micro-batch.

    `cu_seqlens` is int32 [N+1] on the device, `lengths` the same on the host where a backend
    loops over documents (empty otherwise: reading it back would stall a GPU), `max_length` in
    tokens.
    """

    cu_seqlens: torch.Tensor
    lengths: list[int]
    max_length: int


Backend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Documents], torch.Tensor]


def documents_of(cu_seqlens: torch.Tensor, sequence_length: int) -> Documents:
    """The loader's borders; no document is longer than a window of `sequence_length` tokens."""
    lengths = cu_seqlens.diff().tolist() if cu_seqlens.is_cpu else []
    return Documents(cu_seqlens, lengths, sequence_length)


def sdpa(
    q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, documents: Documents
) -> torch.Tensor:
    """torch's kernel, one document at a time: cost grows with document length, not with S."""
    lengths = documents.lengths or documents.cu_seqlens.diff().tolist()
    return by_document(q_THD, k_TKD, v_TKD, lengths)


def flash_4() -> Backend:
    """FlashAttention 4's varlen kernels, for Hopper and Blackwell."""
    from nanotron_ext.flash_attention_4 import attention

    def backend(
        q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, documents: Documents
    ) -> torch.Tensor:
        out: torch.Tensor = attention(
            q_THD, k_TKD, v_TKD, documents.cu_seqlens, documents.max_length
        )[0]
        return out

    return _in_16_bits(backend)


def flash() -> Backend:
    """FlashAttention 2's varlen kernel (Dao 2023, arXiv:2307.08691), as published."""
    from flash_attn import flash_attn_varlen_func

    def backend(
        q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, documents: Documents
    ) -> torch.Tensor:
        cu, longest = documents.cu_seqlens, documents.max_length
        same_bits = torch.are_deterministic_algorithms_enabled()
        return flash_attn_varlen_func(
            q_THD, k_TKD, v_TKD, cu, cu, longest, longest, causal=True, deterministic=same_bits
        )

    return _in_16_bits(backend)


def varlen() -> Backend:
    """The FlashAttention 2 that torch contains; it has no CPU kernel."""
    kernel = packed_attention.varlen()

    def backend(
        q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, documents: Documents
    ) -> torch.Tensor:
        return kernel(q_THD, k_TKD, v_TKD, documents.cu_seqlens, documents.max_length)

    return _in_16_bits(backend)


def _in_16_bits(kernel: Backend) -> Backend:
    """`kernel` for 16 bits, which is all that it supports, and SDPA for fp32.

    A compiled layer calls SDPA as it is: `fast_step.py` says why.
    """
    plain = torch.compiler.disable(sdpa)

    def backend(
        q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, documents: Documents
    ) -> torch.Tensor:
        run = plain if q_THD.dtype == torch.float32 else kernel
        out: torch.Tensor = run(q_THD, k_TKD, v_TKD, documents)
        return out

    return backend


@dataclass(frozen=True)
class Kernel:
    """A GPU's attention kernel: where it is from, and what it needs."""

    make: Callable[[], Backend]
    modules: tuple[str, ...]
    package: str
    capability: int  # of the GPU, at least: 8 Ampere, 9 Hopper

    def why_not(self) -> str:
        """What it lacks here; empty where it runs."""
        for module in self.modules:
            if not has_module(module):
                return f"{self.package} is not installed (no module {module})"
        found = compat.capability()
        if found < self.capability:
            return f"{self.package} needs compute capability {self.capability}, not {found}"
        return ""


# The fastest first. FA4's forward pass runs from 8 on, its backward pass from 9 on. flash-attn
# ships flash_attn.cute too, but not what that imports.
KERNELS = {
    "fa4": Kernel(flash_4, ("flash_attn.cute", "cutlass", "quack"), "flash-attn-4", 9),
    "flash": Kernel(flash, ("flash_attn",), "flash-attn", 8),
    "varlen": Kernel(varlen, ("torch.nn.attention.varlen",), "torch's varlen_attn", 8),
}


def check_kernel(wanted: str) -> None:
    """Raise UserError where the kernel wanted by name does not run on this GPU."""
    kernel = KERNELS.get(wanted)
    if kernel and (why_not := kernel.why_not()):
        raise UserError(
            f"nanotron.fast_step.attention: '{wanted}': {why_not}; write auto, or install the "
            "gpu extra (make install takes it where a GPU is)"
        )


def choose_backend(device: torch.device, wanted: str = "auto") -> tuple[str, Backend, str]:
    """The kernel `wanted`, or the fastest one here: its name, the function, and why, for the log.

    Raises UserError where the one wanted by name does not run on this GPU. A CPU has SDPA alone.
    """
    if device.type != "cuda":
        return "sdpa", sdpa, "no GPU; the other kernels have no CPU backward"
    check_kernel(wanted)
    passed_over: list[str] = []
    for name, kernel in KERNELS.items():
        if wanted not in ("auto", name):
            continue
        why_not = kernel.why_not()
        if not why_not:
            why = "; ".join(passed_over) or f"{kernel.package} is installed"
            return name, kernel.make(), why
        passed_over.append(why_not)
    return "sdpa", sdpa, "; ".join(passed_over) or "the recipe says so"
