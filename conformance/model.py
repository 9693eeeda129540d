"""The kit's model: random, with attention that depends strongly on positions, and with set answers.

8 layers of 64, NoPE in the 4th and 8th, 4 query heads of 32 on 2 key/value heads, a tied head. Weights are
float32 numbers that bfloat16 holds, so that every precision has the same model. Embeddings of what
is no printable ASCII are small: greedy text can be read through any server.

The answers: the last layer's down projection is the least-squares solution by which the given
prompts are followed by the given tokens. So a runtime can be seen to think, to call a tool and to
end its turn, without any training.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from conformance.cases import KIT

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, SmolLM3ForCausalLM

Ids = Sequence[int]

WINDOW, YARN_FACTOR, THETA = 512, 2.0, 5_000_000.0
VOCAB_SIZE = 512
HEAD_DIM = 32  # the smallest that vLLM's kernels take
# Llama 3's split, and SmolLM3's special tokens in the order of their ids.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|im_start|>", "<|im_end|>")  # fmt: skip
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<code>", "</code>")


@dataclass(frozen=True)
class Answer:
    """A prompt and the tokens that the model is to write after it."""

    prompt: Ids
    tokens: Ids


def make_tokenizer(texts: Sequence[str], template: str) -> "PreTrainedTokenizerFast":
    """A byte-level BPE of VOCAB_SIZE tokens with SmolLM3's split, special tokens and `template`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = VOCAB_SIZE - len(CONTROL) - len(TAGS)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL])
    bpe.add_tokens([AddedToken(token, normalized=False, special=False) for token in TAGS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token=CONTROL[2],
        clean_up_tokenization_spaces=False, model_max_length=2 * WINDOW,
    )  # fmt: skip
    tokenizer.chat_template = template
    # What transformers parses answers by: a release's own, as it was put into the kit.
    stored = json.loads((KIT / "tokenizer_config.json").read_text())
    tokenizer.response_template = stored["response_template"]
    return tokenizer


def make_model(
    tokenizer: "PreTrainedTokenizerFast", answers: Sequence[Answer], seed: int
) -> "SmolLM3ForCausalLM":
    """The model in float32, on the CPU."""
    import torch
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    config = SmolLM3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=HEAD_DIM,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": THETA}, no_rope_layer_interval=4,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, use_cache=True, dtype="float32",
    )  # fmt: skip
    model = SmolLM3ForCausalLM(config).eval()
    random = np.random.default_rng(seed)
    sizes = _embedding_sizes(tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = random.standard_normal(tuple(parameter.shape))
            parameter.copy_(_rounded(torch.from_numpy(_scaled(name, values, sizes))))
        _set_answers(model, answers)
    return model


def _scaled(name: str, values: Any, sizes: Any) -> Any:
    """Standard normal numbers in the size of a parameter: of 8 = sqrt(64) inputs each."""
    if "norm" in name:
        return (0.5 if name == "model.norm.weight" else 1.0) + 0.1 * values
    if "embed_tokens" in name:
        return values * sizes[:, None]
    gain = {"q_proj": 1.4, "k_proj": 1.4, "down_proj": 0.6, "o_proj": 0.7}
    return values * gain.get(name.split(".")[-2], 1.0) / values.shape[1] ** 0.5


def _embedding_sizes(tokenizer: "PreTrainedTokenizerFast") -> Any:
    tokens = [tokenizer.decode([number]) for number in range(len(tokenizer))]
    readable = [text.isascii() and text.replace("\n", "").isprintable() for text in tokens]
    sizes = [1.0 if is_readable else 0.3 for is_readable in readable]
    for token in ("<|im_end|>", *TAGS):
        sizes[tokenizer(token)["input_ids"][0]] = 0.7
    return np.array(sizes)


def _rounded(weight: "torch.Tensor") -> "torch.Tensor":
    import torch

    return weight.to(torch.bfloat16).float()


def _set_answers(model: "SmolLM3ForCausalLM", answers: Sequence[Answer]) -> None:
    """Change the last down projection so that each prompt is followed by its tokens."""
    import torch

    model.double()
    seen: dict[str, torch.Tensor] = {}
    down = model.model.layers[-1].mlp.down_proj
    hook = down.register_forward_hook(lambda _, into, out: seen.update(into=into[0][0], out=out[0]))
    norm_hook = model.model.norm.register_forward_hook(lambda _, into, __: seen.update(hidden=into[0][0]))  # fmt: skip
    inputs, changes = [], []
    for answer in answers:
        model(torch.tensor([[*answer.prompt, *answer.tokens]]), use_cache=False)
        places = slice(len(answer.prompt) - 1, len(answer.prompt) + len(answer.tokens) - 1)
        hidden = seen["hidden"][places]
        wanted = model.lm_head.weight[list(answer.tokens)] / model.model.norm.weight
        wanted = wanted / wanted.norm(dim=-1, keepdim=True) * hidden.norm(dim=-1, keepdim=True)
        inputs.append(seen["into"][places])
        changes.append(wanted - hidden)
    hook.remove()
    norm_hook.remove()
    if inputs:
        solution = np.linalg.lstsq(torch.cat(inputs).numpy(), torch.cat(changes).numpy(), rcond=1e-9)[0]  # fmt: skip
        down.weight.add_(torch.from_numpy(solution.T))
    model.float()
    down.weight.copy_(_rounded(down.weight))


def write_kit_model(
    folder: Path, model: "SmolLM3ForCausalLM", tokenizer: "PreTrainedTokenizerFast"
) -> None:
    """The transformers folder, and yarn/ with the same files by link for twice the window."""
    model.bfloat16().save_pretrained(folder)  # half the bytes, the same numbers
    tokenizer.save_pretrained(folder)
    file = folder / "generation_config.json"
    generation = {"do_sample": False, "eos_token_id": tokenizer.eos_token_id}
    _write(file, generation | {"pad_token_id": tokenizer.pad_token_id})
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    config["rope_theta"] = config["rope_parameters"][
        "rope_theta"
    ]  # for runtimes that read it there
    _write(folder / "config.json", config)
    rope = {
        "rope_type": "yarn",
        "rope_theta": THETA,
        "factor": YARN_FACTOR,
        "original_max_position_embeddings": WINDOW,
    }
    yarn = config | {"rope_parameters": rope, "max_position_embeddings": int(WINDOW * YARN_FACTOR)}
    for file in folder.iterdir():
        file.chmod(0o644)
    (folder / "yarn").mkdir()
    for one in sorted(folder.iterdir()):
        if one.is_file() and one.name != "config.json":
            (folder / "yarn" / one.name).symlink_to(Path("..") / one.name)
    _write(folder / "yarn" / "config.json", yarn)


def _write(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
