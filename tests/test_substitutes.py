"""What is read in place of sources that were never released, and how that is said."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import forget_recipes
from test_sizes import PRETRAINED

from ground.errors import UserError
from launch.recipe.book import load_recipe
from launch.recipe.scale import load_scale
from launch.stages.data import DataStage
from launch.stages.sources import HubData, planned
from launch.tools.diff import stage_changes
from launch.tools.options import scale_at
from launch.walk import resolve

WIKI = "multilingual_wiki"  # of stage 3 and long context


@pytest.fixture
def substituted(recipes: Path) -> Path:
    """Recipes in which every source that was never released has a substitute: one has a row of its
    own, the others share dclm, which is in the mixtures itself."""
    file = recipes / "sources.yaml"
    values: dict[str, Any] = yaml.safe_load(file.read_text())
    rows = values["sources"]
    for name, row in list(rows.items()):
        if row.get("hub_id", "") is None:
            row["replaced_by"] = "editions" if name == WIKI else "dclm"
    rows["editions"] = rows["fw2-kor"] | {"hub_id": "an/encyclopedia", "config": "all"}
    file.write_text(yaml.safe_dump(values, width=10**6))
    forget_recipes()
    return recipes


@pytest.mark.parametrize("stage", PRETRAINED)
def test_no_weight_is_lost_with_substitutes_and_none_is_used_unasked(
    substituted: Path, stage: str
) -> None:
    published = load_recipe(stage).published.mixture
    on, off = (planned(stage, load_scale("full", substitutes=b)) for b in (True, False))
    assert sum(on.weights.values()) == pytest.approx(sum(published.values()))
    assert not on.unreleased and set(on.replaced) == set(off.unreleased) and not off.replaced
    assert "editions" not in off.weights and off.weights["dclm"] == published["dclm"]
    if set(on.replaced) - {WIKI}:
        assert on.weights["dclm"] > published["dclm"]
    assert planned(stage, load_scale("full")) == off
    assert planned(stage, load_scale("60m")).replaced == on.replaced
    stand_ins = planned(stage, load_scale("60m", origin="standin"))
    assert not stand_ins.replaced and not stand_ins.unreleased


def test_a_substitute_is_read_under_its_own_name_and_each_is_told(
    substituted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = load_scale("full", substitutes=True)
    run = resolve("data-stage3", at)
    assert isinstance(run, DataStage) and WIKI not in run.recipe.sources
    editions = run.recipe.sources["editions"]
    assert isinstance(editions, HubData) and editions.hub_id == "an/encyclopedia"
    assert run.recipe_values()["replaced"] == planned("pretrain-stage3", at).replaced
    run._name_what_is_not_read()
    lines = capsys.readouterr().out.splitlines()
    assert (
        f"data-stage3: {WIKI} was never released: editions (an/encyclopedia) takes its place"
        in lines
    )
    assert len(lines) == len(run.recipe.replaced)
    published = resolve("data-stage3", load_scale("full"))
    assert isinstance(published, DataStage)
    published._name_what_is_not_read()
    assert capsys.readouterr().out.count("is left out") == len(lines)
    for stage in ("pretrain-stage3", "data-stage3", "held-out"):
        told = {one.key: one for one in stage_changes(stage, at)}
        assert any("an/encyclopedia" in str(one.after) for one in told.values())
        assert all(one.why for one in told.values())
    told = {one.key: one for one in stage_changes("pretrain-stage3", load_scale("60m"))}
    assert "keeps its shape" in told[f"mixture.{WIKI}"].why


def test_the_command_line_turns_substitutes_on_or_off_in_a_folder_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for scale, given, name in (
        ("full", "1", "full-substitutes"), ("full", "0", "full"), ("60m", "1", "60m"),
        ("60m", "0", "60m-no-substitutes"), ("full", "", "full"),
    ):  # fmt: skip
        monkeypatch.setenv("SUBSTITUTES", given)
        at = scale_at(scale, "", "")
        assert at.name == name
        assert (f" SUBSTITUTES={given}" in at.arguments) == (name != scale)
        assert at.values.substitutes == (given == "1")
    monkeypatch.setenv("SUBSTITUTES", "yes")
    with pytest.raises(UserError, match=r"^SUBSTITUTES=yes: write 1 or 0, or leave it out$"):
        scale_at("full", "", "")
    (tmp_path / "substitutes").mkdir()
    with pytest.raises(UserError, match=r"^TEXT=.*: other runs have names that end in that; "):
        load_scale("60m", str(tmp_path / "substitutes"))
