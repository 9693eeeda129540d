"""One pretraining stage on nanotron: `torchrun -m nanotron_ext.trainer <run folder>`.

The run folder holds job.json (plain values, written by the stage runner) and nanotron.yaml. The
stage continues weights, optimizer, schedule and data position of the checkpoint it resumes.
"""

import errno
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanotron_ext import compat
from nanotron_ext.config import SmolLM3Config
from nanotron_ext.dataloader import DataError, Loader, Source, prefetch
from nanotron_ext.mixture import Mixture, build_mixture
from nanotron_ext.model import SmolLM3ForTraining
from nanotron_ext.optimizer import exclude_from_decay
from nanotron_ext.spikes import SpikeDetector, SpikeOptions

compat.activate()

from nanotron import distributed as dist  # noqa: E402  (only after activate)
from nanotron.parallel.pipeline_parallel.tensor_pointer import TensorPointer  # noqa: E402
from nanotron.trainer import DistributedTrainer  # noqa: E402


@dataclass(frozen=True)
class Job:
    """What the stage runner asks for. Steps are global over stages 1-3, tokens cumulative."""

    stage: str
    weights: dict[str, float]
    sources: list[Source]
    decay_exclude: list[str]
    data_seed: int
    eos_id: int
    first_step: int
    tokens_before: int
    cache: Path
    gradient_spikes: SpikeOptions = field(default_factory=SpikeOptions)
    tokens_per_source_before: dict[str, int] = field(default_factory=dict)
    detail_interval: int = 10  # steps

    @classmethod
    def read(cls, folder: Path) -> "Job":
        values = json.loads((folder / "job.json").read_text())
        values["sources"] = [
            Source(**{**source, "folder": Path(source["folder"])}) for source in values["sources"]
        ]
        values["gradient_spikes"] = SpikeOptions(**values["gradient_spikes"])
        return cls(**{**values, "cache": Path(values["cache"])})


class Diverged(ValueError):
    """A loss or gradient that is no number: step, value and remedy in one line."""


