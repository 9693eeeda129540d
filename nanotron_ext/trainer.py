"""One pretraining stage on nanotron: `torchrun -m nanotron_ext.trainer <run folder>`.

The run folder holds job.json and nanotron.yaml, written by launch/stages. The stage continues
weights, optimizer, schedule and data position of the checkpoint it resumes.
"""

import math
import shutil
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ground import files, peak_memory, processes
from ground.batch_hash import MODULUS, shown
from ground.checksums import seal_together
from ground.errors import SAVED, UserError, fail, line_of
from ground.host_copy import HostCopy
from ground.storage import NodeCache
from nanotron_ext import compat, fast_step, metrics
from nanotron_ext.config import SmolLM3Config
from nanotron_ext.dataloader import Loader, prefetch
from nanotron_ext.job import Job
from nanotron_ext.metrics import Metrics
from nanotron_ext.mixture import build_mixture
from nanotron_ext.model import SmolLM3ForTraining
from nanotron_ext.optimizer import exclude_from_decay
from nanotron_ext.spikes import SpikeDetector

compat.activate()

from nanotron import distributed as dist  # noqa: E402  (only after activate)
from nanotron import logging  # noqa: E402
from nanotron.logging import log_rank  # noqa: E402
from nanotron.parallel.pipeline_parallel.tensor_pointer import TensorPointer  # noqa: E402
from nanotron.trainer import DistributedTrainer  # noqa: E402

logger = logging.get_logger(__name__)


