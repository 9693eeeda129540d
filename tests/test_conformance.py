"""The conformance kit: what it holds, and that each fault fails the case that names it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, edit, environment
from openai_server import openai_server
from small_models import make_tokenizer, random_model

from conformance import make
from conformance.__main__ import cases_of, conform
from conformance.cases import KIT, RIGHT, Case, Greedy, Logits, Render, read_cases
from conformance.check import FAILED, NOT_APPLICABLE, PASSED, Checker, Result
from conformance.folder import Folder
from conformance.reference import Stored, load_model
from ground.errors import UserError
from runtimes.for_servers import response_template

MOST_BYTES = 2_000_000


def checked(folder: Folder, yarn: Folder | None = None, cases: list[Case] | None = None) -> dict[str, Result]:  # fmt: skip
    expected = Stored(KIT / "expected.npz")
    checker = Checker(folder, yarn, expected, lambda ids: str(folder.tokenizer.decode(ids)))
    chosen = read_cases(KIT / "cases.json") if cases is None else cases
    return {result.case: result for result in checker.results(chosen)}


@pytest.fixture(scope="module")
def base() -> Folder:
    return Folder(KIT)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The kit's folder, to be spoilt."""
    shutil.copytree(KIT, tmp_path / "kit", symlinks=True)
    return tmp_path / "kit"


@pytest.mark.slow
def test_transformers_passes_every_case(base: Folder) -> None:
    results = checked(base, Folder(KIT / "yarn"))
    assert {result.outcome for result in results.values()} == {PASSED}, results


def test_the_kit_is_small_and_has_the_projects_template() -> None:
    assert sum(file.stat().st_size for file in KIT.parent.rglob("*") if file.is_file() and not file.is_symlink() and "__pycache__" not in file.parts) < MOST_BYTES  # fmt: skip
    published = (ROOT / "recipes/posttrain/chat_template.jinja").read_text()
    assert (KIT / "chat_template.jinja").read_text() == published
    settings = json.loads((KIT / "tokenizer_config.json").read_text())
    assert settings["response_template"] == response_template()


def test_a_server_can_load_the_kit(base: Folder) -> None:
    """vLLM takes every safetensors file of a folder for weights, and no heads below 32."""
    assert [file.name for file in KIT.glob("*.safetensors")] == ["model.safetensors"]
    assert base.model.config.head_dim == 32


@pytest.mark.slow
def test_the_stored_kit_is_what_it_makes(tmp_path: Path) -> None:
    tmp_path = tmp_path / "made"
    tmp_path.mkdir()
    make.make(tmp_path, (KIT / "chat_template.jinja").read_text())
    for file in ("tokenizer.json", "config.json", "yarn/config.json", "chat_template.jinja"):
        assert (tmp_path / file).read_text() == (KIT / file).read_text(), file
    old, new = (Stored(folder / "expected.npz").arrays for folder in (KIT, tmp_path))
    assert old.keys() == new.keys()
    # A weight on the border of two bfloat16 numbers may fall on either side.
    assert all(np.abs(old[name] - new[name]).max() < 0.1 for name in old)
    old_cases, new_cases = (read_cases(folder / "cases.json") for folder in (KIT, tmp_path))
    for one, other in zip(old_cases, new_cases, strict=True):
        if isinstance(one, Greedy) and isinstance(other, Greedy):
            assert one.answers[RIGHT] == other.answers[RIGHT]
        else:
            assert one == other


def test_the_faults_are_far_from_what_is_right() -> None:
    expected = Stored(KIT / "expected.npz")
    for case in read_cases(KIT / "cases.json"):
        if isinstance(case, Logits):
            right = expected.logprobs(case)
            for fault in case.faults:
                off = np.abs(expected.logprobs(case, fault) - right).max(-1) / right.std()
                assert off.min() > 0.3, (case.name, fault)


# ---- seven faults, made for real in transformers


