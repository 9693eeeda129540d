"""A release with 8- or 4-bit matrices for transformers, by bitsandbytes; CPUs and GPUs load it.

8 bits are LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339), 4 bits NF4 (Dettmers et al. 2023,
arXiv:2305.14314). The embedding, which is the head too, and the norms stay as they are.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BITS = {"int8": 8, "int4": 4}
COPIED = ("tokenizer*", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json")
ROWS = 32  # a 4-bit matrix of another number of rows is refused by bitsandbytes' kernel for CPUs


def write_small(release: Path, folder: Path, format: str) -> None:
    """Write a transformers folder's weights as `int8` or `int4` into the empty `folder`, with its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(release)
    kept = ["lm_head"]
    if BITS[format] == 4 and _kv_rows(config) % ROWS:
        kept += ["k_proj", "v_proj"]
    quantization = BitsAndBytesConfig(
        load_in_8bit=BITS[format] == 8,
        load_in_4bit=BITS[format] == 4,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=kept,
    )
    # No forward pass before it is saved: on a CPU that packs 4-bit weights anew, and they would be
    # saved so.
    model = AutoModelForCausalLM.from_pretrained(
        release, dtype="auto", quantization_config=quantization
    )
    model.save_pretrained(folder)
    for file in sorted({file for pattern in COPIED for file in release.glob(pattern)}):
        shutil.copyfile(file, folder / file.name)


def _kv_rows(config: "PreTrainedConfig") -> int:
    heads: int = config.num_key_value_heads
    return heads * config.hidden_size // config.num_attention_heads
