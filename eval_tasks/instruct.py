"""The instruct suite's own tasks; IFEval, AIME 2025 and GPQA Diamond are lighteval's.

GSM-Plus (testmini, zero-shot, boxed) and Global MMLU with reasoning before a letter. The test of the
two modes over several turns is in modes.py: lighteval's prompts have one turn.
"""

from typing import Any

import numpy as np
from lighteval.metrics.dynamic_metrics import MultilingualExtractiveMatchMetric
from lighteval.metrics.utils.extractive_match_utils import IndicesExtractionConfig
from lighteval.metrics.utils.metric_utils import SampleLevelMetric
from lighteval.tasks.requests import Doc, SamplingMethod
from lighteval.tasks.tasks.aime import MATH_PROMPT_TEMPLATE
from lighteval.utils.language import Language

from eval_tasks.base import extractive, task_on

# language: (its code in Global MMLU, the instruction in it)
GLOBAL_MMLU = {
    "deu": (
        Language.GERMAN,
        "de",
        "Denke Schritt für Schritt nach. Ende mit: Antwort: <Buchstabe>",
    ),
    "fra": (Language.FRENCH, "fr", "Raisonne pas à pas. Termine par : Réponse : <lettre>"),
    "ita": (Language.ITALIAN, "it", "Ragiona passo dopo passo. Termina con: Risposta: <lettera>"),
    "por": (Language.PORTUGUESE, "pt", "Raciocine passo a passo. Termine com: Resposta: <letra>"),
    "spa": (Language.SPANISH, "es", "Razona paso a paso. Termina con: Respuesta: <letra>"),
}


def gsm_plus_prompt(line: dict[str, Any], task_name: str) -> Doc | None:
    """The prompt of lighteval's AIME; critical-thinking items have no answer and are left out. Both as
    published."""
    if line["perturbation_type"] == "critical thinking":
        return None
    query = MATH_PROMPT_TEMPLATE.format(prompt=line["question"]).strip()
    return Doc(task_name=task_name, query=query, choices=[str(line["answer"])], gold_index=0)


def global_mmlu_prompt(instruction: str) -> Any:
    def prompt(line: dict[str, Any], task_name: str) -> Doc:
        options = "\n".join(f"{letter}) {line[f'option_{letter.lower()}']}" for letter in "ABCD")
        query = f"{line['question']}\n{options}\n\n{instruction}"
        gold = "ABCD".index(line["answer"])
        return Doc(task_name=task_name, query=query, choices=list("ABCD"), gold_index=gold)

    return prompt


def letter_match(language: Language) -> SampleLevelMetric:
    targets = (IndicesExtractionConfig(prefix_for_extraction="NativeLetters"),)
    return SampleLevelMetric(
        metric_name="letter_match",
        higher_is_better=True,
        category=SamplingMethod.GENERATIVE,
        sample_level_fn=MultilingualExtractiveMatchMetric(
            language=language, gold_extraction_target=targets, pred_extraction_target=targets
        ),
        corpus_level_fn=np.mean,
    )


def _generative(name: str, prompt: Any, repo: str, subset: str, split: str, metric: Any) -> Any:
    return task_on(
        repo,
        subset,
        name,
        prompt,
        hf_avail_splits=[split],
        evaluation_splits=[split],
        generation_size=32768,
        metrics=[metric],
    )


TASKS = [
    _generative(
        "gsm_plus_mini", gsm_plus_prompt, "qintongli/GSM-Plus", "default", "testmini",
        extractive("latex_match", latex=True),
    ),
    *(
        _generative(
            f"global_mmlu_instruct:{name}", global_mmlu_prompt(instruction),
            "CohereForAI/Global-MMLU", code, "test", letter_match(language),
        )
        for name, (language, code, instruction) in GLOBAL_MMLU.items()
    ),
]  # fmt: skip
