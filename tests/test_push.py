"""What is published is whole, loads by its id, and says what it is; what cannot be is said in a line."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from loopback_hub import Fault, Hub, loopback_hub
from publishable import write_runs
from small_models import WINDOW, weights

from ground.errors import Outage, UserError
from launch.recipe.scale import load_scale
from launch.tools import publish_checkpoints, push
from launch.walk import resolve

REPO, CHECKPOINTS, TOKEN = "owner/model", "owner/checkpoints", "hf_writes"
USE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
for options in ({}, {"subfolder": "yarn"}):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], **options)
    print(model.num_parameters(), model.config.max_position_embeddings, len(tokenizer.chat_template))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runs(tmp_path_factory.mktemp("push"))


@pytest.fixture
def hub(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub.constants as constants

    monkeypatch.setenv("RUNS", str(runs))
    monkeypatch.setenv("CACHE", str(runs.with_name("cache")))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with loopback_hub({}, created=tmp_path / "hub", writers={TOKEN}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        yield hub


def sent(hub: Hub, repo: str = REPO, branch: str = "") -> dict[str, bytes]:
    folder = hub.revisions[repo, branch] if branch else hub.repositories[repo]
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def send(dry: bool = False, private: bool = True) -> None:
    push.command(REPO, "tiny", dry=dry, private=private)


def test_a_dry_run_lists_what_would_be_sent_and_asks_nobody(
    hub: Hub, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = runs / "tiny/export/mine-f16.gguf"
    other.write_bytes(b"GGUF")
    send(dry=True)
    other.unlink()
    publish_checkpoints.command(CHECKPOINTS, "tiny")
    printed = capsys.readouterr().out
    assert other.name not in printed, "an export of another model"
    for name in ("model.safetensors", "yarn/config.json", "SmolLM3-f16.gguf", "report.html"):
        assert f"  {name}\n" in printed
    assert "model-index:" in printed and "manifest.json" not in printed
    assert "stage1-step-10 " in printed and "stage1-step-20 " in printed
    assert printed.count("nothing was sent") == 2 and hub.asked == []


@pytest.mark.slow
def test_what_is_pushed_loads_by_its_id_and_so_does_its_yarn(
    hub: Hub, runs: Path, tmp_path: Path
) -> None:
    send()
    assert hub.private == {REPO}
    done = subprocess.run(
        [sys.executable, "-c", USE, REPO], capture_output=True, text=True, check=False,
        env=os.environ | hub.variables(tmp_path / "home", TOKEN) | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    plain, yarn = (line.split() for line in done.stdout.splitlines())
    assert (int(plain[1]), int(yarn[1])) == (WINDOW, 2 * WINDOW)
    assert plain[0] == yarn[0] and int(plain[2]) > 1000
    release = runs / "tiny/release"
    assert sent(hub)["model.safetensors"] == (release / "model.safetensors").read_bytes()
    assert sent(hub)["report.html"] and not {"manifest.json", "recipe.yaml"} & sent(hub).keys()


def test_the_card_holds_the_scores_as_the_hub_reads_them(hub: Hub) -> None:
    from huggingface_hub import ModelCard

    send()
    card = ModelCard(sent(hub)["README.md"].decode())
    card.validate()
    first, second = card.data.eval_results
    assert (first.dataset_type, first.metric_type, first.metric_value) == (
        "Rowan/hellaswag", "acc_norm", 0.5417,
    )  # fmt: skip
    assert second.dataset_type == "mode_switch" and card.data.model_name == "model"
    assert first.metric_args == {"low": 0.3507, "high": 0.7211}
    assert card.data.license == "apache-2.0" and "en" in card.data.language
    assert card.data.datasets is None, "it was trained on stand-ins"
    assert "| HellaSwag | 54.2% | 35.1% to 72.1% | 24 | 25% |" in card.text
    assert "stand-ins of the published data sets" in card.text
    assert f'folder = "{REPO}"  # with subfolder="yarn" it reads 128 tokens' in card.text
    assert f"llama-server --hf-repo {REPO} --hf-file SmolLM3-f16.gguf" in card.text


def test_a_release_of_the_hubs_data_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.report.card import metadata

    text = metadata(resolve("release", load_scale("tiny", origin="hub")))
    assert "- HuggingFaceTB/smoltalk2\n" in text and "- HuggingFaceFW/fineweb-edu\n" in text


def test_a_card_that_the_hub_refuses_is_said_before_anything_is_sent(hub: Hub, runs: Path) -> None:
    card = runs / "tiny/release/README.md"
    kept = card.read_text()
    card.write_text(kept.replace("license: apache-2.0", "license: nobody-knows-it"))
    try:
        with pytest.raises(UserError, match=r"README\.md: .*license.*must be one of"):
            send()
    finally:
        card.write_text(kept)
    assert sent(hub) == {} and not hub.uploads


@pytest.mark.slow
@pytest.mark.parametrize("breaks", ["owner/model/", "uploads/"])
def test_a_broken_upload_shows_nothing_and_goes_on(hub: Hub, breaks: str) -> None:
    send(private=False)
    files = sent(hub)
    for name in files:
        (hub.repositories[REPO] / name).unlink()
    hub.uploads.clear()
    (hub.repositories[REPO] / "model-00001-of-00002.safetensors").write_bytes(b"of an older push")
    hub.faults.append(Fault(breaks, status=503))
    with pytest.raises(Outage, match="the hub answers 503"):
        send()
    assert [*sent(hub)] == ["model-00001-of-00002.safetensors"]
    hub.faults.clear()
    send()
    assert sent(hub) == files and hub.commits[REPO] == 2
    send()
    assert hub.commits[REPO] == 2, "nothing has changed"


def drop_release(runs: Path) -> str:
    (runs / "tiny/release/manifest.json").rename(runs / "kept")
    return "no finished release of this recipe; first `make release SCALE=tiny`"


def damage_release(runs: Path) -> str:
    file = runs / "tiny/release/model.safetensors"
    (runs / "kept").write_bytes(file.read_bytes())
    file.write_bytes(file.read_bytes()[::-1])
    return r"model\.safetensors: its content is not what was written; `make release"


@pytest.mark.parametrize(
    ("spoil", "name"),
    [(drop_release, "manifest.json"), (damage_release, "model.safetensors")],
)
def test_what_is_not_whole_is_not_sent(hub: Hub, runs: Path, spoil: Any, name: str) -> None:
    words = spoil(runs)
    try:
        with pytest.raises(UserError, match=words):
            send()
    finally:
        (runs / "kept").replace(runs / "tiny/release" / name)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("repo", "words"),
    [
        ("model", "REPO=model: write <owner>/<name> of the hub: the owner is missing"),
        ("owner/my model", "REPO=owner/my model: write <owner>/<name> of the hub: "),
        ("", "REPO=: write <owner>/<name>"),
    ],
)
def test_an_id_that_is_none_is_refused(hub: Hub, repo: str, words: str) -> None:
    for tool in (push, publish_checkpoints):
        with pytest.raises(UserError, match=words):
            tool.command(repo, "tiny", dry=False)


def test_who_may_not_write_is_told_so(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for token, words in {"hf_reads": "this token may not write there", "": "no token"}.items():
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(UserError, match=f"REPO={REPO}: {words}"):
            send()
    assert REPO not in hub.repositories


def test_an_export_of_an_older_release_is_left_out(
    hub: Hub, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = runs / "tiny/export/SmolLM3-f16.gguf"
    times = file.stat().st_atime, file.stat().st_mtime
    os.utime(file, (1, 1))
    try:
        send(dry=True)
    finally:
        os.utime(file, times)
    assert f"{file}: older than the release: left out" in capsys.readouterr().out


@pytest.mark.slow
def test_each_kept_checkpoint_is_a_revision(hub: Hub, runs: Path) -> None:
    hub.faults.append(Fault("uploads/", status=503))
    with pytest.raises(Outage):
        publish_checkpoints.command(CHECKPOINTS, "tiny", dry=False)
    assert "model.safetensors" not in sent(hub, CHECKPOINTS, "stage1-step-10")
    hub.faults.clear()
    publish_checkpoints.command(CHECKPOINTS, "tiny", dry=False)
    for step in (10, 20):
        there = hub.revisions[CHECKPOINTS, f"stage1-step-{step}"]
        ours, theirs = weights(runs / f"model-{step}"), weights(there)
        assert ours.keys() == theirs.keys()
        assert all((ours[name] == theirs[name]).all() for name in ours)
        assert json.loads((there / "config.json").read_text())["model_type"] == "smollm3"
        assert (there / "tokenizer.json").is_file()
    assert [*sent(hub, CHECKPOINTS)] == ["README.md"]
    assert "- `stage1-step-20`" in sent(hub, CHECKPOINTS)["README.md"].decode()
    assert not list((runs / "tiny/.publish").iterdir())


def test_no_checkpoint_is_one_line(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNS", str(tmp_path / "empty"))
    with pytest.raises(
        UserError, match="SCALE=tiny: no stage of this recipe has kept a checkpoint"
    ):
        publish_checkpoints.command(CHECKPOINTS, "tiny")
