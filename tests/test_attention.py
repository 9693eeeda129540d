"""Documents never see each other, in any kernel, and cost is paid by the document."""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import edit

from ground.errors import UserError
from launch.recipe.scale import load_scale
from launch.stages.pretrain import PretrainStage
from launch.walk import resolve
from nanotron_ext import attention
from nanotron_ext.attention import Documents, choose_backend, documents_of, flash, sdpa, varlen

LENGTHS = [7, 1, 25, 15]


def documents(lengths: list[int]) -> Documents:
    return documents_of(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), sum(lengths))


def qkv(
    tokens: int, heads: int = 4, kv_heads: int = 2, dtype: Any = torch.float32
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(tokens, count, 8) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def mask(lengths: list[int]) -> torch.Tensor:
    """bool [T, T]: what each token sees, which is its document up to itself."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    token = torch.arange(len(document))
    return (document[:, None] == document) & (token[:, None] >= token)


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]
) -> torch.Tensor:
    """softmax(q k / sqrt(D)) v with a dense mask."""
    groups, seen = q.shape[1] // k.shape[1], mask(lengths).to(q.device)
    heads = []
    for head in range(q.shape[1]):
        keys, values = k[:, head // groups], v[:, head // groups]
        scores = q[:, head] @ keys.T / q.shape[2] ** 0.5
        heads.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values)
    return torch.stack(heads, dim=1)


def stub_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: Any,
    cu_k: Any,
    *longest: int,
    **options: Any,
) -> torch.Tensor:
    """A varlen kernel on the CPU: checks what it is handed, then the dense reference."""
    assert cu_q is cu_k and cu_q.dtype == torch.int32
    assert cu_q[0] == 0 and cu_q[-1] == len(q) and max(cu_q.diff()) <= min(longest)
    causal = {"causal": True, "deterministic": False}, {"window_size": (-1, 0), "enable_gqa": True}
    assert options in causal
    return reference(q, k, v, cu_q.diff().tolist())


def torch_2_13(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int,
    *, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    options = {"window_size": window_size, "enable_gqa": enable_gqa}
    return stub_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options)


def torch_2_11(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int,
    *, window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:  # fmt: skip
    assert query.shape == key.shape == value.shape, "2.11 shares no kv heads"
    options = {"window_size": window_size, "enable_gqa": True}
    return stub_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options)


@pytest.fixture(params=["sdpa", "flash", "varlen 2.13", "varlen 2.11"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(backend, dtype). The GPU's kernels are replaced: test_gpu_attention.py runs them."""
    if request.param == "sdpa":
        return sdpa, torch.float32
    import torch.nn.attention.varlen as torch_varlen

    monkeypatch.setitem(
        sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=stub_kernel)
    )
    release = torch_2_11 if request.param.endswith("2.11") else torch_2_13
    monkeypatch.setattr(torch_varlen, "varlen_attn", release)
    return (flash if request.param == "flash" else varlen)(), torch.bfloat16


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", [LENGTHS, [48], [1] * 6])
def test_every_kernel_equals_the_dense_reference(
    kernel: Any, kv_heads: int, lengths: list[int]
) -> None:
    backend, dtype = kernel
    q, k, v = qkv(sum(lengths), kv_heads=kv_heads, dtype=dtype)
    out = backend(q, k, v, documents(lengths))
    assert out.shape == q.shape and out.dtype == dtype
    assert torch.allclose(out, reference(q, k, v, lengths), atol=1e-5)


def test_a_changed_token_reaches_no_other_document(kernel: Any) -> None:
    backend, dtype = kernel
    q, k, v = qkv(sum(LENGTHS), dtype=dtype)
    before = backend(q, k, v, documents(LENGTHS))
    borders = [0, 7, 8, 33, 48]
    for token in range(48):
        stop = next(border for border in borders if border > token)
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[token] += 1
        moved = (backend(*changed, documents(LENGTHS)) != before).flatten(1).any(-1).nonzero()
        assert moved.min() == token and moved.max() < stop


def test_a_16_bit_kernel_leaves_fp32_to_sdpa() -> None:
    q, k, v = qkv(48)
    assert torch.equal(varlen()(q, k, v, documents(LENGTHS)), sdpa(q, k, v, documents(LENGTHS)))


def test_gradients_stay_inside_the_document() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(sum(LENGTHS)))
    sdpa(q, k, v, documents(LENGTHS))[8:33].sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        outside = torch.cat([x.grad[:8], x.grad[33:]])
        assert torch.equal(outside, torch.zeros_like(outside)) and x.grad[8:33].any()


