"""`make data-check`: what every source of the mixtures is, needs and costs, without fetching any."""

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import forget_recipes
from loopback_hub import loopback_hub
from small_checkout import make_checkout
from test_sizes import PRETRAINED
from test_source_budget import with_tokens
from test_substitutes import substituted  # noqa: F401  (a fixture)

from ground.errors import Outage
from launch.recipe.book import canonical, load_recipe
from launch.recipe.scale import load_scale
from launch.recipe.tables import load_sources
from launch.stages.budget import drawn
from launch.tools.data_check import check, lost, sources_of_scale


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("COLUMNS", "400")


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's address is a port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def every_source() -> set[str]:
    known = load_sources()
    return {canonical(n, known) for s in PRETRAINED for n in load_recipe(s).published.mixture}


@pytest.mark.usefixtures("no_hub")
def test_all_that_is_known_is_printed_before_a_hub_that_does_not_answer_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Outage, match="the hub does not answer"):
        check(load_scale("full"))
    printed = capsys.readouterr().out
    rows = re.findall(r"^│ (\S+) +│ (.*)│$", printed, re.MULTILINE)
    of_source = {name: cells for name, cells in rows if name in every_source()}
    assert set(of_source) == every_source()
    for name, cells in of_source.items():
        row = load_sources()[name]
        assert (f"{row.hub_id}@" if row.hub_id else "never released") in cells
        assert not row.hub_id or ("not asked: no answer" in cells and (row.licence or "") in cells)
        assert row.hub_id or f"{name}: never released, " in printed
    assert not (tmp_path / "cache").exists() and not (tmp_path / "hf").exists()


def test_offline_by_choice_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check(load_scale("135m"))
    assert "not asked" in capsys.readouterr().out
    check(load_scale("tiny"))
    assert "stand-in web-narratives" in capsys.readouterr().out


def test_a_size_downloads_its_own_tokens() -> None:
    at = load_scale("135m")
    sources = sources_of_scale(at)
    wanted = sum(drawn(stage, at).total() for stage in PRETRAINED)
    assert sum(sum(one.wanted.values()) for one in sources.values()) == wanted
    read = sum(one.tokens for one in sources.values())
    assert at.values.tokens < read < 1.3 * wanted
    assert 2e10 < sum(one.download for one in sources.values()) < 1e11


def test_what_is_read_too_often_is_said(
    recipes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    wanted = sum(sources_of_scale(load_scale("60m"))["fw2-tha"].wanted.values())
    for times in (3, 5):
        with_tokens(recipes, "fw2-tha", wanted // times)
        one = sources_of_scale(load_scale("60m"))["fw2-tha"]
        of_long_context = sum(take for _, take in one.portions)  # a pass of its own
        assert one.is_whole and one.tokens == wanted // times + of_long_context
        check(load_scale("60m"))
        assert ("fw2-tha: read 5.0 times" in capsys.readouterr().out) == (times == 5)
    forget_recipes()


def on_hub(name: str, **more: Any) -> dict[str, Any]:
    return {
        "hub_id": f"owner/{name}", "split": "train", "revision": "main", "licence": "odc-by",
        "clean": "published", "category": "code", "stand_in": "scripts", **more,
    }  # fmt: skip


def test_the_hub_is_asked_and_each_that_it_refuses_is_named(tmp_path: Path) -> None:
    checkout, texts = make_checkout(tmp_path / "checkout"), tmp_path / "texts"
    texts.mkdir()
    rows = "".join(json.dumps({"text": f"line {number} " * 9}) + "\n" for number in range(500))
    (texts / "train-0.jsonl").write_text(rows)
    file = checkout.folder / "recipes/sources.yaml"
    sources = {
        "dclm": on_hub("texts"), "wiki": on_hub("gated", gated=True), "finemath": on_hub("absent"),
        "kaggle": on_hub("texts", revision="absent"),
    }  # fmt: skip
    file.write_text(yaml.safe_dump({"sources": sources}))
    names = {"datasets/owner/texts": texts, "datasets/owner/gated": texts}
    with loopback_hub(names, gated={"datasets/owner/gated": {"accepted"}}) as hub:
        words = {"ORIGIN": "hub", "COLUMNS": "200", **hub.variables(tmp_path / "hf", "other")}
        done = checkout.launch("data-check", **words)
        assert done.returncode == 2 and not any("train-0" in name for name in hub.fetched)
    assert done.stderr == "error: 3 of 4 sources are missing or refused; see above\n"
    table = {line.split()[1]: line for line in done.stdout.splitlines() if line.startswith("│")}
    assert "reachable" in table["dclm"] and f"{len(rows) / 1000:.3g} kB" in table["dclm"]
    for name, problem in (
        ("wiki", "owner/gated@main: its licence is not accepted"),
        ("finemath", "owner/absent@main: no such repository"),
        ("kaggle", "owner/texts@absent: no such revision"),
    ):
        assert "refused" in table[name]
        assert f"sources.{name}: {problem}" in done.stdout


@pytest.mark.usefixtures("substituted")
def test_with_substitutes_no_weight_is_lost() -> None:
    for stage in PRETRAINED:
        assert lost(stage, load_scale("full", substitutes=True)) == 0
    assert lost("longctx-64k", load_scale("full")) == pytest.approx(0.157, abs=0.001)
    sources = sources_of_scale(load_scale("full", substitutes=True))
    assert all(one.data for one in sources.values()) and "editions" in sources


def test_a_narrow_terminal_gets_two_tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("COLUMNS", "100")
    check(load_scale("60m"))
    printed = capsys.readouterr().out
    assert "data set" in printed and "download" in printed
    assert "held-out text: 5 MB, for which up to 5 GB of text are read besides" in printed
    assert max(map(len, re.findall(r"^[│┃].*", printed, re.M))) <= 100
    assert re.search(r"^│ stack-edu-real-shuffled-C-Sharp +│.* MB │$", printed, re.M)
