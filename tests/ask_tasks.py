"""Child of test_released_questions: what the tasks of this repository ask, and how they score, as JSON."""

import json
import random
from pathlib import Path
from typing import Any

import released_questions as released

ROOT = Path(__file__).parent.parent


def task(name: str, config: Any, scored: bool = True) -> dict[str, Any]:
    from lighteval.tasks.lighteval_task import LightevalTask
    from lighteval.tasks.prompt_manager import PromptManager

    config.num_fewshots = released.TASKS[name][1]
    made = LightevalTask(config)
    made.dataset = released.dataset_of(config, made.fewshot_split)
    random.seed(1234)
    chat = name.split(":")[0] in released.IN_CHAT
    prompts = PromptManager(chat, released.Tokenizer(), released.SYSTEM_PROMPT if chat else None)
    docs, asked = made.get_docs(), []
    for doc in docs:
        prompt = prompts.prepare_prompt(doc)
        gold = doc.gold_index if isinstance(doc.gold_index, list) else [doc.gold_index]
        asked.append(
            {
                "prompt": json.loads(prompt) if chat else prompt,
                "choices": doc.choices,
                "gold": gold,
                "scores": scores(made, name, doc) if scored else {},
            }
        )
    metrics = [metric.metric_name for metric in made.metrics]
    found = {
        "dataset": [config.hf_repo, config.hf_subset, config.hf_revision],
        "splits": made.evaluation_split,
        "shots": [made.fewshot_split, config.few_shots_select, config.num_fewshots],
        "answer_tokens": config.generation_size, "stop": list(made.stop_sequence),
        "metrics": metrics, "asked": asked,
    }  # fmt: skip
    return found | (corpus(made, docs) if scored else {})


def scores(made: Any, name: str, doc: Any) -> dict[str, str]:
    from lighteval.metrics.utils.metric_utils import CorpusLevelMetric
    from lighteval.models.model_output import ModelResponse
    from lighteval.tasks.requests import SamplingMethod
    from lighteval.utils.utils import remove_reasoning_tags

    metrics = [m for m in made.metrics if not isinstance(m, CorpusLevelMetric)]
    if any(m.category == SamplingMethod.LOGPROBS for m in metrics):
        answered = [
            ModelResponse(logprobs=logprobs, output_tokens=[[0] * n for n in tokens])
            for logprobs, tokens in released.likelihoods(len(doc.choices))
        ]
    else:
        answered = [ModelResponse(text=[text]) for text in released.answers(name)]
        for answer in answered:  # as lighteval's pipeline does
            shown = remove_reasoning_tags(answer.text[0], [("<think>", "</think>")])
            answer.text_post_processed = [shown]
    found: dict[str, list[Any]] = {}
    for metric in metrics:
        for answer in answered:
            for key, score in metric.compute_sample(doc=doc, model_response=answer).items():
                found.setdefault(key, []).append(score)
    return {key: released.text_of(of_answers) for key, of_answers in found.items()}


def corpus(made: Any, docs: list[Any]) -> dict[str, Any]:
    from lighteval.metrics.utils.metric_utils import CorpusLevelMetric
    from lighteval.models.model_output import ModelResponse

    found = {}
    for metric in made.metrics:
        if isinstance(metric, CorpusLevelMetric):
            pairs = zip(docs, released.TRANSLATIONS, strict=False)
            items = [
                metric.compute_sample(doc=doc, model_response=ModelResponse(text=[text]))[metric.metric_name]
                for doc, text in pairs
            ]  # fmt: skip
            found[metric.metric_name] = metric.get_corpus_aggregations()[metric.metric_name](items)
    return {"corpus": found} if found else {}


def prompts(tasks: list[Any]) -> dict[str, Any]:
    """What those of `tasks` ask that the release has too."""
    known = {config.name: config for config in tasks}
    return {name: task(name, known[name], scored=False) for name in released.TASKS if name in known}


def main() -> None:
    from eval_tasks import compat

    compat.before_import()
    from lighteval.tasks.registry import Registry

    known = Registry.load_all_task_configs(custom_tasks=str(ROOT / "eval_tasks" / "smollm3.py"))
    found = {name: task(name, known[name]) for name in released.TASKS}
    print("RESULT" + json.dumps(found, default=float))


if __name__ == "__main__":
    main()
