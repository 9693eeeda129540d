"""Alarms of a training run, from the lines of its metrics.jsonl and a clock.

throughput  each of the last lines is below half of the median speed
spike       the loss is far above the recent ones, or the gradient norm was (nanotron_ext/spikes.py)
stall       no step for many times a step's time

Each is raised once, and again only after the run has been as before.
"""

from collections import deque
from dataclasses import dataclass, field
from math import isfinite
from statistics import median
from typing import Any

# Median absolute deviation to standard deviation, for normal data.
SIGMA_PER_DEVIATION = 1.4826


@dataclass(frozen=True)
class Limits:
    """A median over fewer than `least_lines` says nothing; over `window` it follows the run."""

    window: int = 100  # lines
    least_lines: int = 20
    slow_lines: int = 5  # in a row: a checkpoint that is saved is one slow line
    slow_share: float = 0.5  # of the median speed
    recovered_share: float = 0.75
    loss_sigmas: float = 10.0  # robust standard deviations above the median, as for gradient norms
    loss_share: float = 0.1  # of the median: where losses hardly differ, sigmas are nothing
    stall_steps: float = 20.0  # median step times
    # A 3B's checkpoint, written to a network's disk, takes a minute; a collective gives up after ten.
    stall_seconds: float = 120.0


LIMITS = Limits()


@dataclass(frozen=True)
class Alarm:
    kind: str  # throughput | spike | stall
    step: int
    text: str


@dataclass
class Alarms:
    """`see` each line in the order of the steps, and ask `late` meanwhile."""

    limits: Limits = field(default_factory=lambda: LIMITS)
    last: dict[str, Any] = field(default_factory=dict)  # line
    raised: set[str] = field(default_factory=set)
    seen_at: float | None = None  # of the last line, by the caller's clock; None: nothing runs yet

    def __post_init__(self) -> None:
        size = self.limits.window
        self.speeds, self.losses = deque[float](maxlen=size), deque[float](maxlen=size)
        self.seconds = deque[float](maxlen=size)  # from one step to the next

    def remember(self, line: dict[str, Any]) -> None:
        """A line of the run before it was stopped."""
        speed, tokens = float(line.get("tokens_per_second") or 0), line.get("tokens", 0)
        steps = line["step"] - self.last.get("step", line["step"])
        if steps > 0 and speed > 0:
            self.seconds.append((tokens - self.last.get("tokens", 0)) / speed / steps)
        if speed > 0:
            self.speeds.append(speed)
        if isfinite(loss := float(line["loss"])):
            self.losses.append(loss)
        self.last = line

    def see(self, line: dict[str, Any], now: float) -> list[Alarm]:
        """The alarms of a new line; `now` in seconds of any clock. A step seen before is left out."""
        if line["step"] <= self.last.get("step", 0):
            return []
        limit, usual = self._loss_limit(), self._usual_speed()
        self.remember(line)
        self.seen_at = now
        self.raised.discard("stall")
        return [*self._spike(line, limit), *self._throughput(line, usual)]

    def late(self, now: float) -> Alarm | None:
        """A stall, where there is one."""
        if self.seen_at is None or len(self.seconds) < 2 or "stall" in self.raised:
            return None
        step, silence = median(self.seconds), now - self.seen_at
        if silence <= max(self.limits.stall_seconds, self.limits.stall_steps * step):
            return None
        self.raised.add("stall")
        text = f"no step for {silence:.0f} s after {self.last['step']:,}; one takes {step:.3g} s"
        return Alarm("stall", self.last["step"], text)

    def _enough(self, values: deque[float]) -> bool:
        return len(values) >= self.limits.least_lines

    def _usual_speed(self) -> float:
        return median(self.speeds) if self._enough(self.speeds) else 0.0

    def _loss_limit(self) -> float:
        if not self._enough(self.losses):
            return float("inf")
        middle = median(self.losses)
        sigma = SIGMA_PER_DEVIATION * median(abs(loss - middle) for loss in self.losses)
        return middle + max(self.limits.loss_sigmas * sigma, self.limits.loss_share * abs(middle))

    def _spike(self, line: dict[str, Any], limit: float) -> list[Alarm]:
        loss, found = float(line["loss"]), line.get("spike")
        if found:
            text = f"gradient norm {line['grad_norm']:.3g}, median {found['median_grad_norm']:.3g}"
            return [Alarm("spike", line["step"], f"{text}; loss {loss:.3f}")]
        is_high, was_high = not loss <= limit, "spike" in self.raised
        (self.raised.add if is_high else self.raised.discard)("spike")
        if not is_high or was_high:
            return []
        middle = f"median {median(self.losses):.3f}" if self.losses else "the first one"
        return [Alarm("spike", line["step"], f"loss {loss:.3f}, {middle}")]

    def _throughput(self, line: dict[str, Any], usual: float) -> list[Alarm]:
        recent = list(self.speeds)[-self.limits.slow_lines :]
        if min(recent, default=0) >= self.limits.recovered_share * usual:
            self.raised.discard("throughput")
        if (
            "throughput" in self.raised
            or not max(recent, default=0) < self.limits.slow_share * usual
        ):
            return []
        self.raised.add("throughput")
        text = f"{median(recent):,.0f} tokens/s over {len(recent)} lines, median {usual:,.0f}"
        return [Alarm("throughput", line["step"], text)]
