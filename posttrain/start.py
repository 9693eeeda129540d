"""The checkpoint that FROM= names: found in a folder or on a hub, and checked.

Of the weights only the headers are read: names and shapes.
"""

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ground.errors import UserError, first_line
from ground.files import read_json_object
from ground.hub import ANSWER_SECONDS, refusal
from ground.modes import CLOSE, END, OPEN
from ground.weights import check_names, check_shape, open_weights, weight_files
from posttrain.data import PAD

ARCHITECTURE = "smollm3"
HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# What the templates write and the scorers look for, each as one token.
TURNS = ("<|im_start|>", END, OPEN, CLOSE)
# Embeddings may have more rows than the tokenizer has tokens: padded to a multiple for the kernels.
MOST_UNUSED_ROWS = 1024
FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# config.json's sizes, and the largest of each that is taken for one.
SIZES = {
    "hidden_size": 2**16,
    "intermediate_size": 2**18,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "vocab_size": 2**22,
}
# Of a weight file this much is hashed, at even distances: training changes every tensor.
SAMPLES, SAMPLE_BYTES = 256, 4096


@dataclass(frozen=True)
class Checkpoint:
    """`revision` is the hub's commit, or a hash of the content of a local folder."""

    named: str  # as FROM= says it
    repository: str  # on the hub; empty: a local folder
    revision: str
    folder: Path  # with config.json; of a repository the snapshot in the hub's cache
    config: dict[str, Any] = field(repr=False)

    @property
    def sizes(self) -> dict[str, int]:
        """What two checkpoints that are merged have in common."""
        tied = self.config.get("tie_word_embeddings", True)
        return {**{key: self.config[key] for key in SIZES}, "tie_word_embeddings": tied}


def find_checkpoint(named: str) -> Checkpoint:
    """The checkpoint that FROM= names, with a configuration that is SmolLM3's."""
    folder = Path(named).expanduser()
    repository, revision = "", ""
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"FROM={named}: no config.json there; name a transformers folder")
    elif hub := HUB_ID.fullmatch(named):
        repository = hub["repository"]
        folder = _hub_file(named, repository, hub["revision"], "config.json").parent
        revision = folder.name
    else:
        raise UserError(
            f"FROM={named}: no such folder, and no hub id; write a transformers folder, "
            "owner/name or owner/name@revision"
        )
    config = read_json_object(folder / "config.json", _remedy(folder))
    if (found := config.get("model_type")) != ARCHITECTURE:
        raise UserError(
            f"FROM={named}: config.json: model_type: {found}: another architecture; name a "
            f"checkpoint of {ARCHITECTURE}"
        )
    _check_sizes(named, config)
    return Checkpoint(named, repository, revision or content_digest(folder), folder, config)


def _check_sizes(named: str, config: dict[str, Any]) -> None:
    for key, most in SIZES.items():
        size = config.get(key)
        if type(size) is not int or not 1 <= size <= most:  # a bool is an int
            shown = "missing" if key not in config else repr(size)[:80]
            raise UserError(
                f"FROM={named}: config.json: {key}: {shown}: no whole number of 1 to {most}; "
                "correct it, or name another checkpoint"
            )
    for key, of in (
        ("hidden_size", "num_attention_heads"),
        ("num_attention_heads", "num_key_value_heads"),
    ):
        if config[key] % config[of]:
            raise UserError(
                f"FROM={named}: config.json: {of}: {config[of]} does not divide {key} "
                f"{config[key]}; correct it, or name another checkpoint"
            )


def _remedy(folder: Path) -> str:
    return f"name a whole transformers folder in FROM=, {folder} is none"


