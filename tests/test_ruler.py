"""RULER's own tasks: the published generator's prompts, byte for byte, lengths and scores."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ruler_texts import made, sources
from small_models import make_tokenizer, random_model

from eval_tasks.package_data import write_dataset
from eval_tasks.ruler import TASKS, items, share_found
from eval_tasks.ruler_sources import Pairs, Sources
from ground.errors import UserError
from launch.recipe.evaluation import load_published, load_ruler
from launch.tools import ruler as tool

SOURCES = sources()
# Of five items at 2,048 and at 4,096 tokens, made by the scripts of NVIDIA/RULER at commit c3f5e3b with
# wonderwords 3.0.1, this essay, these questions, `count` as tokenizer and `sentences_of` for nltk's.
GOLDEN = {
    (2048, 42): (
        "af02fffc d595343c b119fa2b 0ab24fbe 1edf4f6d 96112515 62050baf d961ab3c 59427106 "
        "52f38989 13e43af5 544b6023 3b097e7f"
    ),
    (4096, 7): (
        "5178cd38 9ad26c23 6b49199e df1160e0 6922c614 4feaa23e cd2f89be cb16e2fa 2d1b8a53 "
        "c7c933c5 4469eeca c7c0d512 a7a8513e"
    ),
}


def count(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))


@pytest.mark.parametrize(("length", "seed"), GOLDEN)
def test_prompts_are_those_of_the_published_generator(length: int, seed: int) -> None:
    found = []
    for task in TASKS:
        own = [*items(task, length, 5, count, SOURCES, seed)]
        rows = [[item.prompt, item.prefix, item.answers] for item in own]
        found.append(hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:8])
    assert found == GOLDEN[length, seed].split()


@pytest.mark.parametrize("task", TASKS)
def test_an_item_fits_and_only_who_finds_the_answer_scores(task: str) -> None:
    for length in (2048, 5000):
        for item in items(task, length, 3, count, SOURCES, 1, taken=40):
            assert item.length == count(item.prompt + item.prefix) + item.new_tokens + 40
            assert 0.5 * length < item.length <= length
            evidence = item.prompt if not task.startswith("qa") else " ".join(item.answers)
            assert all(answer in evidence for answer in item.answers)
            told = " and ".join(item.answers).upper()
            assert share_found(told, item.answers, task) == 1
            assert share_found("no", item.answers, task) == 0
            part = share_found(item.answers[0], item.answers, task)
            wanted = 1 if task.startswith("qa") else 1 / len(item.answers)
            assert part == wanted


def test_every_pair_of_words_has_the_place_that_sorting_all_gives_it() -> None:
    adjectives = ["well", "well-made", "a", "well", "b", "a-b"]
    nouns = ["dog", "b-dog", "made-dog", "x", "dog", "-"]
    wanted = sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns})
    assert list(Pairs(adjectives, nouns)) == wanted


@pytest.mark.parametrize("task", TASKS)
def test_a_length_that_is_too_short_is_refused(task: str) -> None:
    with pytest.raises(UserError, match=f"{task} does not fit in 150 tokens; take a longer"):
        list(items(task, 150, 1, count, SOURCES, 0))
    if task == "vt":
        with pytest.raises(UserError, match="vt: its worked example is too long for 500 tokens"):
            list(items(task, 4096, 1, len, SOURCES, 0))


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UserError, match="niah_single_2: its haystack is an essay; give texts"):
        list(items("niah_single_2", 2048, 1, count, Sources(), 0))
    with pytest.raises(UserError, match="qa_2: needs the rows of hotpotqa/hotpot_qa"):
        list(items("qa_2", 2048, 1, count, Sources(), 0))
    with pytest.raises(UserError, match=r"task 'niah': use some of niah_single_1, "):
        list(items("niah", 2048, 1, count, Sources(), 0))


def test_the_recipe_has_every_task_and_published_lengths() -> None:
    suite = load_ruler()
    assert list(suite.tasks) == list(TASKS)
    published = {name for name in load_published().scores["base"] if name.startswith("RULER")}
    assert published <= {f"RULER-{length // 1024}k" for length in suite.lengths}


# ---- the command

# In bytes the example of `vt` does not fit in the 500 tokens that it has.
OF_BYTES = [task for task in TASKS if task != "vt"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model"
    tokenizer = make_tokenizer(short_system=True)
    shape = {"num_hidden_layers": 1, "no_rope_layers": [1], "hidden_size": 16}
    random_model(tokenizer, 0, window=9000, **shape).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def corpus(tmp_path: Path, recipes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus; the recipe has one length and the hub's rows lie in a folder."""
    essay, squad_rows, hotpot_rows = made()
    file = recipes / "eval/ruler.yaml"
    values = yaml.safe_load(file.read_text())
    values |= {"lengths": [8192, 16384], "tasks": list(OF_BYTES)}
    file.write_text(yaml.safe_dump(values))
    write_dataset(tmp_path / "rajpurkar--squad_v2", "squad_v2", {"validation": squad_rows})
    write_dataset(tmp_path / "hotpotqa--hotpot_qa", "distractor", {"validation": hotpot_rows})
    monkeypatch.setenv("EVAL_DATA", str(tmp_path))
    published = {"RULER-8k": 0.7635}
    monkeypatch.setattr(tool, "published_score", lambda section, row: published.get(row))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / ".cache")
    texts = tmp_path / "essay.jsonl"
    texts.write_text(json.dumps({"text": essay}))
    return texts


