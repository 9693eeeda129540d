"""The walk runs what is left to do, in order, and refuses everything before the first stage runs."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, edit
from stage_runs import PlainStage, finished, plain

from ground import processes
from ground.errors import UserError
from launch import walk
from launch.recipe.scale import load_scale
from launch.run.folder import StageRun
from launch.walk import is_whole, resolve, run_stage, unfinished


@pytest.fixture(autouse=True)
def _runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))


class Chain:
    """tokenizer <- data <- train <- report, and train <- tokenizer."""

    def __init__(self, **of_train: object) -> None:
        self.log: list[str] = []
        self.tokenizer = plain("tokenizer", log=self.log)
        self.data = plain("data", takes=[self.tokenizer], log=self.log)
        takes = [self.tokenizer, self.data]
        self.train = plain("train", takes=takes, log=self.log, **of_train)
        self.report = plain("report", takes=[self.train], log=self.log)

    def left(self, force: bool = False) -> list[str]:
        return [stage.stage for stage in unfinished(self.report, force)]


def test_what_is_left_comes_after_what_it_takes_and_once() -> None:
    chain = Chain()
    assert chain.left() == ["tokenizer", "data", "train", "report"]
    finished(chain.data)
    assert chain.left() == ["tokenizer", "train", "report"]
    finished(chain.train)
    assert chain.left() == ["report"], "what a finished stage took is not asked for again"
    finished(chain.report)
    assert chain.left() == [] and chain.left(force=True) == ["report"]


def test_the_order_of_the_whole_pipeline_is_one_in_which_it_can_be_run() -> None:
    seen: set[str] = set()
    for stage in unfinished(resolve("report", load_scale("tiny"))):
        assert set(stage.inputs) <= seen
        seen.add(stage.stage)
    assert seen == set(walk.load_pipeline())


def test_each_stage_is_refused_before_the_first_is_run() -> None:
    chain = Chain()
    assert run_stage(chain.report)
    names = ["tokenizer", "data", "train", "report"]
    assert chain.log[:4] == [f"refuse {name}" for name in names]
    assert chain.log[4:] == [word for name in names for word in (f"work {name}", f"show {name}")]
    assert not run_stage(chain.report) and len(chain.log) == 12


def test_a_stage_that_refuses_leaves_no_folder_of_any_stage(tmp_path: Path) -> None:
    chain = Chain(refusal=UserError("no GPU here"))
    with pytest.raises(UserError, match="no GPU here"):
        run_stage(chain.report)
    assert not [word for word in chain.log if word.startswith("work")]
    assert not (tmp_path / "runs").exists()


def test_what_was_written_elsewhere_and_is_gone_is_made_again(tmp_path: Path) -> None:
    outside = tmp_path / "shard"
    chain = Chain(outside=outside)
    run_stage(chain.report)
    assert is_whole(chain.train)
    outside.unlink()
    assert not is_whole(chain.train) and chain.left() == []
    run_stage(chain.train)
    assert chain.log[-2:] == ["work train", "show train"] and outside.exists()


def test_force_runs_the_named_stage_alone_again(tmp_path: Path) -> None:
    chain = Chain()
    run_stage(chain.report)
    del chain.log[:]
    assert run_stage(chain.train, force=True)
    assert [word for word in chain.log if word.startswith("work")] == ["work train"]
    old = list((tmp_path / "runs/small").glob("*.old-*"))
    assert [path.name.partition(".")[0] for path in old] == ["train"]


def test_a_stage_holds_its_lock_while_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(stage: PlainStage, lock: int) -> dict[str, object]:
        with (
            pytest.raises(UserError, match="another process is running this stage"),
            stage.locked(),
        ):
            pass
        return {}

    monkeypatch.setattr(PlainStage, "work", work)
    assert run_stage(plain("stage"))


@pytest.mark.parametrize("is_caught", [True, False])  # by a library, which may raise its own error
def test_a_signal_that_a_library_keeps_for_itself_still_stops_the_run(
    monkeypatch: pytest.MonkeyPatch, is_caught: bool
) -> None:
    chain = Chain()

    def work(stage: PlainStage, lock: int) -> dict[str, object]:
        chain.log.append(stage.stage)
        monkeypatch.setattr(processes, "_asked_at", 0.0)
        try:
            raise processes.Stopped
        except processes.Stopped:
            if not is_caught:
                raise RuntimeError("cannot be imported") from None
        return {}

    monkeypatch.setattr(PlainStage, "work", work)
    with pytest.raises(processes.Stopped, match="stopped by a signal: it has no checkpoint"):
        run_stage(chain.report)
    assert [name for name in chain.log if " " not in name] == ["tokenizer"]


# ---- mistakes in the recipes of late stages


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("posttrain/sft.yaml", "eos_token: <|im_end|>", "eos_token: <|im_ned|>",
         r"sft\.yaml: trl\.eos_token: <\|im_ned\|>: .*did you mean '<\|im_end\|>'"),
        ("posttrain/apo.yaml", "  beta: 0.05", "  eos_token: <|im_end|>\n  beta: 0.05",
         r"posttrain/apo\.yaml: trl\.eos_token: unknown key"),
        ("posttrain/apo.yaml", "beta: 0.05", "beta: -1", r"posttrain/apo\.yaml: trl\.beta: -1"),
        ("merge/soup.yaml", "apo/checkpoints/-2", "sft/hf",
         r"soup\.yaml: models\.\d\.model: sft/hf: soup takes no stage 'sft'"),
        ("merge/release.yaml", "eos_token: <|im_end|>", "eos_token: <|end|>",
         r"release\.yaml: generation\.eos_token: <\|end\|>: no special token"),
        ("eval/local.yaml", "piqa_cf", "piqua_cf", r"eval/local\.yaml: rows\.\d\.tasks.*piqua_cf"),
        ("pretrain/stage1.yaml", "- .*token_embedding.*", "- .*token_embeding.*",
         r"stage1\.yaml: .*exclude_named_params: .*embeding.*matches no parameter"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_late_recipe_is_told_before_the_tokenizer_is_trained(
    recipes: Path, tmp_path: Path, file: str, old: str, new: str, words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(StageRun, "begin", lambda *_: pytest.fail("a stage was begun"))
    edit(recipes / file, old, new)
    with pytest.raises(UserError, match=words) as caught:
        run_stage(resolve("report", load_scale("tiny")))
    assert "\n" not in str(caught.value) and not (tmp_path / "runs").exists()


def test_an_unknown_stage_or_kind_is_told_the_nearest(recipes: Path) -> None:
    at = load_scale("tiny")
    with pytest.raises(UserError, match="unknown stage 'sfft'; did you mean 'sft'"):
        resolve("sfft", at)
    edit(recipes / "pipeline.yaml", "engine: chats", "engine: chat")
    with pytest.raises(
        UserError, match=r"pipeline\.yaml: stages\.data-chats\.engine: chat: .*'chats'"
    ):
        resolve("sft", load_scale("tiny"))


def test_a_tools_runs_are_found_by_the_start_of_their_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setitem(walk.RESOLVERS, "tool/", lambda name, at: asked.append(name) or plain(name))
    assert resolve("tool/a", load_scale("tiny")).stage == "tool/a" and asked == ["tool/a"]


# ---- a change elsewhere leaves a finished stage finished


def identities(scale: str) -> dict[str, str]:
    """Of every stage of pipeline.yaml."""
    found: dict[str, str] = {}

    def visit(run: StageRun) -> None:
        found[run.stage] = run.identity
        for taken in run.inputs.values():
            visit(taken)

    for name in reversed(walk.load_pipeline()):
        if name not in found:
            visit(resolve(name, load_scale(scale)))
    return found


@pytest.mark.parametrize("scale", ["tiny", "full"])
def test_a_new_source_stand_in_and_stage_change_no_other_stages_identity(
    recipes: Path, scale: str
) -> None:
    before = identities(scale)
    edit(recipes / "sources.yaml", "sources:\n", """sources:
  other: {hub_id: a/b, split: train, revision: main, clean: published, category: math, stand_in: other-text}
  more: {path: LICENSE}
