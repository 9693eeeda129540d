"""What each stage of the chain takes on given GPUs: tokens, disk, memory, layout and time."""

from dataclasses import asdict, dataclass
from math import ceil

from ground.errors import UserError
from launch.machine.cards import Card
from launch.machine.fit import fit
from launch.machine.gpus import Gpus
from launch.machine.memory import Memory, memory
from launch.machine.posttrain_memory import (
    Shape,
    fit_posttrain,
    global_batch,
    posttrain_memory,
)
from launch.machine.speed import PLAIN, Speed, Work, code_of, on_card, speed, work_of
from launch.recipe.book import load_recipe
from launch.recipe.posttrain import DpoRecipe, PosttrainRecipe, SftRecipe
from launch.recipe.pretrain import Nanotron
from launch.recipe.scale import Scale, scale
from launch.recipe.tables import SplitRow, load_pipeline, load_splits

# Bytes of text a token: about four of English for a BPE of 32k to 128k entries. Ours, an estimate.
TEXT_BYTES_PER_TOKEN = 4
# Tokens that a CPU core tokenises in a second with the stock executor: a prototype's 6,500
# core-hours for 11.2T tokens.
TOKENS_PER_CORE_SECOND = 480_000
FP32_STATE_BYTES = 12  # a weight: master and Adam's two moments, in a checkpoint


@dataclass(frozen=True)
class Need:
    """What one stage takes on GPUs; None where it is not known."""

    stage: str
    tokens: float | None = None
    step: Speed | None = None
    seconds: float | None = None  # predicted
    memory: Memory | None = None
    disk: float = 0.0  # bytes
    download: float = 0.0  # bytes
    core_hours: float = 0.0  # of CPUs, to tokenise
    is_refitted: bool = False  # the scale runs in its recipe's layout, which wants other GPUs
    problem: str = ""  # why the stage does not run on these GPUs, and what would

    @property
    def gpus(self) -> int:
        return self.step.work.gpus if self.step else 0

    @property
    def layout(self) -> str:
        return self.step.work.layout if self.step else ""

    @property
    def hours(self) -> float:
        return (self.seconds or 0.0) / 3600

    def kilowatt_hours(self, card: Card) -> float:
        """Of the GPUs' boards alone, at their limit."""
        return self.hours * self.gpus * card.power / 1000

    def money(self, price: float) -> float:
        """In the unit of `price`, that of a GPU-hour."""
        return self.hours * self.gpus * price


def needs(at: Scale, gpus: Gpus, card: Card) -> list[Need]:
    """What every stage of the pipeline takes at a scale, in its order."""
    if at.values.device == "cpu":
        raise UserError(
            f"SCALE={at.given}: trains on the CPU, in minutes that README.md tells; plan predicts "
            "GPUs: choose another scale"
        )
    trained = _pretraining(at)
    model = list(trained.values())[-1][0]
    tokens = {stage: float(own.steps * own.step_tokens) for stage, (_, own) in trained.items()}
    found = []
    for stage, row in load_pipeline().items():
        if row.engine == "pretrain":
            found.append(_pretrain(stage, *trained[stage], at, gpus, card))
        elif row.engine == "posttrain":
            found.append(_posttrain(stage, at, model, gpus, card))
        elif row.engine == "data":
            drawn = sum(tokens[one] for one in row.mixture_of)
            found.append(_data(stage, drawn, at, model.model.model_config.vocab_size))
        elif row.engine == "chats":
            found.append(_chats(stage, at))
        else:
            folder = 2.0 * work_of(model).weights if row.engine in ("merge", "release") else 0.0
            found.append(Need(stage, disk=folder))
    return found


@dataclass(frozen=True)
class _Own:
    """Of one pretraining stage: steps without earlier stages', tokens of a step."""

    steps: int
    step_tokens: int


def _pretraining(at: Scale) -> dict[str, tuple[Nanotron, _Own]]:
    """The pretraining stages' sections and lengths."""
    found: dict[str, tuple[Nanotron, _Own]] = {}
    before = 0
    for stage, row in load_pipeline().items():
        if row.engine != "pretrain":
            continue
        nanotron: Nanotron = scale(load_recipe(stage), at).nanotron
        first = 0 if nanotron.starts_afresh else before
        before = nanotron.tokens.train_steps
        step_tokens = nanotron.windows_a_step * nanotron.tokens.sequence_length
        found[stage] = nanotron, _Own(before - first, step_tokens)
    return found


def _pretrain(stage: str, nanotron: Nanotron, own: _Own, at: Scale, gpus: Gpus, card: Card) -> Need:
    tokens, weights = float(own.steps * own.step_tokens), work_of(nanotron).weights
    in_fp32 = nanotron.optimizer.accumulate_grad_in_fp32
    checkpoint = weights * (FP32_STATE_BYTES + 2 * in_fp32)
    checkpoints = ceil(own.steps / nanotron.checkpoints.checkpoint_interval)
    disk = float(checkpoints * checkpoint + 2 * weights)
    try:
        laid = laid_out(nanotron, gpus)
    except UserError as error:
        return Need(stage, tokens, disk=disk, problem=str(error))
    step = speed(work_of(laid), card, on_card(code_of(laid.fast_step), card))
    return Need(
        stage,
        tokens,
        step,
        tokens / step.tokens_per_second,
        memory(laid),
        disk,
        is_refitted=at.values.layout == "recipe" and laid != nanotron,
    )


def laid_out(nanotron: Nanotron, gpus: Gpus) -> Nanotron:
    """The recipe's own layout where there are GPUs enough for it, else one that fits."""
    layout = nanotron.parallelism
    is_laid_out = 1 < layout.world_size <= gpus.count and layout.context_parallel_size == 1
    if is_laid_out and memory(nanotron).fits(gpus):
        return nanotron
    return fit(nanotron, gpus)


