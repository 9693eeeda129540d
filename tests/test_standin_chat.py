"""The embedded chats: honest, learnable forms, the same bytes for a seed, held-out prompts unseen."""

import json
import operator
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from test_chat_template import make_tokenizer

from datatrove_pipelines.standins import chats as module
from datatrove_pipelines.standins.calls import FORMATS, TOOLS, call_text, draw_tool_task
from datatrove_pipelines.standins.chats import STANDINS, ChatSplit, split_rows, write_chats
from datatrove_pipelines.standins.flaws import TASK_FLAWS, TOOL_FLAWS
from datatrove_pipelines.standins.tasks import TASKS
from datatrove_pipelines.standins.words import LANGUAGES
from ground.errors import UserError
from posttrain.scores import is_right, tool_figures, well_formed
from posttrain.template import check_row, render

TABLE = yaml.safe_load((ROOT / "recipes/posttrain/splits.yaml").read_text("utf-8"))
SPLITS = [
    ChatSplit(config, name, row["mode"], row["stand_in"], tuple(row["languages"]), row.get("share", 1.0))
    for config, rows in TABLE["splits"].items()
    for name, row in rows.items()
]  # fmt: skip
BY_NAME = {split.split: split for split in SPLITS}
PREFERENCE = [split for split in SPLITS if split.config == "Preference"]
END = "<|im_end|>"
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chats") / "all"
    write_chats(folder, SPLITS, rows=60, held_out_rows=80, seed=3)
    return folder


def lines_of(file: Path) -> list[dict]:
    with file.open(encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]


def every_row(folder: Path) -> list[dict]:
    return [row for file in sorted(folder.rglob("*.jsonl")) for row in lines_of(file)]


def chats(folder: Path) -> list[dict]:
    return [row for row in every_row(folder) if "messages" in row]


def pairs(folder: Path) -> list[dict]:
    return [row for row in every_row(folder) if "chosen" in row]


def questions(row: dict) -> set[str]:
    messages = row["messages"] if "messages" in row else row["prompt"]
    return {message["content"] for message in messages if message["role"] == "user"}


def thinks(row: dict) -> bool:
    return row["chat_template_kwargs"]["enable_thinking"]


def text_of(message: dict) -> str:
    """What the model writes in this turn, calls included."""
    text = message["content"]
    for call in message.get("tool_calls", ()):
        called = call_text(call["function"]["name"], call["function"]["arguments"], "xml")
        text = f"{text}\n{called}" if text else called
    return text


def fails(row: dict, text: str) -> bool:
    """Whether the scorer finds anything wrong with an answer to the row's prompt."""
    right = (
        is_right
        if row["check"]["kind"] != "tool"
        else lambda *args: all(tool_figures(*args).values())
    )
    return not (well_formed(text + END, thinks(row)) and right(row, text + END))  # fmt: skip


# --- the table of splits


def test_every_published_split_is_in_the_table_with_its_rows():
    counts = {config: len(rows) for config, rows in TABLE["splits"].items()}
    assert counts == {"Mid": 2, "SFT": 25, "Preference": 2}
    # Totals of the dataset card.
    totals = {c: sum(row["rows"] for row in rows.values()) for c, rows in TABLE["splits"].items()}
    assert totals == {"Mid": 4_779_894, "SFT": 3_383_242, "Preference": 446_886}


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.split)
def test_each_split_has_a_stand_in_of_its_mode_and_languages(split):
    if split.config != "Mid":  # whose names do not tell; both were made by reasoning models
        assert split.mode == ("no_think" if split.split.endswith("_no_think") else "think")
    else:
        assert split.mode == "think"
    assert split.stand_in in STANDINS
    assert set(split.languages) <= set(LANGUAGES)
    rows = list(split_rows(split, 40, seed=1))
    assert {thinks(row) for row in rows} == {split.mode == "think"}
    assert {row["source"] for row in rows} == {split.split}
    spoken = {row["check"]["language"] for row in rows if row["check"]["kind"] != "tool"}
    assert spoken <= set(split.languages)
    assert not spoken or len(spoken) >= min(len(split.languages), 4)


