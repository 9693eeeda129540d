"""The attention kernels themselves, forward and backward, against a dense fp64 reference.

`make gpu-check` runs every kernel that this GPU has. On a CPU the same tests hold SDPA in fp32.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
from test_attention import reference

from nanotron_ext.attention import KERNELS, Backend, documents_of, sdpa


@dataclass(frozen=True)
class Case:
    """A kernel where it runs; relative errors of one H100's kernels were half of the bounds."""

    backend: Backend
    device: str
    dtype: torch.dtype
    output_error: float
    gradient_error: float

    @property
    def is_small(self) -> bool:
        return self.device == "cpu"


@pytest.fixture(params=["sdpa", *(pytest.param(name, marks=pytest.mark.gpu) for name in KERNELS)])
def case(request: pytest.FixtureRequest) -> Case:
    if request.param == "sdpa":
        return Case(sdpa, "cpu", torch.float32, 1e-5, 1e-5)
    kernel = KERNELS[request.param]
    if why_not := kernel.why_not():
        pytest.skip(why_not)
    return Case(kernel.make(), "cuda", torch.bfloat16, 4e-3, 6e-3)


# heads, kv heads, head dim; documents of one token to half a window
SHAPES = {"3b": (16, 4, 128), "135m": (9, 3, 64), "one kv head": (8, 1, 64)}
LENGTHS = [660, 1, 2, 127, 128, 129, 1000, 1, 2048]
SMALL = [14, 1, 2, 15, 16, 17, 30, 1, 32]


def inputs(case: Case, heads: int, kv_heads: int, head_dim: int) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, fp64 on the case's device, with the dtype's bits.

    q, k and v are views of one tensor, as the model hands them over.
    """
    tokens = sum(SMALL if case.is_small else LENGTHS)
    generator = torch.Generator().manual_seed(2)
    shape = (tokens, 2 * heads + 2 * kv_heads, head_dim)
    values = torch.randn(shape, generator=generator).to(case.device, case.dtype).double()
    return list(values.split((heads, kv_heads, kv_heads, heads), dim=1))


def run(case: Case, values: list[torch.Tensor], lengths: list[int]) -> list[torch.Tensor]:
    """Output, dq, dk, dv of the kernel."""
    *leaves, gradient = (x.to(case.dtype).requires_grad_() for x in values)
    borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=case.device)
    out = case.backend(*leaves, documents_of(borders, max(lengths)))
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient.detach())]


def dense(values: list[torch.Tensor], lengths: list[int]) -> list[torch.Tensor]:
    *leaves, gradient = (x.clone().requires_grad_() for x in values)
    out = reference(*leaves, lengths)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient.detach())]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_those_of_the_dense_reference(case: Case, shape: str) -> None:
    lengths = SMALL if case.is_small else LENGTHS
    values = inputs(case, *SHAPES[shape])
    errors = [
        relative(found, wanted)
        for found, wanted in zip(run(case, values, lengths), dense(values, lengths), strict=True)
    ]
    print(f"relative errors of output, dq, dk, dv: {errors}")
    assert errors[0] <= case.output_error and max(errors[1:]) <= case.gradient_error


@pytest.mark.parametrize("changed", [0, 5, 8], ids=["first", "middle", "last"])
def test_another_documents_tokens_change_no_bit(case: Case, changed: int) -> None:
    """Of the output and, where the kernel adds in a fixed order, of the gradients."""
    lengths = SMALL if case.is_small else LENGTHS
    values = inputs(case, *SHAPES["3b"])
    borders = [0, *accumulate(lengths)]
    inside = slice(borders[changed], borders[changed + 1])
    others = [x.clone() for x in values]
    for x in others:
        x[inside] = x[inside].flip(0) + 1
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        before, after = (run(case, x, lengths) for x in (values, others))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, one, other in zip(("output", "dq", "dk", "dv"), before, after, strict=True):
        moved = (one != other).flatten(1).any(-1)
        assert moved[inside].any(), name
        moved[inside] = False
        assert not moved.any(), f"{name}: tokens {moved.nonzero()[:5].flatten().tolist()}"


def run_twice(case: Case) -> Any:
    values = inputs(case, *SHAPES["3b"])
    return [run(case, values, SMALL if case.is_small else LENGTHS) for _ in range(2)]


def test_with_fixed_order_a_repeated_backward_pass_gives_the_same_bits(case: Case) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        for one, other in zip(*run_twice(case), strict=True):
            assert torch.equal(one, other)
    finally:
        torch.use_deterministic_algorithms(False)
