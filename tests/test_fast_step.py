"""The fast step gives the plain step's loss and gradients, each part by itself and all together.

On a CPU the parts are made to run by choosing them as for CUDA; compilation is torch's for CPUs.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from in_process import build, single_process, tiny

from nanotron_ext import attention, fast_step
from nanotron_ext.attention import Documents
from nanotron_ext.dataloader import borders
from nanotron_ext.fast_step import Setting, choose
from nanotron_ext.job import FastStep
from nanotron_ext.weight_table import EMBEDDING

WINDOWS, SEQUENCE, SEED = 2, 24, 5
ON_CUDA = Setting(
    "cuda", has_c_compiler=True, tp=1, pp=1, accumulates_in_fp32=True, logits_bytes=2**30
)
NOTHING = FastStep(False, False, False, 9.0, False)
PARTS: dict[str, FastStep] = {
    "linears": dataclasses.replace(NOTHING, plain_linears=True),
    "loss in place": dataclasses.replace(NOTHING, in_place_loss=True),
    "head in chunks": dataclasses.replace(NOTHING, in_place_loss=True, whole_logits_gib=0.0),
    "weight gradients": dataclasses.replace(NOTHING, plain_linears=True, fused_weight_gradients=True),
    "weight gradients, head in chunks": dataclasses.replace(FastStep(), compile_layer=False, whole_logits_gib=0.0),
}  # fmt: skip
COMPILED: dict[str, FastStep] = {
    "layer": dataclasses.replace(NOTHING, compile_layer=True),
    "all": FastStep(),
    "all, head in chunks": FastStep(whole_logits_gib=0.0),
}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "z-loss": {"z_loss_coefficient": 0.1},
    "recomputation": {"recompute_layer": True},
}


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    with single_process() as context:
        yield context


class Accumulator:
    """The part of nanotron's FP32GradientAccumulator that the fast step uses; it takes fp32 weights.

    nanotron's own refuses them, and in bf16 nothing can be compared to 1e-6; `tests/test_fast_runs.py`
    trains with it.
    """

    def __init__(self, model: Any):
        self.parameters = dict(model.get_named_params_with_correct_tied())
        self.buffers = {name: torch.zeros_like(x).detach() for name, x in self.parameters.items()}

    def get_grad_buffer(self, name: str) -> torch.Tensor:
        return self.buffers[name].as_subclass(torch.Tensor)

    def _accumulate_grad(self, name: str, half_param: Any) -> None:
        raise AssertionError("not called here")

    def gradients(self) -> dict[str, torch.Tensor]:
        """What nanotron's would hold after the backward passes."""
        none = torch.zeros(())
        return {
            name: buffer + (none if (grad := self.parameters[name].grad) is None else grad)
            for name, buffer in self.buffers.items()
        }


def micro_batch(seed: int) -> dict[str, torch.Tensor]:
    """Random tokens in documents of random lengths; their first tokens are no labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(96, (WINDOWS, SEQUENCE + 1), generator=generator)
    starts = torch.rand(WINDOWS, SEQUENCE, generator=generator) < 0.1 * seed
    starts[:, 0] = True
    index = torch.arange(SEQUENCE).expand_as(starts)
    positions = index - (index * starts).cummax(dim=1).values
    mask = ~starts.roll(-1, dims=1)
    return {
        "input_ids": ids[:, :-1],
        "position_ids": positions,
        "cu_seqlens": torch.from_numpy(borders(positions.numpy())),
        "label_ids": ids[:, 1:],
        "label_mask": mask,
    }


def step(context: Any, options: FastStep, changes: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of three micro-batches of other documents each."""
    model = build(tiny(**changes), context, SEED).train()
    accumulator = Accumulator(model)
    choice = choose(options, ON_CUDA)
    fast_step.apply(model, choice, accumulator)
    total = 0.0
    for seed in (1, 2, 3):
        loss = model(**micro_batch(seed))["loss"] / 3
        loss.backward()
        total += loss.item()
    if choice.fused_weight_gradients:
        through_autograd = {n for n, x in accumulator.parameters.items() if x.grad is not None}
        assert all("norm" in name for name in through_autograd - {EMBEDDING})
    return total, accumulator.gradients()


@pytest.fixture(scope="module")
def plain(context: Any) -> dict[str, tuple[float, dict[str, Any]]]:
    return {name: step(context, NOTHING, changes) for name, changes in MODELS.items()}


def assert_equal_to_plain(context: Any, plain: Any, options: FastStep, model: str) -> None:
    loss, gradients = step(context, options, MODELS[model])
    plain_loss, plain_gradients = plain[model]
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        difference = (gradient - plain_gradients[name]).norm()
        assert difference <= 1e-6 * plain_gradients[name].norm(), name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("part", PARTS)
def test_each_part_gives_the_plain_loss_and_gradients(
    context: Any, plain: Any, part: str, model: str
) -> None:
    assert_equal_to_plain(context, plain, PARTS[part], model)


@pytest.fixture
def compiler() -> Iterator[Any]:
    """torch's compiler with nothing compiled yet; it fails where it would fall back to eager."""
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield counters
    torch.compiler.reset()


@pytest.mark.slow  # compiles
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("part", COMPILED)
def test_compiled_the_step_gives_the_plain_loss_and_gradients(
    context: Any, plain: Any, part: str, model: str
) -> None:
    assert_equal_to_plain(context, plain, COMPILED[part], model)


def dense(q_THD: Any, k_TKD: Any, v_TKD: Any, documents: Documents) -> torch.Tensor:
    """Attention that the compiler sees through, as it does through the kernels of a GPU."""
    index_T = torch.arange(len(q_THD))
    document_T = torch.searchsorted(documents.cu_seqlens, index_T, right=True)
    mask_TT = (document_T[:, None] == document_T) & (index_T[:, None] >= index_T)
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_TKD, v_TKD))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TT, enable_gqa=True)
    return out[0].transpose(0, 1)


