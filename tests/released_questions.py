"""What the released task file asks, and how it scores, on made-up rows: writes released_questions.json.

Runs beside the released evaluation (text/evaluation/smollm3 of huggingface/smollm at 3ad6b85, which
differs from main in the data sets' commits alone) and the lighteval that it pins (2788496c), neither of
which is part of this project:

    PYTHONPATH=<lighteval>/src:<folder of the released tasks.py> python tests/released_questions.py

It needs their packages, `language_data` among them; word tokenizers for metrics that no listed task
has are left out. `test_released_questions.py` asks the tasks of this repository the same.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
FILE = Path(__file__).with_suffix(".json")
SYSTEM_PROMPT = "/no_think"
LANGUAGES = {"fr": "fra", "es": "spa", "de": "deu", "it": "ita", "pt": "por", "ar": "ara", "zh": "zho", "ru": "rus"}  # fmt: skip
SCRIPTS = {"eng": "Latn", "fra": "Latn", "spa": "Latn", "deu": "Latn", "ita": "Latn", "por": "Latn", "arb": "Arab", "zho": "Hans", "rus": "Cyrl"}  # fmt: skip
PAIRS = [
    f"{one}_{SCRIPTS[one]}-{two}_{SCRIPTS[two]}"
    for language in list(SCRIPTS)[1:]
    for one, two in ((language, "eng"), ("eng", language))
]
# This repository's name of a task: the released name and the worked examples before a question.
TASKS: dict[str, tuple[str, int]] = {
    **{f"{name}_cf": (f"{name}_cf", 0) for name in (
        "hellaswag", "winogrande", "commonsenseqa", "piqa", "openbookqa", "siqa", "boolq", "mmlu_pro")},
    **{f"arc_cf:{name}": (f"arc_cf:{name}", 0) for name in ("easy", "challenge")},
    **{f"mmlu_cf:{name}": (f"mmlu_cf:{name}", 0) for name in ("anatomy", "virology")},
    "mmlu_pro_mcf": ("mmlu_pro_mcf", 0),
    "gsm8k_base": ("gsm8k", 5),
    **{f"math_base:{name}": (f"math_cot:{name}", 4) for name in ("algebra", "precalculus")},
    **{f"belebele_cf:{name}_{script}": (f"belebele_{name}_{script}_cf", 0) for name, script in SCRIPTS.items()},
    **{f"mlmm_hellaswag_cf:{ours}": (f"mlmm_hellaswag_{name}_cf", 0) for ours, name in LANGUAGES.items()},
    **{f"global_mmlu_ca_cf:{ours}": (f"global_mmlu_ca_{name}_cf:anatomy", 0) for ours, name in LANGUAGES.items()},
    **{f"flores200_base:{pair}": (f"flores200:{pair}", 5) for pair in PAIRS},
    "aime_2025": ("aime25", 0),
    "gpqa_diamond": ("gpqa:diamond", 0),
    "ifeval": ("ifeval", 0),
    "gsm_plus_mini": ("gsm_plus", 0),
    **{f"global_mmlu_instruct:{name}": (f"global_mmlu_instruct_{name}", 0)
       for name in ("deu", "fra", "ita", "por", "spa")},
}  # fmt: skip
IN_CHAT = ("aime_2025", "gpqa_diamond", "ifeval", "gsm_plus_mini", "global_mmlu_instruct")

# ---- made-up rows: ends without a full stop, odd spaces, capitals, brackets, other scripts' signs

OPTIONS = ("red", "the Green door", "blue.", " white ")


def lettered(n: int, question: str = "question") -> Row:
    labels = "1234" if n == 2 else "ABCD"
    text = ["What colour is it?", "Complete: the item is", "Which one  "][n % 3]
    options = {"text": list(OPTIONS), "label": list(labels)}
    return {question: text, "choices": options, "answerKey": labels[n % 4]}


def hellaswag(n: int) -> Row:
    endings = [
        "paints it.",
        "[substeps] Takes  it",
        "is red [title] and runs.",
        "Élan, then stop。",
    ]
    first = ["Someone takes it.", "[header] How to paint [title] Buy", "a man is seen"][n % 3]
    then = ["she", "", "He then"][n % 3]
    label = ["Painting", "home and garden", "Élan"][n % 3]
    return {
        "activity_label": label,
        "ctx_a": first,
        "ctx_b": then,
        "endings": endings,
        "label": str(n % 4),
    }


def winogrande(n: int) -> Row:
    sentences = ["The item fits since _ is small.", "_ is first here.", "Ann told Bea that _", "_ or _?", "it is  _  , so."]  # fmt: skip
    return {
        "sentence": sentences[n % 5],
        "option1": "Ann",
        "option2": "the box",
        "answer": str(n % 2 + 1),
    }


def global_mmlu(n: int) -> Row:
    options = {f"option_{letter}": option for letter, option in zip("abcd", OPTIONS, strict=True)}
    if n == 4:
        options["option_b"] = " "
    label = {"cultural_sensitivity_label": ["CA", "CA", "CA", "CS", "CA", "-"][n % 6]}
    question = ["What colour is it?", "The item is", "它是什么颜色？"][n % 3]  # noqa: RUF001
    return {"question": question, **options, **label, "answer": "ABCD"[n % 4], "subject": "anatomy"}


def belebele(n: int) -> Row:
    answers = {f"mc_answer{number}": option for number, option in enumerate(OPTIONS, start=1)}
    passage = ["There are items. ", "Two items", "有东西。"][n % 3]
    question = ["What colour is it?", "The item is", "它是什么颜色？"][n % 3]  # noqa: RUF001
    return {
        "flores_passage": passage,
        "question": question,
        **answers,
        "correct_answer_num": str(n % 4 + 1),
    }


def gpqa(n: int) -> Row:
    wrong = {f"Incorrect Answer {k}": f"{OPTIONS[k]}\n" for k in (1, 2, 3)}
    return {"Question": f"What colour is item {n}?\n", "Correct Answer": " red", **wrong}


def ifeval(n: int) -> Row:
    words, at_most = (
        ["length_constraints:number_words"],
        {"num_words": 3, "relation": "at least", "language": None},
    )
    if n % 2:
        return {"key": n, "prompt": "No commas, three words.", "kwargs": [at_most, {}],
                "instruction_id_list": [*words, "punctuation:no_comma"]}  # fmt: skip
    return {
        "key": n,
        "prompt": "Three words or more.",
        "kwargs": [at_most],
        "instruction_id_list": words,
    }


NUMBERS = ("18", "1,234", "3.5", "-2", "70", "0")
SOLUTIONS = ("18", "\\frac{1}{2}", "x=3", "2\\sqrt{3}", "(1, 2)", "50\\%")
ROWS: dict[str, Any] = {
    "Rowan/hellaswag": hellaswag,
    "jon-tow/okapi_hellaswag": hellaswag,
    "allenai/ai2_arc": lettered,
    "tau/commonsense_qa": lambda n: lettered(n) | {"answerKey": lettered(n)["answerKey"]},
    "allenai/openbookqa": lambda n: lettered(n % 2, "question_stem"),
    "allenai/winogrande": winogrande,
    "ybisk/piqa": lambda n: {
        "goal": ["Paint it", "how do you eat?", "When boiling butter,"][n % 3], "sol1": "Paint it twice",
        "sol2": " eat.", "label": n % 2,
    },
    "allenai/social_i_qa": lambda n: {
        "context": "Kim has an item.", "question": "Why?", "answerA": "a gift", "answerB": "Bought",
        "answerC": "found.", "label": str(n % 3 + 1),
    },
    "google/boolq": lambda n: {
        "question": ["is it red", "Is it green?"][n % 2], "passage": ["It is.", "It -- (an item) is red "][n % 2],
        "answer": n % 3 == 0,
    },
    "cais/mmlu": lambda n: {
        "question": lettered(n)["question"], "choices": list(OPTIONS), "answer": n % 4, "subject": "x",
    },
    "TIGER-Lab/MMLU-Pro": lambda n: {
        "question": lettered(n)["question"], "options": [*OPTIONS, "none"][: 4 + n % 2], "answer": "ABCD"[n % 4],
        "answer_index": n % 4,
    },
    "openai/gsm8k": lambda n: {
        "question": f"How many is {n}?", "answer": f"It is {n}+1=<<{n}+1={n + 1}>>.\n#### {NUMBERS[n % 6]}",
    },
    "DigitalLearningGmbH/MATH-lighteval": lambda n: {
        "problem": f"Find $x_{n}$.", "solution": f"So it is\n$\\boxed{{{SOLUTIONS[n % 6]}}}$." + "\n" * (n % 2),
        "level": "Level 1", "type": "x",
    },
    "facebook/belebele": belebele,
    "CohereForAI/Global-MMLU": global_mmlu,
    "qintongli/GSM-Plus": lambda n: {
        "question": f"How many is {n}?", "answer": (*NUMBERS[:3], "None", "1/2")[n % 5],
        "perturbation_type": "critical thinking" if n == 3 else "numerical substitution",
    },
    "yentinglin/aime_2025": lambda n: {"problem": f"Find $x_{n}$.\n", "answer": ("18", "204", "70")[n % 3]},
    "Idavidrein/gpqa": gpqa,
    "google/IFEval": ifeval,
}  # fmt: skip


def rows(repo: str, subset: str, numbers: range) -> list[Row]:
    """Made-up rows in the columns of the dataset."""
    if repo == "facebook/flores":
        texts = {"zho_Hans": "这是第{n}句。", "arb_Arab": "هذه هي الجملة {n}."}
        names = subset.split("-")
        return [
            {f"sentence_{name}": texts.get(name, "This is {n}: " + name).format(n=n) for name in names}
            for n in numbers
        ]  # fmt: skip
    return [ROWS[repo](n) for n in numbers]


# ---- made-up answers

LETTERS = [
    "Answer: {}", "**Answer: {}**", "{}", "({})", "The answer is {}.", "I think {} because A is wrong.", "\\boxed{{{}}}",
    "Answer: ${}$", "Answer: {})", "Antwort: {}", "Réponse: {}", "Réponse : {}", "Risposta: {}", "Resposta: {}", "Respuesta: {}",
    "**Antwort:** {}", "La respuesta es {}", "<think>\nAnswer: A\n</think>\nAnswer: {}", "<think>\nAnswer: {}",
    "<think>\nAnswer: {}\n</think>\nNo idea", "Answer:{}", "answer: {}", "Answer: {}\n\nI am sure, as D is odd.",
    "Answer: {}\n", "**Answer: {}**\n\nAs C is odd", "Answer: **{}**", "Answer: ({}) red", "Antwort: {}) rot", "Antwort: {}\n\nA ist",
    "Antwort:\n{}", "Risposta: {}\nPerché B no", "Respuesta: **{}**\n", "Réponse: ({})\n", "Antwort: ${}$", "Resposta: {}).",
]  # fmt: skip
FORMS = [
    "{}", "The answer is {}.", "It is $\\boxed{{{}}}$.", "Therefore, the final answer is: $\\boxed{{{}}}$. I hope it is correct",
    "#### {}", " It is 3+4=<<3+4=7>>.\n#### {}", "${}$", "So $x = {}$", "**{}**", "\\boxed{{{}}} or \\boxed{{5}}", "First 5, then {}",
    "The answer is 5. No, it is {}", "{} apples", "${}", "<think>\nIt is \\boxed{{5}}.\n</think>\nIt is \\boxed{{{}}}.",
    "<think>\nIt is \\boxed{{{}}}.", "<think>\nIt is \\boxed{{{}}}.\n</think>\nNo idea", "x", "", "The answer is {}.0",
    "{}\n\nQuestion: 5", "The answer is {}\nSo 7 it is", "= {}", "\n{}\n", "The answer is ({}).", "**{}** apples",
    "The answer is: {}\n", "answer = {}", "{}%", "{}m2", "({}) apples, 5) pears", "Answer : {}", "{}0",
]  # fmt: skip
SENTENCES = ["No commas here at all", "One, two", "", "Yes", "<think>\nA, b\n</think>\nOne two three", "**One** two, three\nfour",
             "<think>\nOne two three four"]  # fmt: skip
TRANSLATIONS = ["This is 0: eng_Latn", "这是第1句。", "Something else", "هذه هي الجملة 3."]


def answers(name: str) -> list[str]:
    """What a model may have written, whatever the row."""
    if name == "ifeval":
        return SENTENCES
    if name.startswith("flores"):
        return TRANSLATIONS
    if name.startswith(("gpqa", "global_mmlu_instruct")):
        return [form.format(letter) for form in LETTERS for letter in "AB"]
    golds = (
        SOLUTIONS if name.startswith("math") else (*NUMBERS, "0.5", "204", "\\frac{1}{2}", "1234")
    )
    return list(dict.fromkeys(form.format(gold) for form in FORMS for gold in golds))


def likelihoods(choices: int) -> Iterator[tuple[list[float], list[int]]]:
    """Log-likelihoods of the choices, and their numbers of tokens."""
    drawn = random.Random(0)
    for _ in range(12):
        yield (
            [-round(20 * drawn.random(), 3) for _ in range(choices)],
            [drawn.randint(1, 6) for _ in range(choices)],
        )


def dataset_of(config: Any, shots: str | None) -> dict[str, list[Row]]:
    """{split: rows} of a lighteval task's configuration, of either version."""
    keep = config.hf_filter or (lambda row: True)
    found = {
        split: [dict(row) for row in rows(config.hf_repo, config.hf_subset, range(6)) if keep(row)]
        for split in config.evaluation_splits
    }
    if shots and shots not in found:
        found[shots] = [
            dict(row) for row in rows(config.hf_repo, config.hf_subset, range(10, 19)) if keep(row)
        ]
    return found


