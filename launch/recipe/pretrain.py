"""The keys of a recipe that pretrains: a `nanotron:` section and its mixture, as published.

The vocabulary is that of the nanotron branch that trained SmolLM3 (released config files);
nanotron_ext/adapter.py lowers it to the installed nanotron. A key that is not here is a misspelling.
"""

import re
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from launch.recipe.tables import SourceRow
from launch.recipe.values import (
    Count,
    Decay,
    Dtype,
    Flag,
    Many,
    Name,
    Natural,
    NotNegative,
    Overlay,
    Positive,
    PositiveShare,
    Rate,
    Refused,
    Seed,
    Text,
    Whole,
    Window,
    section,
)

LogLevel = Literal["debug", "info", "warning", "error", "critical", "passive"]


@section
class General:
    project: Text
    run: Text
    seed: Seed
    step: Natural | None = None
    consumed_train_samples: Natural | None = None
    benchmark_csv_path: Text | None = None
    ignore_sanity_checks: Flag = True


@section
class Checkpoints:
    checkpoint_interval: Count  # steps
    checkpoints_path_is_shared_file_system: Flag = False
    load_lr_scheduler: Flag = True
    load_optimizer: Flag = True
    save_final_state: Literal[True] = True
    save_initial_state: Flag = False

    def __post_init__(self) -> None:
        if self.load_lr_scheduler != self.load_optimizer:
            remedy = "write the same as load_optimizer: a stage goes on, or it takes weights alone"
            raise Refused("load_lr_scheduler", self.load_lr_scheduler, remedy)


@section
class Logging:
    iteration_step_info_interval: Count = 1
    log_level: LogLevel = "info"
    log_level_replica: LogLevel = "info"


@section
class MetricsLogging:
    log_level: Natural = 1
    log_detail_interval: Count = 200


@section
class InitMethod:
    std: PositiveShare


@section
class RopeScaling:
    rope_type: Literal["yarn"]
    factor: Positive
    original_max_position_embeddings: Count
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    attention_factor: Positive | None = None


@section
class ModelConfig:
    is_smollm3_config: Literal[True]
    _attn_implementation: Literal["flash_attention_2", "llama3_ring_attention", "sdpa"]
    _fused_rms_norm: Flag
    _fused_rotary_emb: Flag
    _use_doc_masking: Flag
    _use_qkv_packed: Literal[True]
    ring_attn_heads_k_stride: Count | None = None
    attention_bias: Literal[False]
    bos_token_id: Natural | None
    eos_token_id: Natural | None
    flex_attention_mask: None = None
    hidden_act: Literal["silu"]
    hidden_size: Count
    initializer_range: PositiveShare
    intermediate_size: Count
    max_position_embeddings: Window
    moe_config: None = None
    no_rope_layer: Natural  # every n-th layer has no RoPE; 0: none
    num_attention_heads: Count
    num_hidden_layers: Count
    num_key_value_heads: Count
    pad_token_id: Natural | None = None
    pretraining_tp: Count
    rms_norm_eps: Rate
    rope_interleaved: Literal[False]
    rope_scaling: RopeScaling | None = None
    rope_theta: Positive
    sliding_window_size: None = None
    tie_word_embeddings: Flag
    use_cache: Flag
    vocab_size: Count
    z_loss_coefficient: NotNegative
    z_loss_enabled: Flag

    def __post_init__(self) -> None:
        heads = self.num_attention_heads
        if self.hidden_size % (2 * heads):
            remedy = (
                f"write a multiple of {2 * heads}: num_attention_heads, {heads}, of an even size"
            )
            raise Refused("hidden_size", self.hidden_size, remedy)
        if heads % self.num_key_value_heads:
            remedy = f"write a divisor of num_attention_heads, {heads}"
            raise Refused("num_key_value_heads", self.num_key_value_heads, remedy)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if (getattr(self, key) or 0) >= self.vocab_size:
                remedy = f"write an id below vocab_size, {self.vocab_size}"
                raise Refused(key, getattr(self, key), remedy)


