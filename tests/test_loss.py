"""Each form of the cross-entropy gives torch's own loss and gradients, in fp32 to 1e-6."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import is_tensor
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanotron_ext import fast_loss
from nanotron_ext.loss import ShardedCrossEntropy

TOKENS, HIDDEN, VOCAB = 37, 16, 96
Z_LOSS = 0.1


class OneRank:
    """A process group of one, as far as the loss asks."""

    @staticmethod
    def rank() -> int:
        return 0

    @staticmethod
    def size() -> int:
        return 1


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunks(monkeypatch.setattr)


def set_chunks(put: Callable[[Any, str, int], None] = setattr) -> None:
    """5 and 8 tokens: neither divides 37, and neither divides the other."""
    put(fast_loss, "CHUNK_BYTES", 5 * VOCAB * 4)
    put(fast_loss, "HEAD_CHUNK_BYTES", 8 * VOCAB * 4)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head, labels and mask; logits of some tokens are far from 0."""
    torch.manual_seed(0)
    h_TC = torch.randn(TOKENS, HIDDEN) * torch.linspace(0.1, 4, TOKENS)[:, None]
    weight_VC, labels_T = torch.randn(VOCAB, HIDDEN) / HIDDEN**0.5, torch.randint(VOCAB, (TOKENS,))
    labels_T[:2] = torch.tensor([0, VOCAB - 1])
    return h_TC, weight_VC, labels_T, torch.rand(TOKENS) > 0.3


def total(of_each: Any, mask: torch.Tensor) -> torch.Tensor:
    """As the model's Loss combines loss and logsumexp, so that both have a gradient."""
    losses, logsumexp = of_each
    return ((losses + Z_LOSS * logsumexp.square()) * mask).sum() / mask.sum()


def reference() -> tuple[torch.Tensor, ...]:
    """Loss, gradient of the hidden states and of the head, in fp64 by torch's own functions."""
    h, weight, labels, mask = inputs()
    h, weight = h.double().requires_grad_(), weight.double().requires_grad_()
    logits = F.linear(h, weight)
    losses = F.cross_entropy(logits, labels, reduction="none")
    value = total((losses, logits.logsumexp(-1)), mask)
    value.backward()
    assert h.grad is not None and weight.grad is not None
    return value.detach(), h.grad, weight.grad


def of_form(form: str, group: Any, compiled: bool, h: torch.Tensor, weight: torch.Tensor,
            into: torch.Tensor | None, labels: torch.Tensor) -> Any:  # fmt: skip
    if form == "head":
        return fast_loss.HeadCrossEntropy.apply(h, weight, into, labels, group, compiled)
    logits = F.linear(h, weight)
    if form == "in place":
        return fast_loss.InPlaceCrossEntropy.apply(logits, labels, group, compiled)
    return ShardedCrossEntropy.apply(logits, labels, group)


def computed(form: str, group: Any, compiled: bool, buffer: bool) -> tuple[torch.Tensor, ...]:
    """The same as `reference`, of this rank's part of the vocabulary."""
    h, weight, labels, mask = inputs()
    weight = weight.chunk(group.size())[group.rank()].clone()
    h, weight = h.requires_grad_(), weight.requires_grad_()
    into = torch.full_like(weight, 0.125).detach() if buffer else None
    value = total(of_form(form, group, compiled, h, weight, into, labels), mask)
    value.backward()
    assert h.grad is not None
    of_weight = weight.grad if into is None else into - 0.125
    assert of_weight is not None and (into is None or weight.grad is None)
    return value.detach(), h.grad, of_weight