def test_all_six_languages_and_both_kinds_of_tools_occur(folder):
    rows = chats(folder)
    assert {row["check"]["language"] for row in rows} == {"en", "fr", "es", "de", "it", "pt"}
    tools = [row for row in rows if row["check"]["kind"] == "tool"]
    assert {row["check"]["format"] for row in tools} == set(FORMATS)
    assert {row["check"]["name"] for row in tools} == {tool.name for tool in TOOLS}


# --- files


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(folder, tmp_path):
    write_chats(tmp_path / "same", SPLITS, rows=60, held_out_rows=80, seed=3)
    write_chats(tmp_path / "other", SPLITS, rows=60, held_out_rows=80, seed=4)
    for file in folder.rglob("*.jsonl"):
        name = file.relative_to(folder)
        assert (tmp_path / "same" / name).read_bytes() == file.read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != file.read_bytes()


def test_a_split_does_not_depend_on_the_others(folder, tmp_path):
    split = BY_NAME["smoltalk_multilingual8_Qwen3_32B_think"]
    write_chats(tmp_path / "one", [split], rows=60, held_out_rows=5, seed=3)
    file = f"sft/{split.split}.jsonl"
    assert (tmp_path / "one" / file).read_bytes() == (folder / file).read_bytes()


def test_splits_of_one_stand_in_have_rows_of_their_own(folder):
    one, other = (lines_of(folder / "mid" / f"{name}.jsonl") for name in TABLE["splits"]["Mid"])
    shared = [row for row in one if row["messages"] in [found["messages"] for found in other]]
    assert len(shared) < 6


def test_fewer_rows_are_the_first_of_more():
    split = BY_NAME["s1k_1.1_think"]
    assert list(split_rows(split, 20, 1)) == list(split_rows(split, 50, 1))[:20]


def test_counts_are_the_rows_asked_for_times_the_share(tmp_path):
    split = replace(BY_NAME["s1k_1.1_think"], share=2.5)
    counts = write_chats(tmp_path / "c", [split], rows=10, held_out_rows=4, seed=0)
    assert counts["sft/s1k_1.1_think"] == 25
    assert len(lines_of(tmp_path / "c" / "sft" / "s1k_1.1_think.jsonl")) == 25
    assert len(lines_of(tmp_path / "c" / "held_out" / "think.jsonl")) == 4


def test_rows_of_a_split_are_distinct(folder):
    for file in folder.rglob("*.jsonl"):
        if file.parent.name != "held_out":
            texts = file.read_text("utf-8").split("\n")[:-1]
            assert len(set(texts)) == len(texts)


def test_a_failure_keeps_the_old_folder_and_leaves_no_other(tmp_path, monkeypatch):
    target = tmp_path / "chats"
    write_chats(target, SPLITS[:3], rows=5, held_out_rows=2, seed=0)
    before = {file: file.read_bytes() for file in target.rglob("*.jsonl")}

    def fail(*_args):
        raise OSError("no space left")

    monkeypatch.setattr(module, "_round_robin", fail)
    with pytest.raises(OSError, match="no space"):
        write_chats(target, SPLITS[:3], rows=6, held_out_rows=2, seed=1)
    assert {file: file.read_bytes() for file in target.rglob("*.jsonl")} == before
    assert list(tmp_path.iterdir()) == [target]


