"""Small files that are damaged are named in one line, or made again; none is used as it is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from stage_runs import PlainStage, finished, plain

from ground.checksums import FILE, seal
from ground.errors import UserError
from ground.files import kept_record, read_record, write_record
from launch.recipe.scale import load_scale
from launch.report.results import collect
from launch.run.folder import StageRun
from launch.stages.pretrain import PretrainStage
from launch.tools.parts import run_part
from launch.walk import resolve, run_stage, unfinished

Damage = Callable[[Path], object]


def without_a_key(file: Path) -> None:
    values = json.loads(file.read_text())
    del values[next(key for key in values if key not in ("checksum", "identity"))]
    file.write_text(json.dumps(values))


def another_value(file: Path) -> None:
    values = json.loads(file.read_text())
    key = next(key for key in values if key not in ("checksum", "identity"))
    file.write_text(json.dumps(values | {key: ["another"]}))


DAMAGES: dict[str, Damage] = {
    "not JSON": lambda file: file.write_text("{" + file.read_text()),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "emptied": lambda file: file.write_text(""),
    "a list": lambda file: file.write_text("[]"),
    "no text": lambda file: file.write_bytes(b"\xff" + file.read_bytes()),
    "a key missing": without_a_key,
    "another type": another_value,
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlainStage:
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    return plain("last", takes=[plain("sealed")])


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_manifest_is_refused(run: PlainStage, damage: Damage) -> None:
    finished(run, tokens=3)
    file = run.folder / "manifest.json"
    damage(file)
    for ask in (run.manifest, run.is_finished, lambda: run_stage(run)):
        with pytest.raises(
            UserError, match=r"manifest.json: not .*make last SCALE=small FORCE=1"
        ) as told:
            ask()
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_record_is_named_and_not_used(
    tmp_path: Path, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    """data.json, before.json, after.json, results.json, points of a sweep and an ablation."""
    file = tmp_path / "data.json"
    write_record(file, {"rows": 3, "of": {1: 0.1}})
    assert kept_record(file) == read_record(file) == {"rows": 3, "of": {"1": 0.1}}
    damage(file)
    assert kept_record(file) is None
    said = capsys.readouterr().out
    assert said.startswith(f"{file}: not ") and said.count("\n") == 1 and "made again" in said
    with pytest.raises(UserError, match=r"data.json: not .*; try it"):
        read_record(file, "try it")
    file.unlink()
    assert kept_record(file) is None and not capsys.readouterr().out


@pytest.mark.parametrize(
    "line", ['{"step": 2, ', "", "[2]", "7", '{"step": 2, "loss": "a"}', '{"step": "2"}', "{}"]
)
def test_a_damaged_line_of_metrics_is_named(run: PlainStage, line: str) -> None:
    taken = finished(run.inputs["sealed"])
    file = taken.folder / "metrics.jsonl"
    file.write_text(f'{{"step": 1, "loss": 3.0}}\n{line}\n{{"step": 3, "loss": 2.5}}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl: line 2: .*delete that line"):
        collect(run)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[1] ^= 1
    file.write_bytes(content)


SEALED: dict[str, tuple[str, Damage]] = {
    "flipped": ("tokenizer.json", flip),
    "truncated": ("tokenizer.json", lambda file: file.write_bytes(file.read_bytes()[:-3])),
    "emptied": ("tokenizer.json", lambda file: file.write_text("")),
    "deleted": ("tokenizer.json", Path.unlink),
    "seal not JSON": (FILE, lambda file: file.write_text("{")),
    "seal emptied": (FILE, lambda file: file.write_text("{}")),
    "seal of another type": (FILE, lambda file: file.write_text("[1]")),
    "seal deleted": (FILE, Path.unlink),
}


@pytest.mark.parametrize(("name", "damage"), SEALED.values(), ids=SEALED)
def test_a_damaged_output_is_made_again_for_the_stage_that_takes_it(
    run: PlainStage, monkeypatch: pytest.MonkeyPatch, name: str, damage: Damage
) -> None:
    def work(stage: PlainStage, lock: int) -> dict[str, object]:
        stage.log.append("work")
        stage.folder.mkdir(exist_ok=True)
        (stage.folder / "tokenizer.json").write_text('{"model": {}}')
        seal(stage.folder, ["tokenizer.json"])
        return {}

    monkeypatch.setattr(PlainStage, "work", work)
    monkeypatch.setattr(PlainStage, "lost", PlainStage.__mro__[1].lost)
    monkeypatch.setattr(PlainStage, "outputs", property(lambda stage: [stage.folder]))
    monkeypatch.setattr(PlainStage, "small_outputs", True)
    assert run_stage(run) and not run_stage(run)
    taken = run.inputs["sealed"]
    before = (taken.folder / "manifest.json").read_bytes()
    damage(taken.folder / name)
    assert unfinished(run) == [], "what a finished stage took is not asked for again"
    (run.folder / FILE).unlink()
    assert [stage.stage for stage in unfinished(run)] == ["sealed", "last"]
    assert run_stage(run) and unfinished(run) == []
    assert (taken.folder / "tokenizer.json").read_text() == '{"model": {}}'
    assert (taken.folder / "manifest.json").read_bytes()[:50] == before[:50]


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StageRun:
    """A finished pretraining without hf/, checkpoints and data, in a job of its nodes."""
    monkeypatch.setenv("RUNS", str(tmp_path))
    for name, value in {"JOB_ID": "1", "NNODES": "48"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("GPUS_A_NODE", "8")
    run = finished(resolve("pretrain-stage1", load_scale("full")))
    tokenizer = finished(run.inputs["tokenizer"]).folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    seal(tokenizer)
    return run


def test_a_training_that_is_lost_is_not_repeated_unasked(trained: StageRun) -> None:
    for part in ("prepare", "train"):
        with pytest.raises(UserError, match=r"has none to make it from; .* trains it again"):
            run_part(trained, part, force=False)


def test_a_trained_stage_needs_no_data_to_make_what_it_lost(trained: StageRun) -> None:
    assert isinstance(trained, PretrainStage)
    (trained.folder / "checkpoints" / str(trained.steps)).mkdir(parents=True)
    assert run_part(trained, "train", force=False)


def test_what_another_recipe_trained_is_not_scored_as_this_ones(trained: StageRun) -> None:
    assert isinstance(trained, PretrainStage)
    (trained.folder / "checkpoints" / str(trained.steps)).mkdir(parents=True)
    manifest = read_record(trained.folder / "manifest.json")
    write_record(
        trained.folder / "manifest.json", manifest | {"identity": "another", "finished": None}
    )
    with pytest.raises(UserError, match="was made from another recipe"):
        run_part(trained, "score", force=False)
