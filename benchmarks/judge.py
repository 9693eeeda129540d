"""`make eval-judge`: the local suite's choices by other judges than ours, item by item.

lighteval scores them as `make eval` does; lm-evaluation-harness gets the same prompts and choices as a
task of its own, and tokenises, batches, runs and normalises by itself; with `--endpoint` a server of
the same model is a third. SmolLM2-135M-Instruct from a package, or a folder, in float32.

    python benchmarks/judge.py [--items 34] [--model FOLDER] [--endpoint http://127.0.0.1:8000] [--out FILE]
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from ground.errors import UserError, fail  # noqa: E402
from ground.files import write_json  # noqa: E402
from ground.loopback import never_proxied  # noqa: E402

OUT = ROOT / "benchmarks" / "judge.json"
OURS, HARNESS, SERVER = "lighteval", "lm-evaluation-harness", "endpoint"


@dataclass(frozen=True)
class Verdict:
    """A judge's scores of an item, 0 or 1, and the log-likelihoods of its choices."""

    acc: float
    acc_norm: float
    choices: list[float]


def questions(tasks: Sequence[str], items: int) -> dict[str, list[Any]]:
    """{task: lighteval's documents}, the first `items` of each in lighteval's order."""
    from lighteval.tasks.registry import Registry

    found = {}
    for name in tasks:
        registry = Registry(tasks=f"{name}|0", custom_tasks=str(ROOT / "eval_tasks/smollm3.py"))
        (task,) = registry.load_tasks().values()
        task.dataset = task.download_dataset_worker(task)
        found[name] = task.get_docs(items)
    return found


def by_lighteval(model: Any, docs: Sequence[Any]) -> list[Verdict]:
    from lighteval.metrics.dynamic_metrics import LogLikelihoodAccMetric
    from lighteval.metrics.normalizations import LogProbCharNorm

    metrics = [LogLikelihoodAccMetric(), LogLikelihoodAccMetric(normalization=LogProbCharNorm())]
    verdicts = []
    for doc, answer in zip(docs, model.loglikelihood(list(docs)), strict=True):
        acc, acc_norm = (
            next(iter(metric.compute_sample(doc=doc, model_response=answer).values()))
            for metric in metrics
        )
        verdicts.append(Verdict(float(acc), float(acc_norm), [float(p) for p in answer.logprobs]))
    return verdicts


def by_the_harness(folder: Path, found: Mapping[str, Sequence[Any]]) -> dict[str, list[Verdict]]:
    """{task: verdicts}, by tasks that are made of the same prompts and choices."""
    import lm_eval
    from datasets import Dataset
    from lighteval.tasks.prompt_manager import PromptManager
    from lm_eval.models.huggingface import HFLM

    prompts = PromptManager(use_chat_template=False)
    tasks = []
    for name, docs in found.items():
        rows = [
            {"query": prompts.prepare_prompt(doc), "choices": doc.choices, "gold": _gold(doc)}
            for doc in docs
        ]
        tasks.append({
            "task": name,
            "custom_dataset": lambda rows=rows, **_: {"test": Dataset.from_list(rows)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": lambda row: row["query"],
            "doc_to_choice": lambda row: row["choices"],
            "doc_to_target": lambda row: row["gold"],
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        })  # fmt: skip
    model = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=8)
    scored: Any = lm_eval.simple_evaluate(model=model, tasks=tasks, bootstrap_iters=0)
    verdicts: dict[str, list[Verdict]] = {}
    for name in found:
        samples = sorted(scored["samples"][name], key=lambda sample: int(sample["doc_id"]))
        verdicts[name] = [
            Verdict(float(s["acc"]), float(s["acc_norm"]), [float(p) for p, _ in s["filtered_resps"]])
            for s in samples
        ]  # fmt: skip
    return verdicts


def _gold(doc: Any) -> int:
    return int(doc.gold_index if isinstance(doc.gold_index, int) else doc.gold_index[0])


