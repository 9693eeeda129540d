"""The base suite: cloze tasks scored by log-likelihood, and generative mathematics and code.

Cloze (CF): the answer's text is scored, the options are not shown; MCF: letters are shown and
scored. Both normalised accuracies are reported; published values are the character-normalised one.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lighteval.metrics.dynamic_metrics import (
    LogLikelihoodAccMetric,
    MultilingualExtractiveMatchMetric,
)
from lighteval.metrics.metrics_sample import SampleLevelComputation
from lighteval.metrics.normalizations import LogProbCharNorm, LogProbTokenNorm
from lighteval.metrics.utils.extractive_match_utils import (
    ExprExtractionConfig,
    LatexExtractionConfig,
)
from lighteval.metrics.utils.metric_utils import SampleLevelMetric
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc, SamplingMethod
from lighteval.tasks.templates.boolq import get_boolq_prompt_function
from lighteval.tasks.templates.continuation import get_continuation_prompt_function
from lighteval.tasks.templates.hellaswag import get_hellaswag_prompt_function
from lighteval.tasks.templates.multichoice import get_mcq_prompt_function
from lighteval.tasks.templates.utils.formulation import CFFormulation, MCFFormulation
from lighteval.utils.language import Language

from eval_tasks import prompts

Prompt = Callable[[dict[str, Any], str], Doc | None]
Program = Callable[[prompts.Row, str], str]  # (row, completion): source
ENGLISH = Language.ENGLISH
MMLU_SUBJECTS = [
    "abstract_algebra",
    "anatomy",
    "astronomy",
    "business_ethics",
    "clinical_knowledge",
    "college_biology",
    "college_chemistry",
    "college_computer_science",
    "college_mathematics",
    "college_medicine",
    "college_physics",
    "computer_security",
    "conceptual_physics",
    "econometrics",
    "electrical_engineering",
    "elementary_mathematics",
    "formal_logic",
    "global_facts",
    "high_school_biology",
    "high_school_chemistry",
    "high_school_computer_science",
    "high_school_european_history",
    "high_school_geography",
    "high_school_government_and_politics",
    "high_school_macroeconomics",
    "high_school_mathematics",
    "high_school_microeconomics",
    "high_school_physics",
    "high_school_psychology",
    "high_school_statistics",
    "high_school_us_history",
    "high_school_world_history",
    "human_aging",
    "human_sexuality",
    "international_law",
    "jurisprudence",
    "logical_fallacies",
    "machine_learning",
    "management",
    "marketing",
    "medical_genetics",
    "miscellaneous",
    "moral_disputes",
    "moral_scenarios",
    "nutrition",
    "philosophy",
    "prehistory",
    "professional_accounting",
    "professional_law",
    "professional_medicine",
    "professional_psychology",
    "public_relations",
    "security_studies",
    "sociology",
    "us_foreign_policy",
    "virology",
    "world_religions",
]
MATH_SUBJECTS = [
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
]


# As in the released tasks. Those of PIQA, Winogrande and SIQA are conversions of data sets whose
# main branch holds a loading script, which datasets 4 and later refuse.
REVISIONS = {
    "Rowan/hellaswag": "6002345709e0801764318f06bf06ce1e7d1a1fe3",
    "allenai/ai2_arc": "210d026faf9955653af8916fad021475a3f00453",
    "allenai/openbookqa": "388097ea7776314e93a529163e0fea805b8a6454",
    "allenai/social_i_qa": "aaaad979029e0df5946111799787313c99c03510",
    "allenai/winogrande": "01e74176c63542e6b0bcb004dcdea22d94fb67b5",
    "cais/mmlu": "c30699e8356da336a370243923dbaf21066bb9fe",
    "evalplus/humanevalplus": "d32357cf319e50e9c8d8dab5ea876c72b0fd321b",
    "evalplus/mbppplus": "b2d74c91837c3f2a20c1299ae98133cbe7cfa077",
    "jon-tow/okapi_hellaswag": "96ed8e0dfc6172dad1d3df338d7b8ba6c1ff9d83",
    "openai/gsm8k": "e53f048856ff4f594e959d75785d2c2d37b678ee",
    "tau/commonsense_qa": "94630fe30dad47192a8546eb75f094926d47e155",
    "TIGER-Lab/MMLU-Pro": "9126953e3e196ff1073499437322f9e2c51ed79a",
    "ybisk/piqa": "ba2f7a4920f4968f04c174c53cc157c899e93501",
}


def dataset(repo: str) -> str:
    """The hub's name of a dataset, or its folder under EVAL_DATA where there is one."""
    local = Path(os.environ.get("EVAL_DATA") or "/nowhere") / repo.replace("/", "--")
    return str(local) if local.is_dir() else repo


