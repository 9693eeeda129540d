"""Documents never see each other, in any kernel, and cost is paid by the document."""

from collections.abc import Callable
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

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


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]
) -> torch.Tensor:
    """softmax(q k / sqrt(D)) v with a dense mask of [T, T]: same document, not later."""
    groups = q.shape[1] // k.shape[1]
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    token = torch.arange(len(document))
    seen = (document[:, None] == document) & (token[:, None] >= token)
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        keys, values = k[:, head // groups], v[:, head // groups]
        scores = q[:, head] @ keys.T / q.shape[2] ** 0.5
        out[:, head] = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values
    return out


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
    causal = options == {"causal": True} or options == {"window_size": (-1, 0), "enable_gqa": True}
    assert causal, options
    return reference(q, k, v, cu_q.diff().tolist())


@pytest.fixture(params=["sdpa", "flash", "varlen"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(backend, dtype). The two GPU kernels are replaced where there is no GPU."""
    if request.param == "sdpa":
        return sdpa, torch.float32
    import torch.nn.attention.varlen as torch_varlen

    stub = SimpleNamespace(flash_attn_varlen_func=stub_kernel)
    monkeypatch.setitem(__import__("sys").modules, "flash_attn", stub)
    monkeypatch.setattr(torch_varlen, "varlen_attn", stub_kernel)
    return {"flash": flash, "varlen": varlen}[request.param], torch.bfloat16


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


@pytest.mark.parametrize("backend", [flash, varlen])
def test_a_16_bit_kernel_leaves_fp32_to_sdpa(backend: Callable[..., Any]) -> None:
    q, k, v = qkv(48)
    assert torch.equal(backend(q, k, v, documents(LENGTHS)), sdpa(q, k, v, documents(LENGTHS)))


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

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", recording)
    sdpa(*qkv(sum(LENGTHS)), documents(LENGTHS))
    assert calls == [(length, length) for length in LENGTHS]


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"flash_attn", "torch.nn.attention.varlen"}, "flash"),
        ({"torch.nn.attention.varlen"}, "varlen"),
        (set(), "sdpa"),
    ],
)
def test_on_a_gpu_the_order_is_flash_varlen_sdpa(
    monkeypatch: pytest.MonkeyPatch, installed: set[str], expected: str
) -> None:
    monkeypatch.setattr(attention, "has_module", lambda name: name in installed)
    name, backend, why = choose_backend(torch.device("cuda"))
    assert (name, backend) == (expected, {"flash": flash, "varlen": varlen, "sdpa": sdpa}[name])
    assert why
    assert choose_backend(torch.device("cpu"))[0] == "sdpa"


def test_the_stand_in_for_flash_attn_is_not_taken_for_it() -> None:
    """compat puts an empty flash_attn into sys.modules, which find_spec finds."""
    import importlib.util

    if importlib.util.find_spec("flash_attn") and attention.has_module("flash_attn"):
        pytest.skip("flash-attn is installed")
    from nanotron_ext import compat

    compat.activate()
    assert importlib.util.find_spec("flash_attn") is not None
    assert not attention.has_module("flash_attn")
    assert attention.has_module("torch.nn.attention.varlen")
