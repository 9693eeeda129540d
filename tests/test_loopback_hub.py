"""The hub of the tests, asked by the real clients: what it gives, refuses, breaks off and counts."""

import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_hub import COMMIT, Fault, Hub, loopback_hub

SET, LINES, MODEL = "datasets/owner/texts", "datasets/owner/lines", "owner/model"
CARD = """---
configs:
- config_name: web
  data_files:
  - split: train
    path: data/CC-MAIN-2024-*/*
---
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tmp_path_factory.mktemp("hub")
    texts = root / "texts"
    for year in (10, 18):
        file = texts / f"data/CC-MAIN-2024-{year}/train-00000-of-00001.parquet"
        file.parent.mkdir(parents=True)
        rows = [f"text {year} {n}" * 50 for n in range(500)]
        pq.write_table(pa.table({"text": rows}), file, row_group_size=100, compression=None)
    lines = "".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(50))
    part = root / "lines/data/train-0.json.gz"
    part.parent.mkdir(parents=True)
    part.write_bytes(gzip.compress(lines.encode()))
    (texts / "README.md").write_text(CARD)
    old = root / "old"
    old.mkdir()
    (old / "README.md").write_text("old")
    model = root / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    return {SET: texts, LINES: root / "lines", MODEL: model, "old": old}


@pytest.fixture
def hub(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import datasets.config
    import huggingface_hub.constants as constants

    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)
    repositories = {name: folders[name] for name in (SET, LINES, MODEL)}
    with loopback_hub(repositories, created=tmp_path) as hub:
        hub.revisions[SET, "v1.0"] = folders["old"]
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
        yield hub


def test_files_are_fetched_by_name_and_by_commit(hub: Hub, folders: dict[str, Path]) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api = HfApi(hub.endpoint)
    place = Path(api.snapshot_download(MODEL))
    assert place.name == COMMIT
    weights = (place / "model.safetensors").read_bytes()
    assert weights == (folders[MODEL] / "model.safetensors").read_bytes()
    assert hub.sent[f"{MODEL}/model.safetensors"] == len(weights) and hub.bytes_of(SET) == 0
    texts = {"repo_id": "owner/texts", "repo_type": "dataset"}
    old = api.hf_hub_download(filename="README.md", revision="v1.0", **texts)
    assert Path(old).read_text() == "old"
    commit = hub.commit(SET, "v1.0")
    assert api.hf_hub_download(filename="README.md", revision=commit, **texts) == old
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(MODEL, "nothing")
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(MODEL, "config.json", revision="v9")
    with pytest.raises(RepositoryNotFoundError):
        api.hf_hub_download("owner/nothing", "config.json")


@pytest.mark.parametrize("page", [1000, 2])
def test_trees_are_listed_in_pages(hub: Hub, folders: dict[str, Path], page: int) -> None:
    from huggingface_hub import HfApi

    hub.page, api = page, HfApi(hub.endpoint)
    texts = {"repo_id": "owner/texts", "repo_type": "dataset"}
    files = {
        str(file.relative_to(folders[SET])): file.stat().st_size
        for file in folders[SET].rglob("*")
        if file.is_file()
    }
    listed = list(api.list_repo_tree(recursive=True, expand=True, **texts))
    assert {one.path: one.size for one in listed if hasattr(one, "size")} == files
    assert {one.path for one in listed} - files.keys() == {
        "data", "data/CC-MAIN-2024-10", "data/CC-MAIN-2024-18",
    }  # fmt: skip
    top = [one.path for one in api.list_repo_tree(**texts)]
    assert top == ["README.md", "data"]
    below = api.list_repo_tree(path_in_repo="data/CC-MAIN-2024-10", **texts)
    assert [Path(one.path).name for one in below] == ["train-00000-of-00001.parquet"]
    assert sum("cursor=" in line for line in hub.asked) == (0 if page == 1000 else 5)
    info = api.dataset_info("owner/texts", files_metadata=True)
    assert (info.sha, {one.rfilename: one.size for one in info.siblings or ()}) == (COMMIT, files)
    (found,) = api.get_paths_info("owner/texts", ["README.md", "none"], repo_type="dataset")
    assert found.path == "README.md"
    branches = api.list_repo_refs("owner/texts", repo_type="dataset").branches
    assert [(one.name, one.target_commit) for one in branches] == [
        (name, hub.commit(SET, name)) for name in ("main", "v1.0")
    ]


def test_a_part_of_a_file_is_a_part_of_its_bytes(hub: Hub, folders: dict[str, Path]) -> None:
    import pyarrow.parquet as pq
    from huggingface_hub import HfFileSystem

    name = "data/CC-MAIN-2024-10/train-00000-of-00001.parquet"
    files, content = HfFileSystem(endpoint=hub.endpoint), (folders[SET] / name).read_bytes()
    place = f"datasets/owner/texts@{COMMIT}/{name}"
    assert sorted(files.glob("datasets/owner/texts/data/*/*.parquet"))[0].endswith(name)
    with files.open(place, block_size=1000) as file:
        file.seek(5000)
        assert file.read(100) == content[5000:5100]
    assert 100 <= hub.sent[f"{SET}/{name}"] <= 2100
    with files.open(place) as file:  # in one stream, then from its middle
        assert file.read() == content
    assert files.cat_file(place, start=-8) == content[-8:]
    hub.forget()
    with files.open(place, block_size=8192) as file:
        table = pq.ParquetFile(file).read_row_group(2)
    assert table.num_rows == 100 and 0 < hub.sent[f"{SET}/{name}"] < 0.6 * len(content)


def test_data_sets_are_loaded_and_streamed(hub: Hub, tmp_path: Path) -> None:
    from datasets import load_dataset

    web = load_dataset("owner/texts", "web", split="train", streaming=True)
    rows = list(web)
    assert len(rows) == 1000 and rows[0]["text"].startswith("text 10 0")
    lines = load_dataset("owner/lines", revision=COMMIT, cache_dir=str(tmp_path / "sets"))
    assert [row["text"] for row in lines["train"]] == [f"line {n}" for n in range(50)]
    with pytest.raises(ValueError, match="none"):
        load_dataset("owner/texts", "none", split="train", streaming=True)


def test_a_gated_set_is_listed_for_all_and_read_by_who_accepted(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi, HfFileSystem
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    hub.gated[SET] = {"hf_right"}
    for token, status in ((False, 401), ("hf_other", 403)):
        api = HfApi(hub.endpoint, token=token)
        assert "README.md" in api.list_repo_files("owner/texts", repo_type="dataset")
        for ask in (
            lambda api=api: api.auth_check("owner/texts", repo_type="dataset"),
            lambda api=api: api.hf_hub_download("owner/texts", "README.md", repo_type="dataset"),
            lambda token=token: HfFileSystem(hub.endpoint, token=token).cat_file(
                "datasets/owner/texts/README.md", start=0, end=4
            ),
        ):
            with pytest.raises(HfHubHTTPError) as caught:
                ask()
            assert isinstance(caught.value, GatedRepoError)
            assert caught.value.response.status_code == status
    api = HfApi(hub.endpoint, token="hf_right")
    api.auth_check("owner/texts", repo_type="dataset")
    assert Path(api.hf_hub_download("owner/texts", "README.md", repo_type="dataset")).is_file()


def test_faults_come_as_often_as_is_said(hub: Hub) -> None:
    from huggingface_hub import HfApi, HfFileSystem
    from huggingface_hub.errors import HfHubHTTPError

    first = "CC-MAIN-2024-10/train"
    hub.faults = [
        Fault(f"{SET}/data/{first}", times=2, retry_after=0),
        Fault(f"{SET}/data/{first}", "cut", times=1),
        Fault(f"{SET}/data/CC-MAIN-2024-18", status=503, times=1),
    ]
    files = HfFileSystem(hub.endpoint)
    names = sorted(files.glob("datasets/owner/texts/data/*/*.parquet"))
    for name in names:
        assert len(files.cat_file(name)) == files.info(name)["size"]
    assert [fault.times for fault in hub.faults] == [0, 0, 0]
    hub.faults = [Fault(first, "cut")]
    with pytest.raises(Exception, match="peer closed connection"):
        files.cat_file(names[0])
    hub.faults = [Fault(f"{SET}/", status=500)]
    with pytest.raises(HfHubHTTPError, match="500"):
        HfApi(hub.endpoint).dataset_info("owner/texts")
    hub.faults = [Fault(f"{SET}/", "silence")]
    begin = time.monotonic()
    with pytest.raises(Exception, match="timed out"):
        HfApi(hub.endpoint).dataset_info("owner/texts", timeout=0.2)
    assert time.monotonic() - begin < 20


def test_a_folder_that_is_uploaded_is_fetched_back(
    hub: Hub, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(hub.endpoint, token=False).create_repo("someone/release")
    api = HfApi(hub.endpoint, token="hf_writer")
    api.create_repo("someone/release", exist_ok=True)
    api.create_repo("someone/release", exist_ok=True)
    before = hub.commit("someone/release")
    (folders[MODEL] / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    done = api.upload_folder(repo_id="someone/release", folder_path=folders[MODEL])
    assert done.oid == hub.commit("someone/release") != before
    place = Path(api.snapshot_download("someone/release"))
    assert place.name == done.oid
    for file in folders[MODEL].iterdir():
        assert (place / file.name).read_bytes() == file.read_bytes()
