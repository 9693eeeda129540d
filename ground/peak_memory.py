"""The most memory that the processes of a training held at once, kept in its run folder.

On a GPU what torch has allocated there; on a CPU the process's resident memory, libraries included.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from ground.files import kept_record, write_record

FILE = "machine.json"


def begin() -> None:
    """Count from now: what came before in this process is not the training's."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # Linux: 5 sets VmHWM back
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int | None:
    """Bytes of this process; None where the system does not say."""
    import torch

    if torch.cuda.is_available() and (allocated := torch.cuda.max_memory_allocated()):
        return int(allocated)
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return None


def keep(folder: Path) -> None:
    """Write machine.json: the GPU's name (empty on a CPU), processes, and the peak of the fullest.

    Called in every process. A run that is stopped and goes on keeps the larger peak.
    """
    import torch
    from torch import distributed as dist

    peaks: list[int | None] = [own := peak()]
    if dist.is_initialized():
        peaks = [None] * dist.get_world_size()
        dist.all_gather_object(peaks, own)
        if dist.get_rank():
            return
    on_gpu = torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0
    before = (kept_record(folder / FILE) or {}).get("peak_memory_bytes")
    record = {
        "gpu": torch.cuda.get_device_name() if on_gpu else "",
        "processes": len(peaks),
        "peak_memory_bytes": max((one for one in (*peaks, before) if one), default=None),
    }
    write_record(folder / FILE, record)


def kept(folder: Path) -> dict[str, Any]:
    """For the manifest: `machine`, what `keep` has written; nothing where it has not."""
    record = kept_record(folder / FILE)
    return {} if record is None else {"machine": record}
