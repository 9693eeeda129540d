"""The model on nanotron equals transformers' SmolLM3ForCausalLM: logits, loss, every gradient.

fp32, tiny random weights, packed documents on our side against one document at a time on theirs.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from in_process import (
    as_transformers,
    build,
    randomise_norms,
    single_process,
    tiny,
    transformers_model,
)

from nanotron_ext.config import SmolLM3Config
from nanotron_ext.dataloader import borders
from nanotron_ext.micro_batch import MicroBatch

# Documents of two windows of 48 tokens; one of a single token, one that fills its window.
DOCUMENTS = ((7, 1, 25, 15), (48,))
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 24}


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    with single_process() as parallel_context:
        yield parallel_context


def micro_batch(
    config: SmolLM3Config, documents: tuple[tuple[int, ...], ...] = DOCUMENTS
) -> MicroBatch:
    generator = torch.Generator().manual_seed(3)
    shape = (len(documents), sum(documents[0]))
    ids_BS1 = torch.randint(config.vocab_size, (shape[0], shape[1] + 1), generator=generator)
    positions_BS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in documents])
    cu_seqlens = torch.from_numpy(borders(positions_BS.numpy()))
    # The label of a document's last token opens the next document; the window's last label counts.
    mask_BS = torch.cat([positions_BS[:, 1:] != 0, torch.ones(shape[0], 1, dtype=bool)], dim=1)
    return MicroBatch(ids_BS1[:, :-1], positions_BS, cu_seqlens, ids_BS1[:, 1:], mask_BS)


def ours(model: Any, batch: MicroBatch) -> dict[str, torch.Tensor]:
    """Logits, loss and gradients under transformers' names."""
    model.zero_grad()
    loss = model(**vars(batch))["loss"]
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        logits = model.model(batch.input_ids, batch.position_ids, batch.cu_seqlens)
    return {"logits": logits, "loss": loss.detach(), **as_transformers(gradients, model.config)}


def theirs(
    model: Any, batch: MicroBatch, documents: tuple[tuple[int, ...], ...] = DOCUMENTS
) -> dict[str, torch.Tensor]:
    """The same of transformers' model, which runs each document by itself."""
    model.zero_grad()
    lengths = [length for row in documents for length in row]
    labels = batch.label_ids.masked_fill(~batch.label_mask, -100).reshape(-1)
    counted, losses, logits = batch.label_mask.sum(), [], []
    for ids, label in zip(
        batch.input_ids.reshape(-1).split(lengths), labels.split(lengths), strict=True
    ):
        out = model(ids[None], labels=ids[None], shift_labels=label, num_items_in_batch=counted)
        losses.append(out.loss)
        logits.append(out.logits[0])
    loss = torch.stack(losses).sum()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"logits": torch.cat(logits).detach(), "loss": loss.detach(), **gradients}


