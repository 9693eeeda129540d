"""A sealed folder is taken only as it was written."""

import json
import threading
from pathlib import Path

import pytest

from ground import checksums
from ground.checksums import FILE, Damaged, seal, seal_together, sizes_differ, verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "below").mkdir()
    (tmp_path / "weights").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "below" / "state.json").write_text("{}")
    (tmp_path / ".hidden").write_text("not sealed")
    seal(tmp_path)
    return tmp_path


def test_a_sealed_folder_is_whole(folder: Path) -> None:
    verify(folder)
    assert sizes_differ(folder) is None
    assert set(json.loads((folder / FILE).read_text())["files"]) == {"weights", "below/state.json"}


def test_a_flipped_bit_is_found_and_named(folder: Path) -> None:
    data = bytearray((folder / "weights").read_bytes())
    data[1000] ^= 1
    (folder / "weights").write_bytes(data)
    assert sizes_differ(folder) is None
    with pytest.raises(Damaged, match="weights: its content is not what was written; do this"):
        verify(folder, "do this")


@pytest.mark.parametrize("change", ["cut", "gone", "other_seal", "no_json", "no_keys", "none"])
def test_sizes_and_the_seal_itself_are_checked_without_hashing(folder: Path, change: str) -> None:
    file, sealed = folder / "below" / "state.json", folder / FILE
    match change:
        case "cut":
            file.write_text("{")
        case "gone":
            file.unlink()
        case "other_seal":
            sealed.write_text(sealed.read_text().replace('"bytes": 2\n', '"bytes": 3\n'))
        case "no_json":
            sealed.write_text("{")
        case "no_keys":
            sealed.write_text("{}")
        case "none":
            sealed.unlink()
    named = "state.json" if change in ("cut", "gone") else FILE
    problem = sizes_differ(folder)
    assert problem is not None and named in problem and "\n" not in problem
    with pytest.raises(Damaged, match=named):
        verify(folder)


def test_ranks_seal_together_what_one_seals_alone(folder: Path) -> None:
    alone = (folder / FILE).read_text()
    (folder / FILE).unlink()
    barrier = threading.Barrier(3)
    ranks = [
        threading.Thread(target=seal_together, args=(folder, rank, 3, barrier.wait))
        for rank in range(3)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert (folder / FILE).read_text() == alone
    assert not list(folder.glob(f".{FILE}*"))


def test_a_file_that_another_rank_did_not_see_is_sealed_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = (folder / FILE).read_text()
    listed = checksums._files
    seen = iter([[], listed(folder), listed(folder)])
    monkeypatch.setattr(checksums, "_files", lambda folder: next(seen))
    for rank in (1, 0):
        seal_together(folder, rank, 2, lambda: None)
    assert (folder / FILE).read_text() == alone
