"""The release's README.md: every figure in it is read from the manifests of the stages.

Its head is the hub's metadata (huggingface_hub.ModelCardData). When the release is published, it gets
the scores of the eval stage too, which has scored it since: as metadata that the hub reads, and as a table.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from launch.report.results import Row, StageResult, collect, summary_rows
from launch.report.terminal import needles_by_length, told_apart
from launch.run.folder import StageRun

# Model card of the release: six natively supported, three more that the mixtures hold.
LANGUAGES = ("en", "fr", "es", "it", "pt", "de", "zh", "ar", "ru")
ORIGINS = {
    "hub": "the published data sets that recipes/sources.yaml pins",
    "standin": "stand-ins of the published data sets, read out of packages: the recipe was run, "
    "its data were not, and the scores say nothing of the recipe's worth",
    "own": "text of its maker's own, at the recipe's settings; post-training as the recipe's scale has it",
}

SCORED = ("before", "after")

HEADER = """---
{metadata}
---

# {name}

{parameters:,} parameters, {dtype}, windows of {window:,} tokens, {yarn_window:,} with YaRN. Made by the
SmolLM3 recipe at {scale} (commit {commit}) from {origin}.
"""

USE = """
## Use it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{folder}"  # "{folder}/yarn" reads {yarn_window:,} tokens
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
messages = [{{"role": "user", "content": "Hi"}}]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, enable_thinking=False, return_tensors="pt", return_dict=True,
    sanitize_control_tokens=True,
)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=256)[0]))
```

`enable_thinking` chooses the mode, true where it is not given; `/think` or `/no_think` in the system
message beats it, and `/system_override` there takes the metadata and the tools away. Tools are given
as `xml_tools` (JSON schemas) or `python_tools` (signatures). generation_config.json samples at
temperature {temperature:g} and top_p {top_p:g} and stops at `{eos_token}`.

A template cannot tell its own `{eos_token}` from one that a message spells, and that would end the message's turn.
`sanitize_control_tokens=True` (transformers 5.23) makes it text; where a server renders the template and tokenises
the result, take special tokens out of messages and tool results first.
"""


def model_card(run: StageRun, origin: str, config: Row, yarn: Row, parameters: int) -> str:
    """The card as Markdown; `config` and `yarn` are the two config.json of the release."""
    stages = collect(run)
    generation = asdict(run.recipe.recipe.generation)
    values = {
        "metadata": metadata(run),
        "name": run.recipe.recipe.model_name,
        "parameters": parameters,
        "dtype": config["dtype"],
        "window": config["max_position_embeddings"],
        "yarn_window": yarn["max_position_embeddings"],
        "scale": run.arguments,
        "commit": (run.manifest() or {}).get("git_commit") or "unknown",
        "origin": ORIGINS[origin],
        "folder": run.folder.name,
        **generation,
    }
    parts = [HEADER.format(**values), USE.format(**values), _stages(stages)]
    parts += [_scores(stages), _merges(stages), _needles(stages)]
    return "".join(part for part in parts if part)


def metadata(run: StageRun) -> str:
    """The card's head, YAML: what is known of a release before it is scored."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        language=list(LANGUAGES), license="apache-2.0", library_name="transformers",
        pipeline_tag="text-generation", tags=["smollm3", "conversational", "nanotron", "trl"],
        datasets=sorted({*_data_sets(run)}) or None,
    )  # fmt: skip
    return str(data.to_yaml())


def _data_sets(run: StageRun) -> Iterator[str]:
    """What a run was trained on, of the hub; stand-ins and text of one's own have no name there."""
    for stage in run.inputs.values():
        yield from _data_sets(stage)
    if run.kind in ("data", "chats"):
        yield from _hub_ids(run.recipe_values())


def _hub_ids(values: Any) -> Iterator[str]:
    if isinstance(values, Mapping):
        if found := values.get("hub_id"):
            yield found
        for value in values.values():
            yield from _hub_ids(value)


def published_card(
    text: str, repository: str, scores: Sequence[Row], gguf: Sequence[str] = ()
) -> str:
    """The card of a release as `<owner>/<name>` of the hub: the owner's text, and what was added since.

    `scores` are rows of the eval stage, with `data_set`, the hub's name of what they were scored on.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    card = ModelCard(text)
    results = [
        EvalResult(
            task_type="text-generation", task_name=f"suite {row['suite']}",
            dataset_type=row["data_set"], dataset_name=f"{row['name']}, {row['items']:,} items",
            metric_type=row["metric"], metric_value=round(row["value"], 4),
            metric_args={"low": round(row["low"], 4), "high": round(row["high"], 4)},
        )
        for row in scores
    ]  # fmt: skip
    if results:
        name = repository.partition("/")[2]
        card.data = ModelCardData(
            **{**card.data.to_dict(), "model_name": name, "eval_results": results}
        )
    own = f'"{repository}"  # with subfolder="yarn" it reads'
    body = card.text.replace('"release"  # "release/yarn" reads', own)
    for title, section in (("Scores", _evaluation(scores)), ("GGUF", _gguf(repository, gguf))):
        if section and f"\n## {title}\n" not in body:
            body += f"\n## {title}\n\n{section}"
    card.text = body
    return str(card)


def _evaluation(scores: Sequence[Row]) -> str:
    names = told_apart([(row["model"], row["name"], row["suite"]) for row in scores])
    rows = [
        [
            name,
            f"{row['value']:.1%}",
            f"{row['low']:.1%} to {row['high']:.1%}",
            f"{row['items']:,}",
            f"{row['chance']:.0%}" if row["chance"] is not None else "",
        ]
        for name, row in zip(names, scores, strict=True)
    ]
    columns = ["benchmark", "score", "95 % interval", "items", "chance"]
    return table(columns, rows) if rows else ""


def _gguf(repository: str, files: Sequence[str]) -> str:
    lines = [f"- `{name}`\n" for name in files]
    use = (
        f"\n```sh\nllama-server --hf-repo {repository} --hf-file {files[0]} --jinja\n```\n"
        if files
        else ""
    )
    return "".join(lines) + use


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _stages(stages: list[StageResult]) -> str:
    rows = [
        [
            row["stage"],
            f"{row['tokens']:,}" if row["tokens"] else "",
            f"{row['loss']:.3f}" if row["loss"] is not None else "",
            f"{row['bits_per_byte']:.3f}" if row["bits_per_byte"] else "",
        ]
        for row in summary_rows(stages)
        if row["loss"] is not None or row["bits_per_byte"]
    ]
    columns = ["stage", "tokens so far", "last loss", "bits per byte, held out"]
    return f"\n## How it was made\n\n{table(columns, rows)}" if rows else ""


def _scores(stages: list[StageResult]) -> str:
    """Scores of post-training, before and after each stage that has them."""
    found = [
        (stage.name, stage.manifest["scores"]) for stage in stages if "scores" in stage.manifest
    ]
    names = dict.fromkeys(
        name for _, scores in found for name in (*scores["before"], *scores["after"])
    )
    columns = [
        (f"{when} {stage}", scores[when])
        for stage, scores in found
        for when in SCORED
        if scores[when]
    ]
    rows = [
        [name.replace("_", " "), *(f"{of[name]:.3g}" if name in of else "" for _, of in columns)]
        for name in names
    ]
    text = "\n## Post-training\n\nGreedy answers to held-out prompts, scored by rule.\n\n"
    return text + table(["score", *(title for title, _ in columns)], rows) if rows else ""


def _merges(stages: list[StageResult]) -> str:
    rows = [
        [stage.name, str(row["model"]), f"{row['weight']:g}"]
        for stage in stages
        for row in stage.manifest.get("merged", ())
    ]
    text = "\n## Merged from\n\nWeights are divided by their sum, in float32.\n\n"
    return text + table(["stage", "model", "weight"], rows) if rows else ""


def _needles(stages: list[StageResult]) -> str:
    found: list[tuple[str, Any]] = [
        (stage.name, stage.manifest["needle"]) for stage in stages if stage.manifest.get("needle")
    ]
    lines = [f"- `{name}`: {needles_by_length(rows)}\n" for name, rows in found]
    text = "\n## Long context\n\nNumbers hidden in held-out text, before post-training:\n\n"
    return text + "".join(lines) if lines else ""
