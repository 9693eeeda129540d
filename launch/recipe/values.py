"""What a single value of a recipe may be: its type, its range, its choices."""

import dataclasses
from typing import Annotated, Literal, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, StrictBool

Cls = TypeVar("Cls")

MOST = 10**12  # of anything that is counted: more is a typing error
# Exactly these types: to Python true is an int, and YAML's "1" is text.
Flag = StrictBool
Whole = Annotated[int, Field(strict=True, ge=-MOST, le=MOST)]
Count = Annotated[int, Field(strict=True, ge=1, le=MOST)]  # at least 1
Natural = Annotated[int, Field(strict=True, ge=0, le=MOST)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32)]  # numpy takes 32 bits
Window = Annotated[int, Field(strict=True, ge=16, le=MOST)]  # tokens; shorter hold no sentence
Positive = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=MOST)]
NotNegative = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=MOST)]
Share = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=1)]
PositiveShare = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=1)]
Rate = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, lt=1)]  # of learning
Decay = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, lt=1)]  # of a moment
Text = Annotated[str, Field(min_length=1)]
# A name that becomes a folder; no separator, not hidden.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
Dtype = Literal["float32", "bfloat16"]

_Item = TypeVar("_Item")
# A YAML list, frozen.
Many = Annotated[tuple[_Item, ...], Field(strict=False)]
OneOrMore = Annotated[tuple[_Item, ...], Field(strict=False, min_length=1)]
# Keys and values with the types of the section that they are laid over.
Overlay = dict[str, object]


@dataclass_transform(
    frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,)
)
def section(cls: type[Cls]) -> type[Cls]:
    """A frozen dataclass that pydantic fills from a mapping and that refuses unknown keys."""
    cls.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


class Refused(ValueError):
    """Raised by a section's `__post_init__`: a dotted key of it, its value and the remedy."""

    def __init__(self, key: str, value: object, remedy: str):
        super().__init__(f"{key}: {value}: {remedy}")
        self.key, self.value, self.remedy = key, value, remedy
