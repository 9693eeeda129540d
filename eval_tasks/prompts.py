"""From a row of a public dataset to what lighteval's prompt templates take; pure, without lighteval.

Names on the left are the templates' (MCQInput, ContinuationInput, HellaswagInput, BoolQInput).
Returning None leaves a row out.
"""

import re
from string import ascii_uppercase
from typing import Any

Row = dict[str, Any]


def letter_or_number(key: str) -> int:
    """0-based index of an answer key: ARC has both `A` and `1`."""
    return int(key) - 1 if key.isdigit() else ascii_uppercase.index(key)


def labelled(row: Row, question: str = "question") -> Row:
    """ARC, CommonsenseQA and OpenBookQA: choices {text, label} and an answer key."""
    return {
        "question": row[question],
        "choices": row["choices"]["text"],
        "gold_idx": letter_or_number(row["answerKey"]),
    }


def openbookqa(row: Row) -> Row:
    return labelled(row, "question_stem")


def hellaswag(row: Row) -> Row:
    return {
        "activity_label": row["activity_label"],
        "ctx_a": row["ctx_a"],
        "ctx_b": row["ctx_b"],
        "continuations": row["endings"],
        "gold_idx": int(row["label"]),
    }


def mlmm_hellaswag(row: Row) -> Row:
    """The translations carry no activity label."""
    return {
        key: value for key, value in hellaswag({"activity_label": "", **row}).items() if value != ""
    }


def winogrande(row: Row) -> Row | None:
    """The rest of the sentence after each option: what follows the blank tells them apart."""
    before, _, after = row["sentence"].partition("_")
    if not before.strip():
        return None
    return {
        "context": before,
        "continuations": [f"{row[option]} {after.strip()}" for option in ("option1", "option2")],
        "gold_idx": int(row["answer"]) - 1,
    }


def piqa(row: Row) -> Row:
    return {
        "question": row["goal"],
        "choices": [row["sol1"], row["sol2"]],
        "gold_idx": int(row["label"]),
    }


def siqa(row: Row) -> Row:
    return {
        "question": row["question"],
        "context": row["context"],
        "choices": [row["answerA"], row["answerB"], row["answerC"]],
        "gold_idx": int(row["label"]) - 1,
    }


def boolq(row: Row) -> Row:
    return {"question": row["question"], "context": row["passage"], "answer": row["answer"]}


def mmlu(row: Row) -> Row:
    return {"question": row["question"], "choices": row["choices"], "gold_idx": int(row["answer"])}


def mmlu_pro(row: Row) -> Row:
    return {
        "question": row["question"],
        "choices": row["options"],
        "gold_idx": int(row["answer_index"]),
    }


def global_mmlu(row: Row) -> Row:
    return {
        "question": row["question"],
        "choices": [row[f"option_{letter}"] for letter in "abcd"],
        "gold_idx": ascii_uppercase.index(row["answer"]),
    }


def belebele(row: Row) -> Row:
    return {
        "question": row["question"],
        "context": row["flores_passage"],
        "choices": [row[f"mc_answer{number}"] for number in range(1, 5)],
        "gold_idx": int(row["correct_answer_num"]) - 1,
    }


def humaneval_program(row: Row, completion: str) -> str:
    """The function, its tests, and the call that runs them."""
    return f"{row['prompt']}{completion}\n{row['test']}\ncheck({row['entry_point']})\n"


def mbpp_prompt(row: Row) -> str:
    """The prompt of the MBPP paper (Austin et al. 2021, arXiv:2108.07732), with all its tests."""
    tests = "\n".join(row["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {row['prompt']} Your code "
        f"should pass these tests:\n\n{tests}\n"
    )


def mbpp_program(row: Row, completion: str) -> str:
    """The imports of its tests, the answer without a fence around it, and the tests."""
    imports = "\n".join(row["test_imports"])
    code = re.sub(r"^\s*```(?:python)?\n", "", completion)
    return f"{imports}\n{code}\n{row['test']}\n"
