"""Scores of a stage's checkpoint on held-out text: bits per byte, a sample, and long context."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ground.chat import text_ids
from ground.errors import UserError
from ground.files import read_json_object
from launch.report.terminal import needles_by_length, print_table_of
from launch.run.folder import cache_root, node_cache
from launch.run.model import encoder, load_checkpoint

if TYPE_CHECKING:
    from launch.stages.pretrain import PretrainStage

# A prompt that every category could continue; the sample is printed unedited.
SAMPLE_PROMPT = "The"
SAMPLE_TOKENS = 64
NEEDLE_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Tokens that the head reads at a time: the logits of a long window are the largest thing in memory,
# and memory that is new for each batch takes longer to get than to fill.
HEAD_TOKENS = 256


@dataclass(frozen=True)
class Scorer:
    """A transformers checkpoint and the held-out text {category: token ids of its documents}."""

    model: Any
    tokenizer: Any
    documents: dict[str, list[list[int]]]

    @classmethod
    def of(cls, run: "PretrainStage", config: dict[str, Any] | None = None) -> "Scorer":
        """The stage's checkpoint; `config` (as in config.json) replaces its own."""
        import torch
        from transformers import AutoConfig

        read_as = AutoConfig.for_model(**config) if config else None
        model, tokenizer = load_checkpoint(run.folder / "hf", read_as, torch.float32)
        return cls(model, tokenizer, _held_out(run, tokenizer))

    @property
    def window(self) -> int:
        length: int = self.model.config.max_position_embeddings
        return length

    @property
    def token_bytes(self) -> Any:
        from eval_tasks.bits_per_byte import byte_lengths

        return byte_lengths(self.tokenizer.convert_ids_to_tokens(range(self.model.vocab_size)))

    def log_p(self, ids: Any) -> Any:
        """Log p of each id [B, S] given the ones before it, nats [B, S-1]."""
        import torch

        with torch.no_grad():
            batch = torch.from_numpy(ids).to(self.model.device)
            hidden = self.model.base_model(batch, use_cache=False).last_hidden_state
            pairs = zip(
                hidden[:, :-1].flatten(0, 1).split(HEAD_TOKENS),
                batch[:, 1:].flatten().split(HEAD_TOKENS),
                strict=True,
            )
            log_p = [
                self.model.lm_head(h).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
                for h, labels in pairs
            ]
            return torch.cat(log_p).view(len(batch), -1).cpu().numpy()

    def first_positions(self, length: int) -> float:
        """Bits per byte of each document's first `length` tokens."""
        from eval_tasks.bits_per_byte import score

        heads = [ids[:length] for group in self.documents.values() for ids in group]
        return score(self.log_p, heads, self.token_bytes, length).bits_per_byte


def _held_out(run: "PretrainStage", tokenizer: Any) -> dict[str, list[list[int]]]:
    return {name: text_ids(tokenizer, texts) for name, texts in run.held_out.texts().items()}


def score_stage(
    run: "PretrainStage", scorer: Scorer, tokens_per_source: dict[str, int]
) -> dict[str, Any]:
    """{bits_per_byte: {category: {model, unigram, bytes, tokens}}, sample}, all on held-out text."""
    return {
        "bits_per_byte": _bits_per_byte(run, scorer, tokens_per_source),
        "sample": _sample(scorer.model, scorer.tokenizer),
    }


def _bits_per_byte(
    run: "PretrainStage", scorer: Scorer, tokens_per_source: dict[str, int]
) -> dict[str, dict[str, float | int]]:
    from eval_tasks.bits_per_byte import Score, score, unigram

    counts = unigram_counts(run.data.shards, tokens_per_source, scorer.model.vocab_size)
    of = {"model": scorer.log_p, "unigram": unigram(counts)}
    token_bytes = scorer.token_bytes
    table, total = {}, {name: Score(0, 0, 0) for name in of}
    for category, ids in scorer.documents.items():
        scores = {name: score(log_p, ids, token_bytes, scorer.window) for name, log_p in of.items()}
        total = {name: total[name] + value for name, value in scores.items()}
        table[category] = _row(scores)
    return table | {"all": _row(total)}


def _row(scores: dict[str, Any]) -> dict[str, float | int]:
    return {name: round(value.bits_per_byte, 4) for name, value in scores.items()} | {
        "bytes": scores["model"].bytes,
        "tokens": scores["model"].tokens,
    }


