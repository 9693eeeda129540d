"""Files and folders that are written by ground/ are whole or absent, whatever happens meanwhile."""

import errno
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ground import files
from ground.errors import UserError, disk_error

# ---- one table of all writers: killed, or on a full disk

Tree = dict[str, str | None]
OLD = "".join(f'{{"step": {step}}}\n' for step in range(1, 6))


def tree(folder: Path) -> Tree:
    """{path below `folder`: its text, None for a folder}, as another process sees it."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {name: path.read_text() if path.is_file() else None for name, path in found.items()}


def old_file(target: Path) -> None:
    target.write_text(OLD)


def old_folder(target: Path) -> None:
    target.mkdir()
    for name in ("a", "b"):
        (target / name).write_text(OLD)


def write_folder(target: Path) -> None:
    with files.folder_aside(target) as aside:
        for name in ("b", "c"):
            (aside / name).write_text("new")


def write_lines(target: Path) -> None:
    with files.open_aside(target) as file:
        file.writelines(["1\n", "2\n"])


def copy(target: Path) -> None:
    files.copy_aside(Path(__file__), target)


def put_in_place(target: Path) -> None:
    made = target.with_name("made")
    if not made.exists():
        write_folder(made)
    files.replace_folder(made, target)


Write = Callable[[Path], Any]
# {what writes: (the old target, how the new one is written)}
WRITERS: dict[str, tuple[Write, Write]] = {
    "write_text": (old_file, lambda target: files.write_text(target, "new")),
    "write_json": (old_file, lambda target: files.write_json(target, {"new": [1, 2]})),
    "open_aside": (old_file, write_lines),
    "copy_aside": (old_file, copy),
    "cut_back": (old_file, lambda target: files.cut_back(target, 3)),
    "folder_aside": (old_folder, write_folder),
    "replace_folder": (old_folder, put_in_place),
}
CASES = [
    (name, again) for name in WRITERS for again in (True, False) if again or name != "cut_back"
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}{' again' if case[1] else ''}")
def writer(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Write, Tree, Tree]:
    """A target, what writes it, and the folder around it before and after."""
    name, is_there = request.param
    prepare, write = WRITERS[name]
    targets = [tmp_path / place / "target" for place in ("whole", "here")]
    for target in targets:
        target.parent.mkdir()
        if is_there:
            prepare(target)
    before = tree(targets[0].parent)
    write(targets[0])
    after = tree(targets[0].parent)
    assert before != after
    return targets[1], write, before, after


def states_during(write: Callable[[], Any], folder: Path) -> list[Tree]:
    """What lies in `folder` at each line of Python that `write` runs: what a kill would leave."""
    states: list[Tree] = []

    def look(frame: Any, event: str, argument: Any) -> Any:
        if (state := tree(folder)) not in states:
            states.append(state)
        return look

    earlier = sys.gettrace()
    sys.settrace(look)
    try:
        write()
    finally:
        sys.settrace(earlier)
    return states


def visible(state: Tree) -> Tree:
    return {name: text for name, text in state.items() if not name.startswith(".")}


def below(name: str, state: Tree) -> list[tuple[str, str | None]]:
    """What a state has at and below `name`, under the name `target`."""
    paths = [path for path in state if path.split("/")[0] == name]
    return sorted((path.replace(name, "target", 1), state[path]) for path in paths)


def lay_out(state: Tree, folder: Path) -> None:
    for name, text in state.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(exist_ok=True) if text is None else path.write_text(text)


def test_killed_at_any_line_the_old_or_the_new_is_there_and_the_next_write_ends_as_ever(
    writer: tuple[Path, Write, Tree, Tree], tmp_path: Path
) -> None:
    target, write, before, after = writer
    states = states_during(lambda: write(target), target.parent)
    assert len(states) >= 3
    for number, state in enumerate(states):
        left = below("target", state) or below("target.old", state)
        assert left in (below("target", before), below("target", after)), state
        place = tmp_path / f"killed {number}" / "target"
        place.parent.mkdir()
        lay_out(state, place.parent)
        write(place)
        assert visible(tree(place.parent)) == after, state


def test_a_write_in_place_would_be_seen(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("old")
    states = states_during(lambda: target.write_text("new"), tmp_path)
    assert {state["target"] for state in states} > {"old"} and {"target": ""} in states


def test_on_a_full_disk_the_old_stays_and_nothing_else(
    writer: tuple[Path, Write, Tree, Tree], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, write, before, after = writer
    for number in range(10):
        calls = itertools.count()

        def full(
            call: Callable[..., Any], *arguments: Any, at: int = number, n: Any = calls
        ) -> Any:
            if next(n) == at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*arguments)

        with monkeypatch.context() as patched:
            for where, name in ((os, "fsync"), (Path, "replace"), (Path, "rename")):
                call = getattr(where, name)
                patched.setattr(where, name, lambda *words, call=call: full(call, *words))
            problem = None
            try:
                write(target)
            except OSError as error:
                problem = disk_error(error)
        state = tree(target.parent)
        if problem is None:
            assert number >= 1 and state == after
            return
        assert problem.startswith("no space left on device") and "free some" in problem
        assert {name: state[name] for name in state if name.split("/")[0] != "made"} == before
    raise AssertionError("the write went on failing")


@pytest.mark.parametrize("was_killed", [False, True], ids=["", "after a kill between two renames"])
def test_an_exception_in_the_block_leaves_the_old_folder(tmp_path: Path, was_killed: bool) -> None:
    folder = tmp_path / "hf"
    old_folder(folder)
    before = tree(tmp_path)
    if was_killed:
        folder.rename(tmp_path / "hf.old")
    with pytest.raises(UserError), files.folder_aside(folder) as aside:
        (aside / "a").write_text("new")
        raise UserError("not this")
    assert tree(tmp_path) == before


def test_a_text_is_on_the_disk_before_it_takes_the_place_of_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(Path, "replace", lambda *a: (calls.append("replace"), replace(*a)))
    files.write_text(tmp_path / "x", "text")
    assert calls == ["fsync", "replace"]


# ---- files


def test_json_is_what_any_reader_takes(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "x.json"
    files.write_json(file, {"é": [1.5, None]})
    assert files.read_json(file) == files.read_json_object(file) == {"é": [1.5, None]}
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON compliant"):
            files.write_json(file, {"loss": value})
    assert files.read_json(file) == {"é": [1.5, None]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"x\.json: no such file; train it"),
        (b'{"a": ', r"x\.json: not JSON \(.*\); train it"),
        (b"\xff", r"x\.json: not JSON \(.*\); train it"),
        (b"[1]", r"x\.json: not a JSON object; train it"),
    ],
)
def test_a_file_that_is_no_json_object_is_named_with_the_remedy(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    file = tmp_path / "x.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        files.read_json_object(file, "train it")
    assert "\n" not in str(caught.value)


def test_checkpoints_are_whole_ones_in_the_order_of_their_steps(tmp_path: Path) -> None:
    assert files.checkpoints(tmp_path) == []
    names = ("12", "3", "checkpoint-100", ".partial/7", "9.partial", "6.old", "checkpoint-", "last")
    for name in names:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    found = files.checkpoints(tmp_path)
    assert [path.name for path in found] == ["3", "12", "checkpoint-100"]
    assert [files.step_of(path) for path in found] == [3, 12, 100]
    assert files.step_of(Path("9.partial")) is None


def test_metrics_are_cut_back_to_the_checkpoint_and_torn_lines_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    files.cut_back(file, 3)
    assert not file.exists()
    lines = [json.dumps({"step": step, "seen": {"a": step}}) for step in range(1, 6)]
    file.write_text("\n".join([*lines, '{"step": 2, "seen": {"a": 1}', "[2]", '{"st']))
    files.cut_back(file, 3)
    assert file.read_text() == "".join(f"{line}\n" for line in lines[:3])
    assert files.read_json_lines(file) == [json.loads(line) for line in lines[:3]]
    files.cut_back(file, -1)
    assert file.read_text() == "" and files.read_json_lines(file) == []
    assert files.read_json_lines(tmp_path / "none.jsonl") == []


def test_a_copy_may_be_read_by_others_and_a_digest_tells_contents(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("text")
    source.chmod(0o600)
    files.copy_aside(source, target)
    assert target.read_text() == "text" and target.stat().st_mode & 0o044
    assert files.digest(source) == files.digest(target) and len(files.digest(source, 4)) == 8
    target.write_text("Text")
    assert files.digest(source) != files.digest(target)
