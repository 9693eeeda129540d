"""One post-training stage: a run folder's job.json and data/ -> checkpoints/, metrics.jsonl, hf/.

python -m posttrain.stage <run folder>          in every process of `accelerate launch`
python -m posttrain.stage <run folder> --steps  the steps alone: what many nodes do
python -m posttrain.stage <run folder> --end    the rest, after them, in one process
"""

import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ground import files, peak_memory, processes
from ground.checksums import intact, seal
from ground.errors import SAVED, UserError, fail, line_of
from posttrain.compat import no_step_after_the_last
from posttrain.data import load_tokenizer
from posttrain.job import Job
from posttrain.lora import lora_config, merged, whole_model

REFERENCE = "reference_log_probs.safetensors"


def train(folder: Path, is_scored: bool = True) -> None:
    """Train from the last whole checkpoint to the end; writes hf/ and results.json if `is_scored`."""
    from accelerate import PartialState
    from datasets import load_from_disk

    _quiet()
    job = Job.read(folder)
    # On CPUs accelerate sees torchrun's processes only when told so.
    state = PartialState(cpu=bool(job.trl.get("use_cpu")))
    if state.num_processes != job.world_size:
        raise UserError(
            f"{job.stage}: the recipe's batch is made up of {job.world_size} processes, "
            f"{state.num_processes} are running: start it with the accelerate configuration of "
            "launch/accelerate/"
        )
    stage = Stage(folder, job, load_tokenizer(job))
    data = load_from_disk(str(folder / "data"))
    saved = files.checkpoints(folder)
    last = saved[-1] if saved else None
    _check_processes(last, state.num_processes)
    if state.is_main_process:
        step = (files.step_of(last) if last else None) or 0
        files.cut_back(folder / "metrics.jsonl", step, intact(saved, "metrics.jsonl"))
    trainer = stage.trainer(data)
    before = stage.figures(trainer, "before") if is_scored else {}
    peak_memory.begin()
    with processes.until_saved():
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        peak_memory.keep(folder)
        if stage.stopping.is_stopped:
            raise processes.Stopped
    if is_scored:
        stage.finish(trainer, before)


def end(folder: Path) -> None:
    """What `train` does beside its steps, once these are done: in one process, whatever took them."""
    from datasets import load_from_disk
    from transformers import TrainerState

    _quiet()
    job, last = Job.read(folder), files.checkpoints(folder)[-1]
    stage = Stage(folder, job, load_tokenizer(job))
    trainer = stage.trainer(load_from_disk(str(folder / "data")))
    if (last / "latest").exists() and (dtype := stage.stored_dtype()):
        trainer.model.to(dtype)  # DeepSpeed computes in it, and keeps its masters to itself
    before = stage.figures(trainer, "before")
    trainer._load_from_checkpoint(str(last))
    trainer.state = TrainerState.load_from_json(str(last / "trainer_state.json"))
    stage.finish(trainer, before)


