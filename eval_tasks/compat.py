"""Fixes of what lighteval 0.13.0 gets wrong. Each fault: symptom, cause, and what is done instead.

`before_import` must run before anything of lighteval is imported; the others replace methods and
work under the stock command line too, which loads a task file before it makes tasks and model.
Every replacement keeps the library's own version as `__wrapped__`; tests call that one and fail
once upstream fixes it.
"""

import copy
import functools
import hashlib
import importlib
import os
import re
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from eval_tasks.sampling import sampled
from ground.chat import chat_tokenizer
from ground.errors import UserError

# Modules of built-in tasks that do harm when they are imported, which happens before any task file
# is: the first downloads a file; the others call `HfApi.list_models(model_name=...)`, an argument
# that huggingface_hub 1 removed (TypeError).
HARMFUL_TASKS = ("tiny_benchmarks", "mt_bench.main", "mix_eval.main")


def before_import() -> None:
    """Make lighteval importable beside nanotron, offline, and beside huggingface_hub 2."""
    _hide_nanotron()
    for name in HARMFUL_TASKS:
        stub = types.ModuleType(f"lighteval.tasks.tasks.{name}")
        stub.TASKS_TABLE = []  # type: ignore[attr-defined]
        sys.modules.setdefault(stub.__name__, stub)


def apply() -> None:
    """Fix what changes results. Repeating it does nothing."""
    import torch

    enabled = torch.is_grad_enabled()
    for module, owner, method, make in MENDS:
        _replace(getattr(importlib.import_module(module), owner), method, make)
    # lighteval.models.transformers has turned it off for the whole process.
    torch.set_grad_enabled(enabled)
    _keep_datasets_apart()


Make = Callable[[Any], Any]  # from the library's own method to the one that takes its place
MENDS: list[tuple[str, str, str, Make]] = []


def mends(module: str, owner: str, method: str) -> Callable[[Make], Make]:
    """Enter a function into MENDS: what it returns replaces lighteval's `owner.method`."""

    def enter(make: Make) -> Make:
        MENDS.append((f"lighteval.{module}", owner, method, make))
        return make

    return enter


def _replace(owner: Any, name: str, make: Make) -> None:
    """Put `make(original)` in place of `owner.name`, once."""
    original = getattr(owner, name)
    if not hasattr(original, "is_mended"):
        replacement: Any = functools.wraps(original)(make(original))
        replacement.is_mended = True
        setattr(owner, name, replacement)


def _hide_nanotron() -> None:
    """ImportError, circular import on LoggingArgs: lighteval's nanotron backend, which is imported
    wherever nanotron is installed, does not fit nanotron 0.4."""
    _replace(
        importlib.import_module("lighteval.utils.imports"),
        "is_package_available",
        lambda original: lambda package: package != "nanotron" and original(package),
    )


@mends("models.transformers.transformers_model", "TransformersModel", "_loglikelihood_tokens")
def _mend_token_counts(original: Any) -> Any:
    """Token-normalised accuracy is wrong, or IndexError: the choices' tokens come back padded to
    the longest choice, and their rows are cut to the number of tokens instead of their columns.
    """

    def loglikelihood_tokens(self: Any, docs: list[Any], rolling: bool = False) -> list[Any]:
        responses: list[Any] = original(self, docs, rolling)
        for doc, response in zip(docs, responses, strict=True):
            if not rolling:
                context = self.prompt_manager.prepare_prompt(doc)
                pair = self.tok_encode_pair(context, doc.choices, pairwise=True)
                response.output_tokens = pair[1]
        return responses

    return loglikelihood_tokens


@mends("models.transformers.transformers_model", "TransformersModel", "_padded_greedy_until")
def _mend_prompt_truncation(original: Any) -> Any:
    """`max_new_tokens` among the generation parameters cuts the prompt to as many tokens from the
    left (the system prompt with `/no_think` goes first) and does not limit the answer."""

    def padded_greedy_until(self: Any, docs: list[Any]) -> list[Any]:
        settings = self.generation_config_dict
        limit = settings.get("max_new_tokens")
        if limit is None:
            return original(self, docs)
        docs = [copy.copy(doc) for doc in docs]
        for doc in docs:
            doc.generation_size = limit
        self.generation_config_dict = {
            key: value for key, value in settings.items() if key != "max_new_tokens"
        }
        try:
            return original(self, docs)
        finally:
            self.generation_config_dict = settings

    return padded_greedy_until