def task_on(
    repo: str, subset: str, name: str, prompt: Prompt, **settings: Any
) -> LightevalTaskConfig:
    """A task on a dataset, at the revision of the released tasks where they name one."""
    return LightevalTaskConfig(
        name=name,
        prompt_function=prompt,
        hf_repo=dataset(repo),
        hf_revision=REVISIONS.get(repo),
        hf_subset=subset,
        **settings,
    )


def cloze_metrics() -> list[SampleLevelMetric]:
    return [
        LogLikelihoodAccMetric(normalization=LogProbTokenNorm()),
        LogLikelihoodAccMetric(normalization=LogProbCharNorm()),
    ]


def choice_task(
    name: str, prompt: Prompt, repo: str, subset: str, split: str,
    metrics: Sequence[SampleLevelMetric] | None = None, shots_from: str | None = None,
    keep: Callable[[dict[str, Any]], bool] | None = None,
) -> LightevalTaskConfig:  # fmt: skip
    """A task scored by log-likelihood; cloze metrics where none are named."""
    return task_on(
        repo,
        subset,
        name,
        prompt,
        hf_filter=keep,
        hf_avail_splits=[split, *([shots_from] if shots_from else [])],
        evaluation_splits=[split],
        few_shots_split=shots_from,
        metrics=list(metrics or cloze_metrics()),
    )


def mcq(adapter: Callable[[prompts.Row], prompts.Row | None], mcf: bool = False) -> Prompt:
    form = MCFFormulation() if mcf else CFFormulation()
    prompt: Prompt = get_mcq_prompt_function(ENGLISH, adapter, formulation=form)
    return prompt


CLOZE = [
    choice_task(
        "hellaswag_cf",
        get_hellaswag_prompt_function(ENGLISH, prompts.hellaswag, formulation=CFFormulation()),
        "Rowan/hellaswag", "default", "validation",
    ),
    *(
        choice_task(
            f"arc_cf:{level}", mcq(prompts.labelled), "allenai/ai2_arc",
            f"ARC-{level.capitalize()}", "test", shots_from="train",
        )
        for level in ("easy", "challenge")
    ),
    choice_task(
        "winogrande_cf",
        get_continuation_prompt_function(ENGLISH, prompts.winogrande, formulation=CFFormulation()),
        "allenai/winogrande", "winogrande_xl", "validation",
    ),
    choice_task(
        "commonsenseqa_cf", mcq(prompts.labelled), "tau/commonsense_qa", "default", "validation"
    ),
    choice_task("piqa_cf", mcq(prompts.piqa), "ybisk/piqa", "plain_text", "validation"),
    choice_task(
        "openbookqa_cf", mcq(prompts.openbookqa), "allenai/openbookqa", "main", "validation"
    ),
    choice_task("siqa_cf", mcq(prompts.siqa), "allenai/social_i_qa", "default", "validation"),
    choice_task(
        "boolq_cf",
        get_boolq_prompt_function(ENGLISH, prompts.boolq, formulation=CFFormulation()),
        "google/boolq", "default", "validation",
    ),
    *(
        choice_task(
            f"mmlu_cf:{subject}", mcq(prompts.mmlu), "cais/mmlu", subject, "test", shots_from="dev"
        )
        for subject in ("all", *MMLU_SUBJECTS)
    ),
    choice_task(
        "mmlu_pro_cf", mcq(prompts.mmlu_pro), "TIGER-Lab/MMLU-Pro", "default", "test",
        shots_from="validation",
    ),
    choice_task(
        "mmlu_pro_mcf", mcq(prompts.mmlu_pro, mcf=True), "TIGER-Lab/MMLU-Pro", "default", "test",
        metrics=[LogLikelihoodAccMetric()], shots_from="validation",
    ),
]  # fmt: skip


