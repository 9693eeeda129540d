"""What a layout needs of a GPU: as measured, as autograd keeps it, as the recipes quote it."""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import environment, metrics
from in_process import build, single_process, tiny

from benchmarks.fit import MEASURED, Row, predicted
from launch.machine.memory import PIECE_BYTES, PLAIN, Memory, layer_bytes, memory, weights
from launch.recipe.book import Loaded, load_recipe
from launch.recipe.pretrain import Nanotron, PretrainRecipe
from launch.recipe.scale import load_scale, scale
from nanotron_ext.config import SIZES, SmolLM3Config
from nanotron_ext.model import layer_inputs

GPU_BYTES = 80e9


def published(stage: str) -> Loaded[PretrainRecipe]:
    return load_recipe(stage)


def layout_of(stage: str, **parallelism: int) -> Nanotron:
    nanotron = scale(published(stage), load_scale("full")).nanotron
    return replace(nanotron, parallelism=replace(nanotron.parallelism, **parallelism))


@pytest.mark.parametrize("row", MEASURED, ids=str)
def test_measured_peaks_are_predicted_within_3_percent(row: Row) -> None:
    assert predicted(row) == pytest.approx(row.gibibytes, rel=0.03)


def test_unsharded_it_is_the_published_74_gigabytes() -> None:
    """Published: tp 2, because the model needs about 74 GB on one GPU without sharding."""
    one = replace(layout_of("pretrain-stage1", tp=1, dp=1), tokens=_one_window())
    assert memory(one).allocated / 1e9 == pytest.approx(74, rel=0.1)
    assert memory(layout_of("pretrain-stage1"), fast=False).total < GPU_BYTES


def _one_window() -> object:
    return replace(layout_of("pretrain-stage1").tokens, micro_batch_size=1)


@pytest.mark.parametrize("stage", ["longctx-32k", "longctx-64k"])
def test_the_recipe_quotes_what_is_computed(stage: str) -> None:
    text = published(stage).file.read_text()
    quoted = re.search(r"It takes\s(?:# )?(\d+) of a GPU's 80 GB", text.replace("\n# ", " "))
    assert quoted and int(quoted[1]) == round(memory(layout_of(stage), fast=False).total / 1e9)


@pytest.mark.parametrize(
    "stage", ["pretrain-stage1", "pretrain-stage3", "longctx-32k", "longctx-64k"]
)
def test_every_layout_fits_its_gpus_and_keeps_the_published_batch(stage: str) -> None:
    nanotron = layout_of(stage)
    assert memory(nanotron, fast=False).total < GPU_BYTES
    batch_tokens = nanotron.windows_a_step * nanotron.tokens.sequence_length
    assert batch_tokens == 2_359_296
    before = published(stage).recipe.nanotron.parallelism
    assert nanotron.parallelism.world_size == before.world_size


def test_without_recomputation_32k_would_leave_next_to_nothing() -> None:
    whole = memory(layout_of("longctx-32k", recompute_layer=False), fast=False)
    assert whole.total > 0.95 * GPU_BYTES
    assert "it would take 78" in published("longctx-32k").file.read_text()
    assert round(whole.total / 1e9) == 78


def test_weights_are_the_models_own_count() -> None:
    assert weights(layout_of("pretrain-stage1", tp=1, dp=384)) == 3_075_098_624


def test_parts_shrink_as_the_layout_says() -> None:
    def of(**layout: int) -> Memory:
        return memory(layout_of("longctx-64k", **{"tp": 1, "pp": 1, **layout}), fast=False)

    one, tp = of(), of(tp=4)
    assert tp.logits_and_loss == pytest.approx(one.logits_and_loss / 4, rel=0.03)
    assert tp.layer_inputs == one.layer_inputs / 4


def test_total_is_the_sum_of_the_parts() -> None:
    one = Memory(1, 2, 4, 8, 16, 32, 64, 128, 256)
    assert (one.total, one.allocated) == (511, 127)


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    with single_process() as parallel_context:
        yield parallel_context


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_layer_keeps_what_autograd_keeps(context: Any, dtype: torch.dtype) -> None:
    """Every storage that autograd saves in four layers (one without rotation), weights aside.

    torch's CPU kernel keeps what FlashAttention does, and since its output has the heads first,
    o_proj keeps a copy of it.
    """
    config = tiny(num_hidden_layers=4)
    model = build(config, context, dtype=dtype).model
    positions = torch.arange(48)[None]
    model.shared.inputs = layer_inputs(positions, torch.tensor([0, 48], dtype=torch.int32), config)
    hidden = torch.randn(48, config.hidden_size, dtype=dtype, requires_grad=True)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    known |= {
        t.untyped_storage().data_ptr()
        for t in vars(model.shared.inputs).values()
        if torch.is_tensor(t)
    }
    saved = dict[int, torch.UntypedStorage]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for block in model.decoder:
            hidden = block(hidden_states=hidden)["hidden_states"]
    bytes_a_token = sum(storage.nbytes() for storage in saved.values()) / 48
    copy = config.hidden_size * dtype.itemsize
    assert bytes_a_token == 4 * (layer_bytes(_of_config(config, dtype)) + copy)


def _of_config(config: SmolLM3Config, dtype: torch.dtype) -> Nanotron:
    """The published recipe with the sizes of a small model."""
    one = layout_of("pretrain-stage1", tp=1, dp=1)
    sizes = {name: getattr(config, name) for name in (*SIZES, "no_rope_layer")}
    ids = {"bos_token_id": None, "eos_token_id": 0}
    changed = replace(one.model.model_config, **sizes, **ids)
    name = str(dtype).removeprefix("torch.")
    model = replace(one.model, model_config=changed, dtype=name)
    return replace(one, model=model, fast_step=PLAIN)


def test_long_windows_are_computed_in_pieces() -> None:
    from nanotron_ext.fast_loss import HEAD_CHUNK_BYTES

    assert PIECE_BYTES == HEAD_CHUNK_BYTES
    one = layout_of("longctx-64k", tp=1, pp=1, dp=1)
    assert one.tokens.sequence_length * 128_256 * 2 > one.fast_step.whole_logits_gib * 2**30
    assert memory(one).logits_and_loss < 2 * PIECE_BYTES + 65_536 * 2048 * 10
    assert memory(one).total < GPU_BYTES  # 64k windows in 80 GB


@pytest.mark.slow
@pytest.mark.parametrize("fast", [True, False])
def test_the_benchmark_runs_real_steps(tmp_path: Path, fast: bool) -> None:
    """On a CPU, where it measures nothing: a small shape in a process of its own."""
    code = (
        "from pathlib import Path; from benchmarks.fit import *; "
        f"row = Row('small', 2, 64, {fast}, 0, recompute=True); "
        f"print(run(layout_of(row, Shape(32, 48, 4, 4, 2, 512)), Path({str(tmp_path)!r})), 'GiB')"
    )
    (tmp_path / "run.py").write_text(code)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    done = subprocess.run(
        [*words, str(tmp_path / "run.py")],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].endswith(" GiB")
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]
