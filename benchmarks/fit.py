"""Memory of one GPU, predicted against measured: `python benchmarks/fit.py`.

Where there is no GPU the predictions stand beside the peaks of a prototype of this step on one H100
80GB (torch 2.11, torch's own varlen attention), which are data here and not this code's own.
"""

import math
from dataclasses import dataclass, replace

from launch.machine.memory import memory
from launch.recipe.book import load_recipe
from launch.recipe.pretrain import Nanotron
from launch.recipe.scale import load_scale, scale


@dataclass(frozen=True)
class Shape:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int


SHAPES = {
    "3B": Shape(2048, 11008, 36, 16, 4, 128256),
    "135M": Shape(576, 1536, 30, 9, 3, 49152),
    "360M": Shape(960, 2560, 32, 15, 5, 49152),
    "1.0B": Shape(1792, 6144, 24, 14, 2, 49152),
}


@dataclass(frozen=True)
class Measured:
    """A peak of torch.cuda.max_memory_allocated, in GiB, of one process."""

    shape: str
    windows: int  # of a micro-batch
    window: int  # tokens
    fast: bool
    gibibytes: float
    recompute: bool = False
    most_logits_bytes: float = math.inf  # more are computed in pieces; the prototype did not


# A prototype's, on one H100; the plain step is the plugin as it was before.
PROTOTYPE = (
    Measured("3B", 1, 4096, False, 75.6),
    Measured("3B", 1, 4096, False, 58.3, recompute=True),
    Measured("3B", 1, 4096, True, 66.4),
    Measured("3B", 1, 6144, True, 73.8),
    Measured("3B", 1, 32768, True, 65.1, recompute=True),
    Measured("135M", 16, 2048, False, 41.9),
    Measured("135M", 16, 2048, True, 22.8),
    Measured("135M", 32, 2048, True, 43.2),
    Measured("360M", 16, 2048, False, 64.6),
    Measured("360M", 16, 2048, True, 40.0),
    Measured("1.0B", 4, 4096, False, 59.7),
    Measured("1.0B", 4, 4096, True, 43.8),
)


def layout_of(row: Measured) -> Nanotron:
    """The published recipe with the sizes of a measurement, on one GPU."""
    published = scale(load_recipe("pretrain-stage1"), load_scale("full")).nanotron
    shape = SHAPES[row.shape]
    model = replace(
        published.model.model_config,
        **vars(shape),
        max_position_embeddings=row.window,
        bos_token_id=0,
        eos_token_id=0,
    )
    parallelism = replace(published.parallelism, dp=1, tp=1, recompute_layer=row.recompute)
    tokens = replace(published.tokens, micro_batch_size=row.windows, sequence_length=row.window)
    return replace(
        published,
        model=replace(published.model, model_config=model),
        parallelism=parallelism,
        tokens=tokens,
    )


def predicted(row: Measured) -> float:
    """GiB that torch would say."""
    return memory(layout_of(row), row.fast, row.most_logits_bytes).allocated / 2**30


def main() -> None:
    print(
        f"{'shape':6} {'tokens':>11} {'step':>6} {'recomputed':>10} {'predicted':>9} {'measured':>8}"
    )
    for row in PROTOTYPE:
        step, recomputed = "fast" if row.fast else "plain", "yes" if row.recompute else "no"
        guess = predicted(row)
        print(
            f"{row.shape:6} {row.windows:>2} x {row.window:>6,} {step:>6} {recomputed:>10} "
            f"{guess:9.1f} {row.gibibytes:8.1f}  {guess / row.gibibytes - 1:+.1%}"
        )


if __name__ == "__main__":
    main()