class Stage:
    """What a stage makes from job and tokenizer: a trainer, figures, a folder of weights."""

    def __init__(self, folder: Path, job: Job, tokenizer: Any):
        self.folder, self.job, self.tokenizer = folder, job, tokenizer

    def trainer(self, data: Any) -> Any:
        """TRL's trainer on the token dataset `data`, with the run folder's metrics."""
        from transformers import PrinterCallback, ProgressCallback

        from posttrain.metrics import Metrics, StopWhenAsked

        job = self.job
        arguments = {
            **job.trl,
            "output_dir": str(self.folder / "checkpoints"),
            "include_num_input_tokens_seen": "non_padding",
            "report_to": "none",
            "logging_nan_inf_filter": False,
            "disable_tqdm": True,
        }
        options = arguments.pop("model_init_kwargs", None) or {}
        if job.trains_pairs:
            build, config = self._pair_trainer(arguments)
        else:
            dense = options.get("attn_implementation", "sdpa") in ("sdpa", "eager")
            build, config = self._chat_trainer(arguments, dense)
        # After the config: with ZeRO-3 that is what shards the weights as they are read.
        model = start_model(job, options, config)
        trainer = build(
            model=model,
            args=config,
            train_dataset=data,
            processing_class=self.tokenizer,
            peft_config=lora_config(job.lora) if job.lora else None,
        )
        for printer in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printer)
        no_step_after_the_last(trainer)
        scorer = self._scorer(job.score_prompts)
        score = partial(_scores, scorer, trainer) if scorer else None
        file = self.folder / "metrics.jsonl"
        self.stopping = StopWhenAsked(trainer)
        log = Metrics(file, job.stage, job.tokens_before, score, job.score_steps, self.stopping)
        for callback in (log, self.stopping):
            trainer.add_callback(callback)
        return trainer

    def _chat_trainer(self, arguments: dict[str, Any], dense: bool) -> tuple[Any, Any]:
        from trl import SFTConfig

        from posttrain.sft import MaskedSFTTrainer

        # The labels carry the mask already; TRL refuses the option on tokens.
        prepared = {"assistant_only_loss": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
        return partial(MaskedSFTTrainer, dense_attention=dense), SFTConfig(**arguments | prepared)

    def _pair_trainer(self, arguments: dict[str, Any]) -> tuple[Any, Any]:
        from trl import DPOConfig

        from posttrain.apo import PairTrainer

        return partial(PairTrainer, reference=self.folder / REFERENCE), DPOConfig(**arguments)

    def _scorer(self, prompts: int) -> Any:
        """A Scorer of so many held-out prompts of each kind; None where nothing is scored."""
        from posttrain.scores import Scorer

        job = self.job
        if not job.held_out or prompts == 0:
            return None
        return Scorer(self.tokenizer, Path(job.held_out), prompts, job.max_new_tokens, job.settings)

    def figures(self, trainer: Any, when: str) -> dict[str, float]:
        """Held-out figures of the model `before` or `after` training, made once: <when>.json."""
        file = self.folder / f"{when}.json"
        if (kept := files.kept_record(file)) is not None:
            return kept
        figures = self._figures(trainer)
        if trainer.is_world_process_zero():
            files.write_record(file, figures)
        return figures

    def _figures(self, trainer: Any) -> dict[str, float]:
        """Scores of the current model, and for pairs the figures of held-out ones."""
        scorer = self._scorer(self.job.score_prompts_at_end)
        if scorer is None:
            return {}
        figures = _scores(scorer, trainer)
        if self.job.trains_pairs:
            figures |= self._preferences(trainer)
        for name, figure in figures.items():
            if not math.isfinite(figure):
                raise UserError(f"{self.job.stage}: {name} is {figure}: lower trl.learning_rate")
        return figures

    def _preferences(self, trainer: Any) -> dict[str, float]:
        """Figures of held-out pairs against the stage's own start, kept beside the run."""
        import torch
        from safetensors.torch import load_file, save_file

        from posttrain.apo import completion_log_probs, preference_figures
        from posttrain.rows import Lines, pair_tokens
        from posttrain.scores import evaluated, shared_out

        job, stored = self.job, self.folder / f"held_out_{REFERENCE}"
        rows = Lines(Path(job.held_out) / "preference.jsonl").first(job.score_prompts_at_end)
        pairs = [pair_tokens(self.tokenizer, row, job.settings, where) for row, where in rows]
        with _whole_model(trainer) as model, evaluated(model):
            policy = torch.stack(
                shared_out(
                    pairs,
                    lambda share: list(
                        completion_log_probs(model, share, self.tokenizer.pad_token_id)
                    ),
                )
            )
        if trainer.state.global_step > 0:
            reference = load_file(stored)["reference"]
            return preference_figures(policy, reference, float(job.trl["beta"]))
        if trainer.is_world_process_zero():
            with files.written_aside(stored) as aside:
                save_file({"reference": policy.contiguous()}, aside)
        trainer.accelerator.wait_for_everyone()
        # Ratios of the start to itself mean nothing.
        return {"chosen_more_likely": preference_figures(policy, policy, 0)["chosen_more_likely"]}

    def finish(self, trainer: Any, before: dict[str, float]) -> None:
        """hf/ with tokenizer, template and generation config; results.json beside it."""
        after = self.figures(trainer, "after")
        aside, dtype = self.folder / "hf.partial", self.stored_dtype()
        if trainer.is_world_process_zero():
            shutil.rmtree(aside, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        if dtype and not self.job.lora and trainer.args.deepspeed_plugin is None:
            trainer.accelerator.unwrap_model(trainer.model).to(dtype)  # masters are float32
        trainer.save_model(str(aside))
        if not trainer.is_world_process_zero():
            return
        if self.job.lora:
            self._merge(trainer, aside, dtype)
        (aside / "training_args.bin").unlink(missing_ok=True)
        seal(aside)
        files.replace_folder(aside, self.folder / "hf")
        results = {
            "step": trainer.state.global_step,
            "tokens": self.job.tokens_before + trainer.state.num_input_tokens_seen,
            "data": files.read_record(self.folder / "data.json"),
            "scores": {"before": before, "after": after},
        }
        files.write_record(self.folder / "results.json", results)

    def stored_dtype(self) -> Any:
        """The dtype of hf/; None: that of the start."""
        import torch

        name = (self.job.trl.get("model_init_kwargs") or {}).get("dtype")
        return getattr(torch, name) if name else None

    def _merge(self, trainer: Any, folder: Path, dtype: Any) -> None:
        """Put the merged model in the place of the adapter, which goes to the run's adapter/."""
        adapter = self.folder / "adapter"
        with files.folder_aside(adapter) as aside:
            for file in folder.glob("adapter_*"):
                file.rename(aside / file.name)
        model, trained = merged(adapter, dtype), whole_model(trainer.model)
        # Trainer has put the end of a turn into both.
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.config, key, getattr(trained.config, key))
        model.generation_config = trained.generation_config
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # peft's, of the adapter


def _check_processes(checkpoint: Path | None, running: int) -> None:
    """Refuse a checkpoint of another number of processes: DeepSpeed has cut its optimizer to that."""
    wrote = len(list(checkpoint.glob("rng_state*.pth"))) if checkpoint else running
    if wrote != running:
        raise UserError(
            f"{checkpoint}: written by {wrote} processes, {running} are running: go on with GPUS="
            f"{wrote}, or begin again with FORCE=1"
        )


def start_model(job: Job, options: Mapping[str, Any], config: Any) -> Any:
    """The weights that training begins with, in float32 where they are their own masters.

    With `bf16` torch's autocast computes in bfloat16 all the same. In weights of bfloat16 most
    updates are lost: a step at 1e-6 is below half of a weight's last bit. DeepSpeed keeps float32
    masters itself, and LoRA does not change these weights.
    """
    from transformers import AutoModelForCausalLM

    from posttrain import attention  # noqa: F401  # which transformers then knows by name

    are_masters = config.bf16 and not job.lora and config.deepspeed_plugin is None
    precision = {"dtype": "float32"} if are_masters else {}
    return AutoModelForCausalLM.from_pretrained(job.model, **{**options, **precision})


@contextmanager
def _whole_model(trainer: Any) -> Iterator[Any]:
    """The unwrapped model, whole in each process during a `with`, in the precision of training."""
    from trl.models.utils import unwrap_model_for_generation

    wrapped = unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator)
    with wrapped as model, trainer.accelerator.autocast():
        yield whole_model(model)


