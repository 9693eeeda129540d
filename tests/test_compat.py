"""Each mend of nanotron 0.4 is needed, and helps: a test here fails once upstream makes one vain.

A symptom is shown by training a small job in a fresh process with that one mend switched off.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import metrics, python_path
from forked import run

from nanotron_ext import compat

MakeJob = Callable[..., Path]
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the symptom is that of no CUDA")
on_0_4 = pytest.mark.skipif(compat.is_main(), reason="nanotron's main branch has it mended")

TRAIN = """
import sys, torch
from pathlib import Path
from nanotron_ext import compat
{without}
from nanotron_ext.job import Job
from nanotron_ext.trainer import SmolLM3Trainer
folder = Path(sys.argv[1])
compat.init_distributed()
SmolLM3Trainer(folder, Job.read(folder)).run()
"""


def train(folder: Path, without: str = "") -> subprocess.CompletedProcess[str]:
    """The job in one process that torchrun did not start."""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    # port 0: the store takes a free one
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    # Libraries are imported, nanotron and what mends it are not.
    code = TRAIN.format(without=without)
    return run("launch", "-c", code, str(folder), env=os.environ | rank | address)


def metadata_of(folder: Path) -> str:
    file = next((folder / "checkpoints").rglob("attn/qkv_proj/*.safetensors"))
    header = file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")]
    return header.decode()


@on_cpu
def test_own_functions_go_past_the_replacement_of_literals() -> None:
    with compat.CudaLiteralsToCpu():
        assert torch.zeros(1, device="cuda").device.type == "cpu"
        with pytest.raises((AssertionError, RuntimeError)):
            compat.past_literals(torch.zeros)(1, device="cuda")


@pytest.mark.slow
def test_with_every_mend_a_job_trains(make_job: MakeJob) -> None:
    folder = make_job("run", steps=1)
    done = train(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(metrics(folder)) == 1
    assert "np.int64" not in metadata_of(folder)


NOTHING = "lambda *_, **__: None"
SYMPTOMS = {
    "import cycle": (
        f"compat._break_import_cycle = {NOTHING}",
        "circular import",
        [on_0_4],
    ),
    "flash_attn": (
        f"compat._stub_flash_attn = {NOTHING}",
        "No module named 'flash_attn'|cannot import name 'bert_padding'",  # as with flash-attn-4
        [pytest.mark.skipif(compat.has_module("flash_attn"), reason="flash-attn is installed")],
    ),
    "cuda calls": (
        f"compat._silence_cuda = {NOTHING}",
        "_cuda_setDevice|Torch not compiled with CUDA enabled|No NVIDIA driver",
        [on_cpu],
    ),
    "cuda literals": (
        f"compat.CudaLiteralsToCpu.__enter__ = {NOTHING}",
        "Torch not compiled with CUDA enabled|No NVIDIA driver",
        [on_cpu],
    ),
    "nccl": (
        f"compat.init_distributed = {NOTHING}",
        "NotImplementedError",
        [on_cpu],
    ),
    "gloo average": (
        f"compat._gloo_average_without_grad = {NOTHING}",
        "a leaf Variable that requires grad",
        [on_cpu],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("without", "symptom"),
    [
        pytest.param(without, symptom, marks=marks, id=name)
        for name, (without, symptom, marks) in SYMPTOMS.items()
    ],
)
def test_without_the_mend_the_job_fails_with_its_symptom(
    make_job: MakeJob, without: str, symptom: str
) -> None:
    done = train(make_job("run", steps=1), without)
    assert done.returncode != 0
    assert any(words in done.stderr for words in symptom.split("|")), done.stderr[-2000:]


@pytest.mark.slow
def test_without_the_cast_metadata_holds_what_nanotron_cannot_read(make_job: MakeJob) -> None:
    folder = make_job("run", steps=1)
    done = train(folder, f"compat._plain_integers_in_metadata = {NOTHING}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "np.int64" in metadata_of(folder)


@pytest.mark.slow
def test_without_realignment_a_resumed_run_takes_its_first_step_at_rate_0(
    make_job: MakeJob,
) -> None:
    whole = make_job("whole")
    assert train(whole).returncode == 0
    losses = {}
    for name, without in {"with": "", "without": f"compat.realign_lr = {NOTHING}"}.items():
        folder = make_job(name, resume=whole / "checkpoints" / "3")
        done = train(folder, without)
        assert done.returncode == 0, done.stderr[-3000:]
        losses[name] = [line["loss"] for line in metrics(folder)]
    expected = [line["loss"] for line in metrics(whole)][3:]
    assert losses["with"] == expected
    assert losses["without"][0] == expected[0]  # before any resumed step
    assert losses["without"][1:] != expected[1:]


@pytest.mark.parametrize("step", [0, 1, 7])
def test_realignment_is_the_schedule_in_closed_form(step: int) -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.5)]
    optimizers = [torch.optim.SGD([dict(group) for group in groups]) for _ in range(2)]

    def rate(step: int) -> float:
        return 1 / (1 + step)

    walked, jumped = (torch.optim.lr_scheduler.LambdaLR(o, [rate, rate]) for o in optimizers)
    for _ in range(step):
        optimizers[0].step()
        walked.step()
    compat.realign_lr(jumped, step)
    assert jumped.get_last_lr() == walked.get_last_lr() == [rate(step), rate(step) / 2]
    for one, two in zip(*(optimizer.param_groups for optimizer in optimizers), strict=True):
        assert one["lr"] == two["lr"]
    assert (jumped.last_epoch, jumped._step_count) == (walked.last_epoch, walked._step_count)


FLASH_ATTN = """
import importlib.util, sys
{before}
from nanotron_ext import compat
print("installed", compat.has_module("flash_attn"), compat.has_module("flash_attn.cute"))
compat.activate()
from nanotron.models import llama
from flash_attn import bert_padding
print("installed", compat.has_module("flash_attn"), compat.has_module("flash_attn.cute"))
if compat.has_module("flash_attn.cute"):
    import flash_attn.cute
    print("kernel", flash_attn.cute.kernel)
