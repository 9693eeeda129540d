"""Every block of docs/HOW_TO.md is run as it stands, from the state of a clean clone."""

import gzip
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from posttrain_jobs import tokenizer_with_pad
from processes import free_port
from publishable import write_runs
from small_models import random_model

ROW = re.compile(r"^\| \[(.*)\]\(docs/HOW_TO\.md#(\S+)\)\? \| (.*) \|$", re.MULTILINE)
BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
DOWNLOADED = ("downloads", "standin", "evaluation")  # folders of .cache/ that all clones share
RUSSIAN = "Мы шли по берегу реки {n}, и вода была холодна; старик рассказал нам про год {m}. "  # noqa: RUF001


@dataclass(frozen=True)
class HowTo:
    question: str
    files: tuple[str, ...]  # YAML blocks, each begins with a comment that names its file
    commands: tuple[str, ...]


def how_tos() -> Iterator[HowTo]:
    text = (ROOT / "docs/HOW_TO.md").read_text("utf-8")
    for part in re.split(r"^## How do I ", text, flags=re.MULTILINE)[1:]:
        blocks = [(block["language"], block["text"]) for block in BLOCK.finditer(part)]
        yield HowTo(
            part.partition("?\n")[0],
            tuple(text for language, text in blocks if language == "yaml"),
            tuple(line for language, text in blocks if language == "sh" for line in text.split("\n") if line),
        )  # fmt: skip


HOW_TOS = {how_to.question: how_to for how_to in how_tos()}


def copied(folder: Path) -> Path:
    """The tracked files as they are now."""
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files as they are now, with notes of one's own beside them."""
    folder = copied(tmp_path_factory.mktemp("how-tos") / "clone")
    shorten(folder / "recipes/scales/tiny.yaml")
    for name in DOWNLOADED:
        (ROOT / ".cache" / name).mkdir(parents=True, exist_ok=True)
        (folder / ".cache").mkdir(exist_ok=True)
        (folder / ".cache" / name).symlink_to(ROOT / ".cache" / name)
    write_notes(folder / "notes")
    chat = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    }
    (folder / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 40)
    # Any released model serves where a how-to scores one.
    release, tokenizer = folder / "runs" / "tiny" / "release", tokenizer_with_pad(short_system=True)
    random_model(tokenizer, seed=0, window=1024).save_pretrained(release)
    tokenizer.save_pretrained(release)
    return folder


def shorten(file: Path) -> None:
    """Fewer steps, chats and items: a how-to does the same in them, and how well is not asked."""
    scale = yaml.safe_load(file.read_text("utf-8"))
    scale |= {"steps_divided_by": 29_500, "minimum_warmup_steps": 1, "ablation_steps": 10}
    scale["train_steps"] = {"longctx-32k": 2, "longctx-64k": 2}
    post = scale["posttrain"]
    post["chats"] |= {"rows": 60, "held_out_rows": 4}
    post["every_stage"]["scores"] |= {"prompts": 1, "prompts_at_end": 2, "max_new_tokens": 16}
    for stage in post["stages"].values():
        stage["trl"]["max_steps"] = 10
    scale["evaluation"]["limit"] = 4
    file.write_text(yaml.safe_dump(scale), "utf-8")