def content_digest(folder: Path) -> str:
    """Hash of a checkpoint: small files whole, of each weight file its size and even samples."""
    total = hashlib.blake2b(digest_size=8)
    files = {file for pattern in FILES for file in folder.glob(pattern) if file.is_file()}
    for file in sorted(files):
        size = file.stat().st_size
        total.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as content:
            if size <= SAMPLES * SAMPLE_BYTES or file.suffix != ".safetensors":
                total.update(content.read())
                continue
            for number in range(SAMPLES):
                content.seek(number * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                total.update(content.read(SAMPLE_BYTES))
    return total.hexdigest()


def _hub_file(named: str, repository: str, revision: str | None, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        with _quiet_hub():
            cached = not _is_reached(repository, name, revision)
            return Path(
                hf_hub_download(repository, name, revision=revision, local_files_only=cached)
            )
    except Exception as error:  # any error of network or hub
        raise _not_fetched(named, name, error) from error


def _is_reached(repository: str, name: str, revision: str | None) -> bool:
    """Whether the hub answers, asked once: hf_hub_download tries for half a minute and longer."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(
            hf_hub_url(repository, name, revision=revision), timeout=ANSWER_SECONDS
        )
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise
        return False
    except Exception:  # no network, no such host, offline by choice
        return False
    return True


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without the hub library's lines on what it tries again."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def carries_template(folder: Path) -> bool:
    """Whether the tokenizer of a transformers folder has a chat template."""
    if (folder / "chat_template.jinja").is_file():
        return True
    file = folder / "tokenizer_config.json"
    return file.is_file() and bool(read_json_object(file, _remedy(folder)).get("chat_template"))


def fetch_tokenizer(checkpoint: Checkpoint) -> None:
    """Bring all but the weights of a hub's model into the cache."""
    if checkpoint.repository:
        _fetch(checkpoint, [pattern for pattern in FILES if "safetensors" not in pattern])


def fetch_weights(checkpoint: Checkpoint) -> None:
    if checkpoint.repository:
        _fetch(checkpoint, FILES)


def _fetch(checkpoint: Checkpoint, patterns: Sequence[str]) -> None:
    """Bring files of a repository into the hub's cache; what is there is not fetched again."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    try:
        if patterns is not FILES:
            disable_progress_bars()  # some small files
        with _quiet_hub():
            snapshot_download(
                checkpoint.repository, revision=checkpoint.revision, allow_patterns=list(patterns)
            )
    except Exception as error:  # any error of network or hub
        raise _not_fetched(checkpoint.named, patterns[0], error) from error
    finally:
        enable_progress_bars()


def _not_fetched(named: str, file: str, error: Exception) -> UserError:
    where = f"FROM={named}: no such folder here, and {file} could not be fetched"
    return refusal(error, where, "check the name")


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """Refuse a vocabulary that is not the model's, or lacks what chats are written with."""
    from tokenizers import Tokenizer

    file, rows = checkpoint.folder / "tokenizer.json", checkpoint.config["vocab_size"]
    read_json_object(file, _remedy(checkpoint.folder))
    try:
        vocabulary = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises no class of its own
        raise UserError(
            f"FROM={checkpoint.named}: tokenizer.json: no tokenizer ({first_line(error)}); name a "
            "checkpoint with its own tokenizer"
        ) from error
    used = max(vocabulary.values(), default=-1) + 1
    if not 0 <= rows - used < MOST_UNUSED_ROWS:
        raise UserError(
            f"FROM={checkpoint.named}: config.json: vocab_size: {rows}: tokenizer.json has {used} "
            "tokens; name a checkpoint with its own tokenizer"
        )
    for token in TURNS:
        if token not in vocabulary:
            raise UserError(
                f"FROM={checkpoint.named}: tokenizer.json: no token {token}, which chats are written "
                "with; name a checkpoint whose tokenizer has it"
            )
    pad = _pad_token(checkpoint.folder)
    if pad in (None, END) and PAD not in vocabulary:
        raise UserError(
            f"FROM={checkpoint.named}: tokenizer_config.json: pad_token: {pad}: no token that no text "
            f"has, and no {PAD} in its place; set one"
        )


def _pad_token(folder: Path) -> str | None:
    file = folder / "tokenizer_config.json"
    pad = read_json_object(file, _remedy(folder)).get("pad_token") if file.is_file() else None
    return pad["content"] if isinstance(pad, dict) else pad


def model_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a SmolLM3's weights, from a model without storage."""
    import torch
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    with torch.device("meta"):
        model = SmolLM3ForCausalLM(SmolLM3Config(**config))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def checked_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """`model_shapes` of a checkpoint; a config.json that makes no model is refused."""
    try:
        return model_shapes(checkpoint.config)
    except Exception as error:  # of transformers' own checks too, whose text has several lines
        problem, remedy = " ".join(str(error).split()), _remedy(checkpoint.folder)
        raise UserError(f"FROM={checkpoint.named}: config.json: {problem}; {remedy}") from error


def check_weights(checkpoint: Checkpoint) -> None:
    """Refuse weights whose names or shapes are not those of config.json; reads headers alone."""
    folder, of = checkpoint.folder, "config.json"
    remedy = _remedy(folder)
    shapes = checked_shapes(checkpoint)
    files = weight_files(folder, remedy)
    names = set(files)
    if "lm_head.weight" not in shapes:
        names.discard("lm_head.weight")  # tied, and stored all the same
    check_names(folder, set(shapes), names, of)
    for file in sorted(set(files.values())):
        with open_weights(file, remedy) as handle:
            for name in sorted(names & set(handle.keys())):
                check_shape(file, name, handle.get_slice(name).get_shape(), shapes[name], of)
