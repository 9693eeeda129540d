"""metrics.jsonl of a pretraining stage: one line per step, and the progress bar."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ground.files import write_text
from nanotron_ext.job import Job
from nanotron_ext.mixture import Mixture

FILE = "metrics.jsonl"
DETAIL_INTERVAL = 10  # steps


@dataclass
class Metrics:
    """Steps are those of nanotron: counted over stages 1-3, from 1."""

    folder: Path
    job: Job
    mixture: Mixture
    global_batch_size: int  # windows per step
    sequence_length: int  # tokens per window
    last_step: int
    unsaved: list[str] = field(default_factory=list)  # lines since the last checkpoint

    @contextmanager
    def opened(self, start_step: int) -> Iterator[None]:
        """Append lines after `start_step` while the context lasts; for one rank only."""
        from tqdm import tqdm

        bar = tqdm(
            desc=self.job.stage,
            initial=start_step - self.job.first_step,
            total=self.last_step - self.job.first_step,
            unit="step",
            file=sys.stdout,
            mininterval=0.5 if sys.stdout.isatty() else 20,
        )
        with (self.folder / FILE).open("a", buffering=1) as self.file, bar as self.bar:
            self.last_time = time.perf_counter()
            yield

    def keep(self, checkpoint: Path) -> None:
        """Copy the lines since the checkpoint before into this one, from which they can be mended."""
        write_text(checkpoint / FILE, "".join(self.unsaved))
        self.unsaved.clear()

    def is_detailed(self, step: int) -> bool:
        """Whether this step's line says more than loss, rate and speed."""
        return step == self.last_step or (step - self.job.first_step) % DETAIL_INTERVAL == 0

    def write(
        self,
        step: int,
        loss: float,
        lr: float,
        norms: dict[str, float],
        batch_hash: str,
        spike_median: float | None,
    ) -> None:
        """`loss` in nats per token; `lr` is the rate that this step used; `batch_hash` of all its
        windows, whatever the layout (ground/batch_hash.py).

        `spike_median` is the median of the gradient norms at a spike, None where there is none.
        """
        now, step_tokens = time.perf_counter(), self.global_batch_size * self.sequence_length
        seconds, self.last_time = now - self.last_time, now
        speed = round(step_tokens / seconds, 1)
        line: dict[str, Any] = {
            "step": step,
            "tokens": self.job.tokens_before + (step - self.job.first_step) * step_tokens,
            "loss": loss,
            "lr": lr,
            **norms,
            "tokens_per_second": speed,
            "batch_hash": batch_hash,
        }
        if self.is_detailed(step):
            line["tokens_per_source"] = self.tokens_per_source(step)
        if spike_median is not None:
            line["spike"] = {
                "median_grad_norm": spike_median,
                "windows_per_source": self._windows_of(step),
                "skipped": self.job.gradient_spikes.skip_batch,
            }
        self.unsaved.append(json.dumps(line) + "\n")
        self.file.write(self.unsaved[-1])
        self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tok/s", refresh=False)
        self.bar.update()

    def tokens_per_source(self, step: int) -> dict[str, int]:
        """Tokens of each source up to this step of this stage, earlier stages included."""
        total = dict(self.job.tokens_per_source_before)
        for name, windows in self._windows_until(step).items():
            total[name] = total.get(name, 0) + windows * self.sequence_length
        return total

    def _windows_of(self, step: int) -> dict[str, int]:
        """Windows of each source that is in this step's batch."""
        before, after = self._windows_until(step - 1), self._windows_until(step)
        return {name: after[name] - before[name] for name in after if after[name] > before[name]}

    def _windows_until(self, step: int) -> dict[str, int]:
        return self.mixture.counts((step - self.job.first_step) * self.global_batch_size)
