"""Every patch of nanotron 0.4 (PyPI), whose installed files are not changed, with and without CUDA.

No other file branches on the device or on nanotron's version. `activate()` must run before the
first `import nanotron.trainer`. Each patch names its symptom; tests/test_compat.py fails once
upstream makes one unnecessary.
"""

import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.distributed
from torch.overrides import TorchFunctionMode


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
    """0.4 imports flash_attn at module level in llama, starcoder2 and layer_norm: ImportError."""

    def missing(*args: Any, **kwargs: Any) -> None:
        raise ImportError("flash-attn is not installed")

    names = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")
    functions = dict.fromkeys(names, missing)
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


def has_module(name: str) -> bool:
    """Whether `name` is installed; the stub of flash_attn is found too, but has no loader."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.loader is not None


def is_main() -> bool:
    """nanotron's main branch also calls itself 0.4; only it has this module."""
    return importlib.util.find_spec("nanotron.s3_checkpoints") is not None


def activate() -> None:
    """Make `nanotron.trainer` importable and runnable on this machine. Idempotent."""
    if "nanotron.trainer" in sys.modules:
        return
    os.environ.setdefault("WANDB_MODE", "disabled")  # nanotron calls wandb.init when importable
    has_cuda = torch.cuda.is_available()
    if not has_module("flash_attn"):
        _stub_flash_attn()
    if not has_cuda:
        _silence_cuda()
        CudaLiteralsToCpu().__enter__()
    if not is_main():
        _break_import_cycle()
    importlib.import_module("nanotron.trainer")  # the only submodule that may be imported first
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
