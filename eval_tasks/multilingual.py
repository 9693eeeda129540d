"""The multilingual suite in the languages of the published tables, cloze, and Flores-200 both ways.

lighteval has these tasks too, but only with its multilingual extra, which pulls in stanza and spaCy.
"""

from typing import Any

from lighteval.metrics.metrics import Metrics
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.templates.hellaswag import get_hellaswag_prompt_function
from lighteval.tasks.templates.multichoice import get_mcq_prompt_function
from lighteval.tasks.templates.translation import get_translation_prompt_function
from lighteval.tasks.templates.utils.formulation import CFFormulation
from lighteval.utils.language import Language

from eval_tasks import prompts
from eval_tasks.base import choice_task, dataset

# two letters: (lighteval's language, Flores' and Belebele's code)
LANGUAGES = {
    "fr": (Language.FRENCH, "fra_Latn"),
    "es": (Language.SPANISH, "spa_Latn"),
    "de": (Language.GERMAN, "deu_Latn"),
    "it": (Language.ITALIAN, "ita_Latn"),
    "pt": (Language.PORTUGUESE, "por_Latn"),
    "ar": (Language.ARABIC, "arb_Arab"),
    "zh": (Language.CHINESE, "zho_Hans"),
    "ru": (Language.RUSSIAN, "rus_Cyrl"),
}


def culturally_agnostic(row: dict[str, Any]) -> bool:
    """The published suite takes the `ca` questions of Global MMLU alone, and whole ones."""
    options = [row[f"option_{letter}"] for letter in "abcd"]
    return row["cultural_sensitivity_label"] == "CA" and all(o and o.strip() for o in options)


def mlmm_hellaswag(code: str, language: Language) -> LightevalTaskConfig:
    prompt = get_hellaswag_prompt_function(
        language, prompts.mlmm_hellaswag, formulation=CFFormulation()
    )
    return choice_task(
        f"mlmm_hellaswag_cf:{code}", prompt, "jon-tow/okapi_hellaswag", code, "validation"
    )


def flores(source: tuple[Language, str], target: tuple[Language, str]) -> LightevalTaskConfig:
    """chrF++ and BLEU of a translation, 5 shots from the dev split, one line."""

    def adapter(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "source_text": row[f"sentence_{source[1]}"],
            "target_text": row[f"sentence_{target[1]}"],
        }

    return LightevalTaskConfig(
        name=f"flores200_base:{source[1]}-{target[1]}",
        prompt_function=get_translation_prompt_function(
            source_language=source[0], target_language=target[0], adapter=adapter,
            formulation=CFFormulation(),
        ),
        hf_repo=dataset("facebook/flores"),
        hf_subset=f"{source[1]}-{target[1]}",
        hf_avail_splits=["dev", "devtest"],
        evaluation_splits=["devtest"],
        few_shots_split="dev",
        generation_size=300,
        stop_sequence=["\n"],
        metrics=[Metrics.chrf_plus, Metrics.bleu],
    )  # fmt: skip


ENGLISH = (Language.ENGLISH, "eng_Latn")
TASKS = [
    *(mlmm_hellaswag(code, language) for code, (language, _) in LANGUAGES.items()),
    *(
        choice_task(
            f"belebele_cf:{script}",
            get_mcq_prompt_function(language, prompts.belebele, formulation=CFFormulation()),
            "facebook/belebele", script, "test",
        )
        for language, script in (ENGLISH, *LANGUAGES.values())
    ),
    *(
        choice_task(
            f"global_mmlu_ca_cf:{code}",
            get_mcq_prompt_function(language, prompts.global_mmlu, formulation=CFFormulation()),
            "CohereForAI/Global-MMLU", code, "test", shots_from="dev", keep=culturally_agnostic,
        )
        for code, (language, _) in LANGUAGES.items()
    ),
    *(flores(pair, ENGLISH) for pair in LANGUAGES.values()),
    *(flores(ENGLISH, pair) for pair in LANGUAGES.values()),
]  # fmt: skip