@mends("models.transformers.transformers_model", "TransformersModel", "_generate_padded")
def _mend_seeds(original: Any) -> Any:
    """Samples differ from run to run, and with the batch: they are drawn from one generator, which
    nothing seeds. And all samples of a batch are held at once. See sampling.py."""

    def generate_padded(self: Any, batch: Any, *, num_samples: int = 1, **named: Any) -> list[Any]:
        if not self.generation_config_dict.get("temperature"):
            answers: list[Any] = original(self, batch=batch, num_samples=num_samples, **named)
            return answers
        return sampled(original, self, batch, num_samples, **named)

    return generate_padded


@mends("models.transformers.transformers_model", "TransformersModel", "_create_auto_tokenizer")
def _mend_forged_turns(original: Any) -> Any:
    """A question that spells `<|im_end|>` ends its turn, and may begin the answer: a prompt is one
    text when it is tokenised. See ground/chat.py; the two below put the marks in."""
    return lambda *arguments, **named: chat_tokenizer(original(*arguments, **named))


@mends("tasks.prompt_manager", "PromptManager", "prepare_prompt")
def _mark_prompts(original: Any) -> Any:
    def prepare_prompt(self: Any, doc: Any) -> str:
        prompt: str = original(self, doc)
        if not (marks := getattr(self.tokenizer, "marks", None)):
            return prompt
        if not self.use_chat_template:
            prompt = marks.on(prompt)
        return prompt if marks.count(prompt) else marks.off(prompt)

    return prepare_prompt


@mends("tasks.prompt_manager", "PromptManager", "_prepare_chat_template")
def _give_tools(original: Any) -> Any:
    """A task cannot give the template tools, nor a conversation: a prompt is one question's text."""

    def prepare_chat_template(self: Any, doc: Any, tokenize: bool = True) -> Any:
        given = doc.specific or {}
        if "tools" not in given:
            return original(self, doc, tokenize)
        if not tokenize:
            raise UserError(
                "a prompt with tools is tokens: not for a server that takes texts alone"
            )
        return self.tokenizer.apply_chat_template(
            with_system(given["messages"], self.system_prompt or ""), tools=given["tools"],
            tokenize=False, add_generation_prompt=True,
        )  # fmt: skip

    return prepare_chat_template


def with_system(messages: list[dict[str, str]], prompt: str) -> list[dict[str, str]]:
    """The messages behind a system message with `prompt` and what their own says."""
    first, *rest = messages
    if first["role"] != "system":
        return [{"role": "system", "content": prompt}, *messages] if prompt else messages
    return [first | {"content": f"{prompt}\n{first['content']}".strip()}, *rest]


@mends("models.abstract_model", "LightevalModel", "tok_encode_pair")
def _mark_choices(original: Any) -> Any:
    def tok_encode_pair(self: Any, context: Any, continuations: list[str], **named: Any) -> Any:
        if marks := getattr(self.tokenizer, "marks", None):
            continuations = marks.on(continuations, spoken=True)
        return original(self, context, continuations, **named)

    return tok_encode_pair


@mends("models.model_input", "GenerationParameters", "to_transformers_dict")
def _mend_sampling(original: Any) -> Any:
    """A temperature above 0 with one sample per prompt is greedy: `do_sample` is never set."""

    def to_transformers_dict(self: Any) -> dict[str, Any]:
        return {**original(self), "do_sample": self.temperature > 0}

    return to_transformers_dict


@mends("utils.cache_management", "SampleCache", "get_model_hash")
def _mend_cache_key(original: Any) -> Any:
    """New weights at the same path give the old scores: the sample cache's key covers only the
    model's settings. And the cache lies in the model's own folder: an absolute path joined to
    `cache_dir` replaces it."""

    def get_model_hash(self: Any, model_config: Any) -> str:
        settings: str = original(self, model_config)
        folder = Path(model_config.model_name)
        if not folder.is_dir():
            return settings
        # The last part of the cache's path; an absolute one replaces what comes before it.
        cache = Path(model_config.cache_dir).expanduser().resolve()
        return str(cache / f"{settings}-{weights_digest(folder)}")

    return get_model_hash


