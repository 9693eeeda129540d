"""A GGUF file of a release is refused, or read by llama.cpp as transformers reads the folder."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, edit
from gguf_models import FACTOR, SCRIPTS, WINDOW, strings, write_release
from small_models import save_model, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from datatrove_pipelines.tokenizer import LLAMA3_SPLIT
from ground.errors import UserError
from launch.tools.export import SMALL, export
from runtimes.gguf_file import DTYPES, write_gguf
from runtimes.gguf_tokenizer import LLAMA_BPE

F32, F16 = 0, 1  # ggml's types


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("gguf") / "release")


def opened(file: Path, cache: int = F32, **more: Any) -> Any:
    """The file in llama.cpp, with one thread and a key-value cache of a ggml type."""
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="no llama-cpp-python: pip install -e '.[llama]'"
    )
    settings = {"n_threads": 1, "n_threads_batch": 1, "type_k": cache, "type_v": cache}
    return llama_cpp.Llama(str(file), verbose=False, **settings | more)


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    tokens = model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0, reset=True)
    return [token for token, _ in zip(tokens, range(count), strict=False)]


# ---- tokens


@pytest.mark.parametrize("is_parsed", [True, False], ids=["control tokens", "as text"])
def test_llama_cpp_reads_a_text_as_the_tokenizer_does(
    release: Path, tmp_path: Path, is_parsed: bool
) -> None:
    write_gguf(release, tmp_path / "model.gguf", "f16")
    tokenizer = AutoTokenizer.from_pretrained(release)
    model = opened(tmp_path / "model.gguf", vocab_only=True)
    texts = [*strings(1000), *SCRIPTS.values()]
    settings = {"add_special_tokens": True, "split_special_tokens": not is_parsed}
    assert [model.tokenize(text.encode(), add_bos=True, special=is_parsed) for text in texts] == [
        tokenizer(text, **settings)["input_ids"] for text in texts
    ]


def test_ids_are_decoded_alike_with_and_without_special_tokens(
    release: Path, tmp_path: Path
) -> None:
    write_gguf(release, tmp_path / "model.gguf", "f16")
    tokenizer = AutoTokenizer.from_pretrained(release)
    model = opened(tmp_path / "model.gguf", vocab_only=True)
    for text in strings(100, seed=1):
        # llama-cpp-python takes a space away after a first BOS.
        ids = tokenizer(text.replace(tokenizer.bos_token, ""))["input_ids"]
        for is_special in (True, False):
            decoded = model.detokenize(ids, special=is_special).decode()
            assert decoded == tokenizer.decode(ids, skip_special_tokens=not is_special)
    assert model.token_eos() == tokenizer.eos_token_id
    assert model.metadata["tokenizer.chat_template"] == tokenizer.chat_template
    assert model.metadata["tokenizer.ggml.eot_token_id"] == str(tokenizer.eos_token_id)


def test_the_split_that_is_looked_for_is_that_of_our_tokenizers() -> None:
    assert LLAMA_BPE == LLAMA3_SPLIT


# ---- greedy answers


def prompts(tokenizer: Any, shortest: int, longest: int) -> list[list[int]]:
    """100 prompts of `shortest` to `longest` tokens, half of them in the chat template."""
    rng = np.random.default_rng(0)
    ids = tokenizer("".join(strings(600, seed=2)))["input_ids"]
    lengths = rng.integers(shortest, longest, 100)
    starts = rng.integers(0, len(ids) - longest, 100)
    texts = [ids[at : at + n].copy() for at, n in zip(starts, lengths, strict=True)]
    chat = tokenizer("<|im_start|>user\n")["input_ids"], tokenizer("<|im_end|>\n<|im_start|>assistant\n")["input_ids"]  # fmt: skip
    return [
        chat[0] + text[len(chat[0]) + len(chat[1]) :] + chat[1] if number % 2 else text
        for number, text in enumerate(texts)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "share"), [("f32", 1.0), ("f16", 0.99)])
@pytest.mark.parametrize("variant", ["", "yarn"])
def test_llama_cpp_answers_with_the_same_tokens(
    release: Path, tmp_path: Path, variant: str, dtype: str, share: float
) -> None:
    folder, new = release / variant, 20
    write_gguf(folder, tmp_path / "model.gguf", dtype)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    window = WINDOW * (FACTOR if variant else 1)
    cache = F32 if dtype == "f32" else F16
    model = opened(tmp_path / "model.gguf", cache, n_ctx=window)
    # With YaRN all but the shortest begin beyond the window that was trained.
    asked = prompts(AutoTokenizer.from_pretrained(folder), window // 2 - 4, window - new)
    equal, seen, margins = 0, set[int](), []
    for prompt in asked:
        answer = greedy(model, prompt, new)
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        equal += int((logits.argmax(-1) == torch.tensor(answer)).sum())
        first, second = logits.topk(2).values.T
        margins.append(float((first - second).min()))
        seen.update(answer)
    assert equal >= share * new * len(asked)
    assert len(seen) > 100, "a model that repeats itself shows little"
    assert min(margins) > 1e-5, "a tie: another seed"


# ---- files


@pytest.mark.parametrize("dtype", [*DTYPES, "q4_k_m"])
def test_each_type_loads_and_generates(release: Path, tmp_path: Path, dtype: str) -> None:
    if dtype == "q4_k_m":
        pytest.importorskip("llama_cpp", reason="no llama-cpp-python: pip install -e '.[llama]'")
    export(release, tmp_path, "model", [dtype])
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"model-{dtype}.gguf", f"model-yarn-{dtype}.gguf",
    ]  # fmt: skip
    model = opened(tmp_path / f"model-yarn-{dtype}.gguf", n_ctx=32)
    assert len(greedy(model, [1, 2, 3], 8)) == 8
    assert model.metadata["general.name"] == "model-yarn"
    assert model.metadata["smollm3.rope.scaling.type"] == "yarn"


def test_stored_values_are_those_of_the_folder(release: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import load_file

    weights = load_file(release / "model.safetensors")
    for dtype, tolerance in {"f32": 0.0, "f16": 1e-7, "bf16": 0.0, "q8_0": 0.005}.items():
        write_gguf(release, tmp_path / "model.gguf", dtype)
        stored = {one.name: one for one in GGUFReader(tmp_path / "model.gguf").tensors}
        assert len(stored) == len(weights), "a tied head is stored once"
        for name, own in {"token_embd": "model.embed_tokens", "blk.3.ffn_up": "model.layers.3.mlp.up_proj"}.items():  # fmt: skip
            one = stored[f"{name}.weight"]
            values = dequantize(one.data, one.tensor_type)
            np.testing.assert_allclose(
                values, weights[f"{own}.weight"].numpy(), atol=tolerance, err_msg=f"{dtype} {name}"
            )


def test_a_file_is_whole_or_absent(release: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import runtimes.gguf_file

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runtimes.gguf_file, "read_tensor", fail)
    with pytest.raises(OSError, match="No space left"):
        write_gguf(release, tmp_path / "model.gguf", "f32")
    assert not list(tmp_path.iterdir())


def changed(release: Path, folder: Path, file: str, change: Callable[[Any], Any]) -> Path:
    """A copy of the release in whose `file` the JSON is changed."""
    folder.mkdir()
    for one in release.iterdir():
        if one.is_file():
            (folder / one.name).symlink_to(one)
    values = json.loads((folder / file).read_text())
    change(values)
    (folder / file).unlink()
    (folder / file).write_text(json.dumps(values))
    return folder


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model_type", "llama", "model_type: llama; name the folder of a SmolLM3"),
        ("no_rope_layers", [0, 1, 1, 1] * 2, "NoPE in every 4th layer"),
        ("attention_bias", True, "attention_bias: True: llama.cpp runs"),
        ("rope_parameters", YARN | {"beta_fast": 16}, "rope_parameters.beta_fast: 16"),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, "use default or yarn"),
        ("hidden_size", 128, "has shape (640, 64), (640, 128) in config.json"),
        ("num_hidden_layers", 9, "must be equal to the number of `layer_types`"),
    ],
)  # fmt: skip
def test_a_model_that_llama_cpp_would_run_otherwise_is_refused(
    release: Path, tmp_path: Path, key: str, value: Any, words: str
) -> None:
    folder = changed(
        release, tmp_path / "model", "config.json", lambda one: one.update({key: value})
    )
    with pytest.raises(UserError) as refused:
        write_gguf(folder, tmp_path / "model.gguf", "f16")
    assert words in str(refused.value) and str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.glob("*.gguf"))


def spoil_split(table: Any) -> None:
    table["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W+"


def spoil_merges(table: Any) -> None:
    del table["model"]["merges"][0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (spoil_split, "not Llama 3's split"),
        (spoil_merges, "not what its own bytes are merged to"),
        (lambda table: table.update(normalizer={"type": "NFC"}), "without normaliser"),
        (lambda table: table["added_tokens"][0].update(id=700), "beyond the 640 rows"),
    ],
    ids=["split", "merges", "normaliser", "rows"],
)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(
    release: Path, tmp_path: Path, change: Callable[[Any], Any], words: str
) -> None:
    folder = changed(release, tmp_path / "model", "tokenizer.json", change)
    with pytest.raises(UserError, match=words):
        write_gguf(folder, tmp_path / "model.gguf", "f16")


@pytest.mark.slow
@pytest.mark.parametrize("format", SMALL)
def test_small_weights_load_whole_in_transformers(
    release: Path, tmp_path: Path, format: str
) -> None:
    pytest.importorskip("bitsandbytes", reason="no bitsandbytes: pip install -e '.[small]'")
    export(release, tmp_path, "model", [format])
    folder = tmp_path / f"model-{format}"
    prompt = torch.tensor([prompts(AutoTokenizer.from_pretrained(folder), 40, 44)[1]])
    for variant, window in {"": WINDOW, "yarn": WINDOW * FACTOR}.items():
        whole = AutoModelForCausalLM.from_pretrained(release / variant).eval()
        model = AutoModelForCausalLM.from_pretrained(folder / variant).eval()
        assert model.config.max_position_embeddings == window
        with torch.no_grad():
            before, after = (one(prompt).logits[0].float() for one in (whole, model))
        alike = torch.nn.functional.cosine_similarity(before, after, dim=-1)
        assert alike.mean() > {"int8": 0.98, "int4": 0.8}[format]
        assert model.generate(prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt.shape[1]
    weights = (folder / "model.safetensors").stat().st_size
    assert weights < 0.7 * (release / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_onnx_gives_the_same_logits_padded_too(release: Path, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime", reason="no onnxruntime: pip install -e '.[onnx]'")
    export(release, tmp_path, "model", ["onnx"])
    for variant, place in {"": "model-onnx", "yarn": "model-yarn-onnx"}.items():
        reference = AutoModelForCausalLM.from_pretrained(release / variant).eval()
        session = ort.InferenceSession(str(tmp_path / place / "model.onnx"))
        ids = torch.randint(0, 600, (3, 60), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[0, :10] = 0
        with torch.no_grad():
            wanted = reference(ids, attention_mask=mask).logits
        (logits,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        kept = mask.bool()
        torch.testing.assert_close(torch.tensor(logits)[kept], wanted[kept], atol=1e-4, rtol=0)
        assert AutoTokenizer.from_pretrained(tmp_path / place).chat_template


# ---- the command


def make_export(**variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch", "export", "--scale", "tiny"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, **variables},
    )  # fmt: skip


@pytest.mark.slow
def test_a_wrong_command_is_one_line(tmp_path: Path) -> None:
    llama = write_model(tmp_path / "other", seed=0)
    edit(llama / "config.json", '"smollm3"', '"llama"')
    for variables, words in (
        ({"FORMAT": "q4_m", "MODEL": str(llama)}, "FORMAT=q4_m: did you mean 'q4_k_m'?"),
        ({"MODEL": str(tmp_path)}, "no config.json there"),
        ({"MODEL": str(llama)}, "model_type: llama; name the folder of a SmolLM3"),
    ):
        done = make_export(RUNS=str(tmp_path / "runs"), **variables)
        assert done.returncode == 2 and not (tmp_path / "runs").exists()
        (line,) = [one for one in done.stderr.splitlines() if one.startswith("error: ")]
        assert words in line


def test_a_missing_package_is_one_line(monkeypatch: Any, release: Path, tmp_path: Path) -> None:
    import launch.tools.export

    monkeypatch.setattr(launch.tools.export, "find_spec", lambda name: None)
    for format, extra in {"q4_k_m": "llama", "int8": "small", "onnx": "onnx"}.items():
        with pytest.raises(UserError, match=rf"pip install -e '\.\[{extra}\]'"):
            export(release, tmp_path, "model", ["f16", format])
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_of_bytes_alone_is_read_alike(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", seed=0)
    write_gguf(folder, tmp_path / "model.gguf", "f32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = opened(tmp_path / "model.gguf", n_ctx=64)
    text = "<|im_start|>user\nIt's 12345 <think>\n\ndébut<|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    assert model.tokenize(text.encode(), add_bos=True, special=True) == ids
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = reference(torch.tensor([ids])).logits[0, -1]
    assert greedy(model, ids, 1) == [int(logits.argmax())]
