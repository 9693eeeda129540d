"""A run folder belongs to one identity, is whole or says so, and has one writer at a time."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, edit
from launch.errors import UserError
from launch.pretrain import _cut_metrics
from launch.run_folder import StageRun, write_aside

from launch.stages import resolve


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StageRun:
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    taken = StageRun("first", "small", "tokenizer", {"size": 3})
    return StageRun("second", "small", "data", {"seed": 6, "weights": {"a": 0.5}}, {"first": taken})


def other(run: StageRun) -> StageRun:
    return replace(run, recipe={**run.recipe, "seed": 7})


def set_aside(run: StageRun) -> list[Path]:
    return sorted(run.folder.parent.glob(f"{run.stage}.old-*"))


# ---- who it is


def test_identity_is_a_function_of_recipe_inputs_and_versions_alone(
    run: StageRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    reordered = replace(run, recipe={"weights": {"a": 0.5}, "seed": 6})
    assert reordered.identity == run.identity
    assert other(run).identity != run.identity
    changed_input = replace(run.inputs["first"], recipe={"size": 4})
    assert replace(run, inputs={"first": changed_input}).identity != run.identity
    before = run.identity
    monkeypatch.setattr("launch.run_folder.version", lambda name: "0.0.1")
    assert run.identity != before


def test_identity_ignores_our_own_commit(run: StageRun, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run.identity
    monkeypatch.setattr("launch.run_folder._git_commit", lambda: "another+")
    assert run.identity == before
    run.begin(rerun_on_change=False, force=False)
    manifest = run.manifest()
    assert manifest and manifest["git_commit"] == "another+" and manifest["identity"] == before


def test_identity_of_a_real_stage_follows_values_not_comments(recipes: Path) -> None:
    file = recipes / "pretrain/stage1.yaml"
    before = {stage: resolve(stage, "tiny").identity for stage in ("tokenizer", "pretrain-stage1")}
    edit(file, "dclm: 0.37 ", "dclm:   0.370   # another comment; ")
    assert resolve("pretrain-stage1", "tiny").identity == before["pretrain-stage1"]
    edit(file, "clip_grad: 1.0", "clip_grad: 0.5")
    assert resolve("pretrain-stage1", "tiny").identity != before["pretrain-stage1"]
    assert resolve("tokenizer", "tiny").identity == before["tokenizer"]


# ---- begin


def test_the_same_identity_goes_on_in_its_folder(run: StageRun) -> None:
    run.begin(rerun_on_change=False, force=False)
    (run.folder / "half").write_text("work")
    started = (run.manifest() or {})["started"]
    run.begin(rerun_on_change=False, force=False)
    assert (run.folder / "half").read_text() == "work"
    assert (run.manifest() or {})["started"] == started and not run.is_finished()
    run.finish(tokens=3)
    assert run.is_finished() and not other(run).is_finished()
    assert (run.manifest() or {})["tokens"] == 3
    assert set_aside(run) == []


def test_another_identity_is_refused_with_the_remedy(run: StageRun) -> None:
    run.begin(rerun_on_change=False, force=False)
    run.finish(tokens=3)
    before = (run.folder / "manifest.json").read_bytes()
    with pytest.raises(UserError, match=r"recipe.yaml differs.*make second SCALE=small FORCE=1"):
        other(run).begin(rerun_on_change=False, force=False)
    assert (run.folder / "manifest.json").read_bytes() == before


def test_the_refusal_says_what_changed(run: StageRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.begin(rerun_on_change=False, force=False)
    changed_input = replace(run.inputs["first"], recipe={"size": 4})
    with pytest.raises(UserError, match="its input first changed"):
        replace(run, inputs={"first": changed_input}).begin(False, False)
    monkeypatch.setattr("launch.run_folder.version", lambda name: "0.0.1")
    with pytest.raises(UserError, match=r"datatrove .*, now 0\.0\.1"):
        run.begin(rerun_on_change=False, force=False)


@pytest.mark.parametrize(("rerun_on_change", "force"), [(True, False), (False, True)])
def test_a_folder_set_aside_loses_nothing(
    run: StageRun, rerun_on_change: bool, force: bool
) -> None:
    for turn in range(3):
        now = replace(run, recipe={"turn": turn})
        now.begin(rerun_on_change, force)
        assert not (now.folder / "result").exists()
        (now.folder / "result").write_text(str(turn))
        now.finish(turn=turn)
    old = set_aside(run)
    assert [(path / "result").read_text() for path in old] == ["0", "1"]
    turns = [json.loads((path / "manifest.json").read_text())["turn"] for path in old]
    assert turns == [0, 1]


def test_force_sets_aside_even_what_would_go_on(run: StageRun) -> None:
    run.begin(rerun_on_change=False, force=False)
    run.begin(rerun_on_change=False, force=True)
    assert len(set_aside(run)) == 1


# ---- whether it is whole


@pytest.mark.parametrize("content", ['{"stage": "sec', "", "null", "[]", "{}", "\udcff"])
def test_a_broken_manifest_is_no_manifest_of_ours(run: StageRun, content: str) -> None:
    run.begin(rerun_on_change=False, force=False)
    (run.folder / "manifest.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    for ask in (run.manifest, run.is_finished, lambda: run.begin(True, False)):
        with pytest.raises(UserError, match=r"manifest.json: not a manifest .*FORCE=1") as caught:
            ask()
        assert "\n" not in str(caught.value)
    run.begin(rerun_on_change=False, force=True)
    assert len(set_aside(run)) == 1 and (run.manifest() or {})["identity"] == run.identity


def test_results_without_a_manifest_are_nobodys(run: StageRun) -> None:
    run.begin(rerun_on_change=False, force=False)
    (run.folder / "checkpoints" / "3").mkdir(parents=True)
    (run.folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"its manifest.json is gone.*FORCE=1"):
        run.begin(rerun_on_change=False, force=False)


def test_killed_before_its_first_manifest_a_stage_begins_again(run: StageRun) -> None:
    run.begin(rerun_on_change=False, force=False)
    (run.folder / "manifest.json").rename(run.folder / ".manifest.json.123")
    run.begin(rerun_on_change=False, force=False)
    assert (run.manifest() or {})["identity"] == run.identity and set_aside(run) == []


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    file = tmp_path / "manifest.json"
    write_aside(file, "old")

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync") if broken == "fsync" else (Path, "replace")), full)
    with pytest.raises(OSError, match="No space left"):
        write_aside(file, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert file.read_text() == "old"


def test_metrics_are_cut_back_to_the_checkpoint_and_torn_lines_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "seen": {"a": step}}) for step in range(1, 6)]
    file.write_text("\n".join([*lines, '{"step": 2, "seen": {"a": 1}', '{"st']))
    _cut_metrics(file, 3)
    assert file.read_text() == "".join(f"{line}\n" for line in lines[:3])
    _cut_metrics(file, -1)
    assert file.read_text() == ""


# ---- who is writing to it

HOLD = """
import subprocess, sys
from launch.run_folder import StageRun
with StageRun("second", "small", "data", {}).locked() as lock:
    code = "import sys, time; print('in', flush=True); time.sleep(60)"
    # as torchrun starts its workers: no descriptor but the standard ones, a session of its own
    agent = ("import subprocess, sys; "
             f"subprocess.run([sys.executable, '-c', {code!r}], start_new_session=True)")
    subprocess.run([sys.executable, "-c", agent], stdin=lock)
