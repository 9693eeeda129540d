"""Tool calls: read from answers, judged as the leaderboard's own checker judges, asked with tools."""

import copy
import json
import random
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from forked import run
from small_models import make_tokenizer, random_model

from datatrove_pipelines.standins.corpus import fetch
from eval_tasks.call_scores import TYPES, calls_of, is_right, tools_of, written
from eval_tasks.package_data import CALLS, PACKAGES, calls

(PACKAGE,) = (pin for pin in PACKAGES if pin.startswith("bfcl-eval"))
# One argument of each kind.
SCHEMAS = {
    "text": {"type": "string"}, "number": {"type": "float"}, "count": {"type": "integer"},
    "on": {"type": "boolean"}, "names": {"type": "array", "items": {"type": "string"}},
    "where": {"type": "dict", "properties": {}}, "all": {"type": "array", "items": {"type": "dict"}},
}  # fmt: skip
PAINT = {
    "name": "paint", "description": "Paints.",
    "parameters": {"type": "dict", "properties": SCHEMAS, "required": ["text"]},
}  # fmt: skip


def told(*calls: Any) -> str:
    named = [{"name": "paint", "arguments": call} if "name" not in call else call for call in calls]
    return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in named)


@pytest.mark.parametrize(
    ("values", "given", "right"),
    [
        ({}, {}, True),
        ({}, {"text": "the  RED one."}, True),  # case, spaces and some marks do not count
        ({}, {"text": "red"}, False),
        ({}, {"text": None}, False),
        ({}, {"other": 1}, False),
        ({}, {"count": 1}, False),  # the function has it, the answer not
        ({"number": [2]}, {"number": 2.0}, True),
        ({"number": [2.0]}, {"number": 2}, True),
        ({"count": [2]}, {"count": 2.0}, False),
        ({"count": [2, ""]}, {}, True),
        ({"count": [2]}, {}, False),
        ({"count": [1]}, {"count": True}, False),
        ({"count": ["n"]}, {"count": "n"}, True),  # a variable in a number's place
        ({"on": [True]}, {"on": "true"}, False),
        ({"names": [["a b", "c"]]}, {"names": ["A-B", "c"]}, True),
        ({"names": [["a", "c"]]}, {"names": ["c", "a"]}, False),
        ({"names": [["a"]]}, {"names": [1]}, False),
        ({"where": [{"x": [1, 2], "y": ["", 3]}]}, {"where": {"x": 2}}, True),
        ({"where": [{"x": [1, 2], "y": ["", 3]}]}, {"where": {"x": 2, "y": 4}}, False),
        ({"where": [{"x": [1]}]}, {"where": {}}, False),
        ({"all": [[{"x": [1]}, {"x": [2]}]]}, {"all": [{"x": 1}, {"x": 2}]}, True),
        ({"all": [[{"x": [1]}, {"x": [2]}]]}, {"all": [{"x": 2}, {"x": 1}]}, False),
        ({"all": [[{"x": [1]}]]}, {"all": ["x"]}, False),
        ({"all": [[{"x": [1]}]]}, {"all": [{"x": 1}, {"x": 1}]}, False),
    ],
)
def test_an_argument_is_right_where_it_is_one_of_the_possible(
    values: dict[str, Any], given: dict[str, Any], right: bool
) -> None:
    due = [{"paint": {"text": ["the red one"]} | values}]
    assert is_right(told({"text": "The red one"} | given), [PAINT], due) == right


def test_calls_come_in_any_order_and_none_too_many() -> None:
    due = [{"paint": {"text": ["a"]}}, {"paint": {"text": ["b", "c"]}}]
    a, b = {"text": "a"}, {"text": "b"}
    assert is_right(told(b, a), [PAINT], due)
    for wrong in ([a], [a, a], [a, b, b], [a, {"name": "print", "arguments": b}]):
        assert not is_right(told(*wrong), [PAINT], due)
    due[1]["paint"]["text"].append("a")
    assert not is_right(told(a, {"text": "d"}), [PAINT], due)  # one call is not two


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("It is blue.", 0),
        ("<think>\n" + told({"text": "a"}) + "\n</think>\nNo.", 0),
        ("<think>\n" + told({"text": "a"}), 0),
        ("<think>\nHm.\n</think>\nI paint.\n" + told({"text": "a"}, {"text": "b"}), 2),
        (told({"text": "</tool_call>"}, {"text": "</think> <think> <tool_call>"}), 2),
        ('<tool_call>{"name": "paint", "arguments": {}}', None),  # no server makes it a call
        ('<tool_call>{"name": "paint", "arguments": {"a": NaN}}</tool_call>', None),
        ("<tool_call>paint()</tool_call>", None),
        ('<tool_call>{"name": "paint"}</tool_call>', None),
        ('<tool_call>["paint"]</tool_call>', None),
        ('<tool_call>{"name": "paint", "arguments": "{}"}</tool_call>', None),
        (told({"text": "a"}) + "<tool_call>{", None),
    ],
)
def test_calls_are_read_behind_the_trace(answer: str, number: int | None) -> None:
    found = calls_of(answer)
    assert (None if found is None else len(found)) == number
    assert is_right(answer, [PAINT], []) == (not number)  # no call is due


def test_a_template_gets_json_schemas() -> None:
    (tool,) = tools_of([PAINT])
    assert (
        tool["parameters"]["type"] == tool["parameters"]["properties"]["where"]["type"] == "object"
    )
    assert tool["parameters"]["properties"]["number"] == {"type": "number"}
    assert PAINT["parameters"]["type"] == "dict"  # as it was
    assert {*TYPES} == {"string", "integer", "float", "boolean", "array", "tuple", "dict", "any"}


