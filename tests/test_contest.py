"""LiveCodeBench by lighteval's rules in our sandbox, and the mean of several samples (avg@n)."""

import json
import os
from typing import Any

import pytest
from conftest import ROOT
from forked import run
from hub_rows import contest

from launch.recipe.evaluation import load_suite

pytestmark = pytest.mark.slow

CHILD = """
import json, sys
from eval_tasks import compat
compat.before_import()
from eval_tasks import smollm3, tasks
from eval_tasks.task_table import read_tasks
from lighteval.models.model_output import ModelResponse
(task,) = [t for t in smollm3.TASKS_TABLE if t.name == sys.argv[1]]
asked = json.loads(sys.stdin.read())
found = []
for row, answers in asked:
    try:
        doc = task.prompt_function(row, task.name)
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
        continue
    (metric,) = task.metrics
    (value,) = metric.compute_sample(doc=doc, model_response=ModelResponse(text=answers)).values()
    found.append([doc.query, float(value)])
print("RESULT" + json.dumps(found))
"""


def scores(task: str, asked: list[tuple[dict[str, Any], list[str]]]) -> list[Any]:
    """[prompt, score] of each row with its answers, or the error that refused the row."""
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = run("scores", "-c", CHILD, task, given=json.dumps(asked), cwd=ROOT, env=offline)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[Any] = json.loads(done.stdout.split("RESULT")[1])
    return found


def fenced(code: str) -> str:
    return f"<think>\nSo ```python\nx\n``` it is.\n</think>\nHere:\n```python\n{code}\n```\n"


STDIN, METHOD = contest(2), contest(3)
READS = "print(int(input()) + int(input()))"
WRAPPED = "import sys\ndef main():\n    print(sum(map(int, sys.stdin.read().split())))\nif __name__ == '__main__':\n    main()"
ADDS = "class Solution:\n    def sum_of_two(self, a: int, b: int) -> int:\n        return a + b"
PROGRAMS = [
    (STDIN, READS, 1), (STDIN, WRAPPED, 1), (METHOD, ADDS, 1),
    (STDIN, "print(3.0)", 0),  # the first test's answer, by Decimal, and not the second's
    (STDIN, "print(3)", 0), (METHOD, ADDS.replace("a + b", "4"), 0), (METHOD, READS, 0),
    (STDIN, "raise SystemExit", 0), (METHOD, ADDS.replace("return", "exit(0)\n        return"), 0),
    (STDIN, "while True: pass", 0),
    (STDIN, f"open({str(ROOT / 'pwned')!r}, 'w').write('x')\n{READS}", 0),
    (STDIN, f"import socket\nsocket.create_connection(('127.0.0.1', 1))\n{READS}", 0),
]  # fmt: skip


def test_programs_pass_by_lightevals_rules_and_do_no_harm() -> None:
    found = scores("livecodebench:v4", [(row, [fenced(code)]) for row, code, _ in PROGRAMS])
    assert [score for _, score in found] == [wanted for _, _, wanted in PROGRAMS]
    assert not (ROOT / "pwned").exists()
    assert "reads the inputs" in found[0][0] and "starter code" in found[2][0]
    (no_fence,) = scores("livecodebench:v4", [(STDIN, [READS])])
    assert no_fence[1] == 0


def test_private_tests_that_would_run_code_are_refused() -> None:
    import base64
    import pickle
    import zlib

    class Harm:
        def __reduce__(self) -> Any:
            return os.system, ("touch pwned",)

    hidden = base64.b64encode(zlib.compress(pickle.dumps(Harm()))).decode()
    (found,) = scores("livecodebench:v4", [(STDIN | {"private_test_cases": hidden}, [""])])
    assert found.startswith("UnpicklingError: private tests name") and "system" in found
    assert not (ROOT / "pwned").exists()


def test_of_several_samples_the_mean_counts() -> None:
    """By hand: 3 of 4 right, 1 of 2 right, none; as pass@1 is estimated from n samples."""
    row = {"problem": "1 + 1?", "answer": "2"}
    right, wrong = "It is $\\boxed{2}$.", "It is $\\boxed{3}$."
    asked = [(row, [right, wrong, right, right]), (row, [wrong, right]), (row, [wrong] * 3)]
    assert [score for _, score in scores("aime_2025", asked)] == [0.75, 0.5, 0.0]
    answers = [fenced(code) for code in (READS, "print(3)", WRAPPED, "")]
    assert [score for _, score in scores("livecodebench:v4_v5", [(STDIN, answers)])] == [0.5]


def test_samples_are_as_published() -> None:
    rows = {row.name: row.samples for row in load_suite("instruct").rows if row.samples > 1}
    assert rows == {"AIME 2025": 64, "GPQA Diamond": 8, "LiveCodeBench v4": 16}