# ---- the released side


class Tokenizer:
    """Gives a chat back as it is."""

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return json.dumps(messages)


class Model:
    tokenizer, max_length = Tokenizer(), None


class Silent:
    """Takes the place of lighteval's log."""

    def __getattr__(self, name: str) -> Any:
        return Silent()

    def __call__(self, *_: Any, **__: Any) -> None: ...


def released_task(name: str, config: Any, shots: int) -> Row:
    from lighteval.tasks.lighteval_task import LightevalTask, create_requests_from_tasks

    task = LightevalTask(config.name, config)
    (split,) = (
        task.fewshot_split or [None]
        if isinstance(task.fewshot_split, list)
        else [task.fewshot_split]
    )
    task.dataset = dataset_of(config, split)
    random.seed(1234)  # as lighteval's pipeline does
    chat = name.split(":")[0] in IN_CHAT
    _, docs = create_requests_from_tasks(
        {config.name: task}, {config.name: [(shots, False)]}, 1, Model(), None, Silent(),  # type: ignore[arg-type]
        chat, SYSTEM_PROMPT if chat else None, None,
    )  # fmt: skip
    asked = []
    for doc in docs.values():
        prompt = json.loads(doc.ctx) if chat else doc.ctx
        gold = doc.gold_index if isinstance(doc.gold_index, list) else [doc.gold_index]
        asked.append(
            {"prompt": prompt, "choices": doc.choices, "gold": gold} | scores(task, name, doc)
        )
    return {
        "released": config.name,
        "dataset": [config.hf_repo, config.hf_subset, config.hf_revision],
        "splits": [*task.evaluation_split], "shots": [split, config.few_shots_select, shots],
        "answer_tokens": config.generation_size, "stop": list(config.stop_sequence or ()),
        "metrics": [metric.metric_name for metric in task.metrics],
        "asked": asked,
    } | corpus(task, docs)  # fmt: skip


