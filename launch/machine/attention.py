"""Which attention kernel post-training runs: the recipe's where it is installed, else the next best.

`varlen` is the FlashAttention 2 that torch contains: posttrain/attention.py.
"""

from importlib.metadata import PackageNotFoundError, version

# The distributions that transformers 5.23 looks for; two of them share a module.
DISTRIBUTIONS = {
    "flash_attention_2": "flash-attn",
    "flash_attention_3": "flash-attn-3",
    "flash_attention_4": "flash-attn-4",
}
# FlashAttention 4 runs from Hopper on, torch's own kernel from Ampere on.
CAPABILITY_OF_4, CAPABILITY_OF_VARLEN = (9, 0), (8, 0)


def usable_attention(wanted: str) -> str:
    """`wanted`, or where its package is missing FlashAttention 4, varlen or sdpa: what runs here."""
    if wanted not in DISTRIBUTIONS or _is_installed(wanted):
        return wanted
    if _is_installed("flash_attention_4") and _capability() >= CAPABILITY_OF_4:
        return "flash_attention_4"
    return "varlen" if _capability() >= CAPABILITY_OF_VARLEN else "sdpa"


def is_dense(kernel: str) -> bool:
    """Whether the kernel reads a mask of all pairs of tokens, not the documents' lengths."""
    return kernel in ("sdpa", "eager")


def _is_installed(kernel: str) -> bool:
    try:
        version(DISTRIBUTIONS[kernel])
    except PackageNotFoundError:
        return False
    return True


def _capability() -> tuple[int, int]:
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
