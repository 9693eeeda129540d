"""A GGUF file in 4 bits, by llama.cpp's own quantiser: `python -m runtimes.quantise FROM TO TYPE`.

In a process of its own: llama.cpp writes to stdout and stops its process on an error.
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from ground.errors import UserError
from ground.files import written_aside
from runtimes.gguf_file import read_config, write_gguf

TYPES = {"q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M"}


def write_quantised(release: Path, target: Path, type: str, name: str = "SmolLM3") -> None:
    """Write a transformers folder as a GGUF file of one of TYPES.

    A file of the release's own dtype is written beside it first. Matrices whose rows are no multiple
    of 256 values get more bits, as llama.cpp decides. Raises UserError where that fails.
    """
    is_bf16 = str(read_config(release).dtype) == "torch.bfloat16"
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        TemporaryDirectory(dir=target.parent, prefix=".") as folder,
        written_aside(target) as aside,
    ):
        whole = Path(folder) / "whole.gguf"
        write_gguf(release, whole, "bf16" if is_bf16 else "f32", name)
        command = [sys.executable, "-m", "runtimes.quantise", str(whole), str(aside), TYPES[type]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(
                f"{target}: llama.cpp's quantiser failed with {done.returncode}: {said}"
            )


def main() -> int:
    """0 where llama.cpp wrote the file."""
    import llama_cpp

    source, target, type = sys.argv[1:]
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, type)
    parameters.nthread = 0  # as many as there are cores
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), parameters))


if __name__ == "__main__":
    sys.exit(main())