class SmolLM3Trainer(DistributedTrainer):
    """DistributedTrainer with our model, data, metrics and all-or-nothing checkpoints."""

    def __init__(self, folder: Path, job: Job, device_type: str = compat.device().type):
        """`device_type` is what the fast step is chosen for; a test takes it on a CPU too."""
        self.folder, self.job, self.device_type = folder, job, device_type
        exclude_from_decay(job.decay_exclude)
        if job.fast_step.deterministic:
            compat.fix_order_of_sums()
        super().__init__(
            str(folder / "nanotron.yaml"),
            model_config_class=SmolLM3Config,
            model_class=SmolLM3ForTraining,
        )

    def _init_model(self, *args: Any, **kwargs: Any) -> Any:  # nanotron calls this
        tokens, parallel = self.config.tokens, self.parallel_context
        self.fast_step = fast_step.choose(
            self.job.fast_step,
            fast_step.Setting(
                device_type=self.device_type,
                has_c_compiler=compat.has_c_compiler(),
                tp=parallel.tp_pg.size(),
                pp=parallel.pp_pg.size(),
                accumulates_in_fp32=self.config.optimizer.accumulate_grad_in_fp32,
                logits_bytes=tokens.micro_batch_size
                * tokens.sequence_length
                * (self.model_config.vocab_size // parallel.tp_pg.size())
                * self.config.model.dtype.itemsize,
            ),
        )
        for line in self.fast_step.lines:
            log_rank(line, logger=logger, level=logging.INFO, group=parallel.world_pg, rank=0)
        with compat.without_ddp(self.fast_step.fused_weight_gradients):
            return super()._init_model(*args, **kwargs)

    def post_init(self) -> None:  # nanotron calls this
        fast_step.apply(
            self.unwrapped_model,
            self.fast_step,
            self.grad_accumulator,
            self.n_micro_batches_per_batch,
        )
        compat.realign_lr(self.lr_scheduler, self.start_iteration_step)
        self.is_logger = dist.get_rank(self.parallel_context.world_pg) == self.logger_ranks[0]
        self.unwritten: deque[tuple[int, float, list[str], HostCopy, processes.Agreed]] = deque()
        self.spikes = SpikeDetector(self.job.gradient_spikes, compat.device())
        if self.start_iteration_step > self.job.first_step:
            self.spikes.restore(self.folder / metrics.FILE)
        compat.watch_gradient_norm(self._watch_gradient_norm)

    def _watch_gradient_norm(self, norm: torch.Tensor) -> None:
        self.is_spike = self.spikes(norm)
        if self.job.gradient_spikes.skip_batch:
            # All ranks or none: norms that differ by an ulp must not make weights differ.
            flag = self.is_spike.float()
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.parallel_context.world_pg)
            compat.skip_step_if(self.optimizer, flag)

    def run(self) -> None:
        """Train from the checkpoint's step to tokens.train_steps, then save."""
        self.mixture = build_mixture(self.job.weights, self.job.cache)
        sources = len(self.mixture.names)
        self.delivered = torch.zeros(sources, dtype=torch.int64)  # on the host, as it is counted
        done = self.start_iteration_step - self.job.first_step
        loader = Loader(
            self.mixture,
            self.job.sources,
            sequence_length=self.sequence_length,
            micro_batch_size=self.micro_batch_size,
            dp_rank=dist.get_rank(self.parallel_context.dp_pg),
            dp_size=self.parallel_context.dp_pg.size(),
            first_sample=done * self.global_batch_size,
            seed=self.job.data_seed,
            eos_id=self.job.eos_id,
            vocab_size=self.model_config.vocab_size,
            masks_documents=self.model_config.use_doc_masking,
            node_cache=NodeCache(*self.job.node_cache) if self.job.node_cache else None,
        )
        self.metrics = Metrics(
            self.folder,
            self.job,
            self.mixture,
            global_batch_size=self.global_batch_size,
            sequence_length=self.sequence_length,
            last_step=self.config.tokens.train_steps,
        )
        self.agreement, self.is_stopping = processes.Agreement(compat.device()), False
        is_stopped, start = False, self.start_iteration_step
        with processes.until_saved():
            with self.metrics.opened(start) if self.is_logger else nullcontext():
                try:
                    self.train(self._batches(loader))
                except processes.Stopped:  # in all processes, before the same step
                    is_stopped = True
                self._write_logs()
            self._check_delivery(done)
            self._save_last(is_stopped)
        if is_stopped:
            raise processes.Stopped

    def training_step(self, dataloader: Iterator[Any]) -> Any:  # nanotron calls this
        if self.is_stopping:
            self.iteration_step -= 1
            raise processes.Stopped
        self.batch_hash = 0
        result = super().training_step(dataloader)
        # Ranks that share a replica have read the same windows.
        parallel = self.parallel_context
        is_first = dist.get_rank(parallel.tp_pg) == dist.get_rank(parallel.pp_pg) == 0
        self.is_stopping = self.agreement(self.batch_hash % MODULUS if is_first else 0)
        return result

    def _save_last(self, is_stopped: bool) -> None:
        """Save where the loop has not: at the stage's end, or after the step of a signal."""
        step, saved = self.iteration_step, self.start_iteration_step
        if step > saved and step % self.config.checkpoints.checkpoint_interval:
            if is_stopped and dist.get_rank() == 0:
                files.note_stopped(self.config.checkpoints.checkpoints_path, step)
            self.save_checkpoint()
        peak_memory.keep(self.folder)

    def _batches(self, loader: Loader) -> Iterator[dict[str, torch.Tensor | TensorPointer]]:
        """Micro-batches in nanotron's form: a pipeline rank gets only what it uses."""
        rank = dist.get_rank(self.parallel_context.pp_pg)
        first, last = self.unwrapped_model.input_pp_rank, self.unwrapped_model.output_pp_rank
        owners = {"input_ids": first, "label_ids": last, "label_mask": last}
        owners |= {"position_ids": rank, "cu_seqlens": rank}  # attention is on every rank
        for batch in prefetch(iter(loader)):
            assert batch.sources is not None and batch.hashes is not None
            self.batch_hash += sum(batch.hashes.tolist())
            self.delivered += torch.bincount(batch.sources, minlength=len(self.delivered))
            yield {
                name: compat.to_device(getattr(batch, name))
                if rank == owner
                else TensorPointer(group_rank=owner)
                for name, owner in owners.items()
            }

    def _check_delivery(self, done: int) -> None:
        """Check that what the loaders delivered equals the sampler's closed form."""
        delivered = compat.to_device(self.delivered)
        dist.all_reduce(delivered, group=self.parallel_context.dp_pg)
        total = (self.iteration_step - self.job.first_step) * self.global_batch_size
        before = self.mixture.counts(done * self.global_batch_size)
        expected = [count - before[name] for name, count in self.mixture.counts(total).items()]
        if delivered.tolist() != expected:
            raise RuntimeError(
                f"the loaders delivered {delivered.tolist()} windows of each source, the "
                f"sampler says {expected}"
            )

    def train_step_logs(  # nanotron calls this
        self, outputs: Iterable[dict[str, Any]], loss_avg: torch.Tensor | None
    ) -> None:
        step, schedule = self.iteration_step, self.lr_scheduler
        norms = self._norms() if self.metrics.is_detailed(step) else {}
        if not self.is_logger or loss_avg is None:
            return
        spike = {"is_spike": self.is_spike, "spike_median": self.spikes.norms.median()}
        values = {"loss": loss_avg, "grad_norm": self.grad_norm_unclipped, **norms, **spike}
        copy = HostCopy(torch.stack([value.double() for value in values.values()]))
        lr = schedule.base_lrs[0] * schedule.lr_lambdas[0](step - 1)
        self.unwritten.append((step, lr, list(values), copy, self.agreement.last))
        self._write_logs(compat.steps_ahead())

    def _write_logs(self, but: int = 0) -> None:
        """Write the lines of all steps but the last `but`; raises where a run is lost."""
        while len(self.unwritten) > but:
            step, lr, names, copy, agreed = self.unwritten.popleft()
            values = dict(zip(names, copy.read(), strict=True))
            is_spike, median = values.pop("is_spike"), values.pop("spike_median")
            loss, norm = values.pop("loss"), values["grad_norm"]
            spike = median if is_spike else None
            self.metrics.write(step, loss, lr, values, shown(agreed.total()), spike_median=spike)
            if not (math.isfinite(loss + norm) or self.job.gradient_spikes.skip_batch):
                raise UserError(
                    f"step {step}: loss {loss}, gradient norm {norm}: the weights are lost since "
                    "the last checkpoint; lower the learning rate, or set "
                    "nanotron.optimizer.gradient_spikes.skip_batch to true"
                )

    def _norms(self) -> dict[str, torch.Tensor]:
        """`embedding_norm`: mean L2 norm of the embedding's rows, on the ranks that have the head.

        The blog says that it becomes stable although it is not decayed.
        """
        model, is_tied = self.unwrapped_model, self.model_config.tie_word_embeddings
        pp_pg = self.parallel_context.pp_pg
        if dist.get_rank(pp_pg) != model.output_pp_rank or not (is_tied or pp_pg.size() == 1):
            return {}
        # A tied head is the embedding, on the pipeline rank that computes the loss.
        if is_tied:
            block = model.model.lm_head.pp_block
        else:
            block = model.model.token_position_embeddings.pp_block.token_embedding
        rows = block.weight.detach().float().norm(dim=1).sum()
        dist.all_reduce(rows, group=self.parallel_context.tp_pg)
        return {"embedding_norm": rows.double() / self.model_config.vocab_size}

    def save_checkpoint(self) -> Path:
        """Written aside, then renamed: a folder named by a step is whole, even after a kill.

        The lines of its steps are written first: none is missing after a resume, and weights that
        are lost are not saved.
        """
        self._write_logs()
        writes = dist.get_rank() == 0  # all nodes share the folder: the adapter sets that option
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
        if self.is_logger:
            self.metrics.keep(aside / whole.name)
        dist.barrier()
        seal_together(aside / whole.name, dist.get_rank(), dist.get_world_size(), dist.barrier)
        if writes:
            files.replace_folder(aside / whole.name, whole)
            shutil.rmtree(aside, ignore_errors=True)
            files.drop_stopped(root, self.iteration_step)
        dist.barrier()
        return whole


def train(folder: Path, rendezvous: str | None = None) -> int:
    """Train a run folder's job in one of its processes; returns the exit status.

    `rendezvous` is a URL of torch.distributed; None: torchrun's environment says where.
    """
    remedy = ""
    try:
        compat.init_distributed(rendezvous)
        job = Job.read(folder)
        remedy = job.memory_remedy
        peak_memory.begin()
        SmolLM3Trainer(folder, job).run()
    except BaseException as error:
        if processes.is_stop(error):
            return SAVED
        if (line := line_of(error, remedy)) is None:
            raise
        return fail(line, getattr(error, "status", 2))
    return 0


if __name__ == "__main__":
    processes.begin()
    sys.exit(train(Path(sys.argv[1])))