def single(task: Any) -> list[Any]:
    """The task's metrics of one answer a question."""
    return [
        m
        for m in task.metrics
        if "samples" not in m.metric_name or m.metric_name.endswith(":1_samples")
    ]


def scores(task: Any, name: str, doc: Any) -> Row:
    """{metric: the score of each answer, 0 or 1, as text; a list for several instructions}."""
    from lighteval.metrics import apply_generative_metric, apply_multichoice_metric
    from lighteval.metrics.metrics import MetricCategory
    from lighteval.metrics.utils.metric_utils import CorpusLevelMetric
    from lighteval.models.model_output import ModelResponse

    found = []
    if any(metric.category == MetricCategory.MULTICHOICE for metric in task.metrics):
        for logprobs, tokens in likelihoods(len(doc.choices)):
            answered = [
                ModelResponse(result=(logprob, False), generated_tokens=[0] * count)
                for logprob, count in zip(logprobs, tokens, strict=True)
            ]
            found += apply_multichoice_metric([""], [answered], [doc], task.metrics)
    else:
        metrics = [
            m
            for m in single(task)
            if not isinstance(m, CorpusLevelMetric) and "bleu" not in m.metric_name
        ]
        for text in answers(name):
            found += apply_generative_metric([""], [[ModelResponse(result=[text])]], [doc], metrics)
    return {"scores": {key: text_of([score[key] for score in found]) for key in (found or [{}])[0]}}