def write_notes(folder: Path) -> None:
    """A megabyte of text: prose of Python's own library, Russian lines, a table, duplicates."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    library = Path(os.__file__).parent
    texts = [file.read_text("utf-8") for file in sorted((library / "email").glob("*.py"))]
    texts += [file.read_text("utf-8") for file in sorted((library / "asyncio").glob("*.py"))]
    paragraphs = [part for text in texts for part in text.split("\n\n\n") if len(part) > 300]
    folder.mkdir()
    (folder / "library.txt").write_text("\n\n".join(texts[:20]), "utf-8")
    russian = "\n\n".join(RUSSIAN.format(n=n, m=1800 + n) * 4 for n in range(300))
    (folder / "russian.md").write_text(russian, "utf-8")
    with gzip.open(folder / "rows.jsonl.gz", "wt", encoding="utf-8") as file:
        for text in [*paragraphs, *paragraphs[:10]]:
            file.write(json.dumps({"text": text}) + "\n")
    rows = pa.table({"text": [text[::-1] for text in paragraphs[:100]]})
    pq.write_table(rows, folder / "rows.parquet")


def lay_out(clone: Path, how_to: HowTo) -> None:
    """Write the files that a how-to asks for; `in <file>, below `<key>:`` adds to one."""
    for block in how_to.files:
        head, _, body = block.partition("\n")
        if below := re.fullmatch(r"# in (\S+), below `( *\w+:)`", head):
            file = clone / below[1]
            text = file.read_text("utf-8")
            assert text.count(f"\n{below[2]}\n") == 1
            file.write_text(text.replace(f"\n{below[2]}\n", f"\n{below[2]}\n{body}"), "utf-8")
        else:
            (clone / head.removeprefix("# ")).write_text(body, "utf-8")


def run(clone: Path, command: str) -> str:
    """What a command prints; it must succeed."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RUNS", "CACHE", "SCALE", "TEXT")}
    done = subprocess.run(
        ["bash", "-c", command.replace("make ", "make -o $VENV/.installed VENV=$VENV ", 1)],
        cwd=clone, capture_output=True, text=True, check=False, timeout=900,
        env=kept | {"COLUMNS": "200", "VENV": str(Path(sys.executable).parent.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_each_question_has_its_answer() -> None:
    assert list(HOW_TOS) == [
        "train on my own text",
        "choose how my text is cleaned",
        "know that my training text holds no test items",
        "run a recipe of my own",
        "post-train a released model on one card",
        "add a source for every recipe",
        "post-train on chats of my own",
        "have a larger model write chats",
        "tokenise on a cluster",
        "add a size",
        "know what a size takes",
        "see what the model saw at a step, or find a text",
        "see what a budget downloads",
        "check a mixture",
        "compare two mixtures",
        "add an evaluation task",
        "serve it, with tools",
        "run the model in llama.cpp",
        "run on my Slurm cluster",
        "keep the shards in a bucket",
        "train on the GPUs that I have",
        "watch a run",
        "publish a model",
        "change a published value",
    ]
    assert all(
        how_to.commands
        for name, how_to in HOW_TOS.items()
        if not name.startswith(("change", "train on the GPUs"))
    )
    assert all(len(block.splitlines()) <= 5 for one in HOW_TOS.values() for block in one.files)


def test_the_readme_lists_each_how_to_with_its_command() -> None:
    rows = ROW.findall((ROOT / "README.md").read_text("utf-8"))
    assert [question for question, _, _ in rows] == list(HOW_TOS)
    for question, anchor, command in rows:
        heading = re.sub(r"[^a-z0-9 -]", "", f"how do i {question}".lower())
        assert anchor == heading.replace(" ", "-")
        if HOW_TOS[question].commands:
            assert command.strip("`") in HOW_TOS[question].commands


@pytest.mark.parametrize("name", ["README.md", "docs/HOW_TO.md", "recipes/README.md"])
def test_links_lead_somewhere(name: str) -> None:
    file = ROOT / name
    links = re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", file.read_text("utf-8"))
    assert [link for link in links if not (file.parent / link).exists()] == []


def finished(clone: Path, run_name: str) -> bool:
    manifest = clone / "runs" / run_name / "manifest.json"
    return bool(json.loads(manifest.read_text("utf-8"))["finished"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "runs"),
    [
        ("run a recipe of my own", ["tiny/my", "tiny/data-my", "tiny/held-out-my"]),
        ("add a size", ["small/pretrain-stage1"]),
    ],
)
def test_a_how_to_ends_in_a_finished_run(clone: Path, question: str, runs: list[str]) -> None:
    how_to = HOW_TOS[question]
    lay_out(clone, how_to)
    for command in how_to.commands:
        run(clone, command)
    assert all(finished(clone, name) for name in runs)


@pytest.mark.slow
def test_tokens_are_read_from_where_they_were_pushed(clone: Path) -> None:
    for command in HOW_TOS["keep the shards in a bucket"].commands:
        run(clone, command)
    assert finished(clone, "tiny/pretrain-stage1")
    assert not list((clone / ".cache" / "shards").glob("*/*.ds"))
    assert list((clone / "node").glob("*/*.ds.00000"))


@pytest.mark.slow
def test_ones_own_text_is_searched_for_test_items(clone: Path) -> None:
    how_to = HOW_TOS["know that my training text holds no test items"]
    lay_out(clone, how_to)
    (command,) = how_to.commands
    assert "data-stage1: no document holds a test item" in run(clone, command)
    with (clone / "runs/checked-notes/eval-texts/eval_texts.jsonl").open(encoding="utf-8") as lines:
        item = json.loads(next(lines))["text"]
    planted = clone / "notes" / "planted.txt"
    planted.write_text(f"Notes of a day.\n{item.upper()}\n", "utf-8")
    try:
        printed = run(clone, command)
    finally:
        planted.unlink()
    assert "text: documents that hold test items, listed and kept: 1 (hellaswag_cf 1)" in printed


@pytest.mark.slow
def test_what_a_size_takes_is_told_before_anything_runs(clone: Path) -> None:
    (command,) = HOW_TOS["know what a size takes"].commands
    printed = run(clone, command)
    assert "pretrain-stage1" in printed and "money" in printed and "predictions" in printed
    assert not (clone / "runs" / "135m").exists()


def test_a_wrong_executor_is_refused_before_anything_runs(clone: Path) -> None:
    (command,) = HOW_TOS["tokenise on a cluster"].commands
    told = command.replace("make ", "PATH=/usr/bin:/bin make ").replace(
        "EXECUTOR=slurm", "EXECUTOR=slrum"
    )
    with pytest.raises(AssertionError, match="did you mean 'slurm'"):
        run(clone, told)
    assert not (clone / "runs/tiny/data-stage1").exists()


@pytest.mark.slow
def test_what_a_budget_downloads_is_told(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # without a hub the status is 69
    (command,) = HOW_TOS["see what a budget downloads"].commands
    printed = run(clone, command)
    assert "HuggingFaceFW/fineweb-edu" in printed and "weight lost" in printed
    assert not (clone / "runs" / "135m").exists()


@pytest.mark.slow
def test_a_mixture_is_drawn(clone: Path) -> None:
    (command,) = HOW_TOS["check a mixture"].commands
    assert "megamath-web-pro" in run(clone, command)
    assert (clone / "runs/tiny/mixture/pretrain-stage2-category.svg").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1000)  # six short trainings
def test_two_mixtures_are_compared(clone: Path) -> None:
    how_to = HOW_TOS["compare two mixtures"]
    lay_out(clone, how_to)
    (command,) = how_to.commands
    printed = run(clone, command)
    assert "bits per byte" in printed and "│ web-multilingual " in printed


@pytest.mark.slow
def test_a_released_model_is_trained_on(clone: Path) -> None:
    how_to = HOW_TOS["post-train a released model on one card"]
    lay_out(clone, how_to)
    (command,) = how_to.commands
    run(clone, command)
    (folder,) = (clone / "runs").glob("tiny-from-release-*/adapters")
    assert finished(clone, str(folder.relative_to(clone / "runs")))
    assert (folder / "adapter/adapter_model.safetensors").is_file()
    assert (folder / "hf/model.safetensors").is_file()
    assert not (clone / "runs/tiny/midtrain").exists(), "no stage before is run"


@pytest.mark.slow
def test_chats_of_ones_own_are_trained_on(clone: Path) -> None:
    how_to = HOW_TOS["post-train on chats of my own"]
    lay_out(clone, how_to)
    (command,) = how_to.commands
    run(clone, command)
    (folder,) = (clone / "runs").glob("tiny-from-release-*/my-sft")
    assert finished(clone, str(folder.relative_to(clone / "runs")))


@pytest.mark.slow
def test_a_source_of_ones_own_is_read(clone: Path) -> None:
    how_to = HOW_TOS["add a source for every recipe"]
    recipe = clone / "recipes" / "pretrain" / "stage1.yaml"
    published = recipe.read_text("utf-8")
    lay_out(clone, how_to)
    try:
        (command,) = how_to.commands
        run(clone, command)
    finally:
        recipe.write_text(published, "utf-8")
    manifest = json.loads((clone / "runs/tiny/data-stage1/manifest.json").read_text("utf-8"))
    assert manifest["own_text"] == {"my-notes": "notes"}
    assert manifest["shards"]["my-notes"]["left_out"]["duplicates"] == 10


@pytest.mark.slow
def test_text_is_cleaned_as_its_row_says(clone: Path) -> None:
    how_to = HOW_TOS["choose how my text is cleaned"]
    lay_out(clone, how_to)
    (command,) = how_to.commands
    run(clone, command)
    assert finished(clone, "tiny/cleaned")
    manifest = json.loads((clone / "runs/tiny/data-cleaned/manifest.json").read_text("utf-8"))
    notes = manifest["shards"]["notes"]
    assert notes["left_out"]["duplicates"] == 10
    assert notes["left_out"]["language"] >= 10, "the pieces of russian.md"
    assert notes["changed"].keys() == {"pii"}


@pytest.mark.slow
def test_a_release_is_served_asked_and_stopped(clone: Path) -> None:
    port, commands = str(free_port()), HOW_TOS["serve it, with tools"].commands
    script = "\n".join([*commands, "wait %1 || true"]).replace("8123", port)
    printed = run(clone, script.replace("| make ", "| make -o $VENV/.installed VENV=$VENV "))
    assert '"role":"assistant"' in printed, "curl's answer"
    assert f"http://127.0.0.1:{port}, /no_think" in printed and "served, and stopped" in printed
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", int(port)))  # nobody listens there any more


@pytest.mark.slow
def test_a_task_of_ones_own_is_scored(clone: Path) -> None:
    how_to = HOW_TOS["add an evaluation task"]
    lay_out(clone, how_to)
    (command,) = how_to.commands
    assert "my PIQA" in run(clone, command)


@pytest.mark.slow
def test_a_release_is_exported(clone: Path) -> None:
    (command,) = HOW_TOS["run the model in llama.cpp"].commands
    run(clone, command)
    files = sorted(file.name for file in (clone / "runs/tiny/export").iterdir())
    assert files == ["SmolLM3-f16.gguf", "SmolLM3-q8_0.gguf"]


@pytest.mark.slow
def test_a_step_and_a_text_are_shown_before_anything_is_trained(clone: Path) -> None:
    prepare, replay, seen = HOW_TOS["see what the model saw at a step, or find a text"].commands
    run(clone, prepare)
    step = run(clone, replay)
    assert "pretrain-stage1, step 100: 4 windows of 256 tokens" in step
    is_trained = (clone / "runs/tiny/pretrain-stage1").exists()  # by another how-to
    said = "as the run logged it" if is_trained else "no run has logged this step"
    assert step.count(", epoch ") == 4 and said in step
    found = run(clone, seen)
    assert "Lunar Roving Vehicle" in found and "boolq-passages" in found
    assert "longctx-32k: its text is not tokenised yet" in found
    assert (clone / "runs/tiny/pretrain-stage1").exists() == is_trained


@pytest.mark.slow
def test_a_run_is_watched(clone: Path) -> None:
    how_to = HOW_TOS["watch a run"]
    lay_out(clone, how_to)
    (command,) = how_to.commands
    run(clone, command)
    state = json.loads((clone / "runs/tiny/watched/tracking.json").read_text("utf-8"))
    assert state["steps"] == {"tensorboard": 30}
    assert list((clone / "runs/tiny/tracking" / state["run"]).glob("events.*"))


@pytest.mark.slow
def test_what_would_be_published_is_listed(tmp_path: Path) -> None:
    clone = copied(tmp_path / "clone")  # recipes that no other how-to has changed
    push, checkpoints = HOW_TOS["publish a model"].commands
    where = f"RUNS={write_runs(tmp_path)} CACHE={tmp_path / 'cache'} "
    printed = run(clone, where + push)
    assert "model.safetensors" in printed and "model-index" in printed and "DRY=0" in printed
    assert "stage1-step-20" in run(clone, where + checkpoints)
