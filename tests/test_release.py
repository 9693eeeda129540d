"""The release is a transformers folder that loads, samples and reads twice its window."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit
from small_models import WINDOW, weights, write_model
from stage_runs import finished, plain
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ground.errors import UserError
from launch.recipe.scale import load_scale
from launch.stages.release import ReleaseStage
from launch.walk import resolve

NEEDLES = [{"length": 64, "depth": 0.5, "hits": 3, "of": 4, "chance": 0.1}]
MERGED = [{"model": "soup/hf", "weight": 0.9}, {"model": "longctx-64k/hf", "weight": 0.1}]


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReleaseStage:
    """The release stage, with finished stages before it."""
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    bits = {"all": {"model": 2.1875, "unigram": 3.75}}
    earlier = finished(plain("longctx-64k"), tokens=1_234_567, bits_per_byte=bits, needle=NEEDLES)
    scores = {"before": {"tool_right": 0.0}, "after": {"tool_right": 0.875, "margin": 1.5}}
    merge = finished(plain("merge", takes=[earlier]), merged=MERGED, scores=scores)
    write_model(merge.folder / "hf", 3, torch.bfloat16)
    (merge.folder / "hf" / "model.safetensors").chmod(0o600)
    release = resolve("release", load_scale("tiny"))
    assert isinstance(release, ReleaseStage)
    return replace(release, inputs={"merge": merge})


@pytest.fixture
def folder(release: ReleaseStage) -> Path:
    release.begin(force=False)
    release.finish(**release.work(0))
    return release.folder


def test_the_release_has_the_merges_weights_template_and_tokenizer(
    release: ReleaseStage, folder: Path
) -> None:
    source = release.inputs["merge"].folder / "hf"
    ours, theirs = weights(folder), weights(source)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("chat_template.jinja", "tokenizer.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config.pop("response_template")["fields"].keys() >= {"content", "tool_calls"}
    assert config == json.loads((source / "tokenizer_config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and model.config.max_position_embeddings == WINDOW
    manifest = release.manifest() or {}
    assert manifest["parameters"] == sum(p.numel() for p in model.parameters())
    assert (manifest["window_tokens"], manifest["yarn_window_tokens"]) == (WINDOW, 2 * WINDOW)


@pytest.mark.parametrize("below", ["", "yarn"])
def test_generation_samples_as_published_and_stops_at_the_end_of_a_turn(
    folder: Path, below: str
) -> None:
    found = GenerationConfig.from_pretrained(folder / below)
    end = AutoTokenizer.from_pretrained(folder / below).convert_tokens_to_ids("<|im_end|>")
    assert (found.do_sample, found.temperature, found.top_p) == (True, 0.6, 0.95)
    assert found.eos_token_id == end
    assert found.repetition_penalty == 4.0  # carried over from the merge
    assert AutoModelForCausalLM.from_pretrained(folder / below).config.eos_token_id == end


def test_yarn_reads_twice_the_window(folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    yarn = AutoModelForCausalLM.from_pretrained(folder / "yarn", dtype=torch.float32)
    assert yarn.config.max_position_embeddings == 2 * WINDOW
    rope = yarn.config.rope_parameters
    assert rope["rope_type"] == "yarn" and rope["factor"] == 2.0
    assert rope["original_max_position_embeddings"] == WINDOW
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), yarn.parameters(), strict=True)
    )
    ids = torch.randint(5, 200, (1, 2 * WINDOW), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, as_trained = yarn(ids).logits, plain(ids).logits
    assert torch.isfinite(logits).all() and not torch.allclose(logits, as_trained, atol=1e-3)
    prompt = ids[:, : WINDOW - 4]
    out = yarn.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=WINDOW, eos_token_id=None
    )
    assert out.shape[1] == 2 * WINDOW - 4


def test_the_release_may_be_moved(folder: Path, tmp_path: Path) -> None:
    moved = folder.rename(tmp_path / "elsewhere")
    assert AutoModelForCausalLM.from_pretrained(moved / "yarn").num_parameters() > 0
    copy = shutil.copytree(moved, tmp_path / "copy")  # follows links, as an upload does
    assert AutoModelForCausalLM.from_pretrained(copy / "yarn").num_parameters() > 0


def test_a_release_that_was_stopped_is_whole_after_the_next_run(
    release: ReleaseStage, folder: Path
) -> None:
    before = files(folder)
    (folder / "generation_config.json").unlink()
    (folder / ".yarn.partial").mkdir()
    (folder / "yarn" / "left-over").write_text("")
    (folder / "model.safetensors").write_bytes(b"half")
    release.work(0)
    assert files(folder) == before


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_the_cards_figures_are_the_manifests(release: ReleaseStage, folder: Path) -> None:
    card = (folder / "README.md").read_text()
    count = (release.manifest() or {})["parameters"]
    for figure in (
        f"{count:,} parameters, bfloat16, windows of {WINDOW} tokens, {2 * WINDOW} with YaRN",
        "| longctx-64k | 1,234,567 |  | 2.188 |",
        "| score | before merge | after merge |",
        "| tool right | 0 | 0.875 |",
        "| margin |  | 1.5 |",
        "| merge | soup/hf | 0.9 |",
        "| merge | longctx-64k/hf | 0.1 |",
        "64: 75%",
        "temperature 0.6 and top_p 0.95 and stops at `<|im_end|>`",
        "stand-ins of the published data sets",
    ):
        assert figure in card
    assert re.match(r"---\nlicense: apache-2\.0\n(.+\n)+---\n\n# SmolLM3\n", card)


def test_the_cards_code_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert code and 'folder = "release"' in code[1]
    monkeypatch.chdir(folder.parent)
    exec(code[1].replace("max_new_tokens=256", "max_new_tokens=4"), {})
    assert "Reasoning Mode: /no_think" in capsys.readouterr().out


def drop_template(hf: Path) -> None:
    (hf / "chat_template.jinja").unlink()


def drop_end_token(hf: Path) -> None:
    edit(hf / "tokenizer.json", '"<|im_end|>"', '"<|turn_end|>"')


def drop_config(hf: Path) -> None:
    (hf / "config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (drop_template, "release: the tokenizer has no chat template"),
        (drop_end_token, r"tokenizer.json: no token <\|im_end\|>"),
        (drop_config, "merge/hf/config.json: no such file"),
        (lambda hf: (hf / "tokenizer.json").unlink(), "merge/hf/tokenizer.json: no such file"),
    ],
)
def test_a_model_that_nobody_could_talk_to_is_refused(
    release: ReleaseStage, spoil: Any, words: str
) -> None:
    release.begin(force=False)
    spoil(release.inputs["merge"].folder / "hf")
    with pytest.raises(UserError, match=words):
        release.work(0)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("top_p: 0.95", "top_p: 95", r"release\.yaml: generation\.top_p: 95: write at most 1"),
        ("temperature: 0.6", "temperature: 0.0", "generation.temperature"),
        ("yarn_factor: 2.0", "yarn_factor: 0.5", r"yarn_factor: 0\.5: write at least 1"),
        ("merge/hf", "soup/hf", "model: soup/hf: release takes no stage 'soup' .*known: merge"),
        ("eos_token:", "eos:", "generation.eos: unknown key"),
    ],
)
def test_a_release_recipe_is_checked(recipes: Path, old: str, new: str, words: str) -> None:
    edit(recipes / "merge/release.yaml", old, new)
    with pytest.raises(UserError, match=words):
        resolve("release", load_scale("tiny")).refuse()


def test_others_may_read_every_file(folder: Path) -> None:
    assert [f.name for f in folder.rglob("*") if f.is_file() and not f.stat().st_mode & 0o044] == []


def test_the_generation_config_is_json_that_others_read(folder: Path) -> None:
    values = json.loads((folder / "generation_config.json").read_text())
    assert "transformers_version" not in values and values["do_sample"] is True