def unigram_counts(
    shards: dict[str, Any], tokens_per_source: dict[str, int], vocab_size: int
) -> Any:
    """How often each token occurred in what the model has seen [V]: sources at their realised
    shares, so that the baseline knows only the mixture."""
    import numpy as np

    from datatrove_pipelines.shards import token_counts
    from ground.storage import Block, NodeCache, open_shards

    counts, cache = np.zeros(vocab_size), NodeCache(*node_cache())
    for name, shard in shards.items():
        parts = open_shards(cache_root() / shard["folder"], shard["token_bytes"], cache)
        # Of shards that are not on this disk, a block says enough.
        here = [part for part in parts if not isinstance(part, Block)] or parts[:1]
        source = sum(token_counts(part, vocab_size) for part in here)
        counts += source * (tokens_per_source.get(name, 0) / source.sum())
    return counts


def _sample(model: Any, tokenizer: Any) -> str:
    """One unedited continuation, drawn at temperature 0.8 with a fixed seed."""
    import torch

    torch.manual_seed(0)
    prompt = tokenizer(SAMPLE_PROMPT, return_tensors="pt", add_special_tokens=False)
    room = model.config.max_position_embeddings - prompt["input_ids"].shape[1]
    out = model.generate(
        **prompt.to(model.device), max_new_tokens=min(SAMPLE_TOKENS, room), do_sample=True,
        temperature=0.8, top_p=0.95, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    text: str = tokenizer.decode(out[0])
    return text


def score_long_context(
    run: "PretrainStage", scorer: Scorer, first_window: int, per_cell: int = 2
) -> dict[str, Any]:
    """{needle, yarn}: needles from `first_window` to the stage's own, and what YaRN costs a short text.

    `yarn` gives the bits per byte of each document's first `first_window` tokens, as trained and
    read with the frequencies of twice the window.
    """
    from nanotron_ext.rope import yarn_config

    lengths = [first_window]
    while lengths[-1] * 2 <= scorer.window:
        lengths.append(lengths[-1] * 2)
    config = yarn_config(read_json_object(run.folder / "hf" / "config.json"))
    return {
        "needle": needle_table(scorer, lengths, per_cell),
        "yarn": {
            "first_tokens": first_window,
            "factor": config["rope_parameters"]["factor"],
            "as_trained": round(scorer.first_positions(first_window), 4),
            "with_yarn": round(Scorer.of(run, config).first_positions(first_window), 4),
        },
    }


def needle_table(scorer: Scorer, lengths: Sequence[int], per_cell: int) -> list[dict[str, Any]]:
    """Rows {length, depth, hits, of, chance} of needles in the held-out text.

    Lengths that the text or the tokenizer has no room for are left out, and a line says so.
    """
    from eval_tasks.likelihood import choice_log_likelihoods
    from eval_tasks.long_context import accuracy, needles

    text = "\n".join(
        scorer.tokenizer.decode(ids) for group in scorer.documents.values() for ids in group
    )

    encode, fitting = encoder(scorer.tokenizer), list[int]()
    for length in lengths:
        try:
            list(needles(encode, text, [length], NEEDLE_DEPTHS, 1))
            fitting.append(length)
        except UserError as error:
            print(f"needles left out: {error}", flush=True)
    if not fitting:
        return []
    found = list(needles(encode, text, fitting, NEEDLE_DEPTHS, per_cell))
    shares = accuracy(
        found, lambda needle: choice_log_likelihoods(scorer.model, needle.context, needle.choices)
    )
    chance = 1 / len(found[0].choices)
    return [
        {"length": length, "depth": depth, "hits": round(share * per_cell), "of": per_cell,
         "chance": chance}
        for (length, depth), share in shares.items()
    ]  # fmt: skip


def print_table(run: "PretrainStage", manifest: dict[str, Any]) -> None:
    """The stage's table, for people."""
    tokens = manifest["tokens"]
    rows = []
    for category, row in manifest["bits_per_byte"].items():
        gain = 1 - row["model"] / row["unigram"]
        rows.append([category, f"{row['model']:.3f}", f"{row['unigram']:.3f}", f"{gain:.1%}"])
    lines = []
    if "yarn" in manifest:
        yarn = manifest["yarn"]
        lines = [
            needles_by_length(manifest["needle"]),
            f"YaRN, factor {yarn['factor']:g}: {yarn['with_yarn']:.3f} bits per byte on the first "
            f"{yarn['first_tokens']} tokens of each document, {yarn['as_trained']:.3f} without",
        ]
    title = f"{run.stage}: held-out bits per byte after {tokens:,} tokens"
    columns = ("category", "model", "unigram", "below unigram")
    print_table_of(columns, rows, title, [*lines, f"checkpoint: {run.folder / 'hf'}"])
