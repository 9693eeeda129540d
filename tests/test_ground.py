"""What the engines stand on: weights checked before use, one line for a mistake."""

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ground import weights
from ground.errors import UserError, did_you_mean, disk_error, fail

# ---- weights

NORM = "model.norm.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two tensors in one file."""
    tensors = {NORM: torch.ones(8), "head": torch.ones(4, 8, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def split(folder: Path) -> None:
    """The same in a file a tensor, with an index."""
    tensors = {
        name: weights.read_tensor(folder / "model.safetensors", name) for name in (NORM, "head")
    }
    (folder / "model.safetensors").unlink()
    for name, tensor in tensors.items():
        save_file({name: tensor}, folder / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in tensors}}
    (folder / weights.INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("is_split", [False, True])
def test_a_tensor_is_found_in_one_file_or_in_shards(model: Path, is_split: bool) -> None:
    if is_split:
        split(model)
    found = weights.weight_files(model)
    assert found.keys() == {NORM, "head"} and len(set(found.values())) == 1 + is_split
    assert torch.equal(weights.read_tensor(found[NORM], NORM), torch.ones(8))
    assert weights.parameters(model) == 8 + 32


def empty(folder: Path) -> None:
    save_file({}, folder / "model.safetensors")


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors: no such file; again"),
        (cut, r"model\.safetensors: truncated or corrupt \(.*\); again"),
        (empty, r"no weights in it; again"),
        (
            lambda f: (f / weights.INDEX).write_text("{}"),
            r"index\.json: weight_map: missing; again",
        ),
        (lambda f: (f / weights.INDEX).write_text("["), r"index\.json: not JSON"),
    ],
)
def test_a_folder_without_whole_weights_is_named(model: Path, damage: Any, words: str) -> None:
    damage(model)
    with pytest.raises(UserError, match=words) as caught:
        weights.weight_files(model, "again")
    assert "\n" not in str(caught.value) and str(model) in str(caught.value)


def test_names_and_shapes_are_those_asked_for(model: Path) -> None:
    file = model / "model.safetensors"
    weights.check_names(model, {NORM, "head"}, weights.weight_files(model), "the config")
    weights.check_shape(file, NORM, (8,), [8], "the config")
    with pytest.raises(UserError, match=r"no tensor 'bias' \(1 missing\), which the config has"):
        weights.check_names(model, {NORM, "bias", "head"}, [NORM, "head"], "the config")
    with pytest.raises(UserError, match="tensor 'head' is not of the config"):
        weights.check_names(model, {NORM}, [NORM, "head"], "the config")
    with pytest.raises(UserError, match=r"'head' has shape \(4, 8\), \(8, 8\) in the config"):
        weights.check_shape(file, "head", (4, 8), (8, 8), "the config")
    with pytest.raises(UserError, match=r"model\.safetensors: no tensor 'bias'; again"):
        weights.read_tensor(file, "bias", "again")


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.tensor([1.0, float("nan"), float("inf")]), "not finite in 2 of 3 values"),
        (torch.ones(3, dtype=torch.int8), r"is torch\.int8; take the unquantised"),
        (torch.ones(3).to(torch.float8_e4m3fn), r"is torch\.float8_e4m3fn; take the unquantised"),
    ],
)
def test_weights_are_floats_and_finite(tensor: torch.Tensor, words: str) -> None:
    weights.check_floats(Path("x"), "head", torch.ones(3, dtype=torch.float16))
    with pytest.raises(UserError, match=f"x: 'head'.*{words}"):
        weights.check_floats(Path("x"), "head", tensor)


# ---- one line for a mistake


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/b"), r"no space left on device \(a/b\): free"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no space left on device: "),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "a/b"), "a/b: read-only file system; RUNS="),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "a/b: permission denied; RUNS="),
    ],
)  # fmt: skip
def test_a_disk_that_is_full_or_closed_is_one_line(error: BaseException, line: str) -> None:
    assert re.match(line, disk_error(error) or "")


@pytest.mark.parametrize("error", [ValueError("x"), FileNotFoundError(errno.ENOENT, "no", "a")])
def test_any_other_error_is_not_the_disks(error: BaseException) -> None:
    assert disk_error(error) is None


def test_a_failure_is_a_line_on_standard_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fail("a: b") == 2 and fail("c", 130) == 130
    assert capsys.readouterr() == ("", "error: a: b\nerror: c\n")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    fail("a")
    assert capsys.readouterr().err == "\033[31merror:\033[0m a\n"
    monkeypatch.setenv("NO_COLOR", "1")
    fail("a")
    assert capsys.readouterr().err == "error: a\n"


def test_a_misspelt_name_is_told_the_nearest_or_all() -> None:
    assert did_you_mean("tpo", ["tp", "dp"]) == "did you mean 'tp'?"
    assert did_you_mean("xyz", ["b", "a"]) == "known: a, b"
    assert did_you_mean("xyz", map(str, range(300))) == "none of 300 is like it; correct it"