# ---- against the package


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fetch([PACKAGE], tmp_path_factory.mktemp("cache"))


@pytest.fixture
def checker(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The leaderboard's `ast_checker`, from its wheel; its list of models needs all their libraries."""
    (wheel,) = wheels.glob("bfcl_eval-*.whl")
    monkeypatch.syspath_prepend(str(wheel))
    base = "bfcl_eval.eval_checker.ast_eval.type_convertor"
    for name, has in (
        ("bfcl_eval.constants.model_config", "MODEL_CONFIG_MAPPING"),
        (f"{base}.java_type_converter", "java_type_converter"),
        (f"{base}.js_type_converter", "js_type_converter"),
    ):
        stub = types.ModuleType(name)
        own = types.SimpleNamespace(underscore_to_dot=False)
        setattr(stub, has, {"any": own} if has.isupper() else None)
        monkeypatch.setitem(sys.modules, name, stub)
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    def check(functions: Any, made: Any, due: Any, category: str) -> bool:
        output = [{call["name"]: call["arguments"]} for call in made]
        verdict = ast_checker(functions, output, due, Language.PYTHON, category, "any")
        return bool(verdict["valid"])

    return check


ODD = [None, True, 0, 1, 2.5, "", "x", [], ["x"], [1], {}, {"a": 1}, [{}], [{"a": "x"}]]


def changed(value: Any, rng: random.Random) -> Any:
    """The value a little or quite another."""
    if rng.random() < 0.15:
        return rng.choice(ODD)
    if isinstance(value, str):
        return rng.choice([value.upper(), value.replace(" ", ""), f"{value}.", f"{value}s"])
    if isinstance(value, bool | int | float):
        return rng.choice([float(value), int(value), value + 1, str(value)])
    if isinstance(value, list):
        new = [changed(item, rng) for item in value]
        return rng.choice([value[::-1], value[:-1], [*value, *value[:1]], new])
    if isinstance(value, dict):
        new = {key: changed(item, rng) for key, item in value.items() if rng.random() < 0.9}
        return rng.choice([new, value | {"more": 1}])
    return value


def mutants(right: list[Any], rng: random.Random) -> Iterator[list[Any]]:
    for _ in range(8):
        calls = copy.deepcopy(right)
        call = rng.choice(calls)
        arguments = call["arguments"]
        key = rng.choice([*arguments, ""])
        match rng.randrange(5):
            case 0:
                call["name"] += "_"
            case 1:
                arguments.pop(key, None)
            case 2:
                calls += calls[: rng.choice([-1, 1])]
                rng.shuffle(calls)
            case _ if key:
                arguments[key] = changed(arguments[key], rng)
        yield calls


@pytest.mark.slow
@pytest.mark.parametrize("category", [name for name in CALLS.values() if name != "irrelevance"])
def test_every_verdict_is_that_of_the_leaderboards_checker(
    category: str, wheels: Path, checker: Any
) -> None:
    rng, seen = random.Random(category), {True: 0, False: 0}
    for row in calls(wheels, category):
        functions, due = json.loads(row["functions"]), json.loads(row["due"])
        answer = written(functions, due)
        assert is_right(answer, functions, due), row["id"]
        found = calls_of(answer)
        assert found
        right = [{"name": call.name, "arguments": call.arguments} for call in found]
        for made in (right, *mutants(right, rng)):
            verdict = checker(functions, made, due, category)
            assert is_right(told(*made), functions, due) == verdict, (row["id"], made)
            seen[verdict] += 1
    assert min(seen.values()) > 400, seen


@pytest.mark.slow
def test_a_prompt_has_the_tools_and_the_mode_of_the_suite(wheels: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    random_model(tokenizer, 0).save_pretrained(tmp_path)
    rows = [next(calls(wheels, "irrelevance"))]
    script = (
        "import json, sys\nfrom eval_tasks import compat\ncompat.before_import()\n"
        "from eval_tasks.smollm3 import TASKS_TABLE\n"
        "from lighteval.tasks.prompt_manager import PromptManager\n"
        "from transformers import AutoTokenizer\n"
        "task = next(t for t in TASKS_TABLE if t.name == 'bfcl:irrelevance')\n"
        "doc = task.prompt_function(json.loads(sys.argv[2])[0], task.name)\n"
        "manager = PromptManager(True, AutoTokenizer.from_pretrained(sys.argv[1]), '/no_think')\n"
        "own = PromptManager._prepare_chat_template\n"
        "texts = [own.__wrapped__(manager, doc), manager.prepare_prompt(doc)]\n"
        "from eval_tasks.endpoint import Endpoint\n"
        "from eval_tasks.job import Job, Server\n"
        "servers = [Server('http://127.0.0.1', 'm', takes_tokens=True)]\n"
        "more = dict(chat=True, system_prompt='/no_think', servers=servers)\n"
        "model = Endpoint(sys.argv[1], Job([], [], sys.argv[1] + '/out.json', **more))\n"
        "texts.append(model.tokenizer.decode(model._request(doc, 0)['ids']))\n"
        "print('RESULT' + json.dumps(texts))"
    )
    done = run("scores", "-c", script, str(tmp_path), json.dumps(rows), cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs, ours, of_a_server = json.loads(done.stdout.split("RESULT")[1])
    messages, functions = (json.loads(rows[0][name]) for name in ("messages", "functions"))
    assert "<tools>" not in theirs
    wanted = tokenizer.apply_chat_template(
        [{"role": "system", "content": "/no_think"}, *messages], tools=tools_of(functions),
        tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    assert ours == of_a_server == wanted
    assert ours.endswith("<think>\n\n</think>\n") and functions[0]["name"] in ours
