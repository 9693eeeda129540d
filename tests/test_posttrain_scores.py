"""What counts as well-formed, as a call and as right."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from posttrain_jobs import chat_rows, kwargs, tokenizer_with_pad, write_rows

from posttrain.scores import (
    END,
    Scorer,
    is_right,
    parse_call,
    shared_out,
    shares,
    tool_figures,
    tool_names,
    well_formed,
)

THINK = {
    f"<think>\nA.\n</think>\nB.{END}": True,
    f"<think>A.</think>B.{END}": True,
    "<think>\nA.\n</think>\nB.": False,  # no end
    f"<think>\n\n</think>\nB.{END}": False,  # empty trace
    f"<think>\nA.\n</think>\n{END}": False,  # empty answer
    f"<think>\nA. B.{END}": False,  # not closed
    f"B.{END}": False,
    f"A.\n</think>\nB.{END}": False,
    f"<think>\nA.\n</think>\n<think>\nA.\n</think>\nB.{END}": False,
    f"<think>\nA.\n</think>\nB.</think>{END}": False,
    f"Well. <think>\nA.\n</think>\nB.{END}": False,
}
NO_THINK = {
    f"B.{END}": True,
    "B.": False,
    END: False,
    f" \n{END}": False,
    f"<think>\n\n</think>\nB.{END}": False,
    f"B.</think>{END}": False,
}


@pytest.mark.parametrize(("answer", "expected"), THINK.items())
def test_form_in_think_mode(answer: str, expected: bool) -> None:
    assert well_formed(answer, thinks=True) is expected


@pytest.mark.parametrize(("answer", "expected"), NO_THINK.items())
def test_form_in_no_think_mode(answer: str, expected: bool) -> None:
    assert well_formed(answer, thinks=False) is expected


CALLS: list[tuple[str, str, Any]] = [
    ("xml", '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', ("f", {"x": 1})),
    ("xml", 'Sure. <tool_call>{"name": "f", "arguments": {}}</tool_call>', ("f", {})),
    ("xml", '<tool_call>\n{"name": "f", "arguments": {"x": }}\n</tool_call>', None),
    ("xml", '<tool_call>\n{"name": "f"}\n</tool_call>', None),
    ("xml", '<tool_call>\n{"name": "f", "arguments": {}}', None),
    ("xml", "<tool_call>\n[1]\n</tool_call>", None),
    ("xml", "<code>\nprint(f(x=1))\n</code>", None),
    ("python", '<code>\nprint(f(x=1, y="a"))\n</code>', ("f", {"x": 1, "y": "a"})),
    ("python", "<code>\nf(x=-2)\n</code>", ("f", {"x": -2})),
    ("python", "<code>\nprint(f(x=))\n</code>", None),
    ("python", "<code>\nprint(f(1))\n</code>", None),
    ("python", "<code>\nx = 3\n</code>", None),
    ("python", "<code>\nprint(f(x=y))\n</code>", None),
]


@pytest.mark.parametrize(("form", "text", "expected"), CALLS)
def test_calls(form: str, text: str, expected: Any) -> None:
    assert parse_call(text, form) == expected


def tool_row() -> dict[str, Any]:
    tools = [json.dumps({"name": name}) for name in ("add", "mul")]
    check = {"turn": 1, "kind": "tool", "format": "xml", "name": "add", "arguments": {"x": 3}}
    return {
        "chat_template_kwargs": kwargs(True, xml_tools=tools, python_tools=["def sub(x: int)"]),
        "check": check,
    }


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("add", {"x": 3}, (True, True, True, True)),
        ("add", {"x": 4}, (True, True, True, False)),
        ("mul", {"x": 3}, (True, True, False, False)),
        ("div", {"x": 3}, (True, False, False, False)),
    ],
)
def test_a_call_is_compared_with_the_expected_one(
    name: str, arguments: dict[str, int], expected: tuple[bool, ...]
) -> None:
    call = json.dumps({"name": name, "arguments": arguments})
    answer = f"<think>\nA.\n</think>\n<tool_call>\n{call}\n</tool_call>{END}"
    assert tuple(tool_figures(tool_row(), answer).values()) == expected
    assert tool_names(tool_row()) == {"add", "mul", "sub"}


def test_a_call_in_the_reasoning_does_not_count() -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"x": 3}}\n</tool_call>'
    assert not any(tool_figures(tool_row(), f"<think>\n{call}\n</think>\nNo.{END}").values())


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("It is 12.", True), ("It is 112.", False), ("<think>\n12\n</think>\nIt is 13.", False)],
)
def test_an_answer_is_right_where_the_result_stands_as_a_word(answer: str, expected: bool) -> None:
    assert is_right({"check": {"result": "12"}}, answer + END) is expected


def test_shares_are_of_the_rows_that_can_be_scored() -> None:
    with_check, without = {"check": {"result": "1"}}, {"source": "hub"}
    found = shares("no_think", [(with_check, f"1{END}"), (without, "1"), (without, f"2{END}")])
    assert found == {"no_think_well_formed": 2 / 3, "no_think_task_accuracy": 1.0}


class Parrot:
    """A model that answers a prompt with the tokens it was told to."""

    training, device = True, "cpu"

    def __init__(self, tokenizer: Any, answers: dict[str, str]):
        self.tokenizer, self.answers = tokenizer, answers
        self.lengths: list[int] = []

    def eval(self) -> None:
        self.training = False

    def train(self, mode: bool) -> None:
        self.training = mode

    def generate(self, input_ids: Any, attention_mask: Any, **_: Any) -> Any:
        import torch

        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            prompt = self.tokenizer.decode(ids[mask.bool()])
            assert mask.tolist() == sorted(mask.tolist())  # padded on the left
            rows.append(self.tokenizer(self.answers[prompt.split("user\n")[-1]])["input_ids"])
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        answers = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        return torch.cat([input_ids, answers], dim=1)


def test_held_out_prompts_are_asked_up_to_the_scored_turn(tmp_path: Path) -> None:
    rows = chat_rows(6)
    write_rows(tmp_path / "think.jsonl", [rows[0], rows[4]])
    write_rows(tmp_path / "no_think.jsonl", [rows[1], rows[3]])
    write_rows(tmp_path / "tools.jsonl", [rows[2]])
    tokenizer = tokenizer_with_pad(short_system=True)
    opening, empty = "<|im_end|>\n<|im_start|>assistant\n", "<think>\n\n</think>\n"
    call = '<tool_call>\n{"name": "add", "arguments": {"x": 2}}\n</tool_call>'
    thought = "<think>\nWell.\n</think>\n"
    model = Parrot(
        tokenizer,
        {
            f"What is 0?{opening}": f"{thought}0{END}",
            f"What is 4?{opening}": f"{thought}5{END} and more",
            f"What is 1?{opening}{empty}": f"1{END}",
            f"What is 3?{opening}{empty}": "3 without an end",
            f"What is 2?{opening}": f"{thought}{call}{END}",
        },
    )
    found = Scorer(tokenizer, tmp_path, 9, 50, {})(model)
    assert model.training
    assert found == {
        "think_well_formed": 1.0,
        "think_task_accuracy": 0.5,
        "no_think_well_formed": 0.5,
        "no_think_task_accuracy": 1.0,
        "tool_call_parses": 1.0,
        "tool_listed": 1.0,
        "tool_right": 1.0,
        "tool_arguments_right": 1.0,
    }


@pytest.mark.parametrize("items", [20, 200])
def test_of_64_processes_each_works_on_a_64th(items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    worked: list[int] = []

    def work(share: Sequence[int]) -> list[int]:
        worked.extend(share)
        return [-item for item in share]

    def gather(shares: list[Any], own: list[int]) -> None:
        shares[:] = [[-item for item in range(items)[rank::64]] for rank in range(64)]
        assert own in shares

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 64)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    for rank in range(64):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        before = len(worked)
        assert shared_out(range(items), work) == [-item for item in range(items)]
        assert len(worked) - before <= -(-items // 64)
    assert sorted(worked) == list(range(items))
