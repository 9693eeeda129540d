"""A post-training stage: recipe, chats and a model become a job for posttrain/, then results."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from ground.checksums import sizes_differ, verify, whole_checkpoints
from ground.errors import UserError, did_you_mean
from ground.files import checkpoints, digest, kept_record, read_json_object, read_record
from ground.processes import command
from launch.machine.attention import DISTRIBUTIONS, is_dense, usable_attention
from launch.machine.gpus import given, gpus_for
from launch.machine.posttrain_memory import Shape, fit_posttrain, posttrain_memory, unfitted
from launch.recipe.book import Loaded, template_file
from launch.recipe.load import short
from launch.recipe.posttrain import PosttrainRecipe, SftTrl
from launch.recipe.scale import Scale, scale
from launch.run.child import run_child
from launch.run.cluster import TrainedStage
from launch.run.folder import StageRun
from launch.stages.chats import ChatsStage, split_files
from launch.stages.checkpoint import CheckpointStage
from launch.stages.pretrain import PretrainStage
from launch.stages.tokenizer import TokenizerStage

GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
# What it costs to attend without the documents' lengths.
DENSE = ", with a mask of all pairs of tokens: time and memory grow with max_length squared"
ACCELERATE = Path(__file__).parent.parent / "accelerate"


@cache
def _digest(template: Path) -> str:
    return digest(template)


@dataclass(frozen=True)
class ResolvedPosttrain:
    """A post-training recipe, resolved."""

    recipe: PosttrainRecipe
    device: str  # gpu | cpu
    template: Path | None  # None: the one that the model carries
    layout: str  # recipe | fit


@dataclass(frozen=True, kw_only=True)
class PosttrainStage(TrainedStage):
    kind: ClassVar = "posttrain"
    takes: ClassVar = ("tokenizer", "chats")
    models: ClassVar = "hf|checkpoints/-?[1-9][0-9]*"
    libraries: ClassVar = ("accelerate", "torch", "transformers", "trl")
    script: ClassVar = "posttrain.slurm"
    module: ClassVar = "posttrain.stage"
    only_steps: ClassVar = ("--steps",)
    prepares_data: ClassVar = True
    recipe: ResolvedPosttrain

    @staticmethod
    def resolve(loaded: Loaded[PosttrainRecipe], at: Scale) -> ResolvedPosttrain:
        recipe, template = scale(loaded, at), template_file(loaded)
        if template:
            # The text of the template is part of the recipe.
            recipe = replace(recipe, template=replace(recipe.template, digest=_digest(template)))
        return ResolvedPosttrain(recipe, at.values.device, template, at.values.layout)

    def recipe_values(self) -> dict[str, Any]:
        """A fitted layout is left out: the same run goes on on other GPUs, as many as before."""
        recipe = self.recipe.recipe
        values = asdict(recipe if self.recipe.layout == "recipe" else unfitted(recipe))
        if self.recipe.template is None:
            del values["template"]["digest"]
        if recipe.lora is None:
            del values["lora"]
        return {**values, "device": self.device}

    @property
    def versions(self) -> dict[str, str]:
        return {
            **super().versions,
            **({"peft": version("peft")} if self.recipe.recipe.lora else {}),
        }

    @property
    def device(self) -> str:
        return self.recipe.device

    @property
    def world_size(self) -> int:
        return self.laid_out.world_size

    @cached_property
    def laid_out(self) -> PosttrainRecipe:
        """The recipe in the layout that it runs in; one that does not fit is refused before."""
        try:
            return self.fitted() if self.recipe.layout == "fit" else self.recipe.recipe
        except UserError:
            return self.recipe.recipe

    def fitted(self) -> PosttrainRecipe:
        """The recipe laid out on the GPUs. UserError where it does not fit."""
        gpus = gpus_for(self.device)
        return fit_posttrain(self.recipe.recipe, self.shape, gpus, self.attention)

    @property
    def shape(self) -> Shape:
        """Sizes of the model that the stage trains."""
        run = self.start
        while isinstance(run, PosttrainStage):
            run = run.start
        if isinstance(run, CheckpointStage):
            return Shape.of(run.model_config)
        if isinstance(run, PretrainStage):
            return Shape.of(asdict(run.recipe.nanotron.model.model_config))
        raise UserError(f"{self.where('layout')}: fit: the sizes of {run.stage} are not known")

    @property
    def size_key(self) -> str:
        return "world_size"

    @property
    def runs_here(self) -> bool:
        """Whether this process trains: one process, on the CPU."""
        return self.device == "cpu" and self.world_size == 1

    @property
    def start(self) -> StageRun:
        """The stage whose model this one starts from: the last that it takes."""
        return list(self.inputs.values())[-1]

    def started_from(self, starts: Sequence[StageRun]) -> "PosttrainStage":
        """From a checkpoint and its tokenizer; no stage before is taken, save the chats."""
        if len(starts) != 1:
            raise UserError(f"FROM= names {len(starts)} checkpoints; {self.stage} starts from one")
        inputs = {
            name: run for name, run in self.inputs.items() if not isinstance(run, TokenizerStage)
        }
        return replace(self, inputs={**inputs, self.start.stage: starts[0]})

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer: the model's own, where the pipeline's is not taken."""
        own = [run.tokenizer for run in self.inputs.values() if isinstance(run, TokenizerStage)]
        return own[0] if own and self.recipe.template else self.start.folder / "hf"

    @property
    def attention(self) -> str:
        """The attention kernel: the recipe's, or what is installed in its place."""
        return usable_attention(self.recipe.recipe.trl.model_init_kwargs.attn_implementation)

    @property
    def chats(self) -> ChatsStage:
        return self.input_of(ChatsStage)

    def refuse(self) -> None:
        super().refuse()
        if self.device == "gpu" and self.world_size > 1 and not find_spec("deepspeed"):
            raise UserError(
                f"{self.where('world_size')}: {self.world_size}: several GPUs share the model by "
                "DeepSpeed, which is not installed: pip install '.[gpu]'"
            )

    def refuse_layout(self) -> None:
        try:
            if self.recipe.layout == "fit":
                self.fitted()
        except UserError as error:
            raise UserError(
                f"{self.arguments}{given()}: {error} ({self.where('layout')}: fit)"
            ) from None

    def refuse_recipe(self) -> None:
        self._refuse_template()
        self._refuse_device()
        self.refuse_layout()
        from datatrove_pipelines.tokenizer import SPECIAL_TOKENS

        trl = self.recipe.recipe.trl
        if isinstance(trl, SftTrl) and trl.eos_token not in SPECIAL_TOKENS:
            hint = did_you_mean(trl.eos_token, SPECIAL_TOKENS)
            problem = f"{trl.eos_token}: no special token of the tokenizer; {hint}"
            raise UserError(f"{self.where('trl.eos_token')}: {problem}")
        if not re.fullmatch(self.start.models, "hf"):
            raise UserError(
                f"recipes/pipeline.yaml: stages.{self.stage}.takes: {self.start.stage}: the last that "
                "is taken leaves no model to start from; name a stage that trains last"
            )

    def _refuse_device(self) -> None:
        trl = self.recipe.recipe.trl
        kernel = trl.model_init_kwargs.attn_implementation
        if self.device == "cpu" and kernel.startswith("flash"):
            key = self.where("trl.model_init_kwargs.attn_implementation")
            problem = f"{kernel}: needs a GPU; write sdpa where device is cpu"
            raise UserError(f"{key}: {problem} ({self.where('device')})")
        if trl.use_cpu != (self.device == "cpu"):
            remedy = f"write {str(not trl.use_cpu).lower()} where device is {self.device}"
            key = self.where("trl.use_cpu")
            raise UserError(f"{key}: {trl.use_cpu}: {remedy} ({self.where('device')})")
        if trl.use_liger_kernel and not find_spec("liger_kernel"):
            key = self.where("trl.use_liger_kernel")
            raise UserError(f"{key}: true: liger-kernel is not installed; write false")

    def _refuse_template(self) -> None:
        """Refuse a template that does not parse, or marks no text as the assistant's own."""
        import jinja2

        file, trl = self.recipe.template, self.recipe.recipe.trl
        if file is None:
            if isinstance(self.start, CheckpointStage) and not self.start.carries_template:
                raise UserError(
                    f"FROM={self.start.recipe.named}: no chat template, and {self.stage} uses the "
                    f"model's own; name a checkpoint that has one, as after sft, or set "
                    f"{self.where('template.file')}"
                )
            return
        try:
            text = file.read_text("utf-8")
            # transformers' own tag; its content is ordinary Jinja.
            jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
                GENERATION.sub("", text)
            )
        except (UnicodeDecodeError, jinja2.TemplateSyntaxError) as error:
            raise UserError(f"{short(file)}: not a Jinja template ({error}); correct it") from None
        if isinstance(trl, SftTrl) and trl.assistant_only_loss and not GENERATION.search(text):
            key = self.where("trl.assistant_only_loss")
            remedy = "mark the assistant's turns, or write false"
            raise UserError(f"{key}: true: {short(file)} has no {{% generation %}} block; {remedy}")

    @property
    def steps_left(self) -> int:
        """Without a checkpoint the number, which follows from the data, is not known: 1 means some."""
        if self.is_ended:
            return 0
        if not (saved := checkpoints(self.folder)):
            return 1
        state = read_json_object(saved[-1] / "trainer_state.json")
        return int(state["max_steps"]) - int(state["global_step"])

    def is_paused(self, step: int) -> bool:
        """Scores come before the line of their step."""
        every, steps = self.recipe.recipe.scores.every_steps, self.recipe.recipe.trl.logging_steps
        return super().is_paused(step) or (step + steps) // every > step // every

    @property
    def is_ended(self) -> bool:
        """Whether hf/ and the results are there."""
        results = kept_record(self.folder / "results.json")
        return results is not None and sizes_differ(self.folder / "hf") is None

    @property
    def outputs(self) -> Iterable[Path]:
        return [self.folder / "hf"]

    def job(self) -> Any:
        """What the engine reads: a posttrain.job.Job."""
        from posttrain.job import Job, Lora

        recipe, model = self.laid_out, self.start.folder / "hf"
        template, scores, file = recipe.template, recipe.scores, self.recipe.template
        defaults: dict[str, str | bool] = {
            "model_name": template.model_name,
            "short_system": template.short_system,
        }
        chats, held_out = self.chats.chats, self.chats.held_out
        trl = asdict(recipe.trl)
        trl["model_init_kwargs"]["attn_implementation"] = self.attention
        return Job(
            stage=self.stage,
            trainer=recipe.trainer,
            model=str(model),
            tokenizer=str(self.tokenizer),
            template=str(file or ""),
            template_defaults={key: v for key, v in defaults.items() if v} if file else {},
            settings={"date_string": template.date_string} if template.date_string else {},
            files=split_files(chats, recipe.mixture),
            mixture=recipe.mixture,
            mixture_seed=recipe.mixture_seed,
            trl={key: value for key, value in trl.items() if value not in (None, {})},
            world_size=recipe.world_size,
            workers=1 if self.runs_here else os.cpu_count() or 1,
            held_out=str(held_out) if held_out.is_dir() else "",
            score_steps=scores.every_steps,
            score_prompts=scores.prompts,
            score_prompts_at_end=scores.prompts_at_end,
            max_new_tokens=scores.max_new_tokens,
            tokens_before=int((self.start.manifest() or {}).get("tokens", 0)),
            lora=Lora(**asdict(recipe.lora)) if recipe.lora else None,
            memory_remedy=self.memory_remedy(),
        )

    def memory_remedy(self) -> str:
        """What helps where a GPU's memory does not suffice after all."""
        trl = self.laid_out.trl
        if self.recipe.layout == "fit":
            least = posttrain_memory(self.laid_out, self.shape, self.attention).total / 2**30
            return (
                f"give a GPU_GB= below {least:.0f}: the layout is fitted anew, and the run goes on "
                "from its last checkpoint"
            )
        if not trl.gradient_checkpointing:
            return f"write true for {self.where('trl.gradient_checkpointing')}"
        if trl.per_device_train_batch_size > 1:
            return (
                f"lower {self.where('trl.per_device_train_batch_size')} and raise "
                "trl.gradient_accumulation_steps as much"
            )
        return f"lower {self.where('trl.max_length')}"

    @property
    def is_prepared(self) -> bool:
        return (self.folder / "data.json").exists() and not sizes_differ(self.folder / "data")

    def prepare(self) -> None:
        """Write job.json and the token dataset."""
        from posttrain.data import prepare_data

        self.start.verify_model(self.start.folder / "hf")
        whole_checkpoints(self.folder, self.stage, f"`{self.command} FORCE=1` begins again")
        wanted = self.recipe.recipe.trl.model_init_kwargs.attn_implementation
        if self.attention != wanted:
            key = self.where("trl.model_init_kwargs.attn_implementation")
            print(
                f"{self.stage}: {key}: {wanted}: {DISTRIBUTIONS[wanted]} is not installed; "
                f"{self.attention} in its place{DENSE * is_dense(self.attention)}",
                flush=True,
            )
        if self.recipe.layout == "fit":
            print(f"{self.stage}: {self._layout_line()}", flush=True)
        self.job().write(self.folder)
        counts = prepare_data(self.folder)
        if cut := counts.get("rows_cut_at_max_length"):
            print(
                f"{self.stage}: {cut} of {counts['rows']} rows are longer than trl.max_length "
                f"{self.recipe.recipe.trl.max_length} and lose their ends",
                flush=True,
            )
        for split, rows in counts.get("rows_with_control_strings", {}).items():
            line = f"{rows} rows spell control tokens in their messages, where they are text"
            print(f"{self.stage}: {split}: {line}", flush=True)

    def _layout_line(self) -> str:
        """What a fitted layout is, and takes of each GPU."""
        recipe, trl = self.laid_out, self.laid_out.trl
        memory = posttrain_memory(recipe, self.shape, self.attention).total / 2**30
        processes = f"{recipe.world_size} process{'es' * (recipe.world_size > 1)}"
        return (
            f"{processes} x {trl.per_device_train_batch_size} x "
            f"{trl.gradient_accumulation_steps} accumulated, "
            f"{'layers computed again' if trl.gradient_checkpointing else 'nothing computed again'}, "
            f"{memory:.1f} GiB a process predicted"
        )

    def train(self, lock: int) -> None:
        """Run the job to its end: in this process where it is one CPU process, so that one
        `make` imports everything once; else under accelerate."""
        if self.is_ended:
            return
        if self.runs_here:
            from posttrain.stage import train

            train(self.folder)
            return
        if self.device == "cpu":
            # accelerate's MULTI_CPU starts one process and exits 0.
            words = ["torch.distributed.run", "--standalone"]
            words += ["--nproc-per-node", str(self.world_size)]
        else:
            config = ACCELERATE / ("zero3.yaml" if self.world_size > 1 else "gpu.yaml")
            words = ["accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
            words += ["--num_machines", "1", "--num_processes", str(self.world_size)]
        words = command(*words, "-m", self.module, str(self.folder), launches=True)
        run_child(words, self.folder / "log.txt", self.stage, lock=lock)

    def results(self) -> dict[str, Any]:
        """The manifest's results, written by the last process, or here for nodes that only trained."""
        if not self.is_ended:
            verify(checkpoints(self.folder)[-1], f"`{self.sbatch('')}` goes on from the one before")
            words = command(self.module, str(self.folder), "--end")
            run_child(words, self.folder / "log.txt", self.stage)
        return read_record(self.folder / "results.json", f"`{self.command}` writes it again")

    def show(self) -> None:
        """Held-out figures before and after the stage."""
        scores = (self.manifest() or {}).get("scores", {})
        before, after = scores.get("before", {}), scores.get("after", {})
        for name, value in sorted(after.items()):
            was = f"{before[name]:.3f} -> " if name in before else ""
            print(f"  {name:28} {was}{value:.3f}", flush=True)