def test_an_unknown_stand_in_is_named_with_those_there_are(tmp_path):
    split = replace(SPLITS[0], stand_in="reasonning")
    with pytest.raises(UserError, match=rf"{split.split}.*reasonning.*reasoning"):
        write_chats(tmp_path / "c", [split], rows=1, held_out_rows=1, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_asking_for_more_rows_than_a_grammar_has_is_refused(monkeypatch):
    monkeypatch.setattr(module, "ATTEMPTS", 200)
    with pytest.raises(UserError, match=r"aya.*distinct rows.*ask for fewer"):
        list(split_rows(BY_NAME["aya_dataset_Qwen3_32B_think"], 50_000, 0))


# --- rows


def test_held_out_prompts_never_occur_in_training_at_any_seed(folder, tmp_path):
    held_out = set().union(*(questions(row) for row in every_row(folder / "held_out")))
    assert len(held_out) > 150
    write_chats(tmp_path / "other", SPLITS, rows=150, held_out_rows=1, seed=8)
    for root in (folder, tmp_path / "other"):
        for config in ("mid", "sft", "preference"):
            for row in every_row(root / config):
                assert not questions(row) & held_out


def test_held_out_prompts_cover_the_kinds_that_are_trained(folder):
    for name in ("think", "no_think", "tools"):
        mode = {"think": True, "no_think": False}.get(name)
        rows = lines_of(folder / "held_out" / f"{name}.jsonl")
        assert len(rows) == 80
        tools = {row["check"]["kind"] == "tool" for row in rows}
        assert tools == {name == "tools"}
        assert {thinks(row) for row in rows} == ({True, False} if mode is None else {mode})


def test_rows_pass_the_check_of_rows(folder):
    for row in chats(folder):
        check_row(row, row["source"])
    for row in pairs(folder):
        for side in ("chosen", "rejected"):
            check_row(row | {"messages": row["prompt"] + row[side]}, row["source"])


def test_every_assistant_turn_keeps_to_its_mode(folder):
    for row in chats(folder):
        for message in row["messages"]:
            if message["role"] == "assistant":
                assert well_formed(text_of(message) + END, thinks(row)), message


def test_the_reference_answers_are_right_by_the_scorer(folder):
    for row in chats(folder):
        assert not fails(row, text_of(row["messages"][row["check"]["turn"]])), row
    for row in pairs(folder):
        assert not fails(row, row["chosen"][0]["content"]), row


def test_some_chats_have_several_turns(folder):
    assert any(len(questions(row)) > 1 and row["check"]["turn"] == 3 for row in chats(folder))


def test_rows_are_short(folder):
    for row in chats(folder):
        tools = row["chat_template_kwargs"]["xml_tools"]
        assert sum(len(text_of(message)) for message in row["messages"]) < 500
        assert sum(map(len, tools)) < 350


# --- tasks


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", TASKS)
def test_every_step_of_a_trace_is_right_and_leads_to_the_answer(name, language):
    rng = random.Random(f"{name}/{language}")
    for _ in range(150):
        task = TASKS[name](rng, language)
        assert "{" not in task.question + task.answer + task.trace
        for a, sign, b, c in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", task.trace):
            assert SIGNS[sign](int(a), int(b)) == int(c)
        for step in task.steps:
            if " < " in step:
                numbers = [int(n) for n in re.findall(r"\d+", step)]
                assert numbers == sorted(numbers)
                asked = [int(n) for n in re.findall(r"\d+", task.question)]
                assert sorted(asked) == numbers
        assert re.search(rf"(?<!\w){re.escape(task.result)}(?!\w)", task.answer)
        if task.kind in ("sum", "unit"):
            assert task.steps[-1].endswith(f" = {task.result}.")
        elif task.kind not in ("instruction", "summary", "system"):
            assert re.search(rf"(?<!\w){re.escape(task.result)}(?!\w)", task.steps[-1])


@pytest.mark.parametrize("language", LANGUAGES)
def test_results_follow_from_the_question_alone(language):
    """Worked out again from the text, not from what the generator had in mind."""
    rng, say = random.Random(language), LANGUAGES[language]
    for _ in range(200):
        task = TASKS["plain_sum"](rng, language)
        expression = re.search(r"\d+(?: [-+] \d+)+", task.question)
        assert str(eval(expression[0])) == task.result
        task = TASKS["number_list"](rng, language)
        numbers = [int(n) for n in re.findall(r"\d+", task.question)]
        largest = say.largest.split("{")[0] in task.question
        assert int(task.result) == (max if largest else min)(numbers)
        task = TASKS["word_sum"](rng, language)
        a, b = (int(n) for n in re.findall(r"\d+", task.question))
        gains = say.gain.split("{things}")[1].split("{b}")[0] in task.question
        assert int(task.result) == (a + b if gains else a - b)
        assert int(task.result) >= 2
        task = TASKS["document"](rng, language)
        assert task.answer in task.question
        name = re.sub(say.where.replace("?", r"\?").format(name="(.+)"), r"\1", task.question)
        assert name.split()[-1] in task.answer


def test_facts_are_told_alike_in_all_languages():
    days = {len(set(say.days)) for say in LANGUAGES.values()}
    assert days == {7}
    for say in LANGUAGES.values():
        assert len(say.capitals) == len(say.opposites) == 8
        words = [word for pair in say.opposites for word in pair]
        assert len(set(words)) == 16
        assert len({country for country, _ in say.capitals}) == 8


# --- tools


def test_tools_return_what_they_compute():
    rng = random.Random(0)
    for _ in range(400):
        task = draw_tool_task(rng)
        given = task.arguments
        if task.tool.name == "add":
            assert int(task.output) == given["a"] + given["b"]
        if task.tool.name == "square":
            assert int(task.output) == given["number"] ** 2
        assert task.output in task.answer or task.output == "done"
        assert task.tool in task.offered
        assert len({tool.name for tool in task.offered}) == 2
        assert all(str(value) in task.question for value in given.values())
        assert list(given) == list(task.tool.parameters)


def test_calls_as_messages_are_rendered_like_calls_as_text():
    tokenizer = make_tokenizer(date_string="01 January 2025")
    rows = list(split_rows(BY_NAME["hermes_function_calling_v1_no_think"], 40, 5))
    thinking = replace(BY_NAME["hermes_function_calling_v1_no_think"], mode="think")
    for row in rows + list(split_rows(thinking, 40, 5)):
        call = row["messages"][1]
        assert call["tool_calls"]
        plain = {"role": "assistant", "content": text_of(call)}
        other = row | {"messages": [row["messages"][0], plain, *row["messages"][2:]]}
        assert render(tokenizer, row) == render(tokenizer, other)


# --- preference pairs


@pytest.mark.parametrize(
    ("flaw", "thinking"),
    [(flaw, thinks) for flaw in TASK_FLAWS for thinks in (True, False)
     if thinks or flaw != "no_think_close"],
)  # fmt: skip
def test_a_flawed_answer_is_wrong_by_the_scorer_or_repeats_itself(flaw, thinking):
    rng = random.Random(flaw)
    for language in LANGUAGES:
        for name in STANDINS["preference"].tasks * 20:
            task = TASKS[name](rng, language)
            row = {
                "chat_template_kwargs": {"enable_thinking": thinking},
                "check": {"kind": task.kind, "result": task.result},
            }
            text = TASK_FLAWS[flaw](rng, task, thinking)
            if flaw == "repeats":
                assert text.endswith(" ".join([task.answer] * 3))
                continue
            assert fails(row, text), text
            formed = well_formed(text + END, thinking)
            assert formed == (flaw in ("wrong_answer", "wrong_language"))
            own = LANGUAGES[language].welcome.split("{name}")[1]
            assert flaw != "wrong_language" or not text.endswith(own)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("flaw", TOOL_FLAWS)
def test_a_flawed_call_fails_in_the_way_its_name_says(flaw, form):
    expected = {  # parses, is listed, is the right tool
        "wrong_tool": (True, True, False),
        "unlisted_tool": (True, False, False),
        "broken_call": (False, False, False),
        "no_call": (False, False, False),
    }
    split = replace(PREFERENCE[0], mode="think")
    seen = 0
    for row in split_rows(split, 600, 2):
        if row["flaw"] != flaw or row["check"]["format"] != form:
            continue
        seen += 1
        text = row["rejected"][0]["content"]
        figures = tool_figures(row, text + END)
        names = ("tool_call_parses", "tool_listed", "tool_right")
        assert tuple(figures[name] for name in names) == expected[flaw], text
        assert not figures["tool_arguments_right"]
        assert well_formed(text + END, True)
    assert seen > 5


def test_every_flaw_occurs_in_both_modes(folder):
    for split in PREFERENCE:
        rows = lines_of(folder / "preference" / f"{split.split}.jsonl")
        flaws = {*TASK_FLAWS, *TOOL_FLAWS} - (
            {"no_think_close"} if split.mode == "no_think" else set()
        )
        assert {row["flaw"] for row in rows} == flaws
        assert all(row["chosen"] != row["rejected"] for row in rows)