"""


@pytest.fixture
def processes() -> Any:
    started: list[int] = []
    yield started
    for pid in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def end(pid: int) -> None:
    """SIGKILL a process and wait until it holds no file any more."""
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
            time.sleep(0.01)


def test_a_second_process_is_refused_until_the_first_and_its_workers_are_gone(
    run: StageRun, processes: list[int]
) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    processes.append(first.pid)
    assert first.stdout and first.stdout.readline() == "in\n"
    (agent,) = children(first.pid)
    (worker,) = children(agent)
    processes += [agent, worker]
    for pid in (None, first.pid, agent):
        if pid:
            end(pid)
        with pytest.raises(UserError, match="another process is running this stage"), run.locked():
            pass
    end(worker)
    with run.locked():
        pass
    first.wait()


def test_training_hands_the_lock_to_its_workers(
    run: StageRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch import child, pretrain

    seen: dict[str, Any] = {}

    def note(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        seen.update(options)
        return subprocess.CompletedProcess(command, 0)

    layout = {"dp": 1, "tp": 1, "pp": 1, "context_parallel_size": 1}
    recipe = {"device": "cpu", "nanotron": {"parallelism": layout, "tokens": {"train_steps": 1}}}
    stage = replace(run, engine="pretrain", recipe=recipe, inputs={})
    stage.begin(rerun_on_change=False, force=False)
    monkeypatch.setattr(child.subprocess, "run", note)
    with stage.locked() as lock:
        pretrain.train(stage, lock)
        assert seen["stdin"] == lock


def test_stages_do_not_lock_each_other(run: StageRun) -> None:
    with run.locked() as own, run.inputs["first"].locked() as taken:
        assert own != taken


# ---- the length of a stage


def test_a_stage_without_a_step_is_refused(run: StageRun) -> None:
    from launch.pretrain import prepare

    def stage(name: str, steps: int, inputs: dict[str, StageRun]) -> StageRun:
        checkpoints = {"load_optimizer": True}
        recipe = {"nanotron": {"tokens": {"train_steps": steps}, "checkpoints": checkpoints}}
        return StageRun(name, "small", "pretrain", recipe, inputs)

    first = stage("first", 3, {})
    with pytest.raises(UserError, match="begins after step 3: lower steps_divided_by"):
        prepare(stage("second", 3, {"first": first}))
