"""A small SmolLM3 that has learned a few conversations by heart: it calls tools, in both modes."""

import json
from pathlib import Path
from typing import Any

import torch
from posttrain_jobs import say
from small_models import TEMPLATE, random_model
from transformers import AutoTokenizer

from datatrove_pipelines.tokenizer import train_bpe
from launch.tools.chat_tools import AS_CODE, AS_JSON
from posttrain.template import configured
from runtimes.for_servers import response_template

QUESTION, ANSWER, RESULT = "What is 17 times 3?", "It is 51.", "51"
THOUGHT, READ = "The tool knows.", "It says 51."
CALL = {"name": "calculate", "arguments": {"expression": "17 * 3"}}
AS_TEXT = f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"
CODE = '<code>\nn = 17\nprint(calculate(f"{n} * 3"))\n</code>'
GREETING, GREETED = "Hello", "Hello to you."
WINDOW = 1024


def traced(thought: str, text: str, thinks: bool) -> str:
    return f"<think>\n{thought}\n</think>\n{text}" if thinks else text


def conversations() -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Messages and the template's variables, in both modes: with tools as JSON, as code, without."""
    ask, result, call = say("user", QUESTION), say("tool", RESULT), {"function": CALL}
    rows: list[tuple[list[dict[str, Any]], dict[str, Any]]] = []
    for thinks in (False, True):
        answer = say("assistant", traced(READ, ANSWER, thinks))
        called = say("assistant", traced(THOUGHT, AS_TEXT, thinks))
        coded = say("assistant", traced(THOUGHT, CODE, thinks))
        greeted = say("assistant", traced("A greeting.", GREETED, thinks))
        json_tools, mode = {"tools": list(AS_JSON)}, {"enable_thinking": thinks}
        rows += [
            ([ask, called, result, answer], json_tools | mode),
            ([ask, coded, result, answer], {"python_tools": list(AS_CODE)} | mode),
            ([say("user", GREETING), greeted], mode),
        ]
        if thinks:  # as a server reads it: a client does not send the trace back
            sent = {"role": "assistant", "content": "", "tool_calls": [call]}
            rows.append(([ask, sent, result, answer], json_tools | mode))
            code = say("assistant", CODE)
            rows.append(([ask, code, result, answer], {"python_tools": list(AS_CODE)} | mode))
    return rows


def write_talking_model(folder: Path, steps: int = 120, head_dim: int = 32) -> Path:
    """Train it, in seconds; a folder as `make release` writes one. vLLM's CPU kernel has heads of 32."""
    texts = [json.dumps(row) for row in conversations()]
    train_bpe(texts, 512, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, eos_token="<|im_end|>")
    tokenizer.chat_template = configured(TEMPLATE, short_system=True)
    model = random_model(
        tokenizer, seed=0, window=WINDOW, std=0.05, hidden_size=64, intermediate_size=128,
        head_dim=head_dim, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    batch = [_tokens(tokenizer, *row) for row in conversations()]
    length = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in batch])
    labels = torch.tensor([row + [-100] * (length - len(row)) for _, row in batch])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.generation_config.update(do_sample=True, top_k=1)  # vLLM samples where nothing is said
    model.save_pretrained(folder)
    tokenizer.response_template = response_template()
    tokenizer.save_pretrained(folder)
    (folder / "checksums.json").unlink()  # of the tokenizer as it was
    return folder


def _tokens(
    tokenizer: Any, messages: list[Any], variables: dict[str, Any]
) -> tuple[list[int], list[int]]:
    """Ids, and labels of what the assistant says: of a call without its trace, none."""
    out = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, **variables
    )
    ids, mask = out["input_ids"], out["assistant_masks"]
    if variables["enable_thinking"] and not messages[1]["content"].startswith("<think>"):
        call_ends = mask.index(0, mask.index(1))
        mask = [0] * call_ends + mask[call_ends:]
    return ids, [token if said else -100 for token, said in zip(ids, mask, strict=True)]
