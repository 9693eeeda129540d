"""FlashAttention 4 as an operator: the compiler sees through it, and autograd knows it.

Its kernels have no CPU version: here the dense reference takes their place, behind the names that
the operator calls. test_gpu_attention.py runs the kernels themselves.
"""

import inspect
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from test_attention import LENGTHS, documents, mask, qkv, reference

from nanotron_ext import compat
from nanotron_ext.attention import flash_4


def forward(q: Any, k: Any, v: Any, *, cu_seqlens_q: Any, **options: Any) -> Any:
    lengths = cu_seqlens_q.diff().tolist()
    assert options.pop("cu_seqlens_k").tolist() == cu_seqlens_q.tolist()
    longest = options.pop("max_seqlen_q"), options.pop("max_seqlen_k")
    assert min(longest) >= max(lengths) and options == {"causal": True, "return_lse": True}
    return reference(q, k, v, lengths), q.new_zeros(q.shape[1], len(q), dtype=torch.float32)


def backward(
    q: Any, k: Any, v: Any, out: Any, gradient: Any, logsumexp: Any, **options: Any
) -> Any:
    """Written out: autograd records nothing inside an operator."""
    assert out.shape == gradient.shape == q.shape and logsumexp.shape == (q.shape[1], len(q))
    assert options["causal"] and options["deterministic"] is False
    seen, groups = mask(options["cu_seqlens_q"].diff().tolist()), q.shape[1] // k.shape[1]
    q, k, v, do = (x.float().transpose(0, 1) for x in (q, k, v, gradient))
    keys, values = (x.repeat_interleave(groups, 0) for x in (k, v))
    scale = q.shape[2] ** -0.5
    p = (q @ keys.mT * scale).masked_fill(~seen, float("-inf")).softmax(-1)
    dp = do @ values.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    shared = [x.unflatten(0, (-1, groups)).sum(1) for x in (ds.mT @ q, p.mT @ do)]
    return [x.transpose(0, 1).bfloat16() for x in (ds @ keys, *shared)]


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    cute, interface = (sys.modules[f"flash_attn.cute{name}"] for name in ("", ".interface"))
    monkeypatch.setattr(cute, "flash_attn_varlen_func", forward, raising=False)
    monkeypatch.setattr(interface, "_flash_attn_bwd", backward, raising=False)


def run(layer: Any, lengths: list[int]) -> list[torch.Tensor]:
    """Output and gradients of q, k and v, which are views of one tensor as in the model."""
    q, k, v = (x.detach() for x in qkv(sum(lengths), dtype=torch.bfloat16))
    fused = torch.cat([q, k, v], dim=1).requires_grad_()
    out = layer(fused, documents(lengths))
    (gradient,) = torch.autograd.grad(out.float().square().sum(), fused)
    return [out.detach(), gradient]


def layer(backend: Any) -> Any:
    def run_layer(fused: torch.Tensor, found: Any) -> torch.Tensor:
        return backend(*fused.split((4, 2, 2), dim=1), found) * 2

    return run_layer


def test_output_and_gradients_are_those_of_the_kernel() -> None:
    wanted = run(layer(lambda *args: reference(*args[:3], LENGTHS)), LENGTHS)
    for found, expected in zip(run(layer(flash_4()), LENGTHS), wanted, strict=True):
        assert (found - expected).norm() <= 1e-2 * expected.norm()  # bf16 has 8 bits


def test_fp32_is_left_to_sdpa() -> None:
    q, k, v = qkv(sum(LENGTHS))
    out = flash_4()(q, k, v, documents(LENGTHS))
    assert torch.allclose(out, reference(q, k, v, LENGTHS), atol=1e-5)


def test_a_compiled_layer_has_no_graph_break_and_one_compilation_for_any_documents() -> None:
    plain, graphs = layer(flash_4()), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    @torch.compile(backend=backend, fullgraph=True, dynamic=False)
    def compiled(fused: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        return plain(fused, attention.Documents(cu_seqlens, [], 48))

    from nanotron_ext import attention

    def marked(fused: torch.Tensor, found: Any) -> torch.Tensor:
        torch._dynamo.mark_dynamic(found.cu_seqlens, 0)
        return compiled(fused, found.cu_seqlens)

    for lengths in (LENGTHS, [10, 10, 28], [5, 5, 5, 5, 28]):
        found, expected = run(marked, lengths), run(plain, lengths)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert len(graphs) == 1
    assert "flash_attention_4" in str(graphs[0].graph)


def test_the_operators_keep_what_torch_asks_of_one() -> None:
    """Schema, shapes of the fake kernels, autograd; the stand-in's gradient cannot be traced."""
    from nanotron_ext import flash_attention_4

    q, k, v = (x.requires_grad_() for x in qkv(sum(LENGTHS), dtype=torch.bfloat16))
    arguments = (q, k, v, documents(LENGTHS).cu_seqlens, sum(LENGTHS))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(flash_attention_4.attention, arguments, test_utils=checks)
    out, logsumexp = (x.detach() for x in flash_attention_4.attention(*arguments))
    inputs = [x.detach() for x in (q, k, v)]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = flash_attention_4.attention_backward(out, *inputs, out, logsumexp, *arguments[3:])
    assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in inputs]


@pytest.mark.skipif(not compat.has_module("flash_attn.cute"), reason="flash-attn-4 is missing")
def test_the_installed_package_takes_what_it_is_handed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    from flash_attn.cute import flash_attn_varlen_func
    from flash_attn.cute.interface import _flash_attn_bwd

    cu = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "causal")
    same = dict.fromkeys(cu)
    inspect.signature(flash_attn_varlen_func).bind(1, 2, 3, **same, return_lse=True)
    names = ["q", "k", "v", "out", "dout", "lse"]
    assert list(inspect.signature(_flash_attn_bwd).parameters)[:6] == names
    inspect.signature(_flash_attn_bwd).bind(*names, **same, deterministic=False)
