"""What a pretraining stage asks of the trainer: `job.json` in its run folder. No torch here."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from ground.files import read_json_object, write_json

FILE = "job.json"


@dataclass(frozen=True)
class Source:
    """Where a source's tokens are (the `*.ds` files of one folder)."""

    name: str
    folder: Path
    token_bytes: int  # 2 or 4
    drawn_windows: int = 0  # of this window length, by earlier stages


@dataclass(frozen=True)
class SpikeOptions:
    """`window_steps` norms are remembered; before that many no step counts as a spike."""

    window_steps: int = 128
    threshold: float = 10.0  # robust standard deviations above the median
    skip_batch: bool = False


@dataclass(frozen=True)
class FastStep:
    """Parts of the fast step on CUDA (`fast_step.py`), for comparison; a CPU has none."""

    compile_layer: bool = True
    plain_linears: bool = True
    in_place_loss: bool = True
    whole_logits_gib: float = 9.0  # of a micro-batch on one rank; above it, the head goes in chunks
    fused_weight_gradients: bool = True
    attention: str = "auto"  # or a kernel of attention.KERNELS, or sdpa
    deterministic: bool = False  # the same bits when repeated; see compat.fix_order_of_sums


@dataclass(frozen=True, kw_only=True)
class Job:
    """One stage. Steps are counted over stages 1-3, tokens over all stages so far."""

    stage: str
    weights: dict[str, float]  # of the mixture, by source; they need not sum to 1
    sources: list[Source]
    decay_exclude: list[str]  # patterns of parameter names
    gradient_spikes: SpikeOptions = field(default_factory=SpikeOptions)
    fast_step: FastStep = field(default_factory=FastStep)
    data_seed: int
    eos_id: int
    first_step: int  # the stage's own steps are counted from it
    tokens_before: int
    tokens_per_source_before: dict[str, int] = field(default_factory=dict)
    cache: Path
    # Folder and bytes of what shards are read through that are not on this disk.
    node_cache: tuple[Path, int] | None = None
    memory_remedy: str = ""  # what to do where a GPU's memory does not suffice

    def write(self, folder: Path) -> None:
        values = asdict(self) | {"cache": str(self.cache)}
        if self.node_cache:
            values["node_cache"] = [str(self.node_cache[0]), self.node_cache[1]]
        for source in values["sources"]:
            source["folder"] = str(source["folder"])
        write_json(folder / FILE, values)

    @classmethod
    def read(cls, folder: Path) -> "Job":
        """Raises UserError where the file is missing or not JSON."""
        values = read_json_object(folder / FILE)
        sources = [
            Source(**{**source, "folder": Path(source["folder"])}) for source in values["sources"]
        ]
        cache = values["node_cache"]
        typed = {
            "sources": sources,
            "gradient_spikes": SpikeOptions(**values["gradient_spikes"]),
            "fast_step": FastStep(**values["fast_step"]),
            "cache": Path(values["cache"]),
            "node_cache": (Path(cache[0]), cache[1]) if cache else None,
        }
        return cls(**{**values, **typed})
