"""A run folder belongs to one identity, is whole or says so, and has one writer at a time."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, edit, python_path
from processes import kill
from stage_runs import PlainRecipe, PlainStage, plain

from ground.errors import UserError
from launch.recipe.scale import load_scale
from launch.run.folder import git_commit
from launch.stages.pretrain import PretrainStage
from launch.walk import resolve

VALUES = {"seed": 6, "weights": {"a": 0.5}}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlainStage:
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    return plain("second", VALUES, takes=[plain("first", {"size": 3})])


def changed(run: PlainStage, **values: Any) -> PlainStage:
    return replace(run, recipe=PlainRecipe({**run.recipe.values, **values}))


def other(run: PlainStage) -> PlainStage:
    return changed(run, seed=7)


def with_changed_input(run: PlainStage) -> PlainStage:
    return replace(run, inputs={"first": plain("first", {"size": 4})})


def set_aside(run: PlainStage) -> list[Path]:
    return sorted(run.folder.parent.glob(f"{run.stage}.old-*"))


# ---- who it is


def test_identity_is_a_function_of_recipe_inputs_and_versions_alone(
    run: PlainStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    reordered = replace(run, recipe=PlainRecipe({"weights": {"a": 0.5}, "seed": 6}))
    assert reordered.identity == run.identity
    assert other(run).identity != run.identity
    assert with_changed_input(run).identity != run.identity
    monkeypatch.setattr("launch.run.folder._version", lambda name: "0.0.1")
    assert replace(run).identity != run.identity


def test_identity_ignores_our_own_commit(run: PlainStage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.run.folder.git_commit", lambda: "another+")
    other_commit = replace(run)
    assert other_commit.identity == run.identity
    other_commit.begin(force=False)
    manifest = run.manifest()
    assert manifest and manifest["git_commit"] == "another+"
    assert manifest["identity"] == run.identity


def test_identity_of_a_real_stage_follows_values_not_comments(recipes: Path) -> None:
    file = recipes / "pretrain/stage1.yaml"

    def identity(stage: str) -> str:
        return resolve(stage, load_scale("tiny")).identity

    before = {stage: identity(stage) for stage in ("tokenizer", "pretrain-stage1")}
    edit(file, "dclm: 0.37 ", "dclm:   0.370   # another comment; ")
    edit(file, "compile_layer: true", "compile_layer: false")  # changes the speed alone
    assert identity("pretrain-stage1") == before["pretrain-stage1"]
    edit(file, "clip_grad: 1.0", "clip_grad: 0.5")
    assert identity("pretrain-stage1") != before["pretrain-stage1"]
    assert identity("tokenizer") == before["tokenizer"]


# ---- begin


def test_the_same_identity_goes_on_in_its_folder(run: PlainStage) -> None:
    run.begin(force=False)
    (run.folder / "half").write_text("work")
    started = (run.manifest() or {})["started"]
    run.begin(force=False)
    assert (run.folder / "half").read_text() == "work"
    assert (run.manifest() or {})["started"] == started and not run.is_finished()
    run.finish(tokens=3)
    assert run.is_finished() and not other(run).is_finished()
    assert (run.manifest() or {})["tokens"] == 3
    assert set_aside(run) == []


def test_another_identity_is_refused_with_the_remedy(run: PlainStage) -> None:
    run.begin(force=False)
    run.finish(tokens=3)
    before = (run.folder / "manifest.json").read_bytes()
    with pytest.raises(UserError, match=r"recipe.yaml differs.*make second SCALE=small FORCE=1"):
        other(run).begin(force=False)
    assert (run.folder / "manifest.json").read_bytes() == before


def test_the_refusal_says_what_changed(run: PlainStage, monkeypatch: pytest.MonkeyPatch) -> None:
    run.begin(force=False)
    with pytest.raises(UserError, match="its input first changed"):
        with_changed_input(run).begin(force=False)
    monkeypatch.setattr("launch.run.folder._version", lambda name: "0.0.1")
    with pytest.raises(UserError, match=r"datatrove .*, now 0\.0\.1"):
        replace(run).begin(force=False)


@pytest.mark.parametrize(("rerun_on_change", "force"), [(True, False), (False, True)])
def test_a_folder_set_aside_loses_nothing(
    run: PlainStage, rerun_on_change: bool, force: bool
) -> None:
    for turn in range(3):
        now = replace(changed(run, turn=turn), rerun_on_change=rerun_on_change)
        now.begin(force)
        assert not (now.folder / "result").exists()
        (now.folder / "result").write_text(str(turn))
        now.finish(turn=turn)
    old = set_aside(run)
    assert [(path / "result").read_text() for path in old] == ["0", "1"]
    turns = [json.loads((path / "manifest.json").read_text())["turn"] for path in old]
    assert turns == [0, 1]


def test_force_sets_aside_even_what_would_go_on(run: PlainStage) -> None:
    run.begin(force=False)
    run.begin(force=True)
    assert len(set_aside(run)) == 1


# ---- whether it is whole


@pytest.mark.parametrize("content", ['{"stage": "sec', "", "null", "[]", "{}", "\udcff"])
def test_a_broken_manifest_is_no_manifest_of_ours(run: PlainStage, content: str) -> None:
    run.begin(force=False)
    (run.folder / "manifest.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    again = replace(run, rerun_on_change=True)
    for ask in (run.manifest, run.is_finished, lambda: again.begin(force=False)):
        with pytest.raises(UserError, match=r"manifest.json: not .*FORCE=1") as caught:
            ask()
        assert "\n" not in str(caught.value)
    run.begin(force=True)
    assert len(set_aside(run)) == 1 and (run.manifest() or {})["identity"] == run.identity


def test_results_without_a_manifest_are_nobodys(run: PlainStage) -> None:
    run.begin(force=False)
    (run.folder / "checkpoints" / "3").mkdir(parents=True)
    (run.folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"its manifest.json is gone.*FORCE=1"):
        run.begin(force=False)


def test_killed_before_its_first_manifest_a_stage_begins_again(run: PlainStage) -> None:
    run.begin(force=False)
    (run.folder / "manifest.json").rename(run.folder / ".manifest.json.123")
    run.begin(force=False)
    assert (run.manifest() or {})["identity"] == run.identity and set_aside(run) == []


# ---- who is writing to it

HOLD = """
import subprocess, sys
from processes import kill
from stage_runs import plain
with plain("second").locked() as lock:
    code = "import sys, time; print('in', flush=True); time.sleep(60)"
    # as torchrun starts its workers: no descriptor but the standard ones, a session of its own
    agent = ("import subprocess, sys; "
             f"subprocess.run([sys.executable, '-c', {code!r}], start_new_session=True)")
    subprocess.run([sys.executable, "-c", agent], stdin=lock)
