"""The hub beside data stages: chats, a model and the data that it is scored on, a release that goes up."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import environment
from datasets import Dataset
from hub_rows import write_hub_rows
from hub_runs import make_hub_checkout
from loopback_hub import Fault, Hub, loopback_hub
from posttrain_jobs import write_start
from test_chats_hub import CHAT, PAIR, chat, lines_of, pair, tool_chat

from launch.recipe.tables import load_splits

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
BENCHMARKS = {"HellaSwag", "ARC", "BoolQ"}


def write_chats(folder: Path) -> Path:
    """All published splits: parquet files and a card that maps them."""
    card = ["---", "configs:"]
    for config, rows in load_splits().splits.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for name in rows:
            make = pair if config == "Preference" else tool_chat if "xlam" in name else chat
            features = PAIR if config == "Preference" else CHAT
            made = Dataset.from_list([make(index) for index in range(40)], features=features)
            made.to_parquet(str(folder / config / f"{name}-00000-of-00001.parquet"))
            card += [f"  - split: {name}", f"    path: {config}/{name}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]), "utf-8")
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    start = write_start(tmp_path / "start")
    with loopback_hub({"owner/start": start}, created=tmp_path) as hub:
        yield hub


def test_chats_of_the_hub_are_read_once_and_a_file_that_breaks_off_costs_itself_alone(
    hub: Hub, tmp_path: Path
) -> None:
    name = f"datasets/{load_splits().dataset.hub_id}"
    hub.repositories[name] = write_chats(tmp_path / "chats")
    checkout = make_hub_checkout(tmp_path / "checkout", hub)
    hub.faults = [Fault("s1k_1.1_think", status=404)]
    line = checkout.failed("data-chats", 2)
    assert "s1k_1.1_think" in line and "no such file" in line, line
    hub.faults = []
    checkout.done("run", "data-chats")
    shards = hub.sent.copy()
    rows = [
        row["source"]
        for file in (checkout.cache / "chats").rglob("sft/*.jsonl")
        for row in lines_of(file)
    ]
    assert rows.count("xlam") > 0 and rows.count("s1k") > 500, len(rows)
    assert "up to date" in checkout.done("run", "data-chats") and hub.sent == shards


def test_a_model_and_the_data_of_its_scores_come_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    from eval_tasks.task_table import expanded, read_tasks

    checkout = make_hub_checkout(tmp_path / "checkout", hub)
    file = checkout.folder / "recipes/eval/base.yaml"
    suite = yaml.safe_load(file.read_text())
    suite["rows"] = [row for row in suite["rows"] if row["name"] in BENCHMARKS]
    file.write_text(yaml.safe_dump(suite))
    table = read_tasks()
    patterns = [pattern for row in suite["rows"] for pattern in row["tasks"]]
    tasks = [table[name] for name in expanded(patterns, table)]
    wanted = [(t.dataset, t.config, [s for s in (t.split, t.shots_from) if s]) for t in tasks]
    write_hub_rows(tmp_path / "rows", wanted)
    for task in tasks:
        repo, folder = f"datasets/{task.dataset}", task.dataset.replace("/", "--")
        hub.repositories[repo] = tmp_path / "rows" / folder
        if task.revision:
            hub.revisions[repo, task.revision] = hub.repositories[repo]
    printed = checkout.done("eval", "--model", "owner/start", "--suite", "base", "--limit", "4")
    for name in BENCHMARKS:
        assert re.search(rf"{name} .*\d", printed), printed
    scores = json.loads(next(checkout.folder.glob("runs/*/evaluation/base-table.json")).read_text())
    assert {row["name"] for row in scores} == BENCHMARKS
    assert not [row for row in scores if "error" in row]
    assert hub.sent["owner/start/model.safetensors"] and hub.bytes_of("datasets/google/boolq")


UPLOAD = """
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("someone/release", exist_ok=True)
api.upload_folder(repo_id="someone/release", folder_path={folder!r})
from transformers import AutoModelForCausalLM, AutoTokenizer
for place in ("", "yarn"):
    model = AutoModelForCausalLM.from_pretrained("someone/release", subfolder=place)
    tokenizer = AutoTokenizer.from_pretrained("someone/release", subfolder=place)
    print(model.config.max_position_embeddings, len(tokenizer))
"""


def test_a_release_folder_goes_up_and_is_loaded_from_there(hub: Hub, tmp_path: Path) -> None:
    from launch.stages.release import check_loads, write_yarn

    release = hub.repositories["owner/start"]
    write_yarn(release, 2)
    check_loads(release)
    done = subprocess.run(
        [sys.executable, "-c", UPLOAD.format(folder=str(release))],
        capture_output=True, text=True, check=False, timeout=300,
        env=environment(**hub.variables(tmp_path / "hf", "hf_writer")),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (window, size), (longer, same) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert longer == 2 * window and size == same
    up = hub.repositories["someone/release"]
    for file in release.rglob("*"):
        if file.is_file():
            copy = up / file.relative_to(release)
            assert copy.read_bytes() == file.read_bytes() and not copy.is_symlink()