@section
class Model:
    ddp_bucket_cap_mb: Count
    dtype: Dtype
    init_method: InitMethod
    make_vocab_size_divisible_by: Count
    model_config: ModelConfig


@section
class LearningRateScheduler:
    learning_rate: Rate
    lr_decay_starting_step: Natural
    lr_decay_steps: Count
    lr_decay_style: Literal["linear", "cosine"]
    lr_warmup_steps: Natural
    lr_warmup_style: Literal["linear", "constant"]
    min_decay_lr: NotNegative

    def __post_init__(self) -> None:
        if self.min_decay_lr > self.learning_rate:
            remedy = f"write at most learning_rate, {self.learning_rate:g}"
            raise Refused("min_decay_lr", self.min_decay_lr, remedy)
        if self.lr_warmup_steps > self.lr_decay_starting_step:
            remedy = f"write at most lr_decay_starting_step, {self.lr_decay_starting_step}"
            raise Refused("lr_warmup_steps", self.lr_warmup_steps, remedy)


@section
class OptimizerFactory:
    adam_beta1: Decay
    adam_beta2: Decay
    adam_eps: Rate
    name: Literal["adamW"]
    torch_adam_is_fused: Flag


@section
class GradientSpikes:
    """The plugin's own section: nanotron_ext/spikes.py."""

    window_steps: Count
    threshold: Positive
    skip_batch: Flag


@section
class Optimizer:
    accumulate_grad_in_fp32: Flag
    clip_grad: Positive
    gradient_spikes: GradientSpikes
    learning_rate_scheduler: LearningRateScheduler
    optimizer_factory: OptimizerFactory
    weight_decay: Decay
    weight_decay_exclude_named_params: Many[Text]  # regular expressions
    zero_stage: Annotated[int, Field(strict=True, ge=0, le=1)]

    def __post_init__(self) -> None:
        for number, pattern in enumerate(self.weight_decay_exclude_named_params):
            try:
                re.compile(pattern)
            except re.error as error:
                key = f"weight_decay_exclude_named_params.{number}"
                raise Refused(key, pattern, f"no regular expression ({error})") from None


@section
class Parallelism:
    context_parallel_size: Count = 1
    dp: Count
    expert_parallel_size: Literal[1] = 1
    moe_layer_recompute: Literal[False] = False
    pp: Count
    pp_engine: Literal["1f1b", "afab"]
    recompute_layer: Flag
    tp: Count
    tp_linear_async_communication: Flag
    tp_mode: Literal["ALL_REDUCE", "REDUCE_SCATTER"]
    tp_recompute_allgather: Flag

    @property
    def world_size(self) -> int:
        """Processes of the layout."""
        return self.dp * self.tp * self.pp * self.context_parallel_size


@section
class Tokenizer:
    tokenizer_max_length: Count | None = None
    tokenizer_name_or_path: Text
    tokenizer_revision: Text | None = None


@section
class Tokens:
    batch_accumulation_per_replica: Count
    limit_test_batches: Natural = 0
    limit_val_batches: Natural = 0
    # Of a micro-batch: with labels, as published, the loss of a step depends on how the step is cut
    # into micro-batches, since those with more documents have fewer labels; with tokens it does not.
    loss_mean_over: Literal["labels", "tokens"] = "labels"
    micro_batch_size: Count
    sequence_length: Window
    train_steps: Count  # cumulative over stages 1-3
    val_check_interval: Whole = -1


@section
class Data:
    num_loading_workers: Natural = 0
    seed: Seed


@section
class DataStage:
    name: Text
    start_training_step: Count = 1
    data: Data


