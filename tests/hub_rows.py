"""Made-up rows in the columns of the hub's datasets, for every task of every suite."""

import base64
import json
import pickle
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
OPTIONS = ("red", "green", "blue", "white")


def choices(n: int, question: str = "question") -> Row:
    options = {"text": list(OPTIONS), "label": list("ABCD")}
    return {question: f"What colour is item {n}?", "choices": options, "answerKey": "ABCD"[n % 4]}


def hellaswag(n: int) -> Row:
    endings = [f"paints it {colour}." for colour in OPTIONS]
    row = {"ctx_a": f"Someone takes item {n}.", "ctx_b": "she", "endings": endings}
    return row | {"label": str(n % 4)}


def global_mmlu(n: int) -> Row:
    options = {f"option_{letter}": option for letter, option in zip("abcd", OPTIONS, strict=True)}
    label = {"cultural_sensitivity_label": "CA", "answer": "ABCD"[n % 4]}
    return {"question": f"What colour is item {n}?", **options, **label}


def belebele(n: int) -> Row:
    answers = {f"mc_answer{number}": option for number, option in enumerate(OPTIONS, start=1)}
    passage = {"flores_passage": "There are items.", "question": f"What colour is item {n}?"}
    return {**passage, **answers, "correct_answer_num": str(n % 4 + 1)}


def gpqa(n: int) -> Row:
    wrong = {f"Incorrect Answer {k}": OPTIONS[k] for k in (1, 2, 3)}
    return {"Question": f"What colour is item {n}?", "Correct Answer": OPTIONS[0], **wrong}


def ifeval(n: int) -> Row:
    kwargs = [{"num_words": 3, "relation": "at least"}]
    instruction = {"instruction_id_list": ["length_constraints:number_words"], "kwargs": kwargs}
    return {"key": n, "prompt": f"Name item {n} in three words or more.", **instruction}


def humaneval(n: int) -> Row:
    prompt = f"def add{n}(a, b):\n    '''The sum.'''\n"
    test = f"def check(f):\n    assert f(1, {n}) == {n + 1}\n"
    return {"prompt": prompt, "entry_point": f"add{n}", "test": test, "task_id": str(n)}


def mbpp(n: int) -> Row:
    test = f"assert add{n}(1, 2) == 3"
    prompt = f"Write a function add{n} that adds."
    return {"prompt": prompt, "test_list": [test], "test_imports": [], "test": test}


def contest(n: int) -> Row:
    """The sum of two numbers: by a method where n is odd, else from stdin to stdout.

    The grader imports all of `operator` before an answer, so that no answer at all would have `add`.
    """
    lines = [(f"{a}\n{n}", str(a + n)) for a in (1, 20)]
    tests = [{"input": text, "output": total, "testtype": "x"} for text, total in lines]
    hidden = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests[1:]))))
    starter = (
        "class Solution:\n    def sum_of_two(self, a: int, b: int) -> int:\n        "
        if n % 2
        else ""
    )
    return {
        "question_content": f"Add two numbers, number {n}.", "starter_code": starter,
        "public_test_cases": json.dumps(tests[:1]), "private_test_cases": hidden.decode(),
        "metadata": json.dumps({"func_name": "sum_of_two"} if n % 2 else {}),
    }  # fmt: skip


def tool_calls(n: int, calls: int = 1) -> Row:
    """A question on a function for which `calls` calls are due."""
    schema = {
        "type": "dict",
        "properties": {"item": {"type": "integer"}, "note": {"type": "string"}},
    }
    function = {
        "name": "paint.item",
        "description": "Paints.",
        "parameters": schema | {"required": ["item"]},
    }
    due = [{"paint.item": {"item": [n + call], "note": ["", "red"]}} for call in range(calls)]
    values = {"messages": [{"role": "user", "content": f"Paint {calls} items from item {n} on."}]}
    values |= {"functions": [function], "due": due}
    return {"id": str(n)} | {key: json.dumps(value) for key, value in values.items()}