def test_cost_is_one_kernel_call_a_document_and_no_dense_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[int, int]] = []
    kernel = F.scaled_dot_product_attention

    def recording(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        assert options == {"is_causal": True}, "a mask was handed over"
        calls.append((q.shape[-2], k.shape[-2]))
        return kernel(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recording)
    sdpa(*qkv(sum(LENGTHS)), documents(LENGTHS))
    assert calls == [(length, length) for length in LENGTHS]


GPU = torch.device("cuda")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes choose_backend see a GPU of this capability with these kernels installed."""

    def make(capability: int, *kernels: str) -> None:
        modules = {module for name in kernels for module in attention.KERNELS[name].modules}
        monkeypatch.setattr(attention, "has_module", lambda name: name in modules)
        monkeypatch.setattr(attention.compat, "capability", lambda: capability)
        chosen = {
            name: replace(kernel, make=lambda name=name: name)  # type: ignore[misc]
            for name, kernel in attention.KERNELS.items()
        }
        monkeypatch.setattr(attention, "KERNELS", chosen)

    return make


@pytest.mark.parametrize(
    ("capability", "kernels", "expected"),
    [
        (9, ["fa4", "flash", "varlen"], "fa4"),
        (12, ["fa4", "varlen"], "fa4"),
        (9, ["flash", "varlen"], "flash"),
        (9, ["varlen"], "varlen"),
        (8, ["fa4", "varlen"], "varlen"),  # FlashAttention 4 has no backward pass there
        (7, ["fa4", "flash", "varlen"], "sdpa"),
        (9, [], "sdpa"),
    ],
)
def test_on_a_gpu_the_fastest_kernel_that_runs_there_is_taken(
    machine: Callable[..., None], capability: int, kernels: list[str], expected: str
) -> None:
    machine(capability, *kernels)
    name, backend, why = choose_backend(GPU)
    assert (name, backend) == (expected, sdpa if expected == "sdpa" else expected)
    for missing in attention.KERNELS.keys() - kernels:
        order = [*attention.KERNELS, "sdpa"]
        if order.index(missing) < order.index(expected):
            assert f"{attention.KERNELS[missing].package} is not installed" in why
    assert choose_backend(torch.device("cpu"))[0] == "sdpa"


def test_a_kernel_wanted_by_name_is_taken_or_refused_in_one_line(
    machine: Callable[..., None],
) -> None:
    machine(9, "flash", "varlen")
    assert [choose_backend(GPU, name)[0] for name in ("varlen", "flash", "sdpa")] == [
        "varlen",
        "flash",
        "sdpa",
    ]
    with pytest.raises(
        UserError, match=r"attention: 'fa4': flash-attn-4 is not installed .*; write auto"
    ):
        choose_backend(GPU, "fa4")
    machine(8, "fa4")
    with pytest.raises(UserError, match=r"'fa4': flash-attn-4 needs compute capability 9, not 8"):
        choose_backend(GPU, "fa4")
    assert choose_backend(torch.device("cpu"), "fa4")[0] == "sdpa"  # a recipe's laptop


@pytest.mark.parametrize(
    ("wanted", "has_gpu", "problem"),
    [
        ("fa4", True, "flash-attn-4 is not installed (no module flash_attn.cute)"),
        ("flash", True, "flash-attn needs compute capability 8, not 7"),
        ("sdpa", True, ""),
        ("fa4", False, ""),  # who only looks at the recipe
    ],
)
def test_a_kernel_that_does_not_run_here_is_refused_before_any_stage(
    machine: Callable[..., None], recipes: Path, monkeypatch: pytest.MonkeyPatch,
    wanted: str, has_gpu: bool, problem: str,
) -> None:  # fmt: skip
    machine(7, "flash")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    edit(recipes / "pretrain" / "stage1.yaml", "attention: auto", f"attention: {wanted}")
    run = resolve("pretrain-stage1", load_scale("full"))
    assert isinstance(run, PretrainStage)
    if not problem:
        return run.refuse_recipe()
    line = f"stage1.yaml: nanotron.fast_step.attention: '{wanted}': {problem}; write auto"
    with pytest.raises(UserError, match=re.escape(line)):
        run.refuse_recipe()


def test_what_flash_attention_2_ships_of_4_is_not_taken_for_it(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """flash-attn's wheel has a folder cute as well, without what it imports."""
    machine(9, "flash")
    installed = {"flash_attn", "flash_attn.cute"}
    monkeypatch.setattr(attention, "has_module", lambda name: name in installed)
    name, _, why = choose_backend(GPU)
    assert name == "flash" and "flash-attn-4 is not installed (no module cutlass)" in why
