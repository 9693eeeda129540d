"""LiveCodeBench: prompts and rules are lighteval's own; programs run in our sandbox alone.

lighteval 0.13 would run them as this user, behind a guard that its own docstring calls no sandbox, and
would unpickle the private tests, which runs what the data set's file says.
"""

import base64
import io
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

from lighteval.tasks.requests import Doc
from lighteval.tasks.tasks.lcb import codegen_metrics as rules
from lighteval.tasks.tasks.lcb.main import prepare_prompt

TEST_SECONDS = 6  # as published, for one test
MEMORY_MB = 4096  # as published
GRADING = """
import importlib.util
spec = importlib.util.spec_from_file_location("rules", {file!r})
rules = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rules)
results = rules.run_test({{"input_output": {tests!r}}}, test={code!r}, timeout={seconds})
assert results and all(result > 0 for result in results), results
"""


class _Plain(pickle.Unpickler):
    """Takes values alone: a pickle that names a class or a function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"private tests name {module}.{name}")


def private_tests(encoded: str) -> list[dict[str, str]]:
    """The rows {input, output, testtype} of a column `private_test_cases`."""
    pickled = zlib.decompress(base64.b64decode(encoded))
    return list(json.loads(_Plain(io.BytesIO(pickled)).load()))


def question(row: dict[str, Any], task_name: str) -> Doc:
    """The prompt; the tests, public and private, stand in its `specific`."""
    tests = json.loads(row["public_test_cases"]) + private_tests(row["private_test_cases"])
    checked = {
        "inputs": [test["input"] for test in tests],
        "outputs": [test["output"] for test in tests],
        "fn_name": json.loads(row["metadata"]).get("func_name"),
    }
    return Doc(
        task_name=task_name, query=prepare_prompt(row), choices=[""], gold_index=0,
        specific={"row": checked},
    )  # fmt: skip


def tested(tests: dict[str, Any], completion: str) -> str:
    """A program that runs the last fenced block of an answer on every test, by lighteval's rules."""
    return GRADING.format(
        file=str(Path(rules.__file__)), tests=json.dumps(tests), seconds=TEST_SECONDS,
        code=rules.extract_code(completion),
    )  # fmt: skip


def seconds(tests: dict[str, Any]) -> float:
    """The limit of all tests together, as published."""
    return float((TEST_SECONDS + 1) * len(tests["inputs"]) + 5)
