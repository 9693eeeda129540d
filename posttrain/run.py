"""One post-training stage: job.json of a run folder -> data/, checkpoints/, metrics.jsonl, hf/.

python -m posttrain.run <run folder>      in every process of `accelerate launch`
"""

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import PosttrainError

TRAINERS = ("SFTTrainer", "DPOTrainer")
REFERENCE = "reference_log_probs.safetensors"


@dataclass(frozen=True)
class Job:
    """What a stage needs, as plain values. `trl` is an SFTConfig's or a DPOConfig's."""

    stage: str
    trainer: str  # SFTTrainer | DPOTrainer
    model: str  # transformers folder to start from
    tokenizer: str
    template: str  # file; empty: the tokenizer's own
    template_defaults: Mapping[str, Any]  # written into the template that the model carries
    settings: Mapping[str, Any]  # template variables of training and scoring alone
    files: Mapping[str, str]  # of each split
    mixture: Mapping[str, float]
    mixture_seed: int
    trl: Mapping[str, Any]
    world_size: int
    workers: int  # processes that tokenise
    held_out: str  # folder; empty: nothing is scored
    score_steps: int
    score_prompts: int  # of each kind, during training; at its end all are
    score_prompts_at_end: int
    max_new_tokens: int
    tokens_before: int

    @staticmethod
    def read(folder: Path) -> "Job":
        return Job(**json.loads((folder / "job.json").read_text("utf-8")))


def load_tokenizer(job: Job) -> Any:
    """The stage's tokenizer, with the template and the end token that the model will carry."""
    from transformers import AutoTokenizer

    from posttrain.template import configured

    tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
    if job.template:
        tokenizer.chat_template = configured(Path(job.template), **job.template_defaults)
    if not tokenizer.chat_template:
        raise PosttrainError(f"{job.tokenizer}: no chat template; name one in the recipe")
    if end := job.trl.get("eos_token"):
        tokenizer.eos_token = end
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        raise PosttrainError(
            f"{job.tokenizer}: no padding token of its own: set pad_token to one that no text has, "
            "such as <|finetune_right_pad_id|>"
        )
    return tokenizer


def check_model(folder: Path) -> None:
    """Refuse a missing model, and one with NaN or infinity in it, before anything is computed."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise PosttrainError(f"{folder}: no *.safetensors; run the stage that makes it")
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                if not tensors.get_tensor(name).isfinite().all():
                    raise PosttrainError(
                        f"{file}: {name} has NaN or infinity in it: the stage before diverged; "
                        "run it again with a lower learning rate"
                    )


def prepare_data(folder: Path) -> dict[str, int]:
    """Write the run folder's data/ unless it is there; figures of it. For one process alone."""
    from datasets import disable_progress_bars

    from posttrain.rows import Mixture, chat_tokens, packed, pair_tokens, tokenised, write_dataset
    from posttrain.rows import with_settings as checked

    figures = folder / "data.json"
    if figures.exists() and (folder / "data").is_dir():
        return dict(json.loads(figures.read_text("utf-8")))
    disable_progress_bars()
    job, scratch = Job.read(folder), folder / "data.scratch"
    check_model(Path(job.model))
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(folder / "data", ignore_errors=True)
    tokenizer, trl = load_tokenizer(job), job.trl
    files = {split: Path(file) for split, file in job.files.items()}
    mixture = Mixture(files, job.mixture, job.mixture_seed, job.settings)

    def chat(row: dict[str, Any], where: str) -> dict[str, Any]:
        whole = checked(row, job.settings, where)
        return chat_tokens(tokenizer, whole, bool(trl["assistant_only_loss"]), where)

    def pair(row: dict[str, Any], where: str) -> dict[str, Any]:
        return pair_tokens(tokenizer, row, job.settings, where)

    is_chat = job.trainer == "SFTTrainer"
    rows = tokenised(mixture, chat if is_chat else pair, scratch, job.workers)
    counted = _counts(rows, trl["max_length"], is_chat, trl.get("packing_strategy") == "wrapped")
    if is_chat:
        rows = packed(rows, trl["max_length"], trl["packing_strategy"], scratch)
        counted["windows"] = len(rows)
    else:
        rows = rows.filter(
            lambda row: len(row["prompt_ids"]) < trl["max_length"], new_fingerprint="kept"
        )
    write_dataset(folder / "data", rows)
    figures.write_text(json.dumps(counted), "utf-8")
    shutil.rmtree(scratch)
    return counted