"""


@pytest.fixture
def started() -> Iterator[list[int]]:
    """Processes that do not outlive the test."""
    pids: list[int] = []
    yield pids
    kill(pids)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def test_a_second_process_is_refused_until_the_first_and_its_workers_are_gone(
    run: PlainStage, started: list[int]
) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": python_path(ROOT / "tests")},
    )
    started.append(first.pid)
    assert first.stdout and first.stdout.readline() == "in\n"
    (agent,) = children(first.pid)
    (worker,) = children(agent)
    started += [agent, worker]
    host, ended = socket.gethostname(), "that process has ended; its workers"
    for pid, remedy in (
        (None, f"`kill {first.pid}`: it saves"),
        (first.pid, ended),
        (agent, ended),
    ):
        if pid:
            kill([pid])
            first.wait()
        with pytest.raises(UserError) as refused, run.locked():
            pass
        line = str(refused.value)
        assert re.search(
            rf"{run.folder}: .* on {host}, process {first.pid}, since 20.*: `.* -c", line
        )
        assert remedy in line
    lock = run.folder.with_name(".second.lock")
    lock.write_text(lock.read_text().replace(host, "node7"))
    with pytest.raises(UserError, match=f"`kill {first.pid}` on node7"), run.locked():
        pass
    lock.write_text("")  # as a shell's `flock` leaves it
    with pytest.raises(UserError, match="running this stage; its workers, or a job"), run.locked():
        pass
    kill([worker])
    with run.locked():
        assert f'"pid": {os.getpid()},' in lock.read_text()


def test_training_hands_the_lock_to_its_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setenv("RUNS", str(tmp_path))
    stage = resolve("pretrain-stage1", load_scale("tiny"))
    assert isinstance(stage, PretrainStage)
    stage.begin(force=False)
    note = "launch.stages.pretrain.run_workers"
    monkeypatch.setattr(note, lambda folder, name, **options: seen.update(options))
    with stage.locked() as lock:
        stage.train(lock)
        assert seen == {"lock": lock, "processes": 2}


def test_stages_do_not_lock_each_other(run: PlainStage) -> None:
    with run.locked() as own, run.inputs["first"].locked() as taken:
        assert own != taken


# ---- the length of a stage


def test_a_stage_without_a_step_is_refused(recipes: Path) -> None:
    file = recipes / "pretrain/stage2.yaml"
    edit(file, "train_steps: 4198000", "train_steps: 3450000")
    with pytest.raises(
        UserError, match=r"stage2\.yaml: .*no more than the 585 .*lower steps_divided_by"
    ):
        resolve("pretrain-stage2", load_scale("tiny")).refuse()


def test_a_run_needs_no_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None
