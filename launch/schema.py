"""What a recipe may say: the keys and types of a `nanotron:` section, as published.

The vocabulary is that of the nanotron branch that trained SmolLM3 (released config files);
nanotron_ext/adapter.py lowers it to the installed nanotron. A key that is not here is a misspelling.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

from omegaconf import MISSING

from launch.schema_posttrain import PosttrainScale

Count = Annotated[int, 1]  # at least 1
Positive = Annotated[float, 1e-12]


@dataclass
class General:
    project: str = MISSING
    run: str = MISSING
    seed: int = MISSING
    step: int | None = None
    consumed_train_samples: int | None = None
    benchmark_csv_path: str | None = None
    ignore_sanity_checks: bool = True


@dataclass
class Checkpoints:
    checkpoint_interval: Count = MISSING  # steps
    checkpoints_path_is_shared_file_system: bool = False
    load_lr_scheduler: bool = True
    load_optimizer: bool = True
    save_final_state: bool = True
    save_initial_state: bool = False


@dataclass
class Logging:
    iteration_step_info_interval: int = 1
    log_level: str = "info"
    log_level_replica: str = "info"


@dataclass
class MetricsLogging:
    log_level: int = 1
    log_detail_interval: int = 200


@dataclass
class InitMethod:
    std: float = MISSING


@dataclass
class ModelConfig:
    is_smollm3_config: bool = MISSING
    _attn_implementation: str = MISSING
    _fused_rms_norm: bool = MISSING
    _fused_rotary_emb: bool = MISSING
    _use_doc_masking: bool = MISSING
    _use_qkv_packed: bool = MISSING
    ring_attn_heads_k_stride: int | None = None
    attention_bias: bool = MISSING
    bos_token_id: int | None = MISSING
    eos_token_id: int | None = MISSING
    flex_attention_mask: str | None = None
    hidden_act: str = MISSING
    hidden_size: Count = MISSING
    initializer_range: float = MISSING
    intermediate_size: Count = MISSING
    max_position_embeddings: Count = MISSING
    moe_config: Any = None
    no_rope_layer: int = MISSING
    num_attention_heads: Count = MISSING
    num_hidden_layers: Count = MISSING
    num_key_value_heads: Count = MISSING
    pad_token_id: int | None = None
    pretraining_tp: int = MISSING
    rms_norm_eps: float = MISSING
    rope_interleaved: bool = MISSING
    rope_scaling: Any = None
    rope_theta: float = MISSING
    sliding_window_size: int | None = None
    tie_word_embeddings: bool = MISSING
    use_cache: bool = MISSING
    vocab_size: Count = MISSING
    z_loss_coefficient: float = MISSING
    z_loss_enabled: bool = MISSING


@dataclass
class Model:
    ddp_bucket_cap_mb: int = MISSING
    dtype: str = MISSING
    init_method: InitMethod = field(default_factory=InitMethod)
    make_vocab_size_divisible_by: int = MISSING
    model_config: ModelConfig = field(default_factory=ModelConfig)


@dataclass
class LearningRateScheduler:
    learning_rate: float = MISSING
    lr_decay_starting_step: int = MISSING
    lr_decay_steps: int = MISSING
    lr_decay_style: str = MISSING
    lr_warmup_steps: int = MISSING
    lr_warmup_style: str = MISSING
    min_decay_lr: float = MISSING


@dataclass
class OptimizerFactory:
    adam_beta1: float = MISSING
    adam_beta2: float = MISSING
    adam_eps: float = MISSING
    name: str = MISSING
    torch_adam_is_fused: bool = MISSING


@dataclass
class GradientSpikes:
    """The plugin's own section: nanotron_ext/spikes.py."""

    window_steps: Count = MISSING
    threshold: Positive = MISSING
    skip_batch: bool = MISSING


@dataclass
class Optimizer:
    accumulate_grad_in_fp32: bool = MISSING
    clip_grad: float = MISSING
    gradient_spikes: GradientSpikes = field(default_factory=GradientSpikes)
    learning_rate_scheduler: LearningRateScheduler = field(default_factory=LearningRateScheduler)
    optimizer_factory: OptimizerFactory = field(default_factory=OptimizerFactory)
    weight_decay: float = MISSING
    weight_decay_exclude_named_params: list[str] = MISSING
    zero_stage: int = MISSING