def _counts(rows: Any, length: int, is_chat: bool, cuts: bool) -> dict[str, int]:
    """Rows and tokens, and how many rows are longer than the window."""
    import pyarrow.compute as pc

    names = ("input_ids",) if is_chat else ("prompt_ids", "chosen_ids", "rejected_ids")
    sizes = [pc.list_value_length(rows.data.column(name)).to_numpy() for name in names]
    longest = sizes[0] if is_chat else sizes[0] + (sizes[1].clip(min=sizes[2]))
    counted = {"rows": len(rows), "tokens": int(sum(size.sum() for size in sizes))}
    if not cuts:
        counted["rows_cut_at_max_length"] = int((longest > length).sum())
    return counted


def train(folder: Path) -> None:
    """Train from the last whole checkpoint to the end; writes hf/ and results.json."""
    from accelerate import PartialState
    from datasets import load_from_disk

    from posttrain.checkpoints import cut_metrics, whole_checkpoints

    _quiet()
    job = Job.read(folder)
    # On CPUs it sees torchrun's processes only when told so.
    processes = PartialState(cpu=bool(job.trl.get("use_cpu")))
    if (found := processes.num_processes) != job.world_size:
        raise PosttrainError(
            f"{job.stage}: the recipe's batch is made up of {job.world_size} processes, {found} "
            "are running: start it with the accelerate configuration of launch/accelerate/"
        )
    stage = Stage(folder, job, load_tokenizer(job))
    data = load_from_disk(str(folder / "data"))
    saved = whole_checkpoints(folder)
    if processes.is_main_process:
        cut_metrics(folder / "metrics.jsonl", int(saved[-1].name) if saved else 0)
    trainer = stage.trainer(data)
    before = stage.figures_once("before", trainer)
    trainer.train(resume_from_checkpoint=str(saved[-1]) if saved else None)
    stage.finish(trainer, before)