""")  # fmt: skip
    edit(recipes / "standins.yaml", "standins:\n", """standins:
  other-text:
    category: math
    language: eng
    files: {stdlib: ["json/*.py"]}
    reader: whole_files
    licence: PSF-2.0
    provenance: Python's library
""")  # fmt: skip
    (recipes / "pretrain/other.yaml").write_text(
        "extends: stage1.yaml\nstage: pretrain-other\nmixture: {other: 1.0, dclm: 1.0}\n"
    )
    pipeline = recipes / "pipeline.yaml"
    pipeline.write_text(pipeline.read_text() + """
  data-other: {engine: data, mixture_of: [pretrain-other], takes: [tokenizer, eval-texts]}
  pretrain-other:
    engine: pretrain
    recipe: pretrain/other.yaml
    takes: [tokenizer, held-out, data-other]
""")  # fmt: skip
    after = identities(scale)
    assert after.keys() - before.keys() == {"data-other", "pretrain-other"}
    assert {name: after[name] for name in before} == before


def test_held_out_text_scores_a_stage_and_does_not_make_it(recipes: Path) -> None:
    before = identities("tiny")
    edit(recipes / "scales/tiny.yaml", "bytes_per_category: 50000", "bytes_per_category: 60000")
    changed = {name for name, identity in identities("tiny").items() if identity != before[name]}
    assert changed == {"held-out"}
    edit(recipes / "scales/tiny.yaml", "fraction: 0.06", "fraction: 0.05")
    kept = {name for name, identity in identities("tiny").items() if identity == before[name]}
    assert kept == {"eval-texts", "data-chats"}, "what is kept out of training belongs to the data"


def test_what_is_up_to_date_is_known_without_a_heavy_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `make` that does nothing takes the time of its imports."""
    monkeypatch.setenv("RUNS", str(tmp_path))
    code = (
        "import sys, launch.__main__\nfrom launch.recipe.scale import load_scale\n"
        "from launch.walk import resolve\nresolve('report', load_scale('tiny')).is_finished()\n"
        "print([m for m in ('numpy', 'torch', 'datatrove', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