@section
class FastStep:
    """The plugin's own section, on CUDA alone: nanotron_ext/fast_step.py. Results stay the same."""

    compile_layer: Flag = True
    plain_linears: Flag = True
    in_place_loss: Flag = True
    whole_logits_gib: NotNegative = 9.0
    fused_weight_gradients: Flag = True
    attention: Literal["auto", "fa4", "flash", "varlen", "sdpa"] = "auto"
    deterministic: Flag = False  # true: a resumed run ends in the same bits on a GPU too

    @property
    def fuses_gradients(self) -> bool:
        """What nanotron_ext/fast_step.py makes of both keys where nothing else is against it."""
        return self.plain_linears and self.fused_weight_gradients


@section
class Nanotron:
    general: General
    checkpoints: Checkpoints
    logging: Logging = field(default_factory=Logging)
    metrics_logging: MetricsLogging = field(default_factory=MetricsLogging)
    model: Model
    optimizer: Optimizer
    parallelism: Parallelism
    tokenizer: Tokenizer
    tokens: Tokens
    data_stages: Many[DataStage]
    fast_step: FastStep = field(default_factory=FastStep)

    def __post_init__(self) -> None:
        if len(self.data_stages) != 1:
            remedy = "write one entry; each stage has its own recipe"
            raise Refused("data_stages", f"{len(self.data_stages)} entries", remedy)
        warmup = self.optimizer.learning_rate_scheduler.lr_warmup_steps
        if self.tokens.train_steps <= warmup:
            remedy = f"write more than lr_warmup_steps, {warmup}"
            raise Refused("tokens.train_steps", self.tokens.train_steps, remedy)
        window = self.tokens.sequence_length
        if self.model.model_config.max_position_embeddings < window:
            value = self.model.model_config.max_position_embeddings
            remedy = f"write at least tokens.sequence_length, {window}"
            raise Refused("model.model_config.max_position_embeddings", value, remedy)
        self._check_layout()

    def _check_layout(self) -> None:
        model, layout = self.model.model_config, self.parallelism
        for key, size in {
            "num_key_value_heads": model.num_key_value_heads,
            "intermediate_size": model.intermediate_size,
            "vocab_size": model.vocab_size,
        }.items():
            if size % layout.tp:
                remedy = f"write a divisor of model_config.{key}, {size}"
                raise Refused("parallelism.tp", layout.tp, remedy)
        if layout.tp_mode == "REDUCE_SCATTER" and self.tokens.sequence_length % layout.tp:
            remedy = f"write a divisor of tokens.sequence_length, {self.tokens.sequence_length}"
            raise Refused("parallelism.tp", layout.tp, remedy)
        ring = layout.context_parallel_size
        if ring > 1 and self.tokens.sequence_length % (2 * ring):  # two pieces of a window each
            remedy = (
                f"write a divisor of half of tokens.sequence_length, {self.tokens.sequence_length}"
            )
            raise Refused("parallelism.context_parallel_size", ring, remedy)
        if layout.pp > model.num_hidden_layers:
            remedy = f"write at most model_config.num_hidden_layers, {model.num_hidden_layers}"
            raise Refused("parallelism.pp", layout.pp, remedy)

    @property
    def data_seed(self) -> int:
        return self.data_stages[0].data.seed

    @property
    def windows_a_step(self) -> int:
        """Windows per global batch."""
        tokens = self.tokens
        return tokens.micro_batch_size * tokens.batch_accumulation_per_replica * self.parallelism.dp

    @property
    def starts_afresh(self) -> bool:
        """Whether the stage takes only weights and counts its own steps, as long context does."""
        return not self.checkpoints.load_optimizer


@section
class PretrainRecipe:
    """A recipe that pretrains; `mixture` as written, its weights need not sum to 1."""

    stage: Name
    mixture: dict[str, Positive]
    nanotron: Nanotron
    # Rows as in sources.yaml, for this recipe only.
    sources: dict[Name, SourceRow] = field(default_factory=dict)
    # Laid over `nanotron` for the pinned engine, where it cannot do what was published.
    on_nanotron_0_4: Overlay = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.mixture:
            raise Refused("mixture", "empty", "name a source and its weight")