def extractive(name: str, latex: bool, latex_gold: bool = False) -> SampleLevelMetric:
    """Right where the number (with `latex` also an expression, boxed first) that the answer ends in
    is the gold's, of which `latex_gold` takes expressions alone."""
    expression, boxed = ExprExtractionConfig(), LatexExtractionConfig(boxed_match_priority=0)
    answer = (expression, boxed) if latex else (expression,)
    return SampleLevelMetric(
        metric_name=name,
        higher_is_better=True,
        category=SamplingMethod.GENERATIVE,
        sample_level_fn=MultilingualExtractiveMatchMetric(
            language=ENGLISH,
            gold_extraction_target=(LatexExtractionConfig(),) if latex_gold else answer,
            pred_extraction_target=answer,
            fallback_mode="first_match",
            precision=5,
        ),
        corpus_level_fn=np.mean,
    )


def question_and_answer(question: str, answer: str) -> Prompt:
    def prompt(line: dict[str, Any], task_name: str) -> Doc:
        query = f"Question: {line[question]}\nAnswer:"
        return Doc(
            task_name=task_name, query=query, choices=[f" {line[answer]}"], gold_index=0
        )  # fmt: skip

    return prompt


def worked_task(
    name: str, prompt: Prompt, repo: str, subset: str, size: int, stop: str,
    metric: SampleLevelMetric,
) -> LightevalTaskConfig:  # fmt: skip
    """Mathematics with worked examples from the training split; an answer ends at `stop`."""
    return task_on(
        repo,
        subset,
        name,
        prompt,
        hf_avail_splits=["train", "test"],
        evaluation_splits=["test"],
        few_shots_split="train",
        few_shots_select="random_sampling_from_train",
        generation_size=size,
        stop_sequence=[stop],
        metrics=[metric],
    )


class PassAt1(SampleLevelComputation):
    """1 where `program(row, completion)` passes its tests in the sandbox."""

    def __init__(self, program: Program):
        self.program = program

    def compute(self, doc: Doc, model_response: ModelResponse, **kwargs: Any) -> float:
        from eval_tasks.sandbox import run_tests

        assert doc.specific is not None
        program = self.program(doc.specific["row"], model_response.final_text[0])
        return float(run_tests(program).passed)


def code_prompt(query: Callable[[prompts.Row], str]) -> Prompt:
    def prompt(line: dict[str, Any], task_name: str) -> Doc:
        row = {key: value for key, value in line.items() if not key.startswith("__")}
        return Doc(
            task_name=task_name, query=query(line), choices=[""], gold_index=0, specific={"row": row}
        )  # fmt: skip

    return prompt


def pass_at_1(program: Program) -> SampleLevelMetric:
    return SampleLevelMetric(
        metric_name="pass@1",
        higher_is_better=True,
        category=SamplingMethod.GENERATIVE,
        sample_level_fn=PassAt1(program),
        corpus_level_fn=np.mean,
    )


def code_task(
    name: str, query: Callable[[prompts.Row], str], program: Program, repo: str, subset: str,
    stop: list[str], size: int,
) -> LightevalTaskConfig:  # fmt: skip
    return task_on(
        repo,
        subset,
        name,
        code_prompt(query),
        hf_avail_splits=["test"],
        evaluation_splits=["test"],
        generation_size=size,
        stop_sequence=stop,
        metrics=[pass_at_1(program)],
    )


# A function has ended where a line at the margin begins anything else.
STOP_FUNCTION = ["\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```"]
STOP_PROGRAM = ["\nclass", "\nassert", "\n```"]


def humaneval(name: str, repo: str) -> LightevalTaskConfig:
    return code_task(
        name, lambda row: str(row["prompt"]), prompts.humaneval_program, repo, "default",
        STOP_FUNCTION, 512,
    )  # fmt: skip


GENERATIVE = [
    worked_task(
        "gsm8k_base", question_and_answer("question", "answer"), "openai/gsm8k", "main", 256,
        "Question:", extractive("expr_match", latex=False),
    ),
    *(
        worked_task(
            f"math_base:{subject}", question_and_answer("problem", "solution"),
            "DigitalLearningGmbH/MATH-lighteval", subject, 4096, "\n",
            extractive("latex_match", latex=True, latex_gold=True),
        )
        for subject in MATH_SUBJECTS
    ),
    humaneval("humaneval_plus", "evalplus/humanevalplus"),
    humaneval("humaneval", "openai/openai_humaneval"),
    code_task(
        "mbpp_plus", prompts.mbpp_prompt, prompts.mbpp_program, "evalplus/mbppplus",
        "default", STOP_PROGRAM, 512,
    ),
]  # fmt: skip

TASKS = [*CLOZE, *GENERATIVE]