"""


@pytest.mark.skipif(compat.has_module("flash_attn"), reason="flash-attn is installed")
@pytest.mark.parametrize(
    ("has_4", "before"), [(False, ""), (True, ""), (True, "import flash_attn.cute")]
)
def test_nanotron_and_flash_attention_4_stand_beside_each_other(
    tmp_path: Path, has_4: bool, before: str
) -> None:
    """flash-attn-4 leaves a namespace package: neither flash-attn nor what nanotron imports."""
    if has_4:
        (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
        (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("kernel = 4")
    done = subprocess.run(
        [sys.executable, "-c", FLASH_ATTN.format(before=before)],
        env=os.environ | {"PYTHONPATH": python_path(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [f"installed False {has_4}"] * 2 + ["kernel 4"] * has_4
    assert [
        line for line in done.stdout.splitlines() if "nstalled" in line or "kernel" in line
    ] == found


@on_cpu
def test_cuda_literals_become_cpu_and_other_devices_stay() -> None:
    with compat.CudaLiteralsToCpu():
        assert torch.empty(1, device="cuda").device.type == "cpu"
        assert torch.ones(1).to("cuda:0").device.type == "cpu"
        assert torch.ones(1).to(torch.device("cuda"), torch.float64).dtype == torch.float64
        assert torch.empty(1, device="meta").device.type == "meta"


@pytest.mark.parametrize(("main", "expected"), [(True, True), (False, False)])
def test_main_is_told_apart_by_its_s3_module(
    monkeypatch: pytest.MonkeyPatch, main: bool, expected: bool
) -> None:
    found = {"nanotron.s3_checkpoints": SimpleNamespace()} if main else {}
    monkeypatch.setattr(compat.importlib.util, "find_spec", found.get)
    assert compat.is_main() is expected