class SmolLM3Trainer(DistributedTrainer):
    """DistributedTrainer with our model, data, metrics and all-or-nothing checkpoints."""

    def __init__(self, folder: Path, job: Job):
        self.folder, self.job = folder, job
        exclude_from_decay(job.decay_exclude)
        super().__init__(
            str(folder / "nanotron.yaml"),
            model_config_class=SmolLM3Config,
            model_class=SmolLM3ForTraining,
        )

    def post_init(self) -> None:
        compat.realign_lr(self.lr_scheduler, self.start_iteration_step)
        self.is_logger = dist.get_rank(self.parallel_context.world_pg) == self.logger_ranks[0]
        self.spikes = SpikeDetector(self.job.gradient_spikes, compat.device())
        if self.start_iteration_step > self.job.first_step:
            self.spikes.restore(self.folder / "metrics.jsonl")
        compat.watch_gradient_norm(self._watch_gradient_norm)

    def _watch_gradient_norm(self, norm: torch.Tensor) -> None:
        self.is_spike = self.spikes(norm)
        if self.job.gradient_spikes.skip_batch:
            # All ranks or none: an ulp between two of them must not part their weights.
            flag = self.is_spike.float()
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.parallel_context.world_pg)
            compat.skip_step_if(self.optimizer, flag)

    def run(self) -> None:
        """Train from the checkpoint's step to tokens.train_steps, then save."""
        mixture = build_mixture(self.job.weights, self.job.cache)
        self.mixture = mixture
        self.delivered = torch.zeros(len(mixture.names), dtype=torch.int64, device=compat.device())
        done = self.start_iteration_step - self.job.first_step
        loader = Loader(
            mixture,
            self.job.sources,
            sequence_length=self.sequence_length,
            micro_batch_size=self.micro_batch_size,
            dp_rank=dist.get_rank(self.parallel_context.dp_pg),
            dp_size=self.parallel_context.dp_pg.size(),
            first_sample=done * self.global_batch_size,
            seed=self.job.data_seed,
            eos_id=self.job.eos_id,
            vocab_size=self.model_config.vocab_size,
        )
        with Metrics(self, mixture) as self.metrics:
            self.train(self._tensors(loader))
        self._check_delivery(mixture, done)
        if self.iteration_step % self.config.checkpoints.checkpoint_interval:
            self.save_checkpoint()

    def _tensors(self, loader: Loader) -> Iterator[dict[str, torch.Tensor | TensorPointer]]:
        """Micro-batches as nanotron wants them: a pipeline rank gets only what it uses."""
        model = self.unwrapped_model
        rank = dist.get_rank(self.parallel_context.pp_pg)
        first, last = model.input_pp_rank, model.output_pp_rank
        for batch in prefetch(iter(loader)):
            self.delivered += torch.bincount(
                torch.from_numpy(batch.sources), minlength=len(self.delivered)
            ).to(self.delivered.device)
            owners = {
                "input_ids": (batch.input_ids, first),
                "position_ids": (batch.position_ids, rank),  # every pipeline rank needs borders
                "label_ids": (batch.label_ids, last),
                "label_mask": (batch.label_mask, last),
            }
            yield {
                name: torch.from_numpy(array.copy()).to(compat.device())
                if rank == owner
                else TensorPointer(group_rank=owner)
                for name, (array, owner) in owners.items()
            }

    def _check_delivery(self, mixture: Mixture, done: int) -> None:
        """What the loaders handed out must equal the sampler's closed form."""
        dist.all_reduce(self.delivered, group=self.parallel_context.dp_pg)
        total = (self.iteration_step - self.job.first_step) * self.global_batch_size
        before = mixture.counts(done * self.global_batch_size)
        wanted = [count - before[name] for name, count in mixture.counts(total).items()]
        if self.delivered.tolist() != wanted:
            raise RuntimeError(f"loader delivered {self.delivered.tolist()}, sampler says {wanted}")

    def train_step_logs(
        self, outputs: Iterable[dict[str, Any]], loss_avg: torch.Tensor | None
    ) -> None:
        norms = self._norms() if self.metrics.is_detailed() else {}
        if self.is_logger and loss_avg is not None:
            loss, norm = loss_avg.item(), self.grad_norm_unclipped.item()
            self.metrics.write(loss, {"grad_norm": norm, **norms}, is_spike=bool(self.is_spike))
            if not (math.isfinite(loss + norm) or self.job.gradient_spikes.skip_batch):
                raise Diverged(
                    f"step {self.iteration_step}: loss {loss}, gradient norm {norm}: the weights are "
                    "lost since the last checkpoint; lower the learning rate, or set "
                    "nanotron.optimizer.gradient_spikes.skip_batch to true"
                )

    def _norms(self) -> dict[str, float]:
        """`embedding_norm`: mean L2 norm of the rows of the embedding, on the ranks of the head.

        The blog says that it settles although nothing decays it.
        """
        if not (self.model_config.tie_word_embeddings or self.parallel_context.pp_pg.size() == 1):
            return {}
        model = self.unwrapped_model
        if dist.get_rank(self.parallel_context.pp_pg) != model.output_pp_rank:
            return {}
        # Where they are tied, the head is the embedding, and lies where the loss is computed.
        block = model.model.lm_head.pp_block
        if not self.model_config.tie_word_embeddings:
            block = model.model.token_position_embeddings.pp_block.token_embedding
        rows = block.weight.detach().float().norm(dim=1).sum()
        dist.all_reduce(rows, group=self.parallel_context.tp_pg)
        return {"embedding_norm": rows.item() / self.model_config.vocab_size}

    def save_checkpoint(self) -> Path:
        """Written aside, then renamed: a folder named by a step is whole, whatever was killed."""
        writes = dist.get_rank() == 0  # the adapter sees to it that all nodes share the folder
        root = self.config.checkpoints.checkpoints_path
        aside, whole = root / ".partial", root / str(self.iteration_step)
        if writes:
            shutil.rmtree(aside, ignore_errors=True)
        dist.barrier()
        self.config.checkpoints.checkpoints_path = aside
        try:
            super().save_checkpoint()
        finally:
            self.config.checkpoints.checkpoints_path = root
        dist.barrier()
        if writes and not whole.exists():
            (aside / whole.name).rename(whole)
        if writes:
            shutil.rmtree(aside, ignore_errors=True)
        dist.barrier()
        return whole


