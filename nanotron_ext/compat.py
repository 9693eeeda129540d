"""Every patch of nanotron 0.4 (PyPI), whose installed files are not changed, with and without CUDA.

No other file branches on nanotron's version; on the device, only those that choose kernels
(`attention.py`, `fast_step.py`) and the operator of `weight_gradient.py`. `activate()` must run
before the first `import nanotron.trainer`. Each patch names its symptom; tests/test_compat.py and
test_fast_runs.py fail once upstream makes one unnecessary.
"""

import importlib
import importlib.util
import os
import shutil
import sys
import types
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed
from torch.overrides import TorchFunctionMode


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def capability() -> int:
    """Major compute capability of the GPU: 8 Ampere and Ada, 9 Hopper, 10 and 12 Blackwell."""
    return torch.cuda.get_device_capability()[0]


def pin(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in page-locked memory, which alone a GPU reads while the host goes on; else itself."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` on the device; the host does not wait for the copy of a pinned one."""
    return tensor.to(device(), non_blocking=True)


def fix_order_of_sums() -> None:
    """Let every kernel add in one order, so that a run on a GPU can be repeated to the bit."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch demands it; cuBLAS reads it
    torch.use_deterministic_algorithms(True)
    # Else every new tensor is filled first, against reading what nobody wrote.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010


def steps_ahead() -> int:
    """Steps that the host is ahead of the device when it reads a step's loss.

    With 0 a GPU idles at the end of each step, until the host has read and queued the next one.
    """
    return int(torch.cuda.is_available())


def same_gpu() -> Callable[[], None]:
    """What a new thread calls first: CUDA's current GPU is the thread's own, and starts as GPU 0.

    Without it the loader's thread of every process would set up a context on GPU 0.
    """
    if not torch.cuda.is_available():
        return lambda: None
    return partial(torch.cuda.set_device, torch.cuda.current_device())


class CudaLiteralsToCpu(TorchFunctionMode):
    """nanotron writes device="cuda" in many places: `Torch not compiled with CUDA enabled`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = _to_cpu(kwargs["device"])
        if func is torch.Tensor.to:
            args = (args[0], *(_to_cpu(a) for a in args[1:]))
        return func(*args, **kwargs)


def past_literals(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, of which CudaLiteralsToCpu sees no call: it names no device.

    Where it acts each call of torch goes through Python, a thousand of them a step of a small model.
    """
    if torch.cuda.is_available():
        return function

    @wraps(function)
    def plain(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return plain


def _to_cpu(value: Any) -> Any:
    is_cuda = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
    return torch.device("cpu") if is_cuda else value


def _stub(name: str, **attributes: Any) -> None:
    """Put an empty package `name` into sys.modules and bind it in its parent."""
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    module.__path__ = []
    module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def _stub_flash_attn() -> None:
    """0.4 imports flash_attn at module level in llama, starcoder2 and layer_norm: ImportError.

    flash-attn-4 alone installs only flash_attn.cute, in a namespace package: `cannot import name
    'bert_padding' from 'flash_attn'`. That package is kept and given what it lacks.
    """

    def missing(*args: Any, **kwargs: Any) -> None:
        raise ImportError("flash-attn is not installed")

    names = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")
    functions = dict.fromkeys(names, missing)
    if importlib.util.find_spec("flash_attn"):
        importlib.import_module("flash_attn").__dict__["flash_attn_func"] = missing
    else:
        _stub("flash_attn", flash_attn_func=missing)
    _stub("flash_attn.bert_padding")
    _stub("flash_attn.flash_attn_interface", **functions)
    _stub("flash_attn.layers")
    _stub("flash_attn.layers.rotary", RotaryEmbedding=torch.nn.Module, apply_rotary_emb=missing)
    _stub("flash_attn.ops")
    _stub("flash_attn.ops.triton")
    _stub("flash_attn.ops.triton.layer_norm", layer_norm_fn=missing)
    _stub("flash_attn.modules")
    _stub("flash_attn.modules.mha", flash_attn_varlen_kvpacked_func=missing)


def _break_import_cycle() -> None:
    """0.4: logging -> config.config -> pipeline engine -> logging; no import order works.

    nanotron.logging needs config.config only for an annotation, so it is loaded first with a
    placeholder, which is then dropped. Main has no such cycle.
    """
    import nanotron

    _stub("nanotron.config")
    _stub("nanotron.config.config", LoggingArgs=object)
    importlib.import_module("nanotron.logging")
    for name in ("nanotron.config.config", "nanotron.config"):
        del sys.modules[name]
    del nanotron.config


def _gloo_average_without_grad() -> None:
    """gloo's AVG divides outside no_grad: `a leaf Variable that requires grad ... in-place`."""
    import nanotron.distributed

    for name in ("all_reduce", "broadcast"):
        setattr(nanotron.distributed, name, torch.no_grad()(getattr(torch.distributed, name)))


def _plain_integers_in_metadata() -> None:
    """numpy 2 writes "np.int64(128)" into checkpoint metadata, which then cannot be read."""
    from nanotron.parallel.parameters import NanotronParameter

    original = NanotronParameter.mark_as_sharded

    def mark_as_sharded(
        self: Any, global_ranks: Any, local_global_slices_pairs: Any, unsharded_shape: Any
    ) -> None:
        shape = tuple(int(x) for x in unsharded_shape)
        original(self, global_ranks, local_global_slices_pairs, shape)

    NanotronParameter.mark_as_sharded = mark_as_sharded


def _silence_cuda() -> None:
    """`torch.cuda.*` calls of the training loop assert without a GPU."""
    for name in ("set_device", "synchronize", "reset_peak_memory_stats"):
        # Distinct objects: dynamo asserts that no function has two trace rules.
        setattr(torch.cuda, name, types.FunctionType((lambda *_, **__: None).__code__, {}))


def replace_named_optimizer(optimizer: type) -> None:
    """0.4 has no option that exempts parameters from weight decay (main has).

    NamedOptimizer is the leaf of all its optimizer stacks: plain, fp32 accumulator, ZeRO-1.
    """
    import nanotron.helpers

    nanotron.helpers.NamedOptimizer = optimizer


def watch_gradient_norm(watch: Callable[[torch.Tensor], None]) -> None:
    """Call `watch` with each gradient norm, before the optimizer's step; 0.4 has no hook for it."""
    import nanotron.optim.clip_grads
    import nanotron.trainer

    def clip_grad_norm(*args: Any, **kwargs: Any) -> torch.Tensor:
        norm: torch.Tensor = nanotron.optim.clip_grads.clip_grad_norm(*args, **kwargs)
        watch(norm)
        return norm

    nanotron.trainer.clip_grad_norm = clip_grad_norm


def skip_step_if(optimizer: Any, flag: torch.Tensor) -> None:
    """Make the next step of nanotron's optimizer leave weights and moments unchanged if `flag`.

    torch's fused AdamW reads `found_inf` inside its kernel (as a gradient scaler would set it), so
    that the host does not wait for it. nanotron's wrappers of AdamW have no such argument.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    optimizer.found_inf = flag.float()


def realign_lr(scheduler: Any, step: int) -> None:
    """Set a LambdaLR to the learning rate of `step` completed steps, in closed form.

    0.4 resumes with the rate of step 0 in the optimizer, main one step ahead.
    """
    scheduler.last_epoch, scheduler._step_count = step, step + 1
    rates = [
        base * rate(step)
        for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    scheduler._last_lr = rates
    for group, lr in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = lr


def has_c_compiler() -> bool:
    """torch.compile on CUDA builds the launchers of its kernels, and fails in the first step without."""
    return any(shutil.which(name) for name in (os.environ.get("CC", ""), "gcc", "clang"))


@contextmanager
def without_ddp(is_wanted: bool) -> Iterator[None]:
    """Let nanotron leave the model unwrapped at dp > 1, so that it reduces the fp32 buffer itself.

    DDP takes a gradient that is in the buffer alone (`weight_gradient.py`) for zeros, keeps a bf16
    bucket for it and adds the bucket to the buffer. 0.4 goes without DDP under ZeRO-1 alone.
    """
    import nanotron.trainer

    class Unwrapped(torch.nn.parallel.DistributedDataParallel):
        def __new__(cls, module: Any, *args: Any, **kwargs: Any) -> Any:
            return module  # no instance of this class, so that its __init__ is not called

    original = nanotron.trainer.DistributedDataParallel
    nanotron.trainer.DistributedDataParallel = Unwrapped if is_wanted else original
    try:
        yield
    finally:
        nanotron.trainer.DistributedDataParallel = original


def expect_gradients_in_buffer(accumulator: Any, names: Set[str]) -> None:
    """Let FP32GradientAccumulator take the parameters `names`, whose gradient is in its buffer alone.

    0.4: `Expected param ... to have gradient`, as it still says of all others. One of them goes the way of one that DDP's hook
    has added already; its `grad` only has to be there, and nothing reads it.
    """
    original = accumulator._accumulate_grad

    def accumulate(name: str, half_param: Any) -> None:
        if half_param.grad is not None or name not in names:
            return original(name=name, half_param=half_param)
        half_param.grad = half_param.detach()
        accumulator._is_accumulation_sync_step = True
        try:
            original(name=name, half_param=half_param)
        finally:
            accumulator._is_accumulation_sync_step = False

    accumulator._accumulate_grad = accumulate


def has_module(name: str) -> bool:
    """Whether `name` is installed as a module with code of its own.

    A stub of flash_attn is found too, and so is the namespace that flash-attn-4 leaves; neither
    comes from a file.
    """
    parent = name.rpartition(".")[0]
    if parent and importlib.util.find_spec(parent) is None:
        return False
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def is_main() -> bool:
    """nanotron's main branch also calls itself 0.4; only it has this module."""
    return importlib.util.find_spec("nanotron.s3_checkpoints") is not None


def activate() -> None:
    """Make `nanotron.trainer` importable and runnable on this machine. Idempotent."""
    if "nanotron.trainer" in sys.modules:
        return
    has_cuda = torch.cuda.is_available()
    if not has_module("flash_attn"):
        _stub_flash_attn()
    if not has_cuda:
        _silence_cuda()
        CudaLiteralsToCpu().__enter__()
    if not is_main():
        _break_import_cycle()
    trainer: Any = importlib.import_module("nanotron.trainer")  # the only one that may come first
    # Where wandb is installed nanotron would start a run of its own; TRACK= watches from outside.
    trainer.wandb = None
    _plain_integers_in_metadata()
    if not has_cuda:
        _gloo_average_without_grad()


def init_distributed(rendezvous: str | None = None) -> None:
    """Join the process group that torchrun's environment describes; ParallelContext reuses it.

    Without CUDA nanotron would ask for nccl: NotImplementedError. `rendezvous` is a URL where the
    processes meet in place of torchrun's address and port.
    """
    if not torch.cuda.is_available() and not torch.distributed.is_initialized():
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        torch.distributed.init_process_group("gloo", rendezvous, rank=rank, world_size=size)
