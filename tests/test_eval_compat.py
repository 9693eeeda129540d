"""Each mend of lighteval 0.13: the library's own way fails, ours does not. Red once upstream mends it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from small_models import save_model

# In a process of its own: lighteval changes global state when it is imported.
SCRIPT = """
import json, sys
from eval_tasks import compat
compat.before_import()
from eval_tasks.smollm3 import TASKS_TABLE
import torch
from lighteval.models.model_input import GenerationParameters
from lighteval.tasks.lighteval_task import LightevalTask
from lighteval.utils import imports

found = {"autograd": torch.is_grad_enabled()}
config = next(task for task in TASKS_TABLE if task.name == "piqa_cf")
ours, theirs = LightevalTask(config), LightevalTask.__new__(LightevalTask)
LightevalTask.__init__.__wrapped__(theirs, config)
found["stop"] = [type(theirs.stop_sequence).__name__, type(ours.stop_sequence).__name__]
sampled = GenerationParameters(temperature=0.6)
own = GenerationParameters.to_transformers_dict
found["sample"] = [own.__wrapped__(sampled).get("do_sample", False), own(sampled)["do_sample"]]
found["nanotron"] = [imports.is_package_available.__wrapped__("nanotron"), imports.is_package_available("nanotron")]
digests = [compat.weights_digest(__import__("pathlib").Path(folder)) for folder in sys.argv[1:]]
found["digests"] = digests

from lighteval.metrics.metrics_corpus import CorpusLevelTranslationMetric
from lighteval.metrics.sample_preparator import GenerativeCorpusMetricInput

answers = ["the cat sat", "wrong from the first word", "another"]
texts = ["the cat sat", "this is a house", "another"]
pairs = [GenerativeCorpusMetricInput(golds=[b], preds=[a]) for a, b in zip(answers, texts)]
chrf = CorpusLevelTranslationMetric("chrf++")
found["chrf"] = [CorpusLevelTranslationMetric.compute_corpus.__wrapped__(chrf, pairs), chrf.compute_corpus(pairs)]
direct = __import__("sacrebleu").CHRF(word_order=2).corpus_score(answers, [texts]).score
found["chrf"].append(direct)

from lighteval.tasks.requests import Doc
from eval_tasks.job import Job
from eval_tasks.backends import load as _load

job = Job(models=[], rows=[], results=sys.argv[1] + "/x.json", generation={"max_new_tokens": 8})
model, seen = _load(sys.argv[1], job), []
model._generate = lambda batch, max_new_tokens, **_: seen.append(
    [batch.input_ids.shape[1], max_new_tokens]
) or ["answer"]
doc = Doc(query="/no_think " + "one two three " * 20, choices=[""], gold_index=0, generation_size=64)
doc.stop_sequences = []
prompt = len(model.tok_encode(model.prompt_manager.prepare_prompt(doc)))
mended = type(model)._padded_greedy_until
mended.__wrapped__(model, [doc])
mended(model, [doc])
found["generation"] = {"prompt": prompt, "theirs": seen[0], "ours": seen[1]}
from lighteval.models.abstract_model import LightevalModel
from lighteval.tasks.prompt_manager import PromptManager

def ends(ids):
    return list(ids).count(model.tokenizer.convert_tokens_to_ids("<|im_end|>"))

found["forged"], manager = {}, model.prompt_manager
for manager.use_chat_template in (True, False):
    for text in ("a < b", "<|im_end|> and <b>"):
        asked, row = Doc(query=text, choices=[text], gold_index=0), []
        for prepare, encode in (
            (PromptManager.prepare_prompt, LightevalModel.tok_encode_pair),
            (PromptManager.prepare_prompt.__wrapped__, LightevalModel.tok_encode_pair.__wrapped__),
        ):
            prompt = prepare(manager, asked)
            if not manager.use_chat_template or prepare is PromptManager.prepare_prompt:
                contexts, choices = encode(model, prompt, [text], pairwise=True)
                row += [ends(contexts[0]), ends(choices[0])]
                assert text in model.tokenizer.decode(contexts[0])
                assert model.tokenizer.decode(choices[0]).strip() == text
        found["forged"][f"{manager.use_chat_template} {text}"] = row
found["unmarked"] = "a < b" in manager.prepare_prompt(Doc(query="a < b", choices=[""], gold_index=0))
from dataclasses import replace
from eval_tasks.task_table import read_tasks
from eval_tasks.tasks import lighteval_task

found["refused"] = []
for change in ({"form": "clozze"}, {"metrics": ["acc_nrom"]}, {"keep": "agnostic"}):
    try:
        lighteval_task(replace(read_tasks()["piqa_cf"], **change))
    except ValueError as error:
        found["refused"].append(str(error).rpartition("datasets.yaml: ")[2])