class Stage:
    """The parts of a stage that need its job and tokenizer."""

    def __init__(self, folder: Path, job: Job, tokenizer: Any):
        self.folder, self.job, self.tokenizer = folder, job, tokenizer

    def trainer(self, data: Any) -> Any:
        from posttrain.metrics import Metrics

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
        build = self._sft if job.trainer == "SFTTrainer" else self._apo
        trainer = build(arguments, options, data)
        _remove_printers(trainer)
        scorer = self.scorer(job.score_prompts)
        score = (lambda: _scored(scorer, trainer)) if scorer else None
        metrics = Metrics(self.folder, job.stage, job.tokens_before, score, job.score_steps)
        trainer.add_callback(metrics)
        return trainer

    def _sft(self, arguments: dict[str, Any], options: dict[str, Any], data: Any) -> Any:
        from trl import SFTConfig

        from posttrain.sft import MaskedSFTTrainer

        # The labels carry the mask already; TRL refuses the option on tokens.
        prepared = {"assistant_only_loss": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
        # Before the model: with ZeRO-3 this is what shards the weights as they are read.
        config = SFTConfig(**arguments | prepared)
        return MaskedSFTTrainer(
            model=self._model(options),
            args=config,
            train_dataset=data,
            processing_class=self.tokenizer,
            dense_attention=options.get("attn_implementation", "sdpa") in ("sdpa", "eager"),
        )

    def _apo(self, arguments: dict[str, Any], options: dict[str, Any], data: Any) -> Any:
        from trl import DPOConfig

        from posttrain.apo import PairTrainer

        config = DPOConfig(**arguments)
        return PairTrainer(
            model=self._model(options),
            args=config,
            train_dataset=data,
            processing_class=self.tokenizer,
            reference=self.folder / REFERENCE,
        )

    def _model(self, options: dict[str, Any]) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.job.model, **options)

    def scorer(self, prompts: int) -> Any:
        """A posttrain.scores.Scorer of so many held-out prompts a kind; None without any."""
        from posttrain.scores import Scorer

        job = self.job
        if not job.held_out or prompts == 0:
            return None
        return Scorer(self.tokenizer, Path(job.held_out), prompts, job.max_new_tokens, job.settings)

    def figures_once(self, name: str, trainer: Any) -> dict[str, float]:
        """Held-out figures of the model as it is, computed at the stage's first start alone."""
        file = self.folder / f"{name}.json"
        if file.exists():
            return dict(json.loads(file.read_text("utf-8")))
        figures = self.figures(trainer)
        if trainer.is_world_process_zero():
            aside = file.with_name(f".{file.name}")
            aside.write_text(json.dumps(figures), "utf-8")
            aside.replace(file)
        return figures

    def figures(self, trainer: Any) -> dict[str, float]:
        scorer = self.scorer(self.job.score_prompts_at_end)
        if scorer is None:
            return {}
        found = _scored(scorer, trainer)
        if self.job.trainer == "DPOTrainer":
            found |= self._preference(trainer)
        return found

    def _preference(self, trainer: Any) -> dict[str, float]:
        """Figures of held-out pairs against the stage's own start, kept beside the run."""
        from safetensors.torch import load_file, save_file

        from posttrain.apo import completion_log_probs, preference_figures
        from posttrain.rows import pair_tokens, read_rows

        job, file = self.job, Path(self.job.held_out) / "preference.jsonl"
        rows = read_rows(file, job.score_prompts_at_end)
        pairs = [
            pair_tokens(self.tokenizer, row, job.settings, f"{file}:{index + 1}")
            for index, row in enumerate(rows)
        ]
        with _whole_model(trainer) as model:
            was_training = model.training
            model.eval()
            policy = completion_log_probs(model, pairs, self.tokenizer.pad_token_id)
            model.train(was_training)
        stored = self.folder / f"held_out_{REFERENCE}"
        if trainer.state.global_step == 0:
            if trainer.is_world_process_zero():
                save_file({"reference": policy.contiguous()}, stored)
            trainer.accelerator.wait_for_everyone()
            return {
                "chosen_more_likely": preference_figures(policy, policy, 0)["chosen_more_likely"]
            }
        reference = load_file(stored)["reference"]
        return preference_figures(policy, reference, float(job.trl["beta"]))

    def finish(self, trainer: Any, before: dict[str, float]) -> None:
        """hf/ with tokenizer, template and generation config; results.json beside it."""
        from posttrain.checkpoints import replace_folder

        after = self.figures(trainer)
        aside = self.folder / "hf.partial"
        if trainer.is_world_process_zero():
            shutil.rmtree(aside, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(aside))
        if not trainer.is_world_process_zero():
            return
        (aside / "training_args.bin").unlink(missing_ok=True)
        replace_folder(aside, self.folder / "hf")
        results = {
            "step": trainer.state.global_step,
            "tokens": self.job.tokens_before + trainer.state.num_input_tokens_seen,
            "data": json.loads((self.folder / "data.json").read_text("utf-8")),
            "scores": {"before": before, "after": after},
        }
        (self.folder / "results.json").write_text(json.dumps(results, indent=1), "utf-8")


def _whole_model(trainer: Any) -> Any:
    """The unwrapped model, for the time of a `with` whole in each process."""
    from trl.models.utils import unwrap_model_for_generation

    return unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator)


def _scored(scorer: Any, trainer: Any) -> dict[str, float]:
    with _whole_model(trainer) as model:
        return dict(scorer(model))


def _quiet() -> None:
    """Bars for each file, and deprecations of names that the recipes keep as published."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    names = "is_gradient_checkpointing|gradient_checkpointing|use_liger_kernel"
    warnings.filterwarnings("ignore", message=f"`({names})", category=FutureWarning)


def _remove_printers(trainer: Any) -> None:
    from transformers import PrinterCallback, ProgressCallback

    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)


def main() -> None:
    try:
        train(Path(sys.argv[1]))
    except PosttrainError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
