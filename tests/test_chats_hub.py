"""The hub's chats: published schema and layout in, the training files out, nothing half-written."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, Features, List, Value

from datatrove_pipelines import chats_hub
from datatrove_pipelines.chats_hub import split_pair, write_hub_chats
from datatrove_pipelines.held_out import is_held_out
from ground.errors import UserError
from posttrain.scores import tool_figures
from posttrain.template import check_row

KWARGS = {"custom_instructions": "", "enable_thinking": True, "python_tools": [], "xml_tools": []}
TOOL = json.dumps({"name": "clock", "parameters": {"type": "object", "properties": {}}})
SPLITS = {
    "Mid": ["OpenThoughts3_1.2M"],
    "SFT": ["s1k_1.1_think", "xlam_traces_no_think"],
    "Preference": ["tulu_3_8b_pref_mix_Qwen3_32B_Qwen3_0.6B_think"],
}


MESSAGES = List({"role": Value("string"), "content": Value("string")})
TEXT = Value("string")
COLUMNS = {
    "chat_template_kwargs": {
        "custom_instructions": TEXT,
        "enable_thinking": Value("bool"),
        "python_tools": List(TEXT),
        "xml_tools": List(TEXT),
    },
    "source": TEXT,
}
CHAT = Features({"messages": MESSAGES, **COLUMNS})
PAIR = Features({"prompt": TEXT, "chosen": MESSAGES, "rejected": MESSAGES, **COLUMNS})


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def chat(index: int) -> dict:
    answer = f"<think>\nn\n</think>\nanswer {index}\u2028end"
    return {
        "messages": [say("user", f"question {index}"), say("assistant", answer)],
        "chat_template_kwargs": KWARGS,
        "source": "s1k",
    }


def tool_chat(index: int) -> dict:
    call = json.dumps({"name": "clock", "arguments": {"zone": index}})
    call = f"<tool_call>\n{call}\n</tool_call>"
    return {
        "messages": [say("user", f"time {index}?"), say("assistant", call), say("tool", "9:00")],
        "chat_template_kwargs": KWARGS | {"enable_thinking": False, "xml_tools": [TOOL]},
        "source": "xlam",
    }


def pair(index: int) -> dict:
    question = say("user", f"question {index}")
    return {
        "prompt": f"question {index}",
        "chosen": [question, say("assistant", "good")],
        "rejected": [question, say("assistant", "bad")],
        "chat_template_kwargs": KWARGS,
        "source": "tulu",
    }


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A folder in the layout of the published repository: parquet files and a card that maps them."""
    folder = tmp_path_factory.mktemp("hub")
    card = ["---", "configs:"]
    for config, names in SPLITS.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for name in names:
            make = pair if config == "Preference" else tool_chat if "xlam" in name else chat
            file = folder / config / f"{name}-00000-of-00001.parquet"
            rows = [make(index) for index in range(40)]
            features = PAIR if config == "Preference" else CHAT
            Dataset.from_list(rows, features=features).to_parquet(str(file))
            card += [f"  - split: {name}", f"    path: {config}/{name}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]), "utf-8")
    return folder


def lines_of(file: Path) -> list[dict]:
    with file.open(encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]


def write(hub: Path, folder: Path, **options) -> dict[str, int]:
    options = {"held_out_fraction": 0.3, "held_out_rows": 8} | options
    return write_hub_chats(folder, str(hub), "main", SPLITS, **options)


def test_every_row_is_trained_on_or_kept_out_and_passes_the_check_of_rows(hub, tmp_path):
    counts = write(hub, tmp_path)
    for config, names in SPLITS.items():
        for name in names:
            file = tmp_path / config.lower() / f"{name}.jsonl"
            train, out = lines_of(file), lines_of(file.with_name(f"{name}.held_out.jsonl"))
            assert len(train) == counts[f"{config.lower()}/{name}"]
            assert len(train) + len(out) == 40
            assert 0 < len(out) < 40
            if config != "Preference":
                for row in train:
                    check_row(row, str(file))


def test_a_split_is_read_up_to_the_rows_that_are_asked_for(hub, tmp_path):
    counts = write(hub, tmp_path, most_rows={"s1k_1.1_think": 7}, held_out_fraction=0.0)
    assert lines_of(tmp_path / "sft" / "s1k_1.1_think.jsonl") == [chat(i) for i in range(7)]
    assert counts["sft/s1k_1.1_think"] == 7 and counts["sft/xlam_traces_no_think"] == 40


def test_no_split_is_written_before_all_can_be_read(hub, tmp_path):
    splits = {**SPLITS, "Preference": ["absent"]}
    with pytest.raises(UserError, match=r"\(Preference, absent\)"):
        write_hub_chats(tmp_path, str(hub), "main", splits)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_rows_equal_the_published_ones(hub, tmp_path):
    write(hub, tmp_path, held_out_fraction=0.0)
    assert lines_of(tmp_path / "sft" / "s1k_1.1_think.jsonl") == [chat(i) for i in range(40)]
    assert lines_of(tmp_path / "sft" / "xlam_traces_no_think.jsonl") == [
        tool_chat(i) for i in range(40)
    ]


def test_a_prompt_kept_out_of_one_split_is_kept_out_of_all(hub, tmp_path):
    write(hub, tmp_path)
    asked = {}
    for name in ("sft/s1k_1.1_think", "mid/OpenThoughts3_1.2M"):
        asked[name] = {
            row["messages"][0]["content"] for row in lines_of(tmp_path / f"{name}.jsonl")
        }
    pairs = lines_of(tmp_path / "preference" / f"{SPLITS['Preference'][0]}.jsonl")
    asked["preference"] = {row["prompt"][0]["content"] for row in pairs}
    assert len(set(map(frozenset, asked.values()))) == 1
    held_out = lines_of(tmp_path / "held_out" / "think.jsonl")
    assert held_out
    for row in held_out:
        prompt = row["messages"][0]["content"]
        assert is_held_out(prompt, 0.3)
        assert all(prompt not in questions for questions in asked.values())


def test_held_out_tool_rows_can_be_scored(hub, tmp_path):
    write(hub, tmp_path)
    rows = lines_of(tmp_path / "held_out" / "tools.jsonl")
    assert 0 < len(rows) <= 8
    for row in rows:
        right = row["messages"][row["check"]["turn"]]["content"]
        assert all(tool_figures(row, right).values())
        assert not any(tool_figures(row, right.replace("}", "")).values())


def test_long_prompts_are_not_scored(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(chats_hub, "SCORED_CHARACTERS", 1)
    counts = write(hub, tmp_path)
    assert {counts[name] for name in counts if name.startswith("held_out/")} == {0}
    assert counts["sft/s1k_1.1_think"] < 40


def test_pairs_do_not_repeat_their_prompt(hub, tmp_path):
    write(hub, tmp_path)
    for row in lines_of(tmp_path / "preference" / f"{SPLITS['Preference'][0]}.jsonl"):
        assert [m["role"] for m in row["prompt"]] == ["user"]
        assert row["chosen"] == [say("assistant", "good")]
        assert row["rejected"] == [say("assistant", "bad")]


@pytest.mark.parametrize(
    "prompt", ["q", [say("user", "q")], [say("system", "s"), say("user", "q")]]
)
def test_pairs_without_the_prompt_inside_take_it_from_its_column(prompt):
    row = {"prompt": prompt, "chosen": [say("assistant", "a")], "rejected": [say("assistant", "b")]}
    made = split_pair(row, "row 1")
    assert made["prompt"] == (prompt if isinstance(prompt, list) else [say("user", "q")])
    assert (made["chosen"], made["rejected"]) == (row["chosen"], row["rejected"])


def test_a_conversation_of_several_turns_is_shared_up_to_where_the_sides_part():
    turns = [say("user", "q"), say("assistant", "a"), say("user", "r")]
    row = {"chosen": [*turns, say("assistant", "b")], "rejected": [*turns, say("assistant", "c")]}
    assert split_pair(row, "row 1")["prompt"] == turns


def test_a_pair_without_difference_is_refused_by_name():
    same = [say("user", "q"), say("assistant", "a")]
    with pytest.raises(UserError, match=r"row 7.*same"):
        split_pair({"prompt": "q", "chosen": same, "rejected": same}, "split, row 7")


def test_nulls_of_a_common_message_schema_are_left_out():
    row = {"messages": [say("user", "q") | {"tool_calls": None}], "chat_template_kwargs": KWARGS}
    assert chats_hub._normal(row, "SFT", "row 1")["messages"] == [say("user", "q")]


def test_a_split_that_the_hub_lacks_is_named_in_one_line(hub, tmp_path):
    with pytest.raises(UserError, match="no_such_split") as caught:
        write_hub_chats(tmp_path, str(hub), "main", {"SFT": ["no_such_split"]})
    assert "\n" not in str(caught.value)
    assert "splits.yaml" in str(caught.value)


def test_a_cut_off_download_leaves_no_half_and_goes_on_where_it_stopped(hub, tmp_path, monkeypatch):
    normal, read = chats_hub._normal, []

    def cut(row, config, where):
        if where == "xlam_traces_no_think, row 20":
            raise OSError("connection reset")
        return normal(row, config, where)

    monkeypatch.setattr(chats_hub, "_normal", cut)
    with pytest.raises(UserError, match="connection reset"):
        write(hub, tmp_path)
    assert [path.name for path in (tmp_path / "sft").glob("*xlam*")] == []

    def count(row, config, where):
        read.append(where.split(",")[0])
        return normal(row, config, where)

    monkeypatch.setattr(chats_hub, "_normal", count)
    counts = write(hub, tmp_path)
    assert set(read) == {"xlam_traces_no_think", *SPLITS["Preference"]}
    assert counts == write(hub, tmp_path / "again")