def compare(docs: Sequence[Any], by: Mapping[str, Sequence[Verdict]]) -> dict[str, Any]:
    """Each judge's scores, and the items in which one differs from lighteval."""
    scores = {
        judge: {
            "acc": sum(v.acc for v in verdicts) / len(docs),
            "acc_norm": sum(v.acc_norm for v in verdicts) / len(docs),
        }
        for judge, verdicts in by.items()
    }
    differences, furthest = [], dict[str, float]()
    for judge, verdicts in by.items():
        for number, (ours, other) in enumerate(zip(by[OURS], verdicts, strict=True)):
            nats = [abs(a - b) for a, b in zip(ours.choices, other.choices, strict=True)]
            furthest[judge] = max([furthest.get(judge, 0.0), *nats])
            if (ours.acc, ours.acc_norm) != (other.acc, other.acc_norm):
                differences.append({
                    "item": number, "judge": judge, "prompt": docs[number].query[-80:],
                    OURS: [round(p, 4) for p in ours.choices],
                    judge: [round(p, 4) for p in other.choices],
                })  # fmt: skip
    return {
        "items": len(docs),
        "scores": scores,
        "furthest_nats": {judge: round(nats, 5) for judge, nats in furthest.items()},
        "differences": differences,
    }


def served(url: str, folder: Path) -> Any:
    """lighteval's model behind a server. Raises UserError for one that cannot score choices."""
    from transformers import AutoTokenizer

    from eval_tasks.endpoint import Endpoint
    from eval_tasks.job import Job
    from eval_tasks.served import examine

    able = examine(
        url.rstrip("/").removesuffix("/v1"), str(folder), AutoTokenizer.from_pretrained(folder)
    )
    if able.echo:
        raise UserError(f"--endpoint {url}: {able.echo}")
    return Endpoint(str(folder), Job([], [], str(OUT), servers=[able.server]))


def judge(folder: Path, tasks: Mapping[str, str], items: int, endpoint: str) -> dict[str, Any]:
    """{benchmark: what the judges say}; `tasks` is {benchmark: task}."""
    from eval_tasks import compat

    compat.before_import()
    import tempfile

    from eval_tasks import smollm3  # noqa: F401  (its fixes)
    from eval_tasks.backends import load
    from eval_tasks.job import Job

    found = questions(list(tasks.values()), items)
    with tempfile.TemporaryDirectory() as scratch:  # kept answers would not be judged anew
        model = load(str(folder), Job([str(folder)], [], f"{scratch}/results.json"))
        other = served(endpoint, folder) if endpoint else None
        by = {name: {OURS: by_lighteval(model, docs)} for name, docs in found.items()}
    for name, verdicts in by_the_harness(folder, found).items():
        by[name][HARNESS] = verdicts
    for name, docs in found.items() if other else ():
        by[name][SERVER] = by_lighteval(other, docs)
    return {benchmark: compare(found[name], by[name]) for benchmark, name in tasks.items()}


def show(results: Mapping[str, Any]) -> None:
    from launch.report.terminal import percent, print_table_of

    judges = list(next(iter(results.values()))["scores"])
    rows = []
    for benchmark, found in results.items():
        scores = [
            f"{percent(found['scores'][j]['acc'], 1)} / {percent(found['scores'][j]['acc_norm'], 1)}"
            for j in judges
        ]
        rows.append([benchmark, str(found["items"]), *scores, str(len(found["differences"]))])
    columns = ["benchmark", "items", *(f"{judge}: acc / acc_norm" for judge in judges), "differ"]
    print_table_of(columns, rows)
    for benchmark, found in results.items():
        for row in found["differences"]:
            print(
                f"{benchmark}, item {row['item']}: {row[OURS]}, {row['judge']} {row[row['judge']]}"
            )


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--items", type=int, default=34, help="of each of six benchmarks")
    words.add_argument("--model", default="")
    words.add_argument("--endpoint", default=os.environ.get("ENDPOINT", ""))
    words.add_argument("--out", type=Path, default=OUT)
    asked = words.parse_args()
    never_proxied()
    from launch.machine.here import machine
    from launch.recipe.evaluation import load_suite
    from launch.stages.evaluate import local_datasets
    from launch.tools.reference import PACKAGE, SUITE, reference_model

    os.environ["EVAL_DATA"] = str(local_datasets())
    tasks = {row.name: row.tasks[0] for row in load_suite(SUITE).rows if not row.generative}
    folder = Path(asked.model) if asked.model else reference_model()
    results = judge(folder, tasks, asked.items, asked.endpoint)
    show(results)
    if asked.model and asked.out == OUT:
        return  # the stored figures are the package's
    name = asked.model or PACKAGE
    versions = {"lm-eval": version("lm-eval"), **machine()["versions"]}
    write_json(asked.out, {**machine(), "versions": versions, "model": name, "benchmarks": results})
    print(asked.out)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(fail(str(error), error.status))
