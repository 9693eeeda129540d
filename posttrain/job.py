"""The job of a post-training stage: launch writes it to job.json, the engine reads it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ground.files import read_json_object, write_json


@dataclass(frozen=True)
class Lora:
    """Adapters beside the linears named in `targets`: W + alpha / rank * B A."""

    rank: int
    alpha: float
    dropout: float  # of an adapter's input
    targets: Sequence[str]


@dataclass(frozen=True)
class Job:
    """All that a stage depends on. Paths are texts, since the job is stored as JSON."""

    stage: str
    trainer: str  # SFTTrainer | DPOTrainer
    model: str  # transformers folder to start from
    tokenizer: str
    template: str  # file; empty: the tokenizer's own
    template_defaults: Mapping[str, str | bool]  # written into the template that the model carries
    settings: Mapping[str, str]  # template variables, only for training and scoring
    files: Mapping[str, str]  # JSON lines of each split
    mixture: Mapping[str, float]  # share of each split's rows
    mixture_seed: int
    trl: Mapping[str, Any]  # keyword arguments of TRL's SFTConfig or DPOConfig
    world_size: int  # training processes
    workers: int  # processes that tokenise
    held_out: str  # folder; empty: nothing is scored
    score_steps: int  # steps from one scoring to the next
    score_prompts: int  # of each kind, during training
    score_prompts_at_end: int  # of each kind, before the first step and after the last
    max_new_tokens: int  # of a scored answer
    tokens_before: int  # that the model was trained on in earlier stages
    lora: Lora | None = None  # None: all weights are trained
    memory_remedy: str = ""  # what to do where a GPU's memory does not suffice

    @property
    def trains_pairs(self) -> bool:
        """Whether the rows are preference pairs; else they are chats."""
        return self.trainer == "DPOTrainer"

    def write(self, folder: Path) -> None:
        write_json(folder / "job.json", asdict(self))

    @staticmethod
    def read(folder: Path) -> "Job":
        values = read_json_object(folder / "job.json")
        lora = values.pop("lora", None)
        return Job(**values, lora=Lora(**lora) if lora else None)