def _data(stage: str, tokens: float, at: Scale, vocabulary: int) -> Need:
    if at.text is not None or at.values.origin != "hub":
        return Need(stage)
    return Need(
        stage,
        tokens,
        disk=tokens * (2 if vocabulary <= 2**16 else 4),
        download=tokens * TEXT_BYTES_PER_TOKEN,
        core_hours=tokens / TOKENS_PER_CORE_SECOND / 3600,
    )


def _chats(stage: str, at: Scale) -> Need:
    """The splits of post-training, whole or as much of them as the scale reads; kept as text."""
    if at.values.origin != "hub":
        return Need(stage)
    tokens = sum(tokens for splits in _splits(at).values() for _, tokens in splits.values())
    text = TEXT_BYTES_PER_TOKEN * tokens
    return Need(stage, tokens, disk=text, download=text)


def _splits(at: Scale) -> dict[str, dict[str, tuple[float, float]]]:
    """Rows and tokens of each split of the hub that a scale reads, by config."""
    share = at.values.posttrain.chats.hub_share
    return {
        config: {
            name: ((row.rows or 0) * share.get(config, 1.0), _tokens(row) * share.get(config, 1.0))
            for name, row in splits.items()
        }
        for config, splits in load_splits().splits.items()
    }


def _tokens(row: SplitRow) -> float:
    return 1e6 * (row.million_tokens or 0.0)


@dataclass(frozen=True)
class _Rows:
    """What a post-training stage reads: windows filled with rows, or pairs."""

    tokens: float  # of a row
    document_tokens: float  # of a conversation in it
    epoch: float | None  # rows of one pass; None: embedded chats, whose length is not known


def _rows(recipe: PosttrainRecipe, at: Scale) -> _Rows:
    window, is_pairs = recipe.trl.max_length, isinstance(recipe, DpoRecipe)
    if at.values.origin != "hub":
        return _Rows(window * (1 + is_pairs), window, None)
    known = {name: split for splits in _splits(at).values() for name, split in splits.items()}
    shares = recipe.mixture.items()
    rows, tokens = (sum(known[name][n] * share for name, share in shares) for n in (0, 1))
    if is_pairs:  # the rejected side taken to be as long as the chosen
        return _Rows(2 * tokens / rows, tokens / rows, rows)
    whole = isinstance(recipe, SftRecipe) and recipe.trl.packing_strategy == "bfd"
    return _Rows(window, tokens / rows if whole else window, tokens / window)


def _posttrain(stage: str, at: Scale, model: Nanotron, gpus: Gpus, card: Card) -> Need:
    recipe: PosttrainRecipe = scale(load_recipe(stage), at)
    rows, config = _rows(recipe, at), model.model.model_config
    count = rows.epoch and recipe.trl.num_train_epochs * rows.epoch
    if recipe.trl.max_steps > 0:
        count = float(recipe.trl.max_steps * global_batch(recipe))
    shape = Shape.of(asdict(config))
    left = _saved(recipe) * checkpoint_bytes(recipe, shape, gpus)
    disk = left + 2.0 * work_of(model).weights
    if count is None:
        return Need(stage, disk=disk)
    tokens = count * rows.tokens
    try:
        laid, takes = posttrain_laid_out(recipe, shape, gpus)
    except UserError as error:
        problem = str(error).removeprefix(recipe.stage).lstrip(": ")
        return Need(stage, tokens, disk=disk, problem=problem)
    work = Work(
        config,
        ceil(rows.tokens),
        laid.trl.per_device_train_batch_size,
        laid.trl.gradient_accumulation_steps,
        dp=laid.world_size,
        recompute=laid.trl.gradient_checkpointing,
        zero_stage=3 if laid.world_size > 1 else 0,
        document_tokens=rows.document_tokens,
        frozen=laid.lora is not None,
    )
    step = speed(work, card, on_card(PLAIN, card))
    # The reference's forward pass comes on top of forward, backward and recomputation.
    passes = 1 + (1 / (4 if work.recompute else 3) if isinstance(recipe, DpoRecipe) else 0.0)
    seconds = count / global_batch(recipe) * step.seconds * passes
    return Need(stage, tokens, step, seconds, takes, disk)


def posttrain_laid_out(
    recipe: PosttrainRecipe, shape: Shape, gpus: Gpus
) -> tuple[PosttrainRecipe, Memory]:
    """The recipe's own layout where there are GPUs enough for it, else one that fits; its memory."""
    attention = recipe.trl.model_init_kwargs.attn_implementation
    laid = recipe
    takes = posttrain_memory(laid, shape, attention)
    fits = takes.fits(gpus)
    if not (fits and 1 < recipe.world_size <= gpus.count):
        laid = fit_posttrain(recipe, shape, gpus, attention)
        takes = posttrain_memory(laid, shape, attention)
    return laid, takes


def checkpoint_bytes(recipe: PosttrainRecipe, shape: Shape, gpus: Gpus) -> float:
    """One process keeps masters and moments, or adapters' alone; several add their bf16 weights."""
    if recipe.lora:
        return float(FP32_STATE_BYTES * shape.adapter_parameters(recipe.lora))
    return float((FP32_STATE_BYTES + 2 * (gpus.count > 1)) * shape.parameters)


def _saved(recipe: PosttrainRecipe) -> float:
    """Checkpoints that a stage leaves."""
    trl = recipe.trl
    if trl.save_strategy == "epoch":
        return ceil(trl.num_train_epochs)
    if trl.save_strategy == "no" or not trl.save_steps:
        return 0
    return 1 / trl.save_steps if trl.save_steps < 1 else max(trl.max_steps, 1) / trl.save_steps