ROWS: dict[str, Callable[[int], Row]] = {
    "Rowan/hellaswag": lambda n: hellaswag(n) | {"activity_label": "Painting"},
    "jon-tow/okapi_hellaswag": hellaswag,
    "allenai/ai2_arc": choices,
    "tau/commonsense_qa": choices,
    "allenai/openbookqa": lambda n: choices(n, "question_stem"),
    "allenai/winogrande": lambda n: {
        "sentence": f"Item {n} fits the box since _ is small.", "option1": "the item",
        "option2": "the box", "answer": str(n % 2 + 1),
    },
    "ybisk/piqa": lambda n: {"goal": f"Paint item {n}", "sol1": "Paint.", "sol2": "Eat.", "label": n % 2},
    "allenai/social_i_qa": lambda n: {
        "context": f"Kim has item {n}.", "question": "Why?", "answerA": "a gift", "answerB": "bought",
        "answerC": "found", "label": str(n % 3 + 1),
    },
    "google/boolq": lambda n: {"question": f"is item {n} red", "passage": "It is.", "answer": n % 2 == 0},
    "cais/mmlu": lambda n: {
        "question": f"What colour is item {n}?", "choices": list(OPTIONS), "answer": n % 4, "subject": "x",
    },
    "TIGER-Lab/MMLU-Pro": lambda n: {
        "question": f"What colour is item {n}?", "options": list(OPTIONS), "answer": "ABCD"[n % 4],
        "answer_index": n % 4,
    },
    "openai/gsm8k": lambda n: {"question": f"1 + {n}?", "answer": f"1 + {n} = {n + 1}\n#### {n + 1}"},
    "DigitalLearningGmbH/MATH-lighteval": lambda n: {
        "problem": f"1 + {n}?", "solution": f"It is $\\boxed{{{n + 1}}}$.", "level": "1", "type": "x",
    },
    "openai/openai_humaneval": humaneval,
    "evalplus/humanevalplus": humaneval,
    "evalplus/mbppplus": mbpp,
    "lighteval/code_generation_lite": contest,
    "facebook/belebele": belebele,
    "CohereForAI/Global-MMLU": global_mmlu,
    "qintongli/GSM-Plus": lambda n: {
        "question": f"1 + {n}?", "answer": str(n + 1),
        "perturbation_type": "critical thinking" if n % 3 == 0 else "numerical substitution",
    },
    "yentinglin/aime_2025": lambda n: {"problem": f"1 + {n}?", "answer": str(n + 1)},
    "Idavidrein/gpqa": gpqa,
    "google/IFEval": ifeval,
    "bfcl/simple": tool_calls,
    "bfcl/multiple": tool_calls,
    "bfcl/parallel": lambda n: tool_calls(n, 3),
    "bfcl/parallel_multiple": lambda n: tool_calls(n, 2),
    "bfcl/irrelevance": lambda n: tool_calls(n, 0),
}  # fmt: skip


def row_of(repo: str, subset: str, n: int) -> Row:
    if repo == "facebook/flores":
        codes = subset.split("-")
        return {f"sentence_{code}": f"This is sentence {n} of {code}." for code in codes}
    return ROWS[repo](n)


def write_hub_rows(
    root: Path, wanted: Iterable[tuple[str, str, list[str]]], count: int = 12
) -> None:
    """A local folder for each (repository, subset, splits) as eval_tasks.tasks.dataset names it."""
    configs: dict[str, list[str]] = {}
    for repo, subset, splits in wanted:
        folder = root / repo.replace("/", "--")
        folder.mkdir(parents=True, exist_ok=True)
        card = f"- config_name: {subset}\n  data_files:\n"
        for number, split in enumerate(splits):
            file = folder / f"{subset}-{split}.jsonl".replace(":", "-")
            rows = (row_of(repo, subset, n + 100 * number) for n in range(count))
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
            card += f"  - split: {split}\n    path: {file.name}\n"
        configs.setdefault(repo, []).append(card)
    for repo, cards in configs.items():
        text = f"---\nconfigs:\n{''.join(cards)}---\n"
        (root / repo.replace("/", "--") / "README.md").write_text(text)
