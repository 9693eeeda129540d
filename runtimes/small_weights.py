"""A release with 8- or 4-bit matrices for transformers, by bitsandbytes; CPUs and GPUs load it.

8 bits are LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339), 4 bits NF4 (Dettmers et al. 2023,
arXiv:2305.14314). The embedding, which is the head too, and the norms stay as they are.
"""

import shutil
from pathlib import Path

from runtimes.gguf_file import weight_shapes

BITS = {"int8": 8, "int4": 4}
COPIED = ("tokenizer*", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json")
# bitsandbytes' 4-bit kernel for CPUs refuses matrices that are no multiples of these.
ROWS, COLUMNS = 32, 64


def write_small(release: Path, folder: Path, format: str) -> None:
    """Write a transformers folder's weights as `int8` or `int4` into the empty `folder`, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, SmolLM3Config
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = SmolLM3Config.from_pretrained(release)
    kept = {"lm_head"}
    if BITS[format] == 4:
        kept |= _refused(weight_shapes(config))
    quantization = BitsAndBytesConfig(
        load_in_8bit=BITS[format] == 8,
        load_in_4bit=BITS[format] == 4,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=sorted(kept),
    )
    # No forward pass before it is saved: on a CPU that packs 4-bit weights anew, and they would be
    # saved so.
    model = AutoModelForCausalLM.from_pretrained(
        release, dtype="auto", quantization_config=quantization
    )
    model.save_pretrained(folder)
    for file in sorted({file for pattern in COPIED for file in release.glob(pattern)}):
        shutil.copyfile(file, folder / file.name)


def _refused(shapes: dict[str, tuple[int, ...]]) -> set[str]:
    return {
        name.split(".")[-2]
        for name, (rows, *columns) in shapes.items()
        if columns and (rows % ROWS or columns[0] % COLUMNS)
    }
