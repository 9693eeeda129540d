"""The loss and gradients of a step, however its windows are cut into micro-batches and replicas."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import metrics
from in_process import build, single_process, tiny
from test_layouts import run

from nanotron_ext.dataloader import borders
from nanotron_ext.micro_batch import MicroBatch

WINDOWS, WINDOW = 8, 48
CUTS = (1, 2, 4, 8)  # windows of a micro-batch


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    with single_process() as parallel_context:
        yield parallel_context


def windows() -> list[torch.Tensor]:
    """ids, positions, labels and mask [8, 48]: from one document a window to sixteen."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(96, (WINDOWS, WINDOW + 1), generator=generator)
    lengths = (48, 24, 16, 12, 8, 6, 4, 3)
    positions = torch.stack([torch.arange(WINDOW) % length for length in lengths])
    mask = torch.cat([positions[:, 1:] != 0, torch.ones(WINDOWS, 1, dtype=torch.bool)], dim=1)
    return [ids[:, :-1], positions, ids[:, 1:], mask]


def step(model: Any, size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of the 8 windows in micro-batches of `size`, as nanotron sums them."""
    model.zero_grad()
    micro_batches = zip(*(field.split(size) for field in windows()), strict=True)
    losses = []
    for ids, positions, labels, mask in micro_batches:
        cu_seqlens = torch.from_numpy(borders(positions.numpy()))
        batch = MicroBatch(ids, positions, cu_seqlens, labels, mask)
        losses.append(model(**vars(batch))["loss"] * size / WINDOWS)
    loss = torch.stack(losses).sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("size", CUTS[1:])
def test_over_tokens_a_step_is_the_same_at_every_cut(context: Any, size: int) -> None:
    model = build(tiny(loss_mean_over="tokens"), context)
    (loss, gradients), (expected, whole) = step(model, size), step(model, 1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient in gradients.items():
        assert (gradient - whole[name]).norm() <= 1e-6 * whole[name].norm(), name


def test_over_labels_as_published_it_is_not(context: Any) -> None:
    model = build(tiny(loss_mean_over="labels"), context)
    losses = [step(model, size)[0].item() for size in CUTS]
    apart = [abs(loss / losses[0] - 1) for loss in losses[1:]]
    assert min(apart) > 1e-6


def test_over_tokens_the_loss_is_smaller_by_the_share_of_masked_labels(context: Any) -> None:
    over = [step(build(tiny(loss_mean_over=m), context), 8)[0] for m in ("tokens", "labels")]
    assert (over[0] / over[1]).item() == pytest.approx(windows()[3].float().mean().item(), rel=1e-6)


# windows of a micro-batch, accumulated micro-batches, replicas: 4 windows a step
REAL = {
    "1 x 4": (1, 4, 1),
    "2 x 2": (2, 2, 1),
    "4 x 1": (4, 1, 1),
    "dp 2": (1, 2, 2),
    "dp 2, 2": (2, 1, 2),
}


@pytest.mark.slow
def test_real_runs_take_the_same_steps_at_every_cut(make_job: Callable[..., Path]) -> None:
    folders = {
        name: make_job(
            name,
            {
                "tokens.loss_mean_over": "tokens",
                "tokens.micro_batch_size": size,
                "tokens.batch_accumulation_per_replica": times,
                "parallelism.dp": dp,
            },
        )
        for name, (size, times, dp) in REAL.items()
    }
    for processes in (1, 2):
        run([folders[name] for name, cut in REAL.items() if cut[2] == processes], processes)
    for key in ("loss", "grad_norm"):
        one, *others = ([line[key] for line in metrics(folder)] for folder in folders.values())
        for other in others:
            assert other == pytest.approx(one, rel=1e-6), key