@pytest.mark.slow  # compiles
def test_a_layer_is_one_graph_for_all_layers_and_documents(context: Any, compiler: Any) -> None:
    """One for layers with RoPE and one for those without, and two of the loss."""
    model = build(tiny(), context, SEED).train()
    choice = dataclasses.replace(choose(COMPILED["all"], ON_CUDA), attention=dense)
    fast_step.apply(model, choice, Accumulator(model))
    for seed in (1, 2, 3):
        model(**micro_batch(seed))["loss"].backward()
        assert compiler["stats"]["unique_graphs"] == 4
    assert not compiler["graph_break"]


@pytest.mark.slow  # compiles
def test_in_fp32_a_gpus_kernel_makes_no_graph_for_each_list_of_documents(
    context: Any, compiler: Any
) -> None:
    model = build(tiny(), context, SEED).train()
    backend = attention._in_16_bits(dense)
    choice = dataclasses.replace(choose(COMPILED["layer"], ON_CUDA), attention=backend)
    fast_step.apply(model, choice, Accumulator(model))
    graphs = []
    for seed in (1, 2, 3):
        model(**micro_batch(seed))["loss"].backward()
        graphs.append(compiler["stats"]["unique_graphs"])
    assert graphs[0] == graphs[2]


@pytest.mark.parametrize(
    ("options", "setting", "expected"),
    [
        ({}, {}, (True, True, "in place", True)),
        ({}, {"device_type": "cpu"}, (False, False, "plain", False)),
        ({"compile_layer": False}, {}, (False, True, "in place", True)),
        ({"plain_linears": False}, {}, (True, False, "in place", False)),
        ({"in_place_loss": False}, {}, (True, True, "plain", True)),
        ({"fused_weight_gradients": False}, {}, (True, True, "in place", False)),
        ({"fused_weight_gradients": False}, {"tp": 2}, (True, False, "in place", False)),
        ({}, {"has_c_compiler": False}, (False, True, "in place", True)),
        ({}, {"tp": 2}, (True, True, "in place", True)),
        ({}, {"accumulates_in_fp32": False}, (True, True, "in place", False)),
        ({"whole_logits_gib": 0.5}, {}, (True, True, "head in chunks", True)),
        ({"whole_logits_gib": 1.0}, {}, (True, True, "in place", True)),
        ({"whole_logits_gib": 0.5}, {"pp": 2}, (True, True, "in place", False)),
    ],
)
def test_what_is_chosen_and_that_each_choice_has_its_reason(
    options: dict[str, Any], setting: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    choice = choose(FastStep(**options), dataclasses.replace(ON_CUDA, **setting))
    chosen = (choice.compile_layer, choice.plain_linears, choice.loss)
    assert (*chosen, choice.fused_weight_gradients) == expected
    if "device_type" in setting:
        assert len(choice.lines) == 2  # the attention kernel, and that the rest is off
    else:
        assert len(choice.lines) == 5
        log = "\n".join(choice.lines)
        for key, value in options.items():
            assert (
                f"nanotron.fast_step.{key} {'is false' if value is False else f'{value:g}'}" in log
            )


@pytest.mark.parametrize(
    ("options", "tp", "linears", "gradients", "own"),
    [
        ({}, 1, "F.linear (tp 1)", "added to nanotron's fp32 buffer", True),
        ({}, 2, "F.linear between nanotron's collectives (tp 2)", "added to", True),
        ({"fused_weight_gradients": False}, 2, "off: nanotron's own (tp 2", "off: ", False),
        ({"plain_linears": False}, 1, "off: ", "off: they need the plain linear", False),
        ({"plain_linears": False}, 2, "off: ", "off: they need the plain linear", False),
    ],
)
def test_the_log_says_which_linear_layers_run(
    context: Any, options: dict[str, Any], tp: int, linears: str, gradients: str, own: bool
) -> None:
    choice = choose(FastStep(compile_layer=False, **options), dataclasses.replace(ON_CUDA, tp=tp))
    assert any(line.startswith(f"fast step, linear layers: {linears}") for line in choice.lines)
    assert any(
        line.startswith(f"fast step, weight gradients: {gradients}") for line in choice.lines
    )
    model = build(tiny(), context, SEED)
    fast_step.apply(model, choice, Accumulator(model))
    layers = [x for x in model.modules() if hasattr(x, "accumulated_OC")]
    assert layers and all(x.is_fast is own for x in layers)


@pytest.mark.parametrize("tied", [True, False])
def test_only_a_linear_layers_gradient_may_be_in_the_buffer_alone(context: Any, tied: bool) -> None:
    model = build(tiny(tie_word_embeddings=tied), context, SEED)
    accumulator, refused = Accumulator(model), set()

    def nanotrons(name: str, half_param: Any) -> None:
        refused.update([name] if half_param.grad is None else [])

    accumulator._accumulate_grad = nanotrons  # type: ignore[method-assign]
    fast_step.apply(model, choose(FastStep(compile_layer=False), ON_CUDA), accumulator)
    for name, parameter in accumulator.parameters.items():
        accumulator._accumulate_grad(name=name, half_param=parameter)
    others = {name for name in accumulator.parameters if "norm" in name}
    assert others and refused == others | (set() if tied else {EMBEDDING})


def test_the_recipe_and_the_job_have_the_same_options() -> None:
    from launch.recipe.pretrain import FastStep as Section

    assert dataclasses.asdict(Section()) == dataclasses.asdict(FastStep())
