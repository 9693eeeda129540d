"""What a token costs as the window grows: `python benchmarks/attention.py`.

One training step's forward and backward of the small scale's model on 4,096 tokens, cut into
windows of 256, 2,048 and 4,096, with documents of 300 tokens: attention document by document (the
plugin's SDPA backend) against one dense mask per window. Both are medians of interleaved runs.
Writes benchmarks/attention.json. On a GPU the varlen kernels are timed too.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ground.files import write_json
from launch.machine.here import machine
from nanotron_ext.attention import KERNELS, Documents, choose_backend, documents_of, sdpa
from nanotron_ext.dataloader import borders

TOKENS, HEADS, KV_HEADS, HEAD_DIM, DOCUMENT = 4096, 4, 1, 16, 300
WINDOWS, REPEATS = (256, 2048, 4096), 15


def dense(
    q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, documents: Documents
) -> torch.Tensor:
    """One additive mask over each whole window, as in a padded implementation."""
    window = documents.max_length
    positions = torch.arange(len(q_THD), device=q_THD.device)
    document = torch.bucketize(positions, documents.cu_seqlens[1:-1], right=True).view(-1, window)
    mask = (document[:, :, None] == document[:, None, :]).tril()[:, None]
    groups = q_THD.shape[1] // k_TKD.shape[1]
    q, k, v = (
        x.view(-1, window, *x.shape[1:]).transpose(1, 2)
        for x in (q_THD, k_TKD.repeat_interleave(groups, 1), v_TKD.repeat_interleave(groups, 1))
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).reshape(q_THD.shape)


def seconds(backend: Callable[..., torch.Tensor], window: int, device: torch.device) -> float:
    positions = (np.arange(TOKENS) % window) % DOCUMENT
    documents = documents_of(torch.from_numpy(borders(positions)).to(device), window)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = ((TOKENS, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    q, k, v = (torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes)
    begin = time.perf_counter()
    backend(q, k, v, documents).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backends = {"sdpa, document by document": sdpa, "sdpa, dense mask": dense}
    if device.type == "cuda":
        backends |= {name: k.make() for name, k in KERNELS.items() if not k.why_not()}
    times = {(name, window): [] for name in backends for window in WINDOWS}
    for _ in range(REPEATS):
        for (name, window), found in times.items():
            found.append(seconds(backends[name], window, device))
    rows = [
        {"backend": name, "window": window, "microseconds_per_token": round(cost, 3)}
        for (name, window), found in times.items()
        for cost in [statistics.median(found) / TOKENS * 1e6]
    ]
    report = {**machine(), "device": str(device), "chosen": choose_backend(device)[0], "rows": rows}
    write_json(Path(__file__).with_suffix(".json"), report)
    for row in rows:
        print(
            f"{row['backend']:28} {row['window']:6} {row['microseconds_per_token']:8.3f} us/token"
        )


if __name__ == "__main__":
    main()