def difference(mine: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest absolute difference of logits and loss; of gradients, relative to their norm."""
    assert mine.keys() == other.keys()
    exact = {name: (mine[name] - other[name]).abs().max().item() for name in ("logits", "loss")}
    gradients = {
        name: ((mine[name] - other[name]).norm() / other[name].norm()).item()
        for name in mine.keys() - exact.keys()
    }
    worst = max(gradients, key=lambda name: gradients[name])
    return {**exact, "gradient": gradients[worst]}


def compare(
    config: SmolLM3Config, context: Any, their_config: SmolLM3Config | None = None
) -> dict[str, float]:
    model = build(config, context)
    randomise_norms(model)
    weights = as_transformers(dict(model.named_parameters()), config)
    reference = transformers_model(their_config or config, weights)
    batch = micro_batch(config)
    return difference(ours(model, batch), theirs(reference, batch))


def assert_equal(found: dict[str, float]) -> None:
    assert found["logits"] <= 1e-5 and found["loss"] <= 1e-5 and found["gradient"] <= 1e-4, found


@pytest.mark.parametrize("no_rope_layer", [0, 1], ids=["RoPE", "NoPE"])
def test_each_kind_of_layer_alone_equals_transformers(context: Any, no_rope_layer: int) -> None:
    assert_equal(compare(tiny(num_hidden_layers=1, no_rope_layer=no_rope_layer), context))


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["GQA 1", "GQA 2", "GQA 4"])
@pytest.mark.parametrize("theta", [50_000.0, 2_000_000.0, 5_000_000.0])
def test_the_whole_model_equals_transformers(context: Any, kv_heads: int, theta: float) -> None:
    assert_equal(compare(tiny(num_key_value_heads=kv_heads, rope_theta=theta), context))


def test_the_untied_model_equals_transformers(context: Any) -> None:
    assert_equal(compare(tiny(tie_word_embeddings=False), context))


def test_the_whole_model_under_yarn_equals_transformers(context: Any) -> None:
    config = tiny(rope_theta=5_000_000.0, rope_scaling=YARN)
    assert_equal(compare(config, context))
    without = compare(config, context, their_config=tiny(rope_theta=5_000_000.0))
    assert without["logits"] > 1e-3


def test_without_document_masking_each_window_is_one_causal_document(context: Any) -> None:
    """The loader's positions and borders are then the window's; its label mask stays."""
    config, whole = tiny(), ((48,), (48,))
    model = build(config, context)
    reference = transformers_model(config, as_transformers(dict(model.named_parameters()), config))
    windows, batch = micro_batch(config, whole), micro_batch(config)
    batch = replace(batch, position_ids=windows.position_ids, cu_seqlens=windows.cu_seqlens)
    assert_equal(difference(ours(model, batch), theirs(reference, batch, whole)))
    # and masking matters: the packed documents are not the whole windows
    found = difference(ours(model, batch), theirs(reference, batch))
    assert found["logits"] > 1e-3 and found["gradient"] > 1e-3


def test_rope_on_a_nope_layer_would_be_seen(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanotron_ext.model.layer_uses_rope", lambda *_: True)
    found = compare(tiny(), context)
    assert found["logits"] > 1e-3 and found["gradient"] > 1e-3


@pytest.mark.parametrize("kind", ["NoPE", "RoPE"])
def test_q_and_k_permuted_in_conversion_would_be_seen(context: Any, kind: str) -> None:
    """Without positions q . k is blind to one permutation of both; only the gradients tell."""
    config = tiny()
    model = build(config, context)
    weights = as_transformers(dict(model.named_parameters()), config)
    interleaved = torch.arange(config.head_dim).view(2, -1).T.reshape(-1)
    for name, weight in weights.items():
        is_nope = name.startswith(("model.layers.3.", "model.layers.7."))
        if is_nope == (kind == "NoPE") and ("q_proj" in name or "k_proj" in name):
            weights[name] = weight.unflatten(0, (-1, config.head_dim))[:, interleaved].flatten(0, 1)
    batch = micro_batch(config)
    found = difference(ours(model, batch), theirs(transformers_model(config, weights), batch))
    assert found["gradient"] > 1e-3
    assert (found["logits"] > 1e-3) == (kind == "RoPE")


def test_no_token_of_a_document_changes_another_documents_logits(context: Any) -> None:
    config = tiny()
    model = build(config, context)
    batch = micro_batch(config)
    borders = [0, 7, 8, 33, 48]
    with torch.no_grad():
        before = model.model(batch.input_ids, batch.position_ids, batch.cu_seqlens)
        for document, (start, stop) in enumerate(itertools.pairwise(borders)):
            for token in range(start, stop):
                changed = batch.input_ids.clone()
                changed[0, token] = (changed[0, token] + 1) % config.vocab_size
                after = model.model(changed, batch.position_ids, batch.cu_seqlens)
                moved = (after != before).any(-1).nonzero()[:, 0]
                assert moved[0] == token and moved[-1] < stop, f"token {token} of {document}"


@pytest.mark.parametrize("layers", [2, 8])
def test_initial_weights_have_the_published_spread(context: Any, layers: int) -> None:
    """nanotron branch smollm3: N(0, std), output projections over sqrt(2 * layers), norms 1."""
    config = tiny(num_hidden_layers=layers, hidden_size=128, intermediate_size=256, vocab_size=512)
    model = build(config, context, std=0.02)
    residual = {"o_proj", "down_proj"}
    for name, weight in model.named_parameters():
        kind = name.split(".")[-2]
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        std = 0.02 / (2 * layers) ** 0.5 if kind in residual else 0.02
        assert weight.std().item() == pytest.approx(std, rel=0.03), name
        assert weight.abs().max() > 3.5 * std, f"{name} is truncated"
        assert abs(weight.mean().item()) < 5 * std / weight.numel() ** 0.5, name


def test_no_two_tensors_start_alike_and_the_seed_decides(context: Any) -> None:
    one, again, other = (build(tiny(), context, seed=seed) for seed in (5, 5, 6))
    firsts = {}
    for (name, a), b, c in zip(
        one.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        if "norm" not in name:
            assert not torch.equal(a, c), name
            firsts[name] = a.flatten()[:8].tolist()
    drawn = [tuple(round(x / max(map(abs, row)), 4) for x in row) for row in firsts.values()]
    assert len(set(drawn)) == len(firsts)


def test_z_loss_changes_the_gradient_alone(context: Any) -> None:
    """PaLM's: coefficient * mean(logsumexp^2) beside the cross-entropy; the shown loss has none."""
    coefficient = 0.1
    config = tiny()
    plain, with_z = build(config, context), build(tiny(z_loss_coefficient=coefficient), context)
    batch = micro_batch(config)
    without, found = ours(plain, batch), ours(with_z, batch)
    assert torch.equal(found["loss"], without["loss"])
    plain.zero_grad()
    logits = plain.model(batch.input_ids, batch.position_ids, batch.cu_seqlens)
    mask = batch.label_mask.reshape(-1)
    labels = batch.label_ids.reshape(-1)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    total = losses + coefficient * logits.logsumexp(-1).square()
    total[mask].mean().backward()
    for name, parameter in with_z.named_parameters():
        wanted = plain.get_parameter(name).grad
        assert (parameter.grad - wanted).norm() <= 1e-5 * wanted.norm(), name
    assert not torch.allclose(found["model.norm.weight"], without["model.norm.weight"], rtol=1e-3)
