"""A release as an ONNX graph of its logits, which onnxruntime and what stands on it run."""

from pathlib import Path
from typing import Any

INPUTS = ("input_ids", "attention_mask")


def write_onnx(release: Path, file: Path) -> None:
    """Write the graph input_ids, attention_mask [B, S] -> logits [B, S, V], float32, by torch's exporter.

    Without a key-value cache: each further token reads the whole text again, so that it is for scores
    and short answers. Weights above 2 GB lie in `<file>.data` beside it. `file` is written in place: give
    a folder that is renamed.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    # The exporter does not know the fused attention's grouped heads.
    model = AutoModelForCausalLM.from_pretrained(
        release, dtype=torch.float32, attn_implementation="eager"
    )

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits

    example = torch.arange(40).view(2, 20), torch.ones(2, 20, dtype=torch.int64)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    torch.onnx.export(
        Logits().eval(), example, str(file), dynamo=True, dynamic_shapes=(axes, axes),
        input_names=list(INPUTS), output_names=["logits"], external_data=True, verbose=False,
    )  # fmt: skip
