"""How a row of datasets.yaml becomes one of lighteval's tasks: FORMS makes its prompts, METRICS scores.

In a cloze task (CF) the text of each answer is scored and the options are not shown; in the other
form (MCF) letters are shown and scored. Either is by log-likelihood. Elsewhere the model writes.
"""

import json
import random
import re
from collections.abc import Callable, Mapping
from functools import partial
from string import ascii_uppercase
from typing import Any

import numpy as np
from lighteval.metrics.dynamic_metrics import (
    LogLikelihoodAccMetric,
    MultilingualExtractiveMatchMetric,
)
from lighteval.metrics.metrics import Metrics
from lighteval.metrics.metrics_sample import SampleLevelComputation
from lighteval.metrics.normalizations import LogProbCharNorm, LogProbTokenNorm
from lighteval.metrics.utils.extractive_match_utils import (
    ExprExtractionConfig,
    IndicesExtractionConfig,
    LatexExtractionConfig,
)
from lighteval.metrics.utils.metric_utils import SampleLevelMetric
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.multilingual.adapters import winogrand_adapter
from lighteval.tasks.requests import Doc, SamplingMethod
from lighteval.tasks.tasks.aime import MATH_PROMPT_TEMPLATE
from lighteval.tasks.templates.boolq import get_boolq_prompt_function
from lighteval.tasks.templates.continuation import get_continuation_prompt_function
from lighteval.tasks.templates.hellaswag import get_hellaswag_prompt_function
from lighteval.tasks.templates.multichoice import get_mcq_prompt_function
from lighteval.tasks.templates.translation import get_translation_prompt_function
from lighteval.tasks.templates.utils.formulation import CFFormulation, MCFFormulation
from lighteval.utils.language import Language

from eval_tasks import contest
from eval_tasks.call_scores import is_right, tools_of
from eval_tasks.call_scores import written as calls
from eval_tasks.task_table import FILE, Task, dataset
from ground.errors import UserError, did_you_mean

Row = dict[str, Any]
Prompt = Callable[[Row, str], Doc | None]  # (row of the dataset, task's name); None leaves it out
Form = Callable[[Task], Prompt]
Answers = tuple[ExprExtractionConfig | LatexExtractionConfig | IndicesExtractionConfig, ...]
Asked = tuple[str, list[str], int]  # the prompt, the choices (or the one answer), the right one


def lighteval_task(task: Task) -> LightevalTaskConfig:
    """Raises UserError for a form, metric or filter that this file does not have."""
    for key, known, names in (
        ("form", FORMS, [task.form]),
        ("metrics", METRICS, task.metrics),
        ("keep", KEEP, [task.keep] if task.keep else []),
    ):
        if unknown := [name for name in names if name not in known]:
            hint = did_you_mean(unknown[0], known)
            raise UserError(f"{FILE}: tasks: {task.name}: {key}: {unknown[0]}: {hint}")
    shots = [task.shots_from] if task.shots_from else []
    return LightevalTaskConfig(
        name=task.name,
        prompt_function=FORMS[task.form](task),
        hf_repo=dataset(task.dataset),
        hf_revision=task.revision,
        hf_subset=task.config,
        hf_filter=KEEP[task.keep] if task.keep else None,
        hf_avail_splits=[task.split, *shots],
        evaluation_splits=[task.split],
        few_shots_split=task.shots_from,
        few_shots_select=task.shots_select,
        generation_size=task.answer_tokens,
        stop_sequence=list(task.stop) or None,
        metrics=[METRICS[metric](task) for metric in task.metrics],
    )


# ---- from a row's columns to the names that a form takes


def adapter(task: Task) -> Callable[[Row], Row]:
    """Rows with the keys of `columns`, which are those of lighteval's templates; `gold_idx` from 0."""

    def adapt(row: Row) -> Row:
        values = {name: _value(row, column) for name, column in task.columns.items()}
        if "gold_idx" in values:
            values["gold_idx"] = gold_index(values["gold_idx"], task.counted_from)
        return values

    return adapt


def _value(row: Row, column: Any) -> Any:
    """A column's value, the list of several columns' values, or with `column.key` one inside it."""
    if not isinstance(column, str):
        return [row[name] for name in column]
    name, _, key = column.partition(".")
    return row[name][key] if key else row[name]


def gold_index(answer: Any, counted_from: int) -> int:
    """The right choice, counted from 0: ARC has both `A` and `1`."""
    key = str(answer)
    return ascii_uppercase.index(key) if key.isalpha() else int(key) - counted_from


# ---- forms: choices that are scored by log-likelihood


def template(of_lighteval: Callable[..., Prompt], with_letters: bool = False) -> Form:
    """One of lighteval's templates, filled from the columns that the task names."""
    formulation = MCFFormulation() if with_letters else CFFormulation()
    return lambda task: of_lighteval(Language(task.language), adapter(task), formulation)


def hellaswag(task: Task) -> Prompt:
    return get_hellaswag_prompt_function(Language(task.language), adapter(task), CFFormulation())