def _scores(scorer: Any, trainer: Any) -> dict[str, float]:
    with _whole_model(trainer) as model:
        return dict(scorer(model))


def _quiet() -> None:
    """Turn off bars per file, and deprecations of names that the recipes keep as published."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    names = "is_gradient_checkpointing|gradient_checkpointing|use_liger_kernel"
    warnings.filterwarnings("ignore", message=f"`({names})", category=FutureWarning)


def main(folder: Path, work: Callable[[Path], None]) -> int:
    """`work` in one of the stage's processes; returns the exit status of a failure."""
    from accelerate import PartialState

    remedy, status = "", 0
    try:
        remedy = Job.read(folder).memory_remedy
        try:
            work(folder)
            PartialState().destroy_process_group()
        except BaseException as error:
            if not processes.is_stop(error):
                raise
            status = SAVED
        sys.stdout.flush()
        # DeepSpeed and gloo leave threads that abort a process which ends by itself.
        os._exit(status)
    except Exception as error:
        if (line := line_of(error, remedy)) is None:
            raise
        return fail(line)


if __name__ == "__main__":
    processes.begin()
    steps: Callable[[Path], None] = partial(train, is_scored=False)
    works = {"": train, "--steps": steps, "--end": end}
    sys.exit(main(Path(sys.argv[1]), works["".join(sys.argv[2:])]))