from lighteval.metrics.utils import extractive_match_utils as letters
from lighteval.metrics.utils.extractive_match_utils import IndicesExtractionConfig
from lighteval.tasks.prompt_manager import PromptManager
from lighteval.utils.language import Language

plain, query = PromptManager._prepare_plain_text, PromptManager._extract_query
shot = Doc(query="q0", choices=["  a "], gold_index=0)
asked = Doc(query="q", choices=["a"], gold_index=0, instruction="", fewshot_samples=[shot])
found["plain"] = [make(PromptManager(), asked) for make in (plain.__wrapped__, plain)]
found["query"] = [make(PromptManager(), "i\\n\\nq", "i") for make in (query.__wrapped__, query)]
kind = IndicesExtractionConfig("Letters")
found["letter"] = [
    any(regex.search("Answer: B\\n\\nAs D is odd") for regex, _ in make(kind, 4, Language.ENGLISH))
    for make in (letters.lazy_indices_regex.__wrapped__, letters.lazy_indices_regex)
]
sys.path.insert(0, "tests")
import ask_tasks
found["asked"] = ask_tasks.prompts(TASKS_TABLE)
found["kept"] = [doc.generation_size, model.generation_config_dict["max_new_tokens"]]
print("RESULT" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("models")
    folders = [str(save_model(root / name, seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *folders], capture_output=True, text=True, check=False,
        cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    loaded: dict[str, Any] = json.loads(done.stdout.split("RESULT")[1])
    return loaded


def test_a_row_of_the_table_with_an_unknown_word_is_refused(found: dict[str, Any]) -> None:
    assert found["refused"] == [
        "tasks: piqa_cf: form: clozze: did you mean 'cloze'?",
        "tasks: piqa_cf: metrics: acc_nrom: did you mean 'acc_norm'?",
        "tasks: piqa_cf: keep: agnostic: known: culturally_agnostic",
    ]


def test_a_task_without_stop_sequences_gets_a_list(found: dict[str, Any]) -> None:
    assert found["stop"] == ["tuple", "list"]


def test_a_temperature_means_sampling(found: dict[str, Any]) -> None:
    assert found["sample"] == [False, True]


def test_a_limit_of_new_tokens_limits_the_answer_and_not_the_prompt(found: dict[str, Any]) -> None:
    assert found["generation"]["prompt"] > 64
    assert found["generation"]["theirs"] == [8, 64]
    assert found["generation"]["ours"] == [found["generation"]["prompt"], 8]
    assert found["kept"] == [64, 8]


def test_a_question_ends_no_turn(found: dict[str, Any]) -> None:
    """End tokens in the prompt and in the choice: in a chat; then plain, and as lighteval has it."""
    assert found["forged"] == {
        "True a < b": [2, 0],
        "True <|im_end|> and <b>": [2, 0],
        "False a < b": [0, 0, 0, 0],
        "False <|im_end|> and <b>": [0, 0, 1, 1],
    }
    assert found["unmarked"]


def test_a_corpus_score_counts_every_item(found: dict[str, Any]) -> None:
    theirs, ours, direct = found["chrf"]
    assert theirs == 100 and ours == direct < 60


def test_prompts_are_put_together_as_by_the_lighteval_of_the_release(found: dict[str, Any]) -> None:
    assert found["plain"] == ["\n\nq0 a\n\nq", "q0  a \n\nq"]
    assert found["query"] == ["q", "\n\nq"]


def test_a_letter_may_end_at_a_line_break(found: dict[str, Any]) -> None:
    assert found["letter"] == [False, True]


def test_every_prompt_is_the_released_one(found: dict[str, Any]) -> None:
    released = json.loads((ROOT / "tests/released_questions.json").read_text("utf-8"))["tasks"]
    assert set(released) - set(found["asked"]) == {"ifeval"}  # lighteval's own
    for name, task in found["asked"].items():
        for key in ("prompt", "choices", "gold"):
            wanted = [item[key] for item in released[name]["asked"]]
            assert [item[key] for item in task["asked"]] == wanted, (name, key)


def test_nanotron_is_not_offered_as_a_backend(found: dict[str, Any]) -> None:
    assert found["nanotron"] == [True, False]


def test_autograd_stays_on(found: dict[str, Any]) -> None:
    assert found["autograd"] is True


def test_the_digest_tells_weights_apart_and_copies_not(found: dict[str, Any]) -> None:
    same, again, other = found["digests"]
    assert same == again != other


def test_the_harmful_modules_are_still_there_to_be_kept_out() -> None:
    """Where upstream drops them, `HARMFUL_TASKS` can go."""
    from importlib.util import find_spec

    from eval_tasks.compat import HARMFUL_TASKS

    spec = find_spec("lighteval")
    assert spec and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0]) / "tasks" / "tasks"
    for name in HARMFUL_TASKS:
        path = root / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or path.is_dir()
