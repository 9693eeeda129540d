"""A pretraining stage: recipe and data become a job for nanotron, its last checkpoint hf/."""

import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from ground.checksums import intact, verify, whole_checkpoints
from ground.errors import UserError
from ground.files import checkpoints, cut_back, write_text
from ground.processes import command
from launch.machine.fit import unfitted
from launch.recipe.book import Loaded
from launch.recipe.pretrain import Nanotron, PretrainRecipe
from launch.recipe.scale import Scale, scale
from launch.run.child import run_child
from launch.run.cluster import TrainedStage
from launch.run.folder import StageRun, cache_root, node_cache
from launch.run.workers import run_workers, start_server
from launch.stages import accounting
from launch.stages.data import DataStage
from launch.stages.held_out import HeldOutStage
from launch.stages.layout import laid_out, memory_remedy, recut_for, refuse_layout
from launch.stages.sources import mixture_of
from launch.stages.tokenizer import TokenizerStage


@dataclass(frozen=True)
class ResolvedPretrain:
    """A pretraining recipe, resolved: canonical names in the mixture, no unreleased sources."""

    mixture: dict[str, float]
    nanotron: Nanotron
    device: str  # gpu | cpu
    layout: str  # recipe | fit


@dataclass(frozen=True, kw_only=True)
class PretrainStage(TrainedStage):
    kind: ClassVar = "pretrain"
    takes: ClassVar = ("tokenizer", "held-out", "data")
    models: ClassVar = "hf"
    libraries: ClassVar = ("nanotron", "torch", "transformers")
    script: ClassVar = "pretrain.slurm"
    module: ClassVar = "nanotron_ext.trainer"
    recipe: ResolvedPretrain

    @staticmethod
    def resolve(loaded: Loaded[PretrainRecipe], at: Scale) -> ResolvedPretrain:
        mixture = mixture_of(str(loaded.file) if loaded.own else loaded.stage, at).weights
        nanotron, says = laid_out(scale(loaded, at).nanotron, at.values), at.values
        return ResolvedPretrain(mixture, nanotron, says.device, says.layout)

    # ---- what it is

    def recipe_values(self) -> dict[str, Any]:
        """Without what changes only how fast the steps are: `fast_step`, and a layout that is fitted,
        so that the same run goes on on other GPUs."""
        recipe = self.recipe
        if recipe.layout == "fit":
            recipe = replace(recipe, nanotron=unfitted(recipe.nanotron))
        values = asdict(recipe)
        del values["nanotron"]["fast_step"]
        return values

    @property
    def device(self) -> str:
        return self.recipe.device

    @property
    def world_size(self) -> int:
        return self.recipe.nanotron.parallelism.world_size

    @property
    def size_key(self) -> str:
        sizes = self.recipe.nanotron.parallelism
        factors = ("dp", "tp", "pp", "context_parallel_size")
        return f"nanotron.parallelism.{max(factors, key=lambda name: getattr(sizes, name))}"

    @property
    def layout(self) -> str:
        sizes = self.recipe.nanotron.parallelism
        return (
            f" (dp {sizes.dp} x tp {sizes.tp} x cp {sizes.context_parallel_size} x pp {sizes.pp})"
        )

    @property
    def steps(self) -> int:
        """The step that the stage ends with; cumulative over stages 1-3."""
        return self.recipe.nanotron.tokens.train_steps

    @property
    def window(self) -> int:
        """Tokens."""
        return self.recipe.nanotron.tokens.sequence_length

    @cached_property
    def earlier(self) -> "list[PretrainStage]":
        """The pretraining stages that this one continues, first to last."""
        for previous in self.inputs.values():
            if isinstance(previous, PretrainStage):
                return [*previous.earlier, previous]
        return []

    @property
    def first_step(self) -> int:
        """The step after which the stage's own steps are counted."""
        is_first = not self.earlier or self.recipe.nanotron.starts_afresh
        return 0 if is_first else self.earlier[-1].steps

    @property
    def tokenizer(self) -> Path:
        return self.input_of(TokenizerStage).tokenizer

    @property
    def held_out(self) -> HeldOutStage:
        return self.input_of(HeldOutStage)

    @property
    def data(self) -> DataStage:
        return self.input_of(DataStage)

    @property
    def outputs(self) -> Iterable[Path]:
        return [self.folder / "hf"]

    @property
    def _end(self) -> Path:
        return self.folder / "checkpoints" / str(self.steps)

    @property
    def _is_trained(self) -> bool:
        """Whether all that a finished stage has lost is in its last checkpoint."""
        return self.is_finished() and self._end.is_dir()

    @property
    def needed(self) -> Iterable[StageRun]:
        return [self.input_of(TokenizerStage)] if self._is_trained else super().needed

    def refuse(self) -> None:
        if not self._is_trained:
            super().refuse()

    def work(self, lock: int) -> dict[str, Any]:
        if not self._is_trained:
            return super().work(lock)
        self._convert()
        return self.manifest() or {}

    def last_checkpoint(self) -> Path:
        """The checkpoint of the stage's last step."""
        path = self._end
        if not path.is_dir():
            raise UserError(
                f"{path}: the stage's last checkpoint is missing; `{self.command} FORCE=1` trains "
                "it again"
            )
        again = (
            f"`rm -r {path} {self.folder / 'hf'}`, and `{self.command}` goes on from the one before"
        )
        verify(path, again)
        return path

    # ---- before, at and after its steps

    def refuse_layout(self) -> None:
        refuse_layout(self)

    def refuse_recipe(self) -> None:
        if self.first_step >= self.steps:
            key = "nanotron.tokens.train_steps"
            raise UserError(
                f"{self.where(key)}: {self.steps} steps at {self.arguments}, no more than the "
                f"{self.first_step} of {self.earlier[-1].where(key)}; take more, or lower "
                "steps_divided_by in the scale file"
            )
        self.refuse_layout()
        self._refuse_vocabulary()
        self._refuse_other_sizes()
        self._refuse_exclusions()
        from nanotron_ext.adapter import lower

        try:
            lower(asdict(self.recipe.nanotron), Path("checkpoints"), None, None)
            self._check_attention()
        except UserError as error:
            key, _, problem = str(error).partition(": ")
            raise UserError(f"{self.where(key)}: {problem}") from None

    def _check_attention(self) -> None:
        """Where there is a GPU, a kernel that is wanted by name must run on it."""
        wanted = self.recipe.nanotron.fast_step.attention
        if self.device != "gpu" or wanted == "auto":
            return
        import torch

        from nanotron_ext.attention import check_kernel

        if torch.cuda.is_available():
            check_kernel(wanted)

    def _refuse_vocabulary(self) -> None:
        """The model's vocabulary and special ids must be the tokenizer's."""
        from datatrove_pipelines.tokenizer import BOS, EOS

        tokenizer = self.input_of(TokenizerStage)
        ids, model = tokenizer.token_ids, self.recipe.nanotron.model.model_config
        wanted = {
            "vocab_size": tokenizer.vocab_size,
            "bos_token_id": ids[BOS],
            "eos_token_id": ids[EOS],
        }
        for key, value in wanted.items():
            if getattr(model, key) != value:
                where = self.where(f"nanotron.model.model_config.{key}")
                raise UserError(
                    f"{where}: {getattr(model, key)}: the tokenizer's is {value}; write that"
                )

    def _refuse_other_sizes(self) -> None:
        """Weights of an earlier stage fit only a model of the same sizes."""
        from nanotron_ext.config import SIZES

        if not self.earlier:
            return
        model = self.recipe.nanotron.model.model_config
        before = self.earlier[-1].recipe.nanotron.model.model_config
        for key in SIZES:
            if getattr(model, key) != getattr(before, key):
                raise UserError(
                    f"{self.where(f'nanotron.model.model_config.{key}')}: {getattr(model, key)}: "
                    f"{self.earlier[-1].stage}, which it goes on from, has {getattr(before, key)}"
                )

    def _refuse_exclusions(self) -> None:
        """With a pattern that matches no parameter, what it should exclude would be decayed."""
        import re

        from nanotron_ext.config import SmolLM3Config
        from nanotron_ext.weight_table import weights_of

        model = self.recipe.nanotron.model.model_config
        names = [
            weight.name
            for weight in weights_of(
                SmolLM3Config(
                    num_hidden_layers=model.num_hidden_layers,
                    tie_word_embeddings=model.tie_word_embeddings,
                )
            )
        ]
        for pattern in self.recipe.nanotron.optimizer.weight_decay_exclude_named_params:
            if not any(re.match(pattern, name) for name in names):
                key = self.where("nanotron.optimizer.weight_decay_exclude_named_params")
                problem = f"{pattern}: matches no parameter; name some, such as {names[0]}"
                raise UserError(f"{key}: {problem}")

    @property
    def steps_left(self) -> int:
        """Steps from the stage's own last checkpoint to its end."""
        saved = checkpoints(self.folder)
        return self.steps - (int(saved[-1].name) if saved else self.first_step)

    def prepare(self) -> None:
        """Write nanotron.yaml and job.json for the step to resume at; cut metrics.jsonl back to it."""
        import yaml

        from nanotron_ext.adapter import lower

        saved = whole_checkpoints(self.folder, self.stage, f"`{self.command} FORCE=1` begins again")
        if self.device == "cpu" and self.steps_left > 0:
            start_server(self.world_size)  # it imports while this process prepares
        before = self.earlier[-1].last_checkpoint() if self.earlier and not saved else None
        afresh = self.recipe.nanotron.starts_afresh
        start = None if afresh else before
        resume, weights = saved[-1] if saved else start, before if afresh else None
        values = asdict(self.recipe.nanotron)
        self.check_start(resume, weights)
        if resume:
            resume = recut_for(self, resume)
        config, warnings = lower(values, self.folder / "checkpoints", resume, weights)
        self._check_shards()
        accounting.report_mixture(self)
        write_text(self.folder / "nanotron.yaml", yaml.safe_dump(config))
        self.job().write(self.folder)
        write_text(self.folder / "adapter.txt", "\n".join(warnings) + "\n")
        print(
            f"{self.stage}: {len(warnings)} keys of the recipe dropped or changed for nanotron 0.4 "
            f"({self.folder / 'adapter.txt'}, docs/LEDGER.md)",
            flush=True,
        )
        last = int(saved[-1].name) if saved else -1
        cut_back(self.folder / "metrics.jsonl", last, intact(saved, "metrics.jsonl"))

    def check_start(self, resume: Path | None, weights: Path | None) -> None:
        """Refuse a checkpoint that nanotron would misread, or fail on once all processes run."""
        from nanotron_ext.checkpoint import check_layout, check_weights

        nanotron = self.recipe.nanotron
        if start := resume or weights:
            check_weights(start, asdict(nanotron.model.model_config))
        if resume:
            check_layout(resume, asdict(nanotron.parallelism))

    def job(self) -> Any:
        """What the trainer reads: a nanotron_ext.job.Job."""
        from nanotron_ext.job import FastStep, Job, Source, SpikeOptions

        nanotron, drawn = self.recipe.nanotron, accounting.windows_before(self)
        before, shards = accounting.tokens_per_source(self.earlier), self.data.shards
        return Job(
            stage=self.stage,
            weights=self.recipe.mixture,
            sources=[
                Source(name, cache_root() / one["folder"], one["token_bytes"], drawn.get(name, 0))
                for name in self.recipe.mixture
                for one in [shards[name]]
            ],
            decay_exclude=list(nanotron.optimizer.weight_decay_exclude_named_params),
            gradient_spikes=SpikeOptions(**asdict(nanotron.optimizer.gradient_spikes)),
            fast_step=FastStep(**asdict(nanotron.fast_step)),
            data_seed=nanotron.data_seed,
            eos_id=self.data.eos_id,
            first_step=self.first_step,
            tokens_before=sum(before.values()),
            tokens_per_source_before=before,
            cache=cache_root(),
            node_cache=node_cache(),
            memory_remedy=memory_remedy(self),
        )

    def _check_shards(self) -> None:
        """Check that each source's shard is whole on disk and holds at least one window."""
        from datatrove_pipelines.shards import check_shards, verify_shards

        shards, eos_id = self.data.shards_to_train_on(), self.data.eos_id
        for name in self.recipe.mixture:
            shard = shards[name]
            check_shards(cache_root() / shard["folder"], eos_id)
            if shard["tokens"] < self.window + 1:
                raise UserError(
                    f"source '{name}' has {shard['tokens']:,} tokens, fewer than one window of "
                    f"{self.window + 1:,} of {self.stage}: shorten nanotron.tokens.sequence_length, "
                    "give it more text, or drop it from the mixture"
                )
        verify_shards(cache_root() / shards[name]["folder"] for name in self.recipe.mixture)

    def train(self, lock: int) -> None:
        """Run the job on this machine until its last step: on GPUs under torchrun, on the CPU in
        processes that share one import of nanotron with the other stages'."""
        if self.steps_left <= 0:
            return
        if self.device == "cpu":
            run_workers(self.folder, self.stage, processes=self.world_size, lock=lock)
            return
        environment = {
            "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // self.world_size, 1)),
            # Published: one hardware queue keeps tensor-parallel communication in issue order.
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        }
        environment = {name: os.environ.get(name, value) for name, value in environment.items()}
        words = command(
            "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.world_size),
            "-m", self.module, str(self.folder), launches=True,
        )  # fmt: skip
        run_child(words, self.folder / "log.txt", self.stage, lock=lock, environment=environment)

    def _convert(self) -> None:
        from nanotron_ext.convert import to_hf

        to_hf(self.last_checkpoint(), self.folder / "hf", self.tokenizer)

    def results(self) -> dict[str, Any]:
        """Convert the last checkpoint to hf/ and score it; returns the manifest's results."""
        from launch.stages.scoring import Scorer, score_long_context, score_stage

        shutil.rmtree(self.folder / "recut", ignore_errors=True)
        self._convert()
        seen = accounting.tokens_per_source([*self.earlier, self])
        scorer = Scorer.of(self)
        results = {
            "step": self.steps,
            "tokens": sum(seen.values()),
            "tokens_per_source": seen,
            **score_stage(self, scorer, seen),
        }
        if self.recipe.nanotron.starts_afresh:
            results |= score_long_context(self, scorer, self.earlier[0].window)
        return results

    def show(self) -> None:
        from launch.stages.scoring import print_table

        print_table(self, self.manifest() or {})
