"""Held-out prompts are shared out over real processes, and the figures are those of one."""

import json
from typing import Any

import pytest
from forked import distributed
from posttrain_jobs import chat_rows, pair_rows, tokenizer_with_pad, write_rows
from small_models import random_model

# Run in each process: figures, answers and how many prompts this process answered.
SCORE = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer
from posttrain import scores
from posttrain.apo import completion_log_probs
from posttrain.rows import Lines, pair_tokens

dist.init_process_group("gloo")
root = Path(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(root / "model")
model = AutoModelForCausalLM.from_pretrained(root / "model")
asked, greedy = [], scores.greedy
def counted(model, tokenizer, prompts, limit):
    asked.append(len(prompts))
    return greedy(model, tokenizer, prompts, limit)
scores.greedy = counted
scorer = scores.Scorer(tokenizer, root / "held_out", 9, 12, {})
rows = [row for kind in scores.KINDS for row in scorer.rows[kind]]
pairs = [pair_tokens(tokenizer, row, {}, at) for row, at in Lines(root / "held_out/preference.jsonl").first(9)]
sums = scores.shared_out(pairs, lambda share: list(completion_log_probs(model, share, 0)))
found = {"answers": scorer.generate(model, rows), "asked": sum(asked), "figures": scorer(model),
         "sums": torch.stack(sums).tolist()}
(root / f"{dist.get_world_size()}-{dist.get_rank()}.json").write_text(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each process of one and of two found, by `<processes>-<rank>`."""
    root = tmp_path_factory.mktemp("shares")
    tokenizer = tokenizer_with_pad(short_system=True)
    random_model(tokenizer, seed=0, window=1024, std=0.5).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    rows = chat_rows(15)
    kinds = {"tools": rows[2::3]}
    kinds["think"] = [row for row in rows if row["chat_template_kwargs"]["enable_thinking"]][:4]
    kinds["no_think"] = [row for row in rows if not row["chat_template_kwargs"]["enable_thinking"]]
    for kind, some in kinds.items():
        write_rows(root / f"held_out/{kind}.jsonl", some)
    write_rows(root / "held_out/preference.jsonl", pair_rows(5))
    (root / "score.py").write_text(SCORE)
    for processes in (1, 2):
        done = distributed("posttrain", processes, str(root / "score.py"), str(root))
        assert done.returncode == 0, done.stderr[-3000:]
    return {file.stem: json.loads(file.read_text()) for file in root.glob("?-?.json")}


@pytest.mark.slow
def test_two_processes_find_what_one_does(found: dict[str, Any]) -> None:
    one = found["1-0"]
    assert len(one["answers"]) == one["asked"] == 4 + 7 + 5
    assert len(set(one["answers"])) > 4, "answers that are all alike show nothing"
    for rank in ("2-0", "2-1"):
        assert found[rank]["answers"] == one["answers"]
        assert found[rank]["figures"] == one["figures"]
        for ours, theirs in zip(found[rank]["sums"], one["sums"], strict=True):
            assert ours[0] == pytest.approx(theirs[0], rel=1e-4)
            assert ours[1] == pytest.approx(theirs[1], rel=1e-4)


@pytest.mark.slow
def test_each_process_answers_its_share(found: dict[str, Any]) -> None:
    assert found["2-0"]["asked"] == found["2-1"]["asked"] == 8
