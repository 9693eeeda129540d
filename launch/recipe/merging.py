"""The keys of a recipe that merges models, or releases one."""

from typing import Literal

from launch.recipe.values import (
    Name,
    NotNegative,
    OneOrMore,
    Positive,
    PositiveShare,
    Refused,
    Text,
    section,
)


@section
class MergeParameters:
    weight: NotNegative


@section
class MergedModel:
    model: Text  # <stage>/<folder in its run folder>; checkpoints/-1 is its last
    parameters: MergeParameters


@section
class MergeRecipe:
    """A recipe that merges: mergekit's keys for a linear merge, and `stage`."""

    stage: Name
    merge_method: Literal["linear"]
    dtype: Literal["float32"]  # in bfloat16 mergekit mis-rounds a fifth of the elements
    out_dtype: Literal["bfloat16", "float16", "float32"]
    models: OneOrMore[MergedModel]

    def __post_init__(self) -> None:
        if len(self.models) < 2:
            raise Refused("models", f"{len(self.models)} listed", "a merge takes two or more")
        if not sum(row.parameters.weight for row in self.models):
            raise Refused("models.0.parameters.weight", 0, "every weight is 0; one must be above")


@section
class ReleaseGeneration:
    """Sampling defaults in generation_config.json."""

    temperature: Positive
    top_p: PositiveShare
    eos_token: Text


@section
class ReleaseRecipe:
    stage: Name
    model: Text  # <stage>/<folder in its run folder>
    model_name: Text
    generation: ReleaseGeneration
    yarn_factor: Positive

    def __post_init__(self) -> None:
        if self.yarn_factor < 1:
            raise Refused("yarn_factor", self.yarn_factor, "write at least 1")
