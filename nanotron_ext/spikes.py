"""Gradient spikes: a norm far above the recent ones, detected without waiting for the GPU.

A step is a spike when its gradient norm exceeds the median of the last `window_steps` norms by more
than `threshold` robust standard deviations (1.4826 times the median absolute deviation, which
equals sigma for normal data), or is not finite. Earlier spikes within the window hardly move a
median, so they do not hide the next one. The answer stays a tensor on the device: it is read
together with the loss when a metrics line is written, and skips a step inside the fused AdamW
kernel.

The only state is the last norms, which are in metrics.jsonl: a resumed run reads them from there.
"""

import json
from collections import deque
from pathlib import Path

import torch

from nanotron_ext.job import SpikeOptions

# Median absolute deviation to standard deviation, for normal data.
SIGMA_PER_DEVIATION = 1.4826


class SpikeDetector:
    def __init__(self, options: SpikeOptions, device: torch.device):
        self.options = options
        self.norms = torch.zeros(options.window_steps, device=device)
        self.seen = 0

    def restore(self, metrics: Path) -> None:
        """Remember the last norms of a resumed run, from its metrics.jsonl (may be absent)."""
        if metrics.exists():
            with metrics.open() as lines:
                for line in deque(lines, self.options.window_steps):
                    self._remember(self.norms.new_tensor(json.loads(line)["grad_norm"]))

    def _remember(self, norm: torch.Tensor) -> None:
        self.norms[self.seen % len(self.norms)] = norm.nan_to_num(nan=torch.inf, posinf=torch.inf)
        self.seen += 1

    def __call__(self, norm: torch.Tensor) -> torch.Tensor:
        """Whether the step with this gradient norm (fp32, 0-d) is a spike: bool, 0-d, on device."""
        is_spike = ~torch.isfinite(norm)
        if self.seen >= len(self.norms):
            is_spike |= norm > self.limit()
        self._remember(norm)
        return is_spike

    def limit(self) -> torch.Tensor:
        """The largest norm that is not a spike, fp32, 0-d."""
        median = self.norms.median()
        deviation = (self.norms - median).abs().median()
        return median + self.options.threshold * SIGMA_PER_DEVIATION * deviation
