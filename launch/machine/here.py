"""The machine and versions that a measured figure depends on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIBRARIES = (
    "torch", "nanotron", "datatrove", "tokenizers", "transformers", "trl", "mergekit", "lighteval"
)  # fmt: skip


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "machine": f"{cpu_model()}, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
    }


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
