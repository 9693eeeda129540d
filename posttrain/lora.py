"""LoRA: low-rank adapters beside the linears of a frozen model, merged into its weights at the end."""

from pathlib import Path
from typing import Any

from posttrain.job import Lora

CONFIG = "adapter_config.json"


def lora_config(options: Lora) -> Any:
    """peft's configuration of a job's `lora`."""
    from peft import LoraConfig

    return LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # peft only divides it
        lora_dropout=options.dropout,
        target_modules=list(options.targets),
        task_type="CAUSAL_LM",
    )


def whole_model(model: Any) -> Any:
    """The causal language model itself, adapters in its linears, without peft's wrapper around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def merged(adapter: Path, dtype: Any = None) -> Any:
    """The model that an adapter's folder was trained on, with W + alpha / rank * B A for each W.

    The sum is taken in float32 and rounded once, to `dtype` or that of the base.
    """
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # or this one process would wait for the others to share the model
    base = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    whole = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    return whole.to(dtype or AutoConfig.from_pretrained(base).dtype or torch.float32)
