"""Weights survive both directions of conversion bit for bit, whatever layout wrote them."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from damaged import DAMAGED
from in_process import as_transformers, build, single_process, tiny, transformers_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ground.errors import UserError
from nanotron_ext import convert
from nanotron_ext.checkpoint import Checkpoint, check_weights
from nanotron_ext.config import SmolLM3Config
from nanotron_ext.convert import from_hf, to_hf
from nanotron_ext.weight_table import weights_of

YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 24}
VARIANTS = {
    "tied": tiny(),
    "untied": tiny(tie_word_embeddings=False, num_key_value_heads=4),
    "yarn": tiny(num_key_value_heads=1, rope_theta=5e6, rope_scaling=YARN),
    "RoPE in all layers": tiny(no_rope_layer=0),
}


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    with single_process() as parallel_context:
        yield parallel_context


def hf_folder(
    folder: Path, config: SmolLM3Config, dtype: torch.dtype = torch.float32, **options: Any
) -> Path:
    """A random model as transformers itself saves it."""
    torch.manual_seed(0)
    transformers_model(config).to(dtype).save_pretrained(folder, **options)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same(mine: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_there_and_back_is_the_same_bits(
    tmp_path: Path, config: SmolLM3Config, dtype: torch.dtype
) -> None:
    source = hf_folder(tmp_path / "hf", config, dtype)
    from_hf(source, tmp_path / "nanotron")
    to_hf(tmp_path / "nanotron", tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back"), tensors_of(source))
    from_hf(tmp_path / "back", tmp_path / "again")
    for name in ("model_config.json", "checkpoint_metadata.json"):
        files = [tmp_path / folder / name for folder in ("nanotron", "again")]
        assert json.loads(files[0].read_text()) == json.loads(files[1].read_text())


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_transformers_reads_the_folder_as_the_same_model(
    tmp_path: Path, config: SmolLM3Config
) -> None:
    from transformers import AutoModelForCausalLM

    source = hf_folder(tmp_path / "hf", config)
    from_hf(source, tmp_path / "nanotron")
    to_hf(tmp_path / "nanotron", tmp_path / "back")
    one, two = (AutoModelForCausalLM.from_pretrained(f) for f in (source, tmp_path / "back"))
    assert one.config.to_dict() | {"_name_or_path": ""} == two.config.to_dict() | {
        "_name_or_path": "",
        # spelt otherwise, equal in effect
        "no_rope_layer_interval": one.config.no_rope_layer_interval,
    }
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(one(ids).logits, two(ids).logits)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_nanotron_loads_what_from_hf_writes(
    tmp_path: Path, context: Any, config: SmolLM3Config
) -> None:
    source = hf_folder(tmp_path / "hf", config)
    from_hf(source, tmp_path / "nanotron")
    model = build(config, context)
    from nanotron.serialize import load_weights

    load_weights(model, context, tmp_path / "nanotron")
    assert_same(as_transformers(dict(model.named_parameters()), config), tensors_of(source))


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_files_and_metadata_are_those_that_nanotron_writes(
    tmp_path: Path, context: Any, config: SmolLM3Config
) -> None:
    model = build(config, context)
    from nanotron.serialize import save_weights

    save_weights(model, context, tmp_path / "theirs")
    save_file(
        {
            k: v.detach().contiguous()
            for k, v in as_transformers(dict(model.named_parameters()), config).items()
        },
        _folder(tmp_path / "hf") / "model.safetensors",
    )
    (tmp_path / "hf" / "config.json").write_text(json.dumps(convert.hf_config(config, "float32")))
    from_hf(tmp_path / "hf", tmp_path / "ours")
    mine, theirs = _contents(tmp_path / "ours" / "model"), _contents(tmp_path / "theirs" / "model")
    assert mine.keys() == theirs.keys()
    for name, (metadata, tensor) in theirs.items():
        assert mine[name][0] == metadata, name
        assert torch.equal(mine[name][1], tensor), name


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _contents(root: Path) -> dict[str, tuple[dict[str, str], torch.Tensor]]:
    found = {}
    for file in root.rglob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            found[str(file.relative_to(root))] = (
                handle.metadata() or {},
                handle.get_tensor("data"),
            )
    return found


def test_shards_are_read_and_written_within_their_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than a shard and the tensor being read is held; here the embedding is 12 kB."""
    limit, written = 20_000, []
    monkeypatch.setattr(convert, "SHARD_BYTES", limit)

    def recording(tensors: dict[str, torch.Tensor], file: Path, metadata: Any) -> None:
        written.append(sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, file, metadata=metadata)

    source = hf_folder(tmp_path / "hf", tiny(), max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    from_hf(source, tmp_path / "nanotron")
    monkeypatch.setattr(convert, "save_file", recording)
    to_hf(tmp_path / "nanotron", tmp_path / "back")
    assert max(written) <= limit and len(written) > 2
    assert_same(tensors_of(tmp_path / "back"), tensors_of(source))
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    total = sum(tensor.nbytes for tensor in tensors_of(source).values())
    assert index["metadata"]["total_size"] == total == sum(written)
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "back" / file)