def blank(task: Task) -> Prompt:
    """The option and the rest of the sentence are scored, after the text before the blank."""
    language = Language(task.language)
    adapt = partial(winogrand_adapter, language)
    return get_continuation_prompt_function(language, adapt, CFFormulation())


# ---- forms: the model writes


def written(ask: Callable[[Task, Row], Asked | None]) -> Form:
    """`ask` is given the task, and a row under the names in `columns`; None leaves the row out."""

    def form(task: Task) -> Prompt:
        adapt = adapter(task)

        def prompt(row: Row, task_name: str) -> Doc | None:
            asked = ask(task, adapt(row))
            if asked is None:
                return None
            query, choices, gold = asked
            return Doc(task_name=task_name, query=query, choices=choices, gold_index=gold)

        return prompt

    return form


def worked(task: Task, row: Row) -> Asked:
    """A problem, which comes after worked examples."""
    return f"Question: {row['question']}\nAnswer:", [f" {row['answer']}"], 0


def reasoned(task: Task, row: Row) -> Asked:
    """A problem, and the released instruction to reason and to box the answer."""
    asked = "Please reason step by step, and put your final answer within \\boxed{}."
    return f"{row['question']}\n{asked}", [f" {row['answer']}"], 0


def boxed(task: Task, row: Row) -> Asked | None:
    """The prompt of lighteval's AIME; critical-thinking items have no answer and are left out. Both as
    published."""
    if row.get("kind") == "critical thinking":
        return None
    query = MATH_PROMPT_TEMPLATE.strip().format(prompt=row["question"])
    return query, [str(row["answer"])], 0


def lettered(task: Task, row: Row) -> Asked:
    """The task's `template`, filled with the question and its options A to D."""
    return _filled(task, row["question"], row["choices"], row["gold_idx"])


def shuffled(task: Task, row: Row) -> Asked:
    """The same, with the right option at a place drawn from lighteval's seed, as published."""
    gold = random.randint(0, 3)
    choices = list(row["wrong"])
    choices.insert(gold, row["right"])
    return _filled(task, row["question"], choices, gold)


def _filled(task: Task, question: str, choices: list[str], gold: int) -> Asked:
    options = dict(zip("ABCD", choices, strict=True))
    return task.template.format(question=question, **options), list(options), gold


def translation(task: Task) -> Prompt:
    """`config` is `<source>-<target>`, both as in Flores-200, such as fra_Latn."""
    source, target = task.config.split("-")
    languages = [Language(code[:3]) for code in (source, target)]
    columns = {"source_text": f"sentence_{source}", "target_text": f"sentence_{target}"}
    return get_translation_prompt_function(*languages, columns, CFFormulation())


def function(task: Task) -> Prompt:
    """The beginning of a function, which the model continues."""
    return _code_prompt(lambda row: str(row["prompt"]))


def tested_function(row: Row, completion: str) -> str:
    """The function, its tests, and the call that runs them."""
    return f"{row['prompt']}{completion}\n{row['test']}\ncheck({row['entry_point']})\n"


def program(task: Task) -> Prompt:
    """The prompt of the MBPP paper (Austin et al. 2021, arXiv:2108.07732), with all its tests."""

    def query(row: Row) -> str:
        tests = "\n".join(row["test_list"])
        return (
            f"You are an expert Python programmer, and here is your task: {row['prompt']} Your code "
            f"should pass these tests:\n\n{tests}\n"
        )

    return _code_prompt(query)


def tested_program(row: Row, completion: str) -> str:
    """The imports of its tests, the answer without a fence around it, and the tests."""
    imports = "\n".join(row["test_imports"])
    code = re.sub(r"^\s*```(?:python)?\n", "", completion)
    return f"{imports}\n{code}\n{row['test']}\n"


def _code_prompt(query: Callable[[Row], str]) -> Prompt:
    def prompt(row: Row, task_name: str) -> Doc:
        columns = {key: value for key, value in row.items() if not key.startswith("__")}
        return Doc(
            task_name=task_name, query=query(row), choices=[""], gold_index=0,
            specific={"row": columns},
        )  # fmt: skip

    return prompt


def called(task: Task) -> Prompt:
    """A conversation and the functions that the model may call; its columns hold JSON."""

    def prompt(row: Row, task_name: str) -> Doc:
        names = ("messages", "functions", "due")
        messages, functions, due = (json.loads(row[name]) for name in names)
        specific = {"functions": functions, "due": due}
        given = {"messages": messages, "tools": tools_of(functions)}
        return Doc(
            task_name=task_name, query=messages[-1]["content"], choices=[calls(functions, due)],
            gold_index=0, specific=specific | given,
        )  # fmt: skip

    return prompt


