"""The keys of a post-training recipe: `trl` is an SFTConfig or a DPOConfig of TRL 1.16.

A key of `trl` that is not here is a misspelling, or one that no published source sets: add it here.
"""

from dataclasses import field
from typing import Annotated, Literal, get_args

from pydantic import Field

from launch.recipe.values import (
    Count,
    Decay,
    Dtype,
    Flag,
    Name,
    Natural,
    NotNegative,
    OneOrMore,
    Positive,
    PositiveShare,
    Rate,
    Refused,
    Seed,
    Text,
    Whole,
    section,
)

Linear = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LINEARS: tuple[Linear, ...] = get_args(Linear)


@section
class ModelInit:
    dtype: Dtype
    attn_implementation: Literal[
        "flash_attention_2", "flash_attention_3", "flash_attention_4", "sdpa", "eager"
    ]


@section
class Trl:
    # schedule and optimizer
    learning_rate: Rate
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_min_lr"
    ]
    lr_scheduler_kwargs: dict[Literal["min_lr_rate", "min_lr"], NotNegative] = field(
        default_factory=dict
    )
    warmup_steps: NotNegative  # below 1: a share of all steps
    num_train_epochs: Positive
    max_steps: Whole = -1  # above 0 it decides in place of the epochs
    weight_decay: Decay
    adam_beta1: Decay
    adam_beta2: Decay
    adam_epsilon: Rate
    max_grad_norm: Positive
    # batch
    per_device_train_batch_size: Count
    gradient_accumulation_steps: Count
    average_tokens_across_devices: Flag
    max_length: Annotated[int, Field(strict=True, ge=64)]  # tokens; a turn takes 20 around its text
    # precision and memory
    bf16: Flag
    use_cpu: Flag = False
    gradient_checkpointing: Flag
    gradient_checkpointing_kwargs: dict[Literal["use_reentrant"], Flag] | None = None
    use_liger_kernel: Flag
    model_init_kwargs: ModelInit
    # bookkeeping
    seed: Seed
    logging_steps: Count
    save_strategy: Literal["steps", "epoch", "no"]
    save_steps: Positive | None = None  # below 1: a share of all steps

    def __post_init__(self) -> None:
        for key in ("warmup_steps", "save_steps"):
            value = getattr(self, key)
            if value is not None and value > 1 and value != int(value):
                raise Refused(key, value, "write whole steps, or a share below 1")
        if self.save_strategy == "steps" and self.save_steps is None:
            raise Refused("save_steps", "empty", "save_strategy is steps: say how often")
        if self.max_steps != -1 and self.max_steps < 1:
            raise Refused("max_steps", self.max_steps, "write at least 1, or -1 for all epochs")
        if 0 < self.max_steps <= self.warmup_steps:
            remedy = f"write less than max_steps, {self.max_steps}"
            raise Refused("warmup_steps", self.warmup_steps, remedy)
        minima = int(self.lr_scheduler_type == "cosine_with_min_lr")
        if len(self.lr_scheduler_kwargs) != minima:
            remedy = (
                "give min_lr_rate or min_lr where lr_scheduler_type is cosine_with_min_lr, and "
                f"neither where it is {self.lr_scheduler_type}"
            )
            raise Refused("lr_scheduler_kwargs", dict(self.lr_scheduler_kwargs), remedy)
        if self.lr_scheduler_kwargs.get("min_lr_rate", 0) > 1:
            remedy = "write a share of the peak, at most 1"
            key = "lr_scheduler_kwargs.min_lr_rate"
            raise Refused(key, self.lr_scheduler_kwargs["min_lr_rate"], remedy)


@section
class SftTrl(Trl):
    packing: Flag
    packing_strategy: Literal["bfd", "wrapped"]
    assistant_only_loss: Flag
    eos_token: Text


@section
class DpoTrl(Trl):
    beta: Positive
    loss_type: OneOrMore[
        Literal["apo_zero", "apo_down", "sigmoid", "hinge", "ipo", "robust", "sft"]
    ]
    padding_free: Flag
    precompute_ref_log_probs: Literal[True]
    precompute_ref_batch_size: Count | None = None


@section
class Template:
    file: str = ""  # beside the recipe; empty: the template that the model carries
    model_name: str = ""  # of the default instructions
    short_system: Flag = False
    date_string: str = ""  # for training only: the stored template prints the day of use
    digest: str | None = None  # of the template's text; launch/stages fills it in


@section
class Scores:
    """Greedy answers to held-out prompts of each kind."""

    every_steps: Count
    prompts: Natural  # of each kind, every so many steps; 0: none
    prompts_at_end: Natural  # before the first step and after the last
    max_new_tokens: Count


@section
class Lora:
    """Adapters W + alpha / rank * B A on frozen linears (arXiv 2106.09685), merged at the end."""

    rank: Count
    alpha: Positive
    dropout: Decay = 0.0  # of an adapter's input
    targets: OneOrMore[Linear] = LINEARS  # all of a layer's, as QLoRA found (arXiv 2305.14314, 4)

    def __post_init__(self) -> None:
        if len(set(self.targets)) < len(self.targets):
            raise Refused("targets", list(self.targets), "name each linear once")


@section
class PosttrainRecipe:
    """A recipe that post-trains."""

    stage: Name
    trainer: Literal["SFTTrainer", "DPOTrainer"]
    world_size: Count  # processes; with batch and accumulation it makes the global batch
    mixture: dict[Name, PositiveShare]  # the share of a split's rows that is drawn
    mixture_seed: Seed
    template: Template
    scores: Scores
    trl: Trl
    lora: Lora | None = None  # null: every weight is trained

    def __post_init__(self) -> None:
        if not self.mixture:
            raise Refused("mixture", "empty", "name a split of posttrain/splits.yaml")


@section
class SftRecipe(PosttrainRecipe):
    trainer: Literal["SFTTrainer"]
    trl: SftTrl


@section
class DpoRecipe(PosttrainRecipe):
    trainer: Literal["DPOTrainer"]
    trl: DpoTrl