class Metrics:
    """metrics.jsonl, a line a step, and the progress bar; on the logging rank alone."""

    def __init__(self, trainer: SmolLM3Trainer, mixture: Mixture):
        self.trainer, self.mixture = trainer, mixture

    def __enter__(self) -> "Metrics":
        from tqdm import tqdm

        trainer = self.trainer
        self.file = self.bar = None
        if trainer.is_logger:
            self.file = (trainer.folder / "metrics.jsonl").open("a", buffering=1)
            self.bar = tqdm(
                desc=trainer.job.stage,
                initial=trainer.start_iteration_step - trainer.job.first_step,
                total=trainer.config.tokens.train_steps - trainer.job.first_step,
                unit="step",
                file=sys.stdout,
                mininterval=0.5 if sys.stdout.isatty() else 20,
            )
        self.last_time = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self.file and self.bar is not None:
            self.bar.close()
            self.file.close()

    def is_detailed(self) -> bool:
        """Whether this step's line says more than loss, rate and speed."""
        trainer = self.trainer
        steps = trainer.iteration_step - trainer.job.first_step
        is_last = trainer.iteration_step == trainer.config.tokens.train_steps
        return is_last or steps % trainer.job.detail_interval == 0

    def write(self, loss: float, norms: dict[str, float], is_spike: bool) -> None:
        """`loss` in nats a token; `lr` is the rate this step was taken with."""
        trainer, job = self.trainer, self.trainer.job
        now, step_tokens = time.perf_counter(), trainer.global_batch_size * trainer.sequence_length
        seconds, self.last_time = now - self.last_time, now
        steps = trainer.iteration_step - job.first_step
        schedule = trainer.lr_scheduler
        line: dict[str, Any] = {
            "step": trainer.iteration_step,
            "tokens": job.tokens_before + steps * step_tokens,
            "loss": loss,
            "lr": schedule.base_lrs[0] * schedule.lr_lambdas[0](trainer.iteration_step - 1),
            **norms,
            "tokens_per_second": round(step_tokens / seconds, 1),
        }
        if self.is_detailed():
            line["tokens_per_source"] = self.tokens_per_source(steps)
        if is_spike:
            line["spike"] = self._spike(steps)
        assert self.file and self.bar is not None
        self.file.write(json.dumps(line) + "\n")
        self.bar.set_postfix_str(
            f"loss {loss:.3f}, {line['tokens_per_second']:,.0f} tok/s", refresh=False
        )
        self.bar.update()

    def tokens_per_source(self, steps: int) -> dict[str, int]:
        """Tokens of each source up to this step of this stage, earlier stages included."""
        trainer = self.trainer
        total = dict(trainer.job.tokens_per_source_before)
        for name, windows in self.mixture.counts(steps * trainer.global_batch_size).items():
            total[name] = total.get(name, 0) + windows * trainer.sequence_length
        return total

    def _spike(self, steps: int) -> dict[str, Any]:
        """What one wants to know of a batch whose gradient stands out."""
        batch = self.trainer.global_batch_size
        before, after = (self.mixture.counts(n * batch) for n in (steps - 1, steps))
        return {
            "median_grad_norm": self.trainer.spikes.norms.median().item(),
            "windows_per_source": {
                name: after[name] - before[name] for name in after if after[name] > before[name]
            },
            "skipped": self.trainer.job.gradient_spikes.skip_batch,
        }


def main() -> None:
    folder = Path(sys.argv[1])
    try:
        compat.init_distributed()
        SmolLM3Trainer(folder, Job.read(folder)).run()
    except (DataError, Diverged) as error:
        sys.exit(_fail(str(error)))
    except Exception as error:
        if not is_disk_full(error):
            raise
        sys.exit(_fail(f"{folder}: no space left on the device; free some and run it again"))


def is_disk_full(error: BaseException) -> bool:
    """safetensors reports ENOSPC in words only."""
    number = getattr(error, "errno", None)
    return number == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)


def _fail(message: str) -> int:
    """The stage runner shows the line that starts so."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    main()