def test_the_tokenizer_comes_along_and_nothing_else_of_its_folder(tmp_path: Path) -> None:
    tokenizer = hf_folder(tmp_path / "tokenizer", tiny())
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tokenizer / name).write_text("{}")
    from_hf(tokenizer, tmp_path / "nanotron")
    to_hf(tmp_path / "nanotron", tmp_path / "hf", tokenizer)
    files = {path.name for path in (tmp_path / "hf").iterdir()}
    model = {"checksums.json", "config.json", "generation_config.json", "model.safetensors"}
    assert files == model | {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 96


# Faults in a checkpoint (to-hf) or in a transformers folder (from-hf), and what is said of each.
Fault = Callable[[Path], None]
NORM = "model/model/decoder/2/pp_block/input_layernorm/model_weight.safetensors"
EMBEDDING = "model/model/token_position_embeddings/pp_block/token_embedding"


def edit_json(name: str, **changes: Any) -> Fault:
    def fault(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | changes))

    return fault


def edit_tensor(name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Fault:
    def fault(folder: Path) -> None:
        with safe_open(folder / name, "pt") as handle:
            metadata = handle.metadata()
        tensors = {key: tensor.clone() for key, tensor in load_file(folder / name).items()}
        change(tensors)
        save_file(tensors, folder / name, metadata=metadata)

    return fault


def truncate(name: str) -> Fault:
    def fault(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) - 10])

    return fault


def remove(name: str) -> Fault:
    return lambda folder: (
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    )


def copy(name: str, target: str) -> Fault:
    def fault(folder: Path) -> None:
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, folder / target)

    return fault


def set_nan(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors[name].view(-1)[-1:].fill_(float("nan"))


def reshape(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()})


Q = "model.layers.1.self_attn.q_proj.weight"
TO_HF: dict[str, tuple[Fault, str]] = {
    "no config": (remove("model_config.json"), r"model_config\.json: no such file; is this"),
    "broken config": (lambda f: (f / "model_config.json").write_text("{"), "not JSON"),
    "Llama": (edit_json("model_config.json", is_smollm3_config=None), "another architecture"),
    "unknown key": (edit_json("model_config.json", qk_norm=True), "qk_norm.*another architecture"),
    "impossible heads": (edit_json("model_config.json", num_attention_heads=5), "multiple of"),
    "a tensor missing": (remove(NORM), r"no tensor 'model\.decoder\.2.*input_layernorm.weight'"),
    "a tensor too many": (
        copy(NORM, NORM.replace("input_layernorm", "q_norm")),
        "q_norm.*another model's",
    ),
    "too few layers": (edit_json("model_config.json", num_hidden_layers=9), "no tensor.*decoder.8"),
    "wrong shape": (edit_json("model_config.json", vocab_size=97), r"\(96, 32\).*\(97, 32\)"),
    "a NaN": (edit_tensor(NORM, set_nan("data")), "input_layernorm.*not finite"),
    "truncated": (truncate(NORM), "input_layernorm.*truncated or corrupt"),
    "no data": (edit_tensor(NORM, lambda t: t.update(x=t.pop("data"))), "no tensor 'data'"),
}
FROM_HF: dict[str, tuple[Fault, str]] = {
    "no config": (remove("config.json"), r"config\.json: no such file; is this a transformers"),
    "Llama": (edit_json("config.json", model_type="llama"), "'llama', not 'smollm3'"),
    "a bias": (edit_json("config.json", attention_bias=True), "attention_bias is True"),
    "odd NoPE layers": (edit_json("config.json", no_rope_layers=[1, 0, 0] + [1] * 5), "no_rope_layers"),
    "another rope": (edit_json("config.json", rope_parameters={"rope_type": "llama3"}), "llama3"),
    "no vocab_size": (lambda f: _drop(f / "config.json", "vocab_size"), "no vocab_size"),
    "untied in name": (edit_json("config.json", tie_word_embeddings=False), "lm_head.weight"),
    "a tensor missing": (edit_tensor("model.safetensors", lambda t: t.pop(Q)), "no tensor.*q_proj"),
    "a tensor too many": (edit_tensor("model.safetensors", lambda t: t.update({"x.bias": t[Q].clone()})), "x.bias"),
    "wrong shape": (edit_tensor("model.safetensors", reshape(Q)), r"\(31, 32\).*\(32, 32\)"),
    "another head": (edit_tensor("model.safetensors", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})), "tie_word_embeddings is true"),
    **DAMAGED,
}  # fmt: skip


