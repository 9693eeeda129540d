"""What the hub refuses of a model card's metadata, as its documentation has it."""

import re

import yaml

LICENCES = ("apache-2.0", "mit", "odc-by", "other")


def card_problems(text: str) -> list[str]:
    """Not all of it."""
    head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    values = yaml.safe_load(head[1]) if head else {}
    problems = [] if values.get("license") in LICENCES else ['"license" must be one of the list']
    kinds = {"language": list, "tags": list, "datasets": list, "pipeline_tag": str}
    for name, kind in kinds.items():
        if not isinstance(values.get(name, kind()), kind):
            problems.append(f'"{name}" must be of another type')
    for result in (one for model in values.get("model-index", []) for one in model["results"]):
        told = [result["task"]["type"], *(result["dataset"][key] for key in ("type", "name"))]
        told += [one[key] for one in result["metrics"] for key in ("type", "value")]
        if not all(isinstance(one, str | int | float) for one in told):
            problems.append('"model-index" has a result without a value')
    return problems
