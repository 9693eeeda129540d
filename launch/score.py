"""Bits per byte of a stage's checkpoint per category, beside a unigram model's, and one sample."""

import json
from pathlib import Path
from typing import Any

from launch.run_folder import StageRun, cache_root

# A prompt that every category could continue; the sample is printed as it comes.
SAMPLE_PROMPT = "The"
SAMPLE_TOKENS = 64


def score_stage(run: StageRun, tokens_per_source: dict[str, int]) -> dict[str, Any]:
    """{bits_per_byte: {category: {model, unigram, bytes, tokens}}, sample}, all on held-out text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from eval_tasks.bits_per_byte import Score, byte_lengths, score, unigram

    logging.disable_progress_bar()
    hf = str(run.folder / "hf")
    tokenizer = AutoTokenizer.from_pretrained(hf)
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()

    def model_log_p(ids: Any) -> Any:
        with torch.no_grad():
            batch = torch.from_numpy(ids)
            log_p = model(batch, use_cache=False).logits[:, :-1].log_softmax(-1)
            return log_p.gather(-1, batch[:, 1:, None])[..., 0].numpy()

    data = next(taken for taken in run.inputs.values() if taken.engine == "data")
    shards = (data.manifest() or {})["shards"]
    unigram_log_p = unigram(unigram_counts(shards, tokens_per_source, model.config.vocab_size))
    token_bytes = byte_lengths(tokenizer.convert_ids_to_tokens(range(model.config.vocab_size)))
    texts: dict[str, list[str]] = {}
    for line in (data.folder / "held_out.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        texts.setdefault(row["category"], []).append(row["text"])
    length = model.config.max_position_embeddings
    table, total = {}, {"model": Score(0, 0, 0), "unigram": Score(0, 0, 0)}
    for category in sorted(texts):
        ids = tokenizer(texts[category], add_special_tokens=False, verbose=False)["input_ids"]
        scores = {
            "model": score(model_log_p, ids, token_bytes, length),
            "unigram": score(unigram_log_p, ids, token_bytes, length),
        }
        total = {name: total[name] + value for name, value in scores.items()}
        table[category] = _row(scores)
    table["all"] = _row(total)
    return {"bits_per_byte": table, "sample": _sample(model, tokenizer)}


def _row(scores: dict[str, Any]) -> dict[str, float | int]:
    return {name: round(value.bits_per_byte, 4) for name, value in scores.items()} | {
        "bytes": scores["model"].bytes,
        "tokens": scores["model"].tokens,
    }


def unigram_counts(
    shards: dict[str, Any], tokens_per_source: dict[str, int], vocab_size: int
) -> Any:
    """How often each token occurred in what the model has seen [V]: sources at their realised
    shares, so that the baseline knows the mixture and nothing else."""
    import numpy as np

    counts = np.zeros(vocab_size)
    for name, shard in shards.items():
        dtype = np.uint16 if shard["token_bytes"] == 2 else np.uint32
        folder = cache_root() / shard["folder"]
        source = sum(
            np.bincount(np.memmap(file, dtype, "r"), minlength=vocab_size)
            for file in sorted(folder.glob("*.ds"))
        )
        counts += source * (tokens_per_source.get(name, 0) / shard["tokens"])
    return counts


def _sample(model: Any, tokenizer: Any) -> str:
    """One unedited continuation, drawn at temperature 0.8 with a fixed seed."""
    import torch

    torch.manual_seed(0)
    prompt = tokenizer(SAMPLE_PROMPT, return_tensors="pt", add_special_tokens=False)
    room = model.config.max_position_embeddings - prompt["input_ids"].shape[1]
    out = model.generate(
        **prompt, max_new_tokens=min(SAMPLE_TOKENS, room), do_sample=True, temperature=0.8, top_p=0.95,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    text: str = tokenizer.decode(out[0])
    return text


def print_table(run: StageRun, manifest: dict[str, Any]) -> None:
    """The stage's table, for people."""
    from rich.console import Console
    from rich.table import Table

    tokens = manifest["tokens"]
    table = Table(title=f"{run.stage}: bits per byte on held-out text after {tokens:,} tokens")
    for column in ("category", "model", "unigram", "below unigram"):
        table.add_column(column, justify="left" if column == "category" else "right")
    for category, row in manifest["bits_per_byte"].items():
        gain = 1 - row["model"] / row["unigram"]
        table.add_row(category, f"{row['model']:.3f}", f"{row['unigram']:.3f}", f"{gain:.1%}")
    console = Console()
    console.print(table)
    console.print(f"checkpoint: {Path(run.folder / 'hf')}", highlight=False)
