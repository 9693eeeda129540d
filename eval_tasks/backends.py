"""Where a job's model runs: in this process, in one for each GPU, or behind servers."""

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from eval_tasks.job import Job
from ground.errors import UserError, first_line
from ground.processes import begin_worker

# What TransformersModel's cached methods call.
SHARED = ("_padded_greedy_until", "_loglikelihood_tokens")


def load(name: str, job: Job) -> Any:
    """A lighteval model. Raises UserError for one that cannot be loaded or used."""
    # A hub id has at most one slash.
    if not Path(name).exists() and name.count("/") > 1:
        raise UserError(f"{name}: no such folder; name a transformers folder or a hub id")
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise UserError(f"{name}: no config.json in it; name a transformers folder")
    try:
        model = _served(name, job) if job.servers else _loaded(name, job)
    except Exception as error:  # safetensors, transformers and tokenizers each have their own
        raise UserError(f"{name}: cannot be loaded: {first_line(error)}") from None
    # A pipeline deletes its model at the end; here the next task needs it.
    model.cleanup = lambda: None
    if job.chat and not model.tokenizer.chat_template:
        raise UserError(
            f"{name}: no chat template; an instruct suite needs one, base.yaml does not"
        )
    if job.processes > 1 and not job.servers:
        _share(model, name, job)
    return model


def _served(name: str, job: Job) -> Any:
    from eval_tasks.endpoint import Endpoint

    return Endpoint(name, job, os.environ.get("OPENAI_API_KEY", ""))


def _loaded(name: str, job: Job) -> Any:
    from lighteval.models.model_input import GenerationParameters
    from lighteval.models.model_loader import load_model
    from lighteval.models.transformers.transformers_model import TransformersModelConfig

    config = TransformersModelConfig(
        model_name=name,
        device=job.device,
        dtype=job.dtype,
        batch_size=job.batch_size,
        override_chat_template=job.chat,
        system_prompt=job.system_prompt,
        generation_parameters=GenerationParameters(**job.generation),
        cache_dir=str(Path(job.results).with_name("lighteval")),
    )
    return load_model(config)


# ---- one process a GPU


def gpu_environment(number: int) -> dict[str, str]:
    """The variables of a process that sees the GPU `number` of this one's, and no other. Raises
    UserError where it has fewer."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    visible = [part for part in named.split(",") if part]
    if visible and number >= len(visible):
        raise UserError(f"CUDA_VISIBLE_DEVICES={named}: not so many GPUs as GPUS= says; lower that")
    return {"CUDA_VISIBLE_DEVICES": visible[number] if visible else str(number)}


def _share(model: Any, name: str, job: Job) -> None:
    """Let other processes answer their share of the items, with the same model on other GPUs. What
    is kept and scored stays here, so that each metric sees all answers in their order."""
    context = get_context("spawn")
    others = [
        ProcessPoolExecutor(1, context, _begin, (os.getpid(), name, job, number))
        for number in range(1, job.processes)
    ]
    for ready in [other.submit(os.getpid) for other in others]:
        try:
            ready.result()
        except Exception as error:
            problem = f"one of {job.processes} processes ended: {first_line(error)}"
            raise UserError(f"{name}: {problem}; GPUS=1 takes this one alone") from None
    for method in SHARED:
        setattr(model, method, partial(_answered, others, getattr(model, method), method))


def _answered(
    others: Sequence[ProcessPoolExecutor], own: Any, method: str, docs: list[Any], **named: Any
) -> list[Any]:
    """Item n by process n modulo their number."""
    count = len(others) + 1
    parts = [docs[number::count] for number in range(count)]
    running = [
        other.submit(_answer, method, part, named)
        for other, part in zip(others, parts[1:], strict=True)
        if part
    ]
    answers: list[Any] = [None] * len(docs)
    answers[::count] = own(parts[0], **named)
    for number, future in enumerate(running, start=1):
        answers[number::count] = future.result()
    return answers


_model: Any = None  # of a process that answers a share


def _begin(parent: int, name: str, job: Job, number: int) -> None:
    global _model
    begin_worker(parent)
    os.environ.update(gpu_environment(number) if job.device != "cpu" else {})
    from eval_tasks import compat

    compat.before_import()
    from eval_tasks import smollm3  # noqa: F401  (its fixes)

    _model = _loaded(name, job)


def _answer(method: str, docs: list[Any], named: dict[str, Any]) -> list[Any]:
    return [_on_cpu(answer) for answer in getattr(_model, method)(docs, **named)]


def _on_cpu(answer: Any) -> Any:
    """The answer without tensors, which another process could not take from this one's GPU."""
    for key in ("output_tokens", "input_tokens", "logprobs", "argmax_logits_eq_gold"):
        setattr(answer, key, _plain(getattr(answer, key)))
    return answer


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.tolist() if hasattr(value, "tolist") else value
