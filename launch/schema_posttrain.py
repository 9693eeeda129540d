"""What a post-training recipe may say: `trl` is an SFTConfig or a DPOConfig of TRL 1.16.

A key of `trl` that is not here is a misspelling, or one that no published source sets: add it here.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

from omegaconf import MISSING

Count = Annotated[int, 1]  # at least 1


@dataclass
class ModelInit:
    dtype: str = MISSING
    attn_implementation: str = MISSING


@dataclass
class Trl:
    # schedule and optimizer
    learning_rate: float = MISSING
    lr_scheduler_type: str = MISSING
    lr_scheduler_kwargs: dict[str, float] = field(default_factory=dict)
    warmup_steps: float = MISSING  # below 1: a share of all steps
    num_train_epochs: float = MISSING
    max_steps: int = -1  # above 0 it decides in place of the epochs
    weight_decay: float = MISSING
    adam_beta1: float = MISSING
    adam_beta2: float = MISSING
    adam_epsilon: float = MISSING
    max_grad_norm: float = MISSING
    # batch
    per_device_train_batch_size: Count = MISSING
    gradient_accumulation_steps: Count = MISSING
    average_tokens_across_devices: bool = MISSING
    max_length: Count = MISSING
    # precision and memory
    bf16: bool = MISSING
    use_cpu: bool = False
    gradient_checkpointing: bool = MISSING
    gradient_checkpointing_kwargs: dict[str, bool] | None = None
    use_liger_kernel: bool = MISSING
    model_init_kwargs: ModelInit = field(default_factory=ModelInit)
    # bookkeeping
    seed: int = MISSING
    logging_steps: Count = MISSING
    save_strategy: str = MISSING
    save_steps: float | None = None  # below 1: a share of all steps


@dataclass
class SftTrl(Trl):
    packing: bool = MISSING
    packing_strategy: str = MISSING  # bfd | wrapped
    assistant_only_loss: bool = MISSING
    eos_token: str = MISSING


@dataclass
class DpoTrl(Trl):
    beta: float = MISSING
    loss_type: list[str] = MISSING
    padding_free: bool = MISSING
    precompute_ref_log_probs: bool = MISSING
    precompute_ref_batch_size: int | None = None


@dataclass
class Template:
    file: str = ""  # beside the recipe; empty: the template that the model carries
    model_name: str = ""  # of the default instructions
    short_system: bool = False
    date_string: str = ""  # of training alone: the stored template prints the day it is used on


@dataclass
class Scores:
    """Greedy answers to held-out prompts of each kind."""

    every_steps: Count = MISSING
    prompts: int = MISSING  # of each kind, every so many steps; 0: none
    prompts_at_end: int = MISSING  # before the first step and after the last
    max_new_tokens: Count = MISSING


@dataclass
class PosttrainFile:
    """A recipe that post-trains."""

    stage: str = MISSING
    trainer: str = MISSING  # SFTTrainer | DPOTrainer
    world_size: Count = MISSING  # processes; with batch and accumulation it makes the global batch
    mixture: dict[str, float] = field(default_factory=dict)
    mixture_seed: int = MISSING
    template: Template = field(default_factory=Template)
    scores: Scores = field(default_factory=Scores)
    trl: Any = MISSING  # SftTrl | DpoTrl


@dataclass
class ChatsScale:
    """How many embedded chats a scale makes; none are made of hub data."""

    rows: int = 0  # of each split, times the split's own share
    held_out_rows: int = 0  # of each kind
    seed: int = 0


@dataclass
class PosttrainScale:
    chats: ChatsScale = field(default_factory=ChatsScale)
    every_stage: dict[str, Any] = field(default_factory=dict)  # laid over each recipe
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)  # then over that stage's


@dataclass
class SplitRow:
    """One row of posttrain/splits.yaml."""

    mode: str = MISSING  # think | no_think
    rows: Count = MISSING
    stand_in: str = MISSING
    languages: list[str] = MISSING
    share: float = 1.0


@dataclass
class ChatDataset:
    hub_id: str = MISSING
    revision: str = MISSING
    licence: str = MISSING


@dataclass
class SplitsFile:
    dataset: ChatDataset = field(default_factory=ChatDataset)
    splits: dict[str, dict[str, SplitRow]] = field(default_factory=dict)
