"""Whatever a recipe file says wrongly is one line: the file, the key, the value, the remedy."""

import math
import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import mutants
import pytest
import torch
from conftest import ROOT, forget_recipes
from mutants import Mutant

from ground.errors import UserError
from launch.recipe import load
from launch.recipe.evaluation import NOT_SUITES, load_long_context, load_ruler, load_suite
from launch.recipe.scale import load_scale
from launch.recipe.tables import load_ablations, load_pipeline, load_synthetic
from launch.run.folder import StageRun
from launch.stages.evaluate import check_tasks
from launch.tools.ablation import ablation_runs
from launch.walk import resolve, unfinished

SEED, EACH = 20261126, 8


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of recipes/ that launch reads, on a machine with all GPUs, DeepSpeed and two cores."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "recipes", root / "recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "RECIPES", root / "recipes")
        patch.setattr(torch.cuda, "device_count", lambda: 10**6)
        patch.setattr(
            "launch.stages.posttrain.find_spec", lambda name: name == "deepspeed" or find_spec(name)
        )
        patch.setattr("os.cpu_count", lambda: 2)
        patch.setenv("GPUS", "8")  # for the scales that are laid out on what is there
        patch.setenv("GPU_GB", "80")
        patch.setenv("RUNS", str(root / "runs"))
        patch.chdir(root)
        yield root / "recipes"
    forget_recipes()


def everything(file: str) -> None:
    """All that `make` checks of recipes/ before it starts a process, at the scales that read a file."""
    for name, origin in mutants.scales_of(file):
        at = load_scale(name, origin=origin)
        left: dict[str, StageRun] = {}
        for stage in reversed(load_pipeline()):
            if stage not in left:
                left |= {run.stage: run for run in unfinished(resolve(stage, at))}
        for run in left.values():
            run.refuse()
        for ablation in load_ablations():
            for group in ablation_runs(ablation, at).values():
                group[0].refuse()
    load_long_context()
    load_ruler()
    load_synthetic()
    for file in sorted((load.RECIPES / "eval").glob("*.yaml")):
        if file.stem not in NOT_SUITES:
            check_tasks(file.stem, load_suite(file.stem))


def outcome(recipes: Path, mutant: Mutant) -> Exception | None:
    file = recipes / mutant.file
    before = file.read_text("utf-8")
    file.write_text(mutant.write(), "utf-8")
    forget_recipes()
    try:
        everything(mutant.file)
    except Exception as error:
        return error
    finally:
        file.write_text(before, "utf-8")
    return None


def problem(mutant: Mutant, error: Exception | None) -> str:
    """What is wrong with the outcome; empty where all is well."""
    if error is None:
        return "taken" if mutant.fate == "refused" else ""
    if not isinstance(error, UserError):
        return f"{type(error).__name__}: {error}"
    text = str(error)
    if mutant.fate == "harmless":
        return f"refused: {text}"
    if "\n" in text or not text.isprintable():
        return f"not one line: {text!r}"
    of_list = re.sub(r"(\.\d+)+$", "", mutant.key)  # a list may be named for its item
    if mutant.fate == "valid":  # what it does not fit may be blamed, if both are named
        is_named = f"recipes/{mutant.file}" in text and of_list.rpartition(".")[2] in text
        return "" if is_named else f"not named: {text}"
    if not re.match(rf"recipes/{re.escape(mutant.file)}( line \d+)?: ", text):
        return f"another file is blamed: {text}"
    if not any(f": {key}{end}" in text for key in {mutant.key, of_list} for end in ":."):
        return f"another key is blamed: {text}" if mutant.key else ""
    of_value = mutant.value is not ... and not re.search(
        "unknown key|no such (stage here|key)|no config", text
    )
    if of_value and shown(mutant.value) not in text:
        return f"the value is not shown: {text}"
    return "" if REMEDY.search(text) else f"no remedy: {text}"


REMEDY = re.compile(
    r"\b(write|did you mean|known|name|add|give|drop|lower|take|say|divide|not valid YAML|"
    r"one of|correct|has|expected|takes)\b"
)


def shown(value: object) -> str:
    return "nan" if isinstance(value, float) and math.isnan(value) else f"{value}"