def assert_equal(mine: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> None:
    for one, other in zip(mine, theirs, strict=True):
        assert (one.double() - other).norm() <= 1e-6 * other.norm()


CASES = [("sharded", False), ("in place", False), ("head", False), ("head", True)]


@pytest.mark.parametrize(("form", "buffer"), CASES)
def test_each_form_is_torchs_loss(form: str, buffer: bool) -> None:
    assert_equal(computed(form, OneRank, False, buffer), reference())


@pytest.mark.slow  # compiles
@pytest.mark.parametrize(("form", "buffer"), CASES[1:])
def test_compiled_each_form_is_torchs_loss(form: str, buffer: bool) -> None:
    assert_equal(computed(form, OneRank, True, buffer), reference())


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 37])
def test_chunks_cover_each_token_once(tokens: int) -> None:
    parts = list(fast_loss.head_chunks(tokens, torch.empty(VOCAB, HIDDEN)))
    assert [i for part in parts for i in range(tokens)[part]] == list(range(tokens))
    assert max(part.stop - part.start for part in parts) <= 8


def test_the_logits_become_their_own_gradient() -> None:
    """No second [T, V] buffer: what autograd hands on is the logits' memory."""
    logits = torch.randn(TOKENS, VOCAB, requires_grad=True)
    kept, seen = logits * 1, []
    kept.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    losses, _ = fast_loss.InPlaceCrossEntropy.apply(kept, inputs()[2], OneRank, False)
    losses.sum().backward()
    assert seen == [kept.data_ptr()]


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation makes, by dtype; views make none."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {
            x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if is_tensor(x)
        }
        for x in filter(is_tensor, tree_leaves(out)):
            if x.untyped_storage().data_ptr() not in known:
                self.elements[x.dtype] = max(self.elements.get(x.dtype, 0), x.numel())
        return out


def largest(form: str) -> dict[torch.dtype, int]:
    """Of the loss and its backward pass in bf16, the gradient of the head through its buffer."""
    h, weight, labels, mask = inputs()
    h, weight = h.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    into = torch.zeros_like(weight, dtype=torch.float32)
    with Largest() as seen:
        total(of_form(form, OneRank, False, h, weight, into, labels), mask).backward()
    return seen.elements


def test_only_the_plain_form_makes_an_fp32_buffer_of_all_logits() -> None:
    whole = TOKENS * VOCAB
    assert largest("sharded")[torch.float32] == whole
    in_place, in_chunks = largest("in place"), largest("head")
    assert in_place[torch.bfloat16] == whole
    assert in_place[torch.float32] <= 5 * VOCAB
    assert in_chunks[torch.bfloat16] <= 16 * VOCAB  # of bf16, a chunk is 16 tokens
    assert in_chunks[torch.float32] <= 5 * VOCAB


def _rank(rank: int, address: str, out: Path) -> None:
    set_chunks()
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    group = dist.group.WORLD
    results = {case: computed(case[0], group, False, case[1]) for case in CASES}
    torch.save(results, out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What two ranks computed, each with half of the vocabulary."""
    out = tmp_path_factory.mktemp("ranks")
    spawn(_rank, (f"file://{out}/rendezvous", out), nprocs=2)
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_over_a_sharded_vocabulary_each_form_is_torchs_loss(ranks: list[Any], case: Any) -> None:
    value, of_hidden, of_weight = reference()
    for rank, result in enumerate(ranks):
        assert_equal((result[case][0],), (value,))
        assert_equal((result[case][2],), (of_weight.chunk(2)[rank],))
    # each rank's share of the hidden states' gradient; the linear layer before adds them
    assert_equal((ranks[0][case][1] + ranks[1][case][1],), (of_hidden,))


def test_bf16_logits_get_the_gradient_of_the_plain_form() -> None:
    h, weight, labels, mask = inputs()
    logits = F.linear(h, weight).bfloat16()
    plain, in_place = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    total(ShardedCrossEntropy.apply(plain * 1, labels, OneRank), mask).backward()
    total(
        fast_loss.InPlaceCrossEntropy.apply(in_place * 1, labels, OneRank, False), mask
    ).backward()
    assert plain.grad is not None and in_place.grad is not None
    torch.testing.assert_close(in_place.grad, plain.grad, rtol=2**-8, atol=1e-7)
