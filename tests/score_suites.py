"""Child of test_suites: scores a model that knows every answer, or none, on made-up rows.

`write <data>` makes the rows of every dataset that the suites' tasks read; `right|wrong <data>
<model> <results>` scores. In processes of their own, since tasks find their data when imported.
"""

import fnmatch
import os
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from launch.recipe.evaluation import Suite, load_suite

SUITES = ("base", "instruct", "multilingual", "tools")
# One of many languages or subjects is enough where only that differs.
ONLY = {"MMLU CF": ["mmlu_cf:anatomy", "mmlu_cf:virology"]}
LEFT_OUT = ("* [ed-i]*", "* pt", "* ar", "* ru", "mode switch")


def suites() -> dict[str, Suite]:
    """The suites with fewer tasks."""
    shortened = {}
    for name in SUITES:
        suite = load_suite(name)
        rows = [
            replace(row, tasks=tuple(ONLY.get(row.name, row.tasks)))
            for row in suite.rows
            if not any(fnmatch.fnmatchcase(row.name, pattern) for pattern in LEFT_OUT)
        ]
        shortened[name] = replace(suite, rows=tuple(rows))
    return shortened


def configs() -> dict[str, Any]:
    from lighteval.tasks.registry import Registry

    known: dict[str, Any] = Registry.load_all_task_configs(custom_tasks="eval_tasks/smollm3.py")
    return known


def write(data: Path) -> None:
    from hub_rows import write_hub_rows

    from eval_tasks.task_table import expanded, read_tasks

    known, columns = configs(), {}
    for suite in suites().values():
        for row in suite.rows:
            for task in expanded(row.tasks, read_tasks()):
                config = known[task]
                splits = [*config.hf_avail_splits, *config.evaluation_splits]
                columns[config.hf_repo, config.hf_subset] = list(dict.fromkeys(splits))
    write_hub_rows(data, [(*name, splits) for name, splits in columns.items()])


def answer(doc: Any, right: bool) -> str:
    """What a model would write that knows the answer, or none."""
    name = doc.task_name.split("|")[0]
    if not right:
        call = '<tool_call>{"name": "paint.item", "arguments": {"item": -1}}</tool_call>'
        return call if name.startswith("bfcl") else "no"
    if name.startswith("humaneval"):
        return "    return a + b\n"
    if name.startswith("mbpp"):
        return f"def {doc.specific['row']['test_list'][0][7:].split('(')[0]}(a, b):\n    return a + b\n"
    if name.startswith("livecodebench"):
        code = "class Solution:\n    def sum_of_two(self, a, b):\n        return a + b"
        if doc.specific["row"]["fn_name"] is None:
            code = "print(int(input()) + int(input()))"
        return f"So:\n```python\n{code}\n```\n"
    if name == "ifeval":
        return "One item, then another."
    gold = doc.choices[doc.gold_index if isinstance(doc.gold_index, int) else doc.gold_index[0]]
    if name.startswith("global_mmlu_instruct"):  # as the prompt asks: 'Antwort: $BUCHSTABE'
        (word,) = re.findall(r"'(\w+): \$", doc.query)
        return f"{word}: {gold}"
    if name.startswith("gpqa"):
        return f"Answer: {gold}"
    return f"It is $\\boxed{{{gold}}}$." if name.startswith(("aime", "gsm_plus")) else str(gold)


def knowing(model: Any, right: bool) -> Any:
    from lighteval.models.model_output import ModelResponse

    def greedy_until(docs: list[Any]) -> list[Any]:
        return [ModelResponse(text=[answer(doc, right)] * doc.num_samples) for doc in docs]

    def loglikelihood(docs: list[Any]) -> list[Any]:
        found = []
        for doc in docs:
            gold = doc.gold_index if isinstance(doc.gold_index, int) else doc.gold_index[0]
            scores = [0.0 if (at == gold) == right else -99.0 for at in range(len(doc.choices))]
            tokens = [model.tok_encode(choice) for choice in doc.choices]
            found.append(
                ModelResponse(logprobs=scores, output_tokens=tokens, argmax_logits_eq_gold=scores)
            )
        return found

    model.greedy_until, model.loglikelihood = greedy_until, loglikelihood
    return model


def score(right: bool, data: Path, model: str, results: Path) -> None:
    from eval_tasks import backends
    from eval_tasks import suite as engine
    from eval_tasks.job import Job, SuiteRow
    from eval_tasks.tasks import dataset

    for config in configs().values():  # lighteval's own tasks look at the hub alone
        config.hf_repo = dataset(config.hf_repo)
    load = backends.load
    backends.load = lambda name, job: knowing(load(name, job), right)
    for name, suite in suites().items():
        drawn = {key: value for key, value in asdict(suite.generation).items() if value is not None}
        rows = [
            SuiteRow(
                name=row.name, tasks=list(row.tasks), metric=row.metric, shots=row.shots,
                generative=row.generative, chance=row.chance, samples=min(row.samples, 2),
            )
            for row in suite.rows
        ]  # fmt: skip
        job = Job(
            models=[model], rows=rows, results=str(results / f"{name}.json"), limit=8,
            data=str(data), chat=suite.chat, generation=drawn, device="cpu", dtype="float32",
            system_prompt="/no_think" if suite.chat else None,
        )  # fmt: skip
        engine.run(job)


if __name__ == "__main__":
    what, data = sys.argv[1], Path(sys.argv[2])
    if what != "write":
        os.environ["EVAL_DATA"] = str(data)
        os.environ["HF_DATASETS_CACHE"] = str(data / ".cache")
    from eval_tasks import compat

    compat.before_import()
    if what == "write":
        write(data)
    else:
        score(what == "right", data, sys.argv[3], Path(sys.argv[4]))