def config_with(**keys: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for file in (folder / "config.json", folder / "yarn/config.json"):
            config = json.loads(file.read_text())
            file.write_text(json.dumps({**config, **keys}))

    return change


def other_theta(folder: Path) -> None:
    for file in (folder / "config.json", folder / "yarn/config.json"):
        config = json.loads(file.read_text())
        config["rope_parameters"]["rope_theta"] = config["rope_theta"] = 10_000.0
        file.write_text(json.dumps(config))


def no_yarn(folder: Path) -> None:
    config = json.loads((folder / "yarn/config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e6}
    (folder / "yarn/config.json").write_text(json.dumps(config))


def untied(folder: Path) -> None:
    """A head of its own, beside embeddings that stay."""
    model = load_model(folder)
    model.config.tie_word_embeddings = False
    head = torch.nn.Linear(64, model.config.vocab_size, bias=False)
    torch.manual_seed(0)
    head.weight.data.normal_()
    model.lm_head = head
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def interleaved(folder: Path) -> None: ...  # by `rotating_pairs`: no config says it


def modeless(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    text = file.read_text()
    start, end = text.index("{%- set mode ="), text.index("{%- set instructions = custom_")
    file.write_text(text[:start] + '{%- set mode = "/think" -%}\n' + text[end:])
    edit(file, '{%- set mode = "/no_think" -%}', "")


FAULTS: dict[str, tuple[Callable[[Path], None], set[str], str]] = {
    # fault: how it is made, the cases that fail by themselves, words of the line
    "RoPE on NoPE layers": (config_with(no_rope_layers=[1] * 8), {"nope"}, "NoPE layers"),
    "NoPE inverted": (config_with(no_rope_layers=[0, 0, 0, 1] * 2), {"nope-order"}, "inverted"),
    "theta ignored": (other_theta, {"theta"}, "rope_theta is ignored"),
    "YaRN ignored": (no_yarn, {"yarn"}, "YaRN is ignored"),
    "interleaved rotation": (interleaved, {"rotation"}, "pairs 2i with 2i + 1"),
    "untied head": (untied, {"tied-head"}, "output head is not the embedding"),
    "template without modes": (modeless, {"template-modes"}, "no modes"),
}  # fmt: skip
NAMED = {"tied-head", "rotation", "theta", "nope", "nope-order", "yarn", "template-modes"}


def rotating_pairs(q, k, cos, sin, unsqueeze_dim: int = 1):  # type: ignore[no-untyped-def]
    """Interleaved rotation, as GPT-J's."""
    cos, sin = (table[..., : table.shape[-1] // 2].repeat_interleave(2, -1).unsqueeze(unsqueeze_dim) for table in (cos, sin))  # fmt: skip

    def turned(x: torch.Tensor) -> torch.Tensor:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)

    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def fails_as_named(results: dict[str, Result], cases: set[str], words: str) -> None:
    failed = {name for name, result in results.items() if result.outcome == FAILED}
    assert failed & NAMED == cases, results
    for name in cases:
        assert words in results[name].line()
    # A case of another fault does not pass as if nothing were wrong.
    if cases <= {"theta", "nope", "nope-order", "rotation"}:
        others = {"theta", "nope", "nope-order", "rotation"} - cases
        assert {results[name].outcome for name in others} == {NOT_APPLICABLE}
        assert "logits" in failed and "greedy" in failed
        assert words in results["logits"].cause and words in results["greedy-long"].cause


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_transformers_fails_the_case_that_names_it(
    fault: str, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed, cases, words = FAULTS[fault]
    seed(copied)
    if seed is interleaved:
        monkeypatch.setattr("transformers.models.smollm3.modeling_smollm3.apply_rotary_pos_emb", rotating_pairs)  # fmt: skip
    fails_as_named(checked(Folder(copied), Folder(copied / "yarn")), cases, words)


def test_a_wrong_theta_is_found_without_its_neighbours(copied: Path) -> None:
    other_theta(copied)
    cases = [case for case in read_cases(KIT / "cases.json") if case.name in ("theta", "nope")]
    results = checked(Folder(copied), cases=cases)
    assert results["theta"].outcome == FAILED and "rope_theta" in results["theta"].cause
    assert results["nope"].outcome == NOT_APPLICABLE


# ---- any other SmolLM3, and mistakes


@pytest.mark.slow
def test_any_smollm3_is_held_against_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make_tokenizer()
    random_model(tokenizer, 0, 2048, std=0.5).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert conform(str(tmp_path / "model"), reference=str(tmp_path / "model")) == 0
    random_model(tokenizer, 1, 2048, std=0.5).save_pretrained(tmp_path / "model2")
    tokenizer.save_pretrained(tmp_path / "model2")
    assert conform(str(tmp_path / "model2"), reference=str(tmp_path / "model")) == 1
    assert "other weights" in capsys.readouterr().out


def test_a_mistake_is_one_line(tmp_path: Path, copied: Path) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/config.json").write_text('{"model_type": "llama"}')
    shutil.copytree(copied, tmp_path / "cut", symlinks=True)
    os.truncate(tmp_path / "cut/model.safetensors", 300_000)
    edit(copied / "config.json", '"vocab_size": 512', '"vocab_size": 600')
    mistakes = {
        str(tmp_path / "cut"): "cut: does not load",
        str(tmp_path / "none.gguf"): "no such folder or GGUF file",
        str(tmp_path / "llama"): "model_type: llama; name the transformers folder of a SmolLM3",
        "http://127.0.0.1:9": "no server answers there",
        "http://127.0.0.1:port": "Invalid port: 'port'; write http://<host>:<port>",
        str(copied): "a SmolLM3, not the kit's own; .* REFERENCE=",
    }
    for model, words in mistakes.items():
        with pytest.raises(UserError, match=words) as caught:
            conform(model)
        assert "\n" not in str(caught.value)


def test_a_server_without_models_is_refused() -> None:
    with (
        openai_server(lambda _: (200, "", "stop")) as other,
        pytest.raises(UserError, match="/v1/models names no model"),
    ):
        conform(other.url)


@pytest.mark.slow
def test_a_base_model_is_held_without_its_template(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    random_model(tokenizer, 0).save_pretrained(tmp_path)
    cases, _ = cases_of(tmp_path, is_kit=False)
    assert {"logits", "greedy"} <= {case.name for case in cases}
    assert not [case.name for case in cases if isinstance(case, Render)]


@pytest.mark.parametrize(
    ("words", "said"),
    [(["nowhere"], "MODEL=nowhere"), (["a", "b"], "Got unexpected"), (["--no"], "No such option")],
)
def test_the_command_exits_with_2_for_a_mistake(words: list[str], said: str) -> None:
    command = [sys.executable, "-m", "conformance", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1