@mends("tasks.lighteval_task", "LightevalTask", "get_docs")
def _mend_item_ids(original: Any) -> Any:
    """A changed prompt is scored with the answers to the old one: the sample cache identifies an
    item by its number in the dataset, and a task by a text with the same `prompt_fn` for all."""

    def get_docs(self: Any, *arguments: Any, **named: Any) -> list[Any]:
        docs: list[Any] = original(self, *arguments, **named)
        for doc in docs:
            asked = [plain_prompt(doc), doc.choices, doc.stop_sequences, doc.generation_size]
            asked.append((doc.specific or {}).get("tools"))
            digest = hashlib.blake2b(repr(asked).encode(), digest_size=8)
            doc.id = f"{doc.id}-{digest.hexdigest()}"
        return docs

    return get_docs


@mends("tasks.prompt_manager", "PromptManager", "_extract_query")
def _mend_query(original: Any) -> Any:
    """GPQA's instruction runs into its question: the blank line between them is stripped."""
    return lambda self, query, instruction: query.removeprefix(instruction or "")


@mends("tasks.prompt_manager", "PromptManager", "_prepare_plain_text")
def _mend_plain_text(original: Any) -> Any:
    """Prompts of HellaSwag, Winogrande, BoolQ and Flores begin with a blank line: an empty instruction
    is joined like a text. And an answer of a worked example loses the spaces at its ends."""
    return lambda self, doc: (self.system_prompt or "") + plain_prompt(doc)


@mends("metrics.utils", "extractive_match_utils", "lazy_indices_regex")
def _mend_letters(original: Any) -> Any:
    """`Answer: B`, a line break and a reason: the reason's letter counts. The lighteval of the release
    ends a letter at any white space and after a bracket, 0.13 at a space alone."""

    def lazy_indices_regex(config: Any, choices: int, language: Any) -> list[Any]:
        return [
            (
                re.compile(
                    regex.pattern.replace("\\ ", r"\s").replace(
                        r"(?:\*\*)?(?:[", r"\)?(?:\*\*)?(?:["
                    )
                ),
                rank,
            )
            for regex, rank in original(config, choices, language)
        ]

    return lazy_indices_regex


def plain_prompt(doc: Any) -> str:
    """Instruction, worked examples and question, put together as by the lighteval of the release."""
    shots = [_without_instruction(shot) + shot.get_golds()[0] for shot in doc.fewshot_samples]
    return (doc.instruction or "") + "\n\n".join([*shots, _without_instruction(doc)])


def _without_instruction(doc: Any) -> str:
    return str(doc.query.removeprefix(doc.instruction or ""))


def _keep_datasets_apart() -> None:
    """Another EVAL_DATA gives the rows of the first: datasets 5.2 separates local folders of one
    name by neither path nor content. So the cache's folder is named by the data's digest."""
    import datasets

    if root := os.environ.get("EVAL_DATA"):
        name = files_digest(f for f in Path(root).glob("*/*") if f.is_file())
        datasets.config.HF_DATASETS_CACHE = Path(root) / ".cache" / name


@mends("tasks.lighteval_task", "LightevalTask", "__init__")
def _mend_stop_sequences(original: Any) -> Any:
    """TypeError, list + tuple: a task without `stop_sequence` gets an empty tuple."""

    def init(self: Any, config: Any) -> None:
        original(self, config)
        self.stop_sequence = list(config.stop_sequence or ())

    return init


@mends("metrics.metrics_corpus", "CorpusLevelTranslationMetric", "compute_corpus")
def _mend_corpus_references(original: Any) -> Any:
    """chrF, chrF++ and TER of a corpus are those of its first item only: sacrebleu gets one list of
    references per item, but needs one list per reference (BLEU's are transposed)."""

    def compute_corpus(self: Any, items: list[Any]) -> float:
        if self.metric_type == "bleu":
            score: float = original(self, items)
            return score
        answers = [item.preds[0] if isinstance(item.preds, list) else item.preds for item in items]
        references = [[item.golds[0] for item in items]]
        return float(self.get_metric().corpus_score(answers, references).score)

    return compute_corpus


def weights_digest(folder: Path) -> str:
    """Digest of all that a transformers folder's scores depend on, by content: copying tools keep
    times and sizes."""
    patterns = ("*.safetensors", "*.bin", "*.gguf", "*.json", "*.jinja", "tokenizer*")
    return files_digest({file for pattern in patterns for file in folder.glob(pattern)})


def files_digest(files: Iterable[Path]) -> str:
    """Digest of the files' names and contents."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(files):
        with file.open("rb") as opened:
            digest.update(file.name.encode())
            digest.update(hashlib.file_digest(opened, "blake2b").digest())
    return digest.hexdigest()