def _drop(path: Path, key: str) -> None:
    values = json.loads(path.read_text())
    del values[key]
    path.write_text(json.dumps(values))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound pair: `hf` and `nanotron`."""
    folder = tmp_path_factory.mktemp("sound")
    from_hf(hf_folder(folder / "hf", tiny()), folder / "nanotron")
    (folder / "nanotron" / "checksums.json").unlink()  # as one from elsewhere
    return folder


@pytest.mark.parametrize(
    ("direction", "name"), [("to-hf", n) for n in TO_HF] + [("from-hf", n) for n in FROM_HF]
)
def test_a_faulty_source_is_refused_in_one_line_and_nothing_is_written(
    tmp_path: Path, sound: Path, direction: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fault, message = (TO_HF if direction == "to-hf" else FROM_HF)[name]
    source = tmp_path / "source"
    shutil.copytree(sound / ("nanotron" if direction == "to-hf" else "hf"), source)
    fault(source)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        convert.main([direction, str(source), str(tmp_path / "out" / "target")])
    said = capsys.readouterr().err
    assert exit_.value.code == 2
    assert said.startswith(f"error: {source}") and said.count("\n") == 1
    assert re.search(message, said), said
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("name", TO_HF)
def test_a_run_does_not_start_from_a_faulty_checkpoint(
    tmp_path: Path, sound: Path, name: str
) -> None:
    fault, message = TO_HF[name]
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(sound / "nanotron", checkpoint)
    check_weights(checkpoint, asdict(tiny()))
    fault(checkpoint)
    # The run's own config is asked before the tensors.
    message += "|vocab_size is 97, the run's|num_hidden_layers is 9, the run's"
    with pytest.raises(UserError, match=message):
        check_weights(checkpoint, asdict(tiny()))


def test_a_run_does_not_start_from_another_models_checkpoint(sound: Path) -> None:
    with pytest.raises(UserError, match=r"num_key_value_heads is 2, the run's .* is 4"):
        check_weights(sound / "nanotron", asdict(tiny(num_key_value_heads=4)))


def test_a_failed_conversion_keeps_what_was_there(tmp_path: Path, sound: Path) -> None:
    shutil.copytree(sound / "nanotron", tmp_path / "nanotron")
    to_hf(tmp_path / "nanotron", tmp_path / "hf")
    before = {path: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    truncate(NORM)(tmp_path / "nanotron")
    with pytest.raises(UserError):
        to_hf(tmp_path / "nanotron", tmp_path / "hf")
    assert {path: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"nanotron", "hf"}
    to_hf(sound / "nanotron", tmp_path / "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"nanotron", "hf"}


def test_the_command_line_never_overwrites(tmp_path: Path, sound: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    command = [sys.executable, "-m", "nanotron_ext.convert", "to-hf", str(sound / "nanotron")]
    done = subprocess.run(
        [*command, str(tmp_path / "mine")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "exists; remove it or name another" in done.stderr
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"


def test_older_spellings_of_rope_are_read(tmp_path: Path, sound: Path) -> None:
    """transformers 4 wrote rope_theta and rope_scaling at the top."""
    source = tmp_path / "hf"
    shutil.copytree(sound / "hf", source)
    _drop(source / "config.json", "rope_parameters")
    edit_json("config.json", rope_theta=5e6, rope_scaling=YARN)(source)
    from_hf(source, tmp_path / "nanotron")
    config = Checkpoint(tmp_path / "nanotron").config
    assert (config.rope_theta, config.rope_scaling) == (5e6, YARN)


def test_the_layout_table_counts_the_published_parameters() -> None:
    """SmolLM3-3B: 3,075,098,624, the tied matrix once."""
    published = SmolLM3Config()
    assert (
        sum(torch.Size(weight.shape).numel() for weight in weights_of(published)) == 3_075_098_624
    )