STAGE1, STAGE2, TINY = "pretrain/stage1.yaml", "pretrain/stage2.yaml", "scales/tiny.yaml"
SIZE = "scales/60m.yaml"  # that the larger sizes extend
SFT, APO = "posttrain/sft.yaml", "posttrain/apo.yaml"
NANOTRON, CONFIG = "nanotron", "nanotron.model.model_config"
SCHEDULE, OPTIMIZER = "nanotron.optimizer.learning_rate_scheduler", "nanotron.optimizer"
NAN = float("nan")
SPLIT = "splits.SFT.s1k_1#1_think"
# Mistakes that would be costly: (file, key, value); `#` stands for a dot within a name.
COSTLY: list[tuple[str, str, object]] = [
    (STAGE1, f"{SCHEDULE}.lr_decay_style", "linera"),
    (STAGE1, f"{SCHEDULE}.learning_rate", 0),
    (STAGE1, f"{SCHEDULE}.learning_rate", NAN),
    (STAGE1, f"{SCHEDULE}.lr_warmup_steps", -5),
    (STAGE1, f"{SCHEDULE}.min_decay_lr", 1.0),
    (STAGE1, f"{OPTIMIZER}.weight_decay", -0.1),
    (STAGE1, f"{OPTIMIZER}.optimizer_factory.adam_beta1", 1.5),
    (STAGE1, f"{OPTIMIZER}.optimizer_factory.adam_eps", -1),
    (STAGE1, f"{OPTIMIZER}.zero_stage", 3),
    (STAGE1, f"{OPTIMIZER}.clip_grad", 0),
    (STAGE1, f"{OPTIMIZER}.weight_decay_exclude_named_params", [".*token_embeding.*"]),
    (STAGE1, "nanotron.general.seed", -1),
    (STAGE1, "nanotron.data_stages.0.data.seed", -1),
    (STAGE1, "nanotron.model.dtype", "float17"),
    (STAGE1, "nanotron.model.init_method.std", 0),
    (STAGE1, f"{CONFIG}.rope_scaling", "yarn"),
    (STAGE1, f"{CONFIG}.rope_theta", NAN),
    (STAGE1, f"{CONFIG}.no_rope_layer", -1),
    (STAGE1, f"{CONFIG}.is_smollm3_config", False),
    (STAGE1, f"{CONFIG}.bos_token_id", 0),
    (STAGE1, "nanotron.parallelism.pp_engine", "foo"),
    (STAGE1, "nanotron.parallelism.tp_mode", "FOO"),
    ("longctx/32k.yaml", "nanotron.parallelism.context_parallel_size", 3),
    ("longctx/32k.yaml", "on_nanotron_0_4.parallelism.context_parallel_size", 2),
    (STAGE2, "nanotron.tokens.train_steps", 3450000),
    (TINY, f"{CONFIG}.hidden_size", 60),
    (TINY, f"{CONFIG}.vocab_size", 8181),
    (TINY, "nanotron.parallelism.dp", 5000),
    (TINY, "windows_divided_by", 4096),
    (TINY, "minimum_warmup_steps", 10_000),
    (TINY, "held_out.fraction", 0),
    (TINY, "held_out.fraction", 1.0),
    (TINY, "posttrain.stages.midtran", {"trl": {"max_steps": 5}}),
    (TINY, "posttrain.chats.rows", -5),
    (TINY, "posttrain.every_stage.trl.use_cpu", False),
    (TINY, "posttrain.every_stage.world_size", 5000),
    (TINY, "evaluation.leave_out", ["Nope"]),
    (TINY, "train_steps.longctx-128k", 5),
    (SIZE, "layout", "fitt"),
    (SIZE, "batch_tokens", 1_000_000),
    (TINY, "tokens", 50_000_000),
    (SIZE, "nanotron.tokens.loss_mean_over", "labels"),
    (SIZE, "nanotron.model", None),
    (SIZE, "nanotron.checkpoints", "word"),
    (SIZE, "minimum_warmup_share", 0.9),
    (SIZE, "windows_divided_by", 4096),
    (SIZE, "posttrain.chats.hub_share.Midd", 0.1),
    (SIZE, "train_steps.longctx-46k", 20),
    (SIZE, "why.batch_token", "the batch fits the tokens"),
    (SIZE, "standin", None),
    (SIZE, "standin.origin", "standin"),
    (SIZE, "standin.tokens", 0.5),
    (SIZE, "standin.fill_window", True),
    (SIZE, "standin.posttrain.chats.rows", 0),
    (SIZE, "standin.nanotron.checkpoints.checkpoint_intervall", 100),
    (SIZE, "standin.train_steps.longctx-46k", 20),
    ("scales/135m.yaml", "batch_tokens", 65_537),
    ("scales/1b.yaml", "extends", "306m.yaml"),
    ("scales/1b.yaml", "nanotron.model.model_config.num_key_value_heads", 5),
    (STAGE1, "nanotron.fast_step", {"atention": "flash"}),
    (STAGE1, "nanotron.fast_step", {"attention": "fa5"}),
    (STAGE1, "nanotron.tokens.loss_mean_over", "label"),
    (SFT, "trl.packing_strategy", "bdf"),
    (SFT, "trl.learning_rate", 0),
    (SFT, "trl.warmup_steps", -1),
    (SFT, "trl.max_length", 1),
    (SFT, "trl.eos_token", "<|nope|>"),
    (SFT, "scores.prompts_at_end", -3),
    ("posttrain/midtrain.yaml", "trl.save_steps", 0),
    ("posttrain/midtrain.yaml", "trl.save_steps", NAN),
    (APO, "trl.loss_type", ["apo_zer"]),
    (APO, "trl.beta", 0),
    ("posttrain/splits.yaml", f"{SPLIT}.share", -9),
    ("posttrain/splits.yaml", f"{SPLIT}.stand_in", "reasonin"),
    ("merge/soup.yaml", "models.0.model", "apo/checkpoints/last"),
    ("merge/merge.yaml", "models.0.parameters.weight", NAN),
    ("merge/release.yaml", "generation.temperature", NAN),
    ("merge/release.yaml", "generation.eos_token", "<|nope|>"),
    ("eval/instruct.yaml", "generation.temprature", 1),
    ("eval/base.yaml", "rows.0.metric", "acc_nrom"),
    ("eval/base.yaml", "rows.0.tasks", ["hellaswag_xx"]),
    ("eval/longctx.yaml", "tasks", ["nedle"]),
    ("eval/ruler.yaml", "tasks", ["niah"]),
    ("sources.yaml", "sources.mwiki.same_as", "multilingual_wik"),
    ("sources.yaml", "sources.dclm.stand_in", "web-narrative"),
    ("sources.yaml", "sources.dclm.category", "web"),
    ("sources.yaml", "sources.dclm.text_field", 3),
    ("sources.yaml", "sources.dclm.tokens", 3.8e12),
    ("sources.yaml", "sources.dclm.clean", "publishd"),
    ("sources.yaml", "sources.dclm.clean", []),
    ("sources.yaml", "sources.dclm.clean", None),
    ("sources.yaml", "sources.dclm.clean", ["langage"]),
    ("sources.yaml", "sources.dclm.data_files", []),
    ("sources.yaml", "sources.dclm.contents", "software heritage"),
    ("sources.yaml", "sources.dclm.file_language", ["C"]),
    ("sources.yaml", "sources.dclm.replaced_by", "fineweb-edu"),
    ("sources.yaml", "sources.tulu-3-chatml.messages", "chat"),
    ("sources.yaml", "sources.tulu-3-chatml.text_field", ["messages", "source"]),
    ("sources.yaml", "sources.multilingual_wiki.replaced_by", "fw2-frx"),
    ("sources.yaml", "sources.multilingual_wiki.replaced_by", "pull-requests"),
    ("sources.yaml", "sources.multilingual_wiki.contents", "software-heritage"),
    ("standins.yaml", "standins.boolq-passages.shared_by.wiki", -9),
    ("standins.yaml", "standins.boolq-passages.reader", "boolq"),
    ("standins.yaml", "standins.web-narratives.options", {"feilds": ["document"]}),
    ("pipeline.yaml", "stages.tokenizer.engine", "tokeniser"),
    ("pipeline.yaml", "stages.sft.takes", ["tokenizer", "data-chats", "midtran"]),
    ("pipeline.yaml", "stages.sft.takes", ["tokenizer", "midtrain"]),
    ("pipeline.yaml", "stages.sft.takes", ["tokenizer", "midtrain", "data-chats"]),
    ("pipeline.yaml", "stages.held-out.mixture_of", []),
    ("pipeline.yaml", "stages.held-out.mixture_of", ["tokenizer"]),
    ("pipeline.yaml", "stages.sft.recipe", "posttrain/sfx.yaml"),
    ("ablations.yaml", "ablations.gqa.of", "tokenizer"),
    (
        "ablations.yaml",
        "ablations.embed-decay.variants.decayed.optimizer.weight_decay_exclude_named_params",
        ["embeding"],
    ),
]


@pytest.mark.parametrize(("file", "key", "value"), COSTLY, ids=str)
def test_a_costly_mistake_is_refused_by_name(
    recipes: Path, file: str, key: str, value: object
) -> None:
    path = tuple(int(part) if part.isdigit() else part.replace("#", ".") for part in key.split("."))
    mutant = mutants.with_value(file, path, "costly", value, "refused")
    assert problem(mutant, outcome(recipes, mutant)) == ""


def test_an_item_of_a_list_is_told_by_itself(recipes: Path) -> None:
    path = ("sources", "dclm", "clean")
    mutant = mutants.with_value("sources.yaml", path, "item", ["pii", "langage"], "refused")
    error = str(outcome(recipes, mutant))
    assert "sources.dclm.clean.1: 'langage': write 'language', 'gopher'" in error


@pytest.mark.parametrize("file", mutants.files())
def test_a_mistake_anywhere_is_refused_by_name_and_what_is_none_passes(
    recipes: Path, file: str
) -> None:
    drawn = mutants.drawn(file, SEED, EACH)
    assert len(drawn) == EACH
    problems = [f"{m}: {p}" for m in drawn if (p := problem(m, outcome(recipes, m)))]
    assert not problems, "\n".join(problems)
