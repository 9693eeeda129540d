"""The keys of a scale file: what one scale changes of every recipe."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from launch.recipe.values import (
    MOST,
    Count,
    Flag,
    Many,
    Name,
    Natural,
    Overlay,
    Positive,
    PositiveShare,
    Refused,
    Seed,
    Share,
    Text,
    section,
)

# To YAML `off` is false.
Decontaminate = Annotated[
    Literal["remove", "report", "off"],
    BeforeValidator(lambda value: "off" if value is False else value),
]


@section
class TokenizerScale:
    vocab_size: Natural = 0  # 0: the published tokenizer
    train_bytes: Natural = 0  # text that the BPE is trained on

    def __post_init__(self) -> None:
        if 0 < self.vocab_size < 512:
            remedy = "write 0, or at least 512: 256 bytes, the special tokens and some merges"
            raise Refused("vocab_size", self.vocab_size, remedy)
        if self.vocab_size and not self.train_bytes:
            raise Refused("train_bytes", self.train_bytes, "say how much text the BPE learns from")


@section
class HeldOutScale:
    # Of documents, never trained on.
    fraction: Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=0.5)]
    bytes_per_category: Count  # of text that bits per byte are measured on


@section
class ChatsScale:
    """How many embedded chats a scale makes, and how many published ones it reads."""

    # Of the published rows, by config of the data set (Mid, SFT, Preference); all where not named.
    hub_share: dict[Name, PositiveShare] = field(default_factory=dict)
    rows: Natural = 0  # of each split, times the split's own share
    held_out_rows: Natural = 0  # of each kind
    seed: Seed = 0


@section
class PosttrainScale:
    chats: ChatsScale = field(default_factory=ChatsScale)
    every_stage: Overlay = field(default_factory=dict)  # laid over each recipe
    stages: dict[Name, Overlay] = field(default_factory=dict)  # then over that stage's


@section
class ScaleFile:
    """What one scale changes of every recipe."""

    scale: Name
    origin: Literal["hub", "standin"]  # where a source is read from when it has both
    device: Literal["gpu", "cpu"]  # gpu: refuse to run without the recipe's GPUs
    layout: Literal["recipe", "fit"] = "recipe"  # fit: to the GPUs at hand
    substitutes: Flag = (
        False  # another set is read for one that was never released, if one is known
    )
    held_out: HeldOutScale
    # Documents that hold an item of an evaluation task: left out of training, or only listed.
    decontaminate: Decontaminate = "remove"
    decontaminate_without: Many[Text] = ()  # tasks, or patterns, whose data may be missing
    rerun_on_change: Flag = False
    tokenizer: TokenizerScale = field(default_factory=TokenizerScale)
    fill_windows: Flag = False  # a source shorter than a window is written as often as fills one
    windows_divided_by: Count = 1
    learning_rate_times: Positive = 1.0
    minimum_warmup_steps: Natural = 0
    minimum_warmup_share: Share = 0.0  # of the steps of a schedule
    steps_divided_by: Count = 1  # stages 1-3 alike, so that their ratio stays
    tokens: Natural = 0  # of stages 1-3 together, in place of steps_divided_by
    batch_tokens: Natural = (
        0  # of one step of every pretraining stage; 0: the windows of `nanotron`
    )
    train_steps: dict[Name, Count] = field(default_factory=dict)  # of every other stage
    ablation_steps: Annotated[
        int, Field(strict=True, ge=10, le=MOST)
    ]  # of each run of an ablation of the first stage
    nanotron: Overlay = field(default_factory=dict)  # laid over the recipe's section
    posttrain: PosttrainScale = field(default_factory=PosttrainScale)
    evaluation: Overlay = field(default_factory=dict)  # laid over the eval stage's recipe
    why: dict[Text, Text] = field(default_factory=dict)  # key prefix: reason, for `make diff`
    standin: Overlay = field(default_factory=dict)  # laid over this file where origin is standin

    def __post_init__(self) -> None:
        if self.tokens and self.steps_divided_by != 1:
            remedy = f"drop it or steps_divided_by, {self.steps_divided_by}: each gives the steps"
            raise Refused("tokens", self.tokens, remedy)
        if self.tokens and not self.batch_tokens:
            raise Refused(
                "batch_tokens", 0, "say how many tokens a step has, where tokens is given"
            )
        for key in ("scale", "origin", "standin"):
            if key in self.standin:
                raise Refused(f"standin.{key}", self.standin[key], "drop it, the file says that")
        if self.origin == "standin" and not (
            self.posttrain.chats.rows and self.posttrain.chats.held_out_rows
        ):
            key = "rows" if not self.posttrain.chats.rows else "held_out_rows"
            value = getattr(self.posttrain.chats, key)
            raise Refused(
                f"posttrain.chats.{key}", value, "write at least 1 where origin is standin"
            )
