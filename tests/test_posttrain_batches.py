"""What a post-training run says that its steps read, and what the order says before it runs."""

import json
import random
import shutil
from pathlib import Path

import pytest
from conftest import metrics
from datasets import Dataset, load_from_disk
from forked import distributed
from posttrain_jobs import make_folder, run_in_process, write_start

from ground.batch_hash import shown, total
from ground.errors import UserError
from ground.files import checkpoints, step_of
from posttrain.batches import Order, documents, hash_of
from posttrain.data import load_tokenizer, prepare_data
from posttrain.job import Job
from posttrain.rows import Lines, chat_tokens, pair_tokens


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("batches")
    write_start(root / "model")
    return root


def order_of(folder: Path) -> Order:
    return Order(Job.read(folder), load_from_disk(str(folder / "data")))


def check_logged(folder: Path) -> None:
    """Each line has the hash of the rows that the order says."""
    order, lines = order_of(folder), metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, order.last_step + 1))
    for line in lines:
        planned = total(hash_of(order.data[row]) for row in order.rows(line["step"]))
        assert line["batch_hash"] == shown(planned), line["step"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["midtrain", "sft", "apo"])
def test_a_run_logs_what_the_order_says(root: Path, stage: str) -> None:
    # Several epochs, of which the last batches are short.
    folder = make_folder(root / stage, stage, root / "model", trl={"max_steps": 30})
    check_logged(run_in_process(folder))
    assert len({line["batch_hash"] for line in metrics(folder)}) > 5


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "apo"])
def test_two_processes_log_what_the_order_says_after_a_resume_too(root: Path, stage: str) -> None:
    folder = make_folder(
        root / f"{stage}-2", stage, root / "model", world_size=2, held_out="",
        trl={"max_steps": 17, "save_steps": 6},
    )  # fmt: skip
    prepare_data(folder)
    words = ("-m", "posttrain.stage", str(folder))
    distributed("posttrain", 2, *words).check_returncode()
    check_logged(folder)
    shutil.rmtree(folder / "hf")
    (folder / "results.json").unlink()
    for saved in checkpoints(folder):
        if (step_of(saved) or 0) > 6:  # in the middle of an epoch
            shutil.rmtree(saved)
    whole = (folder / "metrics.jsonl").read_text()
    distributed("posttrain", 2, *words).check_returncode()
    hashes = [json.loads(line)["batch_hash"] for line in whole.splitlines()]
    assert [line["batch_hash"] for line in metrics(folder)] == hashes


@pytest.mark.parametrize("stage", ["midtrain", "sft", "apo"])
def test_each_document_names_the_conversation_that_it_is(root: Path, stage: str) -> None:
    folder = make_folder(root / f"{stage}-rows", stage, root / "model", trl={"max_length": 200})
    prepare_data(folder)
    job, data = Job.read(folder), load_from_disk(str(folder / "data"))
    tokenizer, tokens = load_tokenizer(job), 0
    seen: dict[tuple[str, int], list[int]] = {}
    for row in data:
        tokens += len(row["input_ids"]) if "input_ids" in row else 0
        for document in documents(job, row):
            ids = [token for part in document.parts.values() for token in part[0]]
            seen.setdefault((document.split, document.row), []).extend(ids)
    assert tokens == sum(map(len, seen.values())) or stage == "apo"
    for (split, number), ids in seen.items():
        row, where = Lines(Path(job.files[split])).row(number)
        if stage == "apo":
            whole = [i for part in pair_tokens(tokenizer, row, {}, where).values() for i in part]
        else:
            whole = chat_tokens(tokenizer, row, False, where)["input_ids"]
        # A window that cuts a conversation, and another that goes on with it, in any order.
        assert sorted(ids) == sorted(whole[: len(ids)]) or len(ids) == 200
    assert len(seen) == 24 + 20


def planned(rows: int, processes: int = 1, **trl: object) -> Order:
    job = Job(
        "sft", "SFTTrainer", "", "", "", {}, {}, {}, {}, 0,
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "seed": 1, **trl},
        processes, 1, "", 1, 0, 0, 0, 0,
    )  # fmt: skip
    return Order(job, Dataset.from_dict({"input_ids": [[n] for n in range(rows)]}))


def test_each_epoch_reads_every_row_in_its_own_order_and_a_row_names_its_steps() -> None:
    order = planned(27, num_train_epochs=3)
    assert order.last_step == 21
    epochs = [[row for step in order.epoch(n) for row in step] for n in range(3)]
    assert all(sorted(rows) == list(range(27)) for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 3
    row = random.randrange(27)
    found = order.steps_of({row})
    assert len(found) == 3
    assert all(order.rows(step)[place] == row for _, step, place in found)


def test_processes_share_a_step_and_fill_the_last_batches_with_rows_from_the_start() -> None:
    order = planned(27, processes=3, num_train_epochs=1)
    steps = order.epoch(0)
    assert [len(step) for step in steps] == [12, 12, 6]
    rows = [row for step in steps for row in step]
    assert len(rows) == 30 and set(rows) == set(range(27))


def test_steps_that_a_stage_does_not_take_are_refused() -> None:
    with pytest.raises(UserError, match="STEP=22: sft takes the steps 1 to 21"):
        planned(27, num_train_epochs=3).rows(22)