def text_of(found: list[Any]) -> str:
    """`011`, a digit an answer; `01 11` where each has several instructions."""
    several = [isinstance(score, list) for score in found]
    texts = (
        "".join(f"{float(part):g}" for part in (score if isinstance(score, list) else [score]))
        for score in found
    )
    return (" " if any(several) else "").join(texts)


def corpus(task: Any, docs: dict[Any, Any]) -> Row:
    """{metric: score of all items together}, where an answer is scored so."""
    from lighteval.metrics.utils.metric_utils import CorpusLevelMetric

    found = {}
    for metric in task.metrics:
        if isinstance(metric, CorpusLevelMetric):
            items = [
                metric.sample_level_fn(golds=doc.get_golds(), predictions=[text])
                for doc, text in zip(docs.values(), TRANSLATIONS, strict=False)
            ]
            found[metric.metric_name] = metric.corpus_level_fn(items)
    return {"corpus": found} if found else {}


def main() -> None:
    import sys
    from types import ModuleType, SimpleNamespace

    # of tasks that are not asked: a file is fetched, judges' names are looked up, and words counted
    # in every language
    fetching = "lighteval.tasks.extended.tiny_benchmarks"
    for name in (fetching, f"{fetching}.main"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].TASKS_TABLE = []  # type: ignore
    sys.modules[fetching].main = sys.modules[f"{fetching}.main"]  # type: ignore
    from huggingface_hub import HfApi
    from lighteval.metrics import normalizations

    HfApi.list_models = lambda self, model_name: [SimpleNamespace(id=model_name)]  # type: ignore
    normalizations.get_word_tokenizer = lambda language: Silent()
    import tasks
    from lighteval.tasks import default_tasks
    from lighteval.tasks.extended.ifeval.main import TASKS_TABLE as IFEVAL
    from lighteval.tasks.extended.smollm.global_mmlu import TASKS_TABLE as GLOBAL_MMLU

    known = {task.name: task for task in [*tasks.TASKS_TABLE, *IFEVAL, *GLOBAL_MMLU]}
    known |= {
        "aime25": default_tasks.aime25,
        "gpqa:diamond": default_tasks.gpqa_diamond_instruct_lighteval,
    }
    found = {ours: released_task(ours, known[name], shots) for ours, (name, shots) in TASKS.items()}
    members = {
        name: sorted(key.split(":")[1] for key in known if key.startswith(f"{name}:"))
        for name in ("mmlu_cf", "math_cot")
    }
    everything = {"tasks": found, "members": members}
    FILE.write_text(
        json.dumps(everything, ensure_ascii=False, indent=1, default=int) + "\n", "utf-8"
    )


if __name__ == "__main__":
    main()