@dataclass
class Parallelism:
    context_parallel_size: Count = 1
    dp: Count = MISSING
    expert_parallel_size: int = 1
    moe_layer_recompute: bool = False
    pp: Count = MISSING
    pp_engine: str = MISSING
    recompute_layer: bool = MISSING
    tp: Count = MISSING
    tp_linear_async_communication: bool = MISSING
    tp_mode: str = MISSING
    tp_recompute_allgather: bool = MISSING


@dataclass
class Tokenizer:
    tokenizer_max_length: int | None = None
    tokenizer_name_or_path: str = MISSING
    tokenizer_revision: str | None = None


@dataclass
class Tokens:
    batch_accumulation_per_replica: Count = MISSING
    limit_test_batches: int = 0
    limit_val_batches: int = 0
    micro_batch_size: Count = MISSING
    sequence_length: Count = MISSING
    train_steps: Count = MISSING  # cumulative over stages 1-3
    val_check_interval: int = -1


@dataclass
class Data:
    num_loading_workers: int = 0
    seed: int = MISSING


@dataclass
class DataStage:
    name: str = MISSING
    start_training_step: int = 1
    data: Data = field(default_factory=Data)


@dataclass
class Nanotron:
    general: General = field(default_factory=General)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    logging: Logging = field(default_factory=Logging)
    metrics_logging: MetricsLogging = field(default_factory=MetricsLogging)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    parallelism: Parallelism = field(default_factory=Parallelism)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    tokens: Tokens = field(default_factory=Tokens)
    data_stages: list[DataStage] = field(default_factory=list)


@dataclass
class RecipeFile:
    """A recipe that pretrains: around nanotron's section only these keys stand."""

    stage: str = MISSING
    mixture: dict[str, float] = field(default_factory=dict)
    nanotron: Nanotron = field(default_factory=Nanotron)
    # laid over `nanotron` for the pinned engine, where it cannot do what was published
    on_nanotron_0_4: dict[str, Any] = field(default_factory=dict)


@dataclass
class SourceRow:
    """One row of sources.yaml; with `same_as` the row of that name counts."""

    same_as: str | None = None
    hub_id: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    licence: str | None = None
    gated: bool = False
    data_files: str | None = None  # narrows `config` where the subset holds more than the source
    max_tokens: int | None = None  # longer documents are left out
    text_field: Any = None
    category: str = ""
    language: str = ""
    stand_in: str | None = None
    substitute: str | None = None
    share: float = 1.0  # of the stand-in's documents, relative to the other sources that map to it


@dataclass
class StageRow:
    """One row of pipeline.yaml."""

    engine: str = MISSING
    takes: list[str] = field(default_factory=list)
    # a data stage prepares the mixtures of these stages' recipes
    mixture_of: list[str] = field(default_factory=list)


@dataclass
class TokenizerScale:
    vocab_size: int = 0  # 0: the published tokenizer
    train_bytes: int = 0  # text that the BPE is trained on


@dataclass
class HeldOut:
    fraction: float = MISSING  # of documents, never trained on
    bytes_per_category: Count = MISSING  # of text that bits per byte are measured on


@dataclass
class Scale:
    """The scale dial: what one scale changes of every recipe (see scale.py)."""

    scale: str = MISSING
    origin: str = MISSING  # hub | standin
    device: str = MISSING  # gpu: refuse to run without the recipe's GPUs | cpu
    held_out: HeldOut = field(default_factory=HeldOut)
    rerun_on_change: bool = False
    tokenizer: TokenizerScale = field(default_factory=TokenizerScale)
    windows_divided_by: Count = 1
    learning_rate_times: Positive = 1.0
    minimum_warmup_steps: int = 0
    steps_divided_by: Count = 1  # stages 1-3 alike, so that their ratio stays
    train_steps: dict[str, Count] = field(default_factory=dict)  # of every other stage
    ablation_steps: Count = MISSING  # of each run of an ablation of the first stage
    nanotron: dict[str, Any] = field(default_factory=dict)  # laid over the recipe's section
    posttrain: PosttrainScale = field(default_factory=PosttrainScale)
    evaluation: dict[str, Any] = field(default_factory=dict)  # laid over the eval stage's recipe
    why: dict[str, str] = field(default_factory=dict)  # key prefix: reason, for `make diff`