FORMS: Mapping[str, Form] = {
    "cloze": template(get_mcq_prompt_function),
    "letters": template(get_mcq_prompt_function, with_letters=True),
    "yes_no": template(get_boolq_prompt_function),
    "hellaswag": hellaswag,
    "blank": blank,
    "worked": written(worked),
    "reasoned": written(reasoned),
    "boxed": written(boxed),
    "lettered": written(lettered),
    "shuffled": written(shuffled),
    "translation": translation,
    "function": function,
    "program": program,
    "contest": lambda task: contest.question,
    "called": called,
}
# The program that tests the answer to a row, by the task's form.
PROGRAMS = {"function": tested_function, "program": tested_program, "contest": contest.tested}


# ---- metrics


class AsWritten(SampleLevelComputation):
    """Scores the whole answer, a trace in think tags too, as published; IFEval alone leaves it out. Of
    several samples the mean (avg@n, which is pass@1 estimated from n)."""

    def __init__(self, scorer: SampleLevelComputation):
        self.scorer = scorer

    def compute(self, doc: Doc, model_response: ModelResponse, **kwargs: Any) -> float:
        answers = [ModelResponse(text=[text]) for text in model_response.text]
        return float(np.mean([self.scorer.compute(doc, answer) for answer in answers]))


def generative(name: str, compute: SampleLevelComputation) -> SampleLevelMetric:
    """The mean of what `compute` makes of each answer."""
    return SampleLevelMetric(
        metric_name=name,
        higher_is_better=True,
        category=SamplingMethod.GENERATIVE,
        sample_level_fn=AsWritten(compute),
        corpus_level_fn=np.mean,
    )


def extractive(name: str, gold: Answers, answer: Answers, **how: Any) -> SampleLevelMetric:
    """Right where what is found in the answer, from its end, equals what is found in the gold."""
    match = MultilingualExtractiveMatchMetric(
        gold_extraction_target=gold, pred_extraction_target=answer, **how
    )
    return generative(name, match)


MATH = EXPRESSION, LATEX = ExprExtractionConfig(), LatexExtractionConfig()
BOXED_FIRST = (EXPRESSION, LatexExtractionConfig(boxed_match_priority=0))
ANCHORED_LETTER = (IndicesExtractionConfig("Letters", try_extract_without_anchor=False),)
ANY_LETTER = (IndicesExtractionConfig("NativeLetters", try_extract_without_anchor=True),)


class PassAt1(SampleLevelComputation):
    """1 where the program of the row and the answer passes its tests in the sandbox."""

    def __init__(self, form: str):
        self.form = form

    def compute(self, doc: Doc, model_response: ModelResponse, **kwargs: Any) -> float:
        from eval_tasks.sandbox.outside import run_tests

        assert doc.specific is not None
        row = doc.specific["row"]
        program = PROGRAMS[self.form](row, model_response.final_text[0])
        if self.form == "contest":
            return float(run_tests(program, contest.seconds(row), contest.MEMORY_MB).passed)
        return float(run_tests(program).passed)


class RightCalls(SampleLevelComputation):
    """1 where the answer makes the calls that are due, and no other."""

    def compute(self, doc: Doc, model_response: ModelResponse, **kwargs: Any) -> float:
        assert doc.specific is not None
        answer, own = model_response.text[0], doc.specific
        return float(is_right(answer, own["functions"], own["due"]))


METRICS: Mapping[str, Callable[[Task], Any]] = {
    "acc": lambda task: LogLikelihoodAccMetric(),
    "acc_norm": lambda task: LogLikelihoodAccMetric(normalization=LogProbCharNorm()),
    "acc_norm_token": lambda task: LogLikelihoodAccMetric(normalization=LogProbTokenNorm()),
    "expr_match": lambda task: extractive("expr_match", (EXPRESSION,), BOXED_FIRST, precision=5),
    "latex_match": lambda task: extractive("latex_match", (LATEX,), BOXED_FIRST, precision=5),
    # The released metric has the row in the precision's place: what must be rounded to be equal, is not.
    "math_match": lambda task: extractive(
        "math_match", MATH, MATH, precision="none", fallback_mode="no_fallback"
    ),
    "letter_match": lambda task: extractive(
        "letter_match", ANCHORED_LETTER, ANCHORED_LETTER, language=Language(task.language)
    ),
    "any_letter_match": lambda task: extractive("any_letter_match", ANY_LETTER, ANY_LETTER),
    "pass@1": lambda task: generative("pass@1", PassAt1(task.form)),
    "right_calls": lambda task: generative("right_calls", RightCalls()),
    "chrf++": lambda task: Metrics.chrf_plus,
    "bleu": lambda task: Metrics.bleu,
}


# ---- filters of rows


def culturally_agnostic(row: Row) -> bool:
    """The published suite takes only the `ca` questions of Global MMLU, and only complete ones."""
    options = [row[f"option_{letter}"] for letter in "abcd"]
    return row["cultural_sensitivity_label"] == "CA" and all(o and o.strip() for o in options)


KEEP: Mapping[str, Callable[[Row], bool]] = {"culturally_agnostic": culturally_agnostic}