def scores(file: Path) -> dict[str, Any]:
    return {row["name"]: row for row in json.loads(file.read_text())["rows"]}


@pytest.mark.slow
@pytest.mark.parametrize("knows", [True, False])
def test_an_oracle_finds_everything_and_a_fool_nothing(
    folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, knows: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def answer(self: Any, item: Any) -> str:
        return ", ".join(item.answers) if knows else "no"

    monkeypatch.setattr(tool.Reader, "answer", answer)
    found = scores(tool.evaluate_ruler(folder, corpus, tmp_path / "out/model", limit=2))
    assert list(found) == [f"{task} 8192" for task in (*OF_BYTES, "mean")]
    assert {row["value"] for row in found.values()} == {float(knows)}
    assert found["mean 8192"]["published"] == 0.7635
    assert all(row["low"] < row["high"] for row in found.values())
    assert "76.3%" in capsys.readouterr().out.replace("76.4%", "76.3%")


@pytest.mark.slow
@pytest.mark.parametrize("in_chat", [False, True])
def test_a_model_reads_the_prompt_and_goes_on_from_its_prefix(
    folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_chat: bool
) -> None:
    seen = list[str]()

    def share(answer: str, golds: list[str], task: str) -> float:
        seen.append(answer)
        return 0.5

    monkeypatch.setattr("eval_tasks.ruler.share_found", share)
    prompts = list[str]()
    generate = type(random_model(make_tokenizer(), 0)).generate

    def spy(self: Any, input_ids: Any, **named: Any) -> Any:
        prompts.append(make_tokenizer().decode(input_ids[0]))
        assert len(input_ids[0]) + named["max_new_tokens"] <= 8192
        return generate(self, input_ids, **named)

    monkeypatch.setattr("transformers.SmolLM3ForCausalLM.generate", spy)
    found = scores(
        tool.evaluate_ruler(folder, corpus, tmp_path / "out/model", limit=1, in_chat=in_chat)
    )
    assert len(prompts) == len(OF_BYTES) == len(seen)
    assert all(text.startswith("<|im_start|>system") == in_chat for text in prompts)
    turn = "<|im_start|>assistant\n<think>\n\n</think>\n Answer:" if in_chat else "? Answer:"
    assert prompts[-1].endswith(f"{turn}")
    assert found["mean 8192"]["value"] == 0.5


@pytest.mark.slow
def test_questions_that_cannot_be_had_cost_no_other_its_score(
    folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(tool.Reader, "answer", lambda self, item: "no")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("EVAL_DATA", str(tmp_path / "nowhere"))
    from eval_tasks.ruler_sources import read_questions

    read_questions.cache_clear()
    found = scores(tool.evaluate_ruler(folder, corpus, tmp_path / "out/model", limit=1))
    assert [name for name, row in found.items() if "error" in row] == ["qa_1 8192", "qa_2 8192"]
    assert found["mean 8192"]["published"] is None
    assert "the mean is of 10 of 12 tasks" in capsys.readouterr().out
    read_questions.cache_clear()


def test_what_cannot_be_scored_is_refused(folder: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="LIMIT=-1: below 0"):
        tool.evaluate_ruler(folder, corpus, tmp_path / "out", limit=-1)
    with pytest.raises(UserError, match=r"MODEL=.*: no config\.json there"):
        tool.evaluate_ruler(tmp_path, corpus, tmp_path / "out")
