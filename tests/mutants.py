"""Makes mistakes in recipe files: what each typed value may not be, and what it may be as well.

A mutant is one changed file. What becomes of it is known from the type of the value that was
changed: `refused` must be one line that names file, key and value; `harmless` must pass; `valid`
suits the type of its key and may still not fit the other keys: it passes, or is refused by name.
"""

import dataclasses
import functools
import random
import types
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import yaml
from conftest import ROOT

from launch.recipe.evaluation import (
    EvalRecipe,
    LongContextSuite,
    Peer,
    Published,
    RulerSuite,
    Suite,
)  # fmt: skip
from launch.recipe.load import _Loader
from launch.recipe.merging import MergeRecipe, ReleaseRecipe
from launch.recipe.posttrain import DpoRecipe, SftRecipe
from launch.recipe.pretrain import Nanotron, PretrainRecipe
from launch.recipe.scale_file import ScaleFile
from launch.recipe.tables import (
    AblationRow,
    SourceRow,
    SplitsFile,
    StageRow,
    StandInRow,
    SyntheticRow,
)
from launch.recipe.values import Overlay, section

RECIPES = ROOT / "recipes"
Key = str | int


def _table(name: str, row: type) -> type:
    """The type of a file of rows."""
    return section(type("Table", (), {"__annotations__": {name: dict[str, row]}}))  # type: ignore[valid-type]


KINDS: dict[str, type] = {
    "pipeline.yaml": _table("stages", StageRow),
    "sources.yaml": _table("sources", SourceRow),
    "standins.yaml": _table("standins", StandInRow),
    "ablations.yaml": _table("ablations", AblationRow),
    "posttrain/splits.yaml": SplitsFile,
    "posttrain/synthetic.yaml": _table("synthetic", SyntheticRow),
    "posttrain/apo.yaml": DpoRecipe,
    "merge/release.yaml": ReleaseRecipe,
    "eval/eval.yaml": EvalRecipe,
    "eval/longctx.yaml": LongContextSuite,
    "eval/ruler.yaml": RulerSuite,
    "eval/published.yaml": Published,
    "eval/peers.yaml": _table("peers", Peer),
}
OF_FOLDERS: dict[str, type] = {
    "scales": ScaleFile, "pretrain": PretrainRecipe, "longctx": PretrainRecipe,
    "posttrain": SftRecipe, "merge": MergeRecipe, "eval": Suite,
}  # fmt: skip
# What an overlay is laid over, by the end of its path.
OVERLAYS: dict[tuple[Key, ...], type] = {
    ("nanotron",): Nanotron, ("on_nanotron_0_4",): Nanotron, ("evaluation",): EvalRecipe,
    ("every_stage",): SftRecipe, ("stages", "midtrain"): SftRecipe, ("stages", "sft"): SftRecipe,
    ("stages", "apo"): DpoRecipe, ("standin",): ScaleFile,
}  # fmt: skip
# Fields that name something else of recipes/ or of the engines: another word names nothing.
NAMES = {
    "StageRow": {"engine", "recipe", "takes", "mixture_of"},
    "SourceRow": {"same_as", "stand_in", "replaced_by", "clean"},
    "StandInRow": {"reader"},
    "SplitRow": {"stand_in"},
    "SyntheticRow": {"prompts"},
    "AblationRow": {"of"},
    "SuiteRow": {"tasks", "metric", "published"},
    "Suite": {"published"},
    "EvalRun": {"model", "suite"},
    "EvalRecipe": {"leave_out", "stage"},
    "MergedModel": {"model"},
    "MergeRecipe": {"stage"},
    "ReleaseRecipe": {"model", "stage"},
    "ReleaseGeneration": {"eos_token"},
    "Template": {"file"},
    "SftTrl": {"eos_token"},
    "SftRecipe": {"stage"},
    "DpoRecipe": {"stage"},
    "PretrainRecipe": {"stage"},
    "ScaleFile": {"scale"},
}
Fate = Literal["refused", "harmless", "valid"]


@dataclass(frozen=True)
class Mutant:
    file: str  # below recipes/
    what: str  # the mistake, in words
    key: str  # dotted, as a message must name it; empty where no key can be named
    write: Callable[[], str]  # the text of the whole file
    fate: Fate
    value: object = ...  # as a message must show it, ... for none

    def __str__(self) -> str:
        return f"{self.file}: {self.key}: {self.what}"


@dataclass(frozen=True)
class Place:
    """A value of a file, its type, and the section and field that it is of."""

    path: tuple[Key, ...]
    annotated: Any
    value: Any
    owner: str = ""
    field: str = ""

    @property
    def kind(self) -> Any:
        """The type without its bounds."""
        return plain(self.annotated)[0]

    @property
    def is_name(self) -> bool:
        return self.field in NAMES.get(self.owner, ())


@functools.cache
def read(file: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.load((RECIPES / file).read_text("utf-8"), _Loader)
    return values


def dump(values: object) -> str:
    return yaml.dump(values, Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=True)


def kind_of(file: str) -> type:
    return KINDS.get(file) or OF_FOLDERS[Path(file).parent.name]


def files() -> list[str]:
    return sorted(str(file.relative_to(RECIPES)) for file in RECIPES.rglob("*.yaml"))


# ---- the scales at which a file is read


def scales_of(file: str) -> list[tuple[str, str]]:
    """(SCALE=, ORIGIN=) of every scale that reads a scale file, the farthest from it first.

    Any other file is read by all: at the published scale, at tiny, and at the smallest size that is
    laid out on the GPUs at hand where that, or its share of the text, may differ.
    """
    if not file.startswith("scales/"):
        fitted = file.startswith(("pretrain/", "longctx/", "posttrain/", "sources", "standins"))
        return [("full", ""), ("tiny", ""), *[("60m", "")] * fitted]
    found = [name for name in map(_stem, files()) if name and file in _extended(name)]
    found.sort(key=lambda name: -_extended(name).index(file))
    return [(name, origin) for name in found for origin in _origins(name)]


def _stem(file: str) -> str:
    return Path(file).stem if file.startswith("scales/") else ""


def _extended(name: str) -> list[str]:
    """A scale's file and those that it extends."""
    file = f"scales/{name}.yaml"
    parent = read(file).get("extends")
    return [file, *(_extended(Path(parent).stem) if parent else [])]


def _origins(name: str) -> tuple[str, ...]:
    """What ORIGIN= may be for a scale; empty: its own."""
    if any("standin" in read(file) for file in _extended(name)):
        return ("", "standin")
    return ("", "hub") if read(f"scales/{name}.yaml")["origin"] == "standin" else ("",)


# ---- the values of a file with their types


@functools.cache
def places(file: str) -> list[Place]:
    """Every value of a file, the whole of it first."""
    return list(_walk(Place((), kind_of(file), read(file))))


def _walk(place: Place) -> Iterator[Place]:
    if plain(place.annotated)[0] == Overlay:
        place = dataclasses.replace(place, annotated=_laid_over(place))
    yield place
    kind, value, path = place.kind, place.value, place.path
    if isinstance(value, Mapping) and is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        for key, below in value.items():
            if key in hints:  # `extends` is none
                yield from _walk(Place((*path, key), hints[key], below, kind.__name__, key))
    elif isinstance(value, Mapping) and get_origin(kind) is dict:
        for key, below in value.items():
            item = get_args(kind)[1]
            yield from _walk(Place((*path, key), item, below, place.owner, place.field))
    elif isinstance(value, list):
        for number, below in enumerate(value):
            item = get_args(_of_union(kind, tuple))[0]
            yield from _walk(Place((*path, number), item, below, place.owner, place.field))


def _laid_over(place: Place) -> Any:
    if place.field == "variants":
        return Nanotron
    return next(over for end, over in OVERLAYS.items() if place.path[-len(end) :] == end)


def plain(kind: Any) -> tuple[Any, bool]:
    """A type without its bounds, and whether it may be empty."""
    if get_origin(kind) is Annotated:
        return plain(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        kinds = [one for one in get_args(kind) if one is not type(None)]
        may_be_empty = len(kinds) < len(get_args(kind))
        if len(kinds) == 1:
            return plain(kinds[0])[0], may_be_empty
        return kind, may_be_empty
    return kind, False


def _of_union(kind: Any, wanted: type) -> Any:
    """The member of a union whose values are of this type."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(plain(one)[0] for one in get_args(kind) if get_origin(plain(one)[0]) is wanted)
    return kind


def bounds(kind: Any) -> dict[str, float | str]:
    """ge, gt, le, lt, min_length and pattern of an annotated type."""
    if get_origin(kind) in (Union, types.UnionType):
        return bounds(next(one for one in get_args(kind) if one is not type(None)))
    found: dict[str, float | str] = {}
    if get_origin(kind) is not Annotated:
        return found
    for note in get_args(kind)[1:]:
        for one in getattr(note, "metadata", [note]):
            for name in ("ge", "gt", "le", "lt", "min_length", "pattern"):
                if getattr(one, name, None) is not None:
                    found[name] = getattr(one, name)
    return found


# ---- what a value may not be


def bad_values(annotated: Any) -> Iterator[tuple[str, object]]:
    """(the mistake, a value that the type forbids)."""
    kind, may_be_empty = plain(annotated)
    limits = bounds(annotated)
    if not may_be_empty and kind is not type(None):
        yield "empty", None
    if kind is int:
        yield from {"text": "lots", "fraction": 1.5, "list": [1], "flag": True}.items()
        yield from _outside(limits, 1)
    elif kind is float:
        yield from {"text": "lots", "list": [1.0], "flag": True, "mapping": {"a": 1}}.items()
        yield from {"nan": float("nan"), "infinity": float("inf")}.items()
        yield from _outside(limits, 0.5)
    elif kind is bool or "StrictBool" in str(annotated):
        yield from {"text": "perhaps", "number": 2, "list": [True]}.items()
    elif get_origin(kind) is Literal:
        choices = get_args(kind)
        yield "another type", [1]
        yield "misspelt", misspelt(choices[0]) if isinstance(choices[0], str) else 17
        if isinstance(choices[0], bool):
            yield "the other", not choices[0]
    elif kind is str:
        yield from {"number": 7, "list": ["a"], "flag": True}.items()
        if limits.get("min_length"):
            yield "no text", ""
        if limits.get("pattern"):
            yield "strange text", "a/b c"
    elif get_origin(kind) is tuple:
        yield from {"text": "word", "number": 3, "mapping": {"a": 1}}.items()
        if limits.get("min_length"):
            yield "nothing", []
    elif get_origin(kind) is dict or is_dataclass(kind):
        yield from {"text": "word", "number": 3, "list": [1]}.items()


def _outside(limits: Mapping[str, Any], step: float) -> Iterator[tuple[str, object]]:
    kind = type(step)
    if "ge" in limits:
        yield "below the least", kind(limits["ge"]) - step
        yield "far below", kind(limits["ge"]) - 1000 * step
    if "gt" in limits:
        yield "the bound", kind(limits["gt"])
        yield "negative", -kind(1)
    if "le" in limits:
        yield "above the most", kind(limits["le"]) + step
        yield "huge", kind(10**30)
    if "lt" in limits:
        yield "the upper bound", kind(limits["lt"])
        yield "huge", kind(10**30)


def good_values(place: Place) -> Iterator[tuple[str, Fate, object]]:
    """(the change, what becomes of it, a value that the type allows as well)."""
    kind, value, limits = place.kind, place.value, bounds(place.annotated)
    if isinstance(value, bool):
        yield "the other", "valid", not value
    elif kind is int and value is not None:
        fate: Fate = "harmless" if "seed" in str(place.path[-1]) else "valid"
        yield "one more", fate, value + 1
        if fate == "valid":
            yield "twice", "valid", value * 2
            if limits.get("ge", 1) <= 1 <= value:
                yield "one", "valid", 1
    elif kind is float and value is not None:
        # A mixture's weight is one of many; other numbers may have neighbours to fit.
        fate = "harmless" if place.field in ("mixture", "shared_by", "share") else "valid"
        most = limits.get("le", limits.get("lt", float("inf")))
        yield "a little more", fate, value * 1.01 if value * 1.01 < most else value * 0.99
        yield "next to nothing", "valid", 1e-300
    elif get_origin(kind) is Literal:
        for choice in get_args(kind):
            if choice != value:
                yield f"{choice}", "valid", choice
    elif kind is str and isinstance(value, str) and not place.is_name and "pattern" not in limits:
        yield "other words", "valid", f"{value} indeed"
    elif isinstance(value, list) and value:
        yield "one less", "valid", value[:-1]
        yield "one twice", "valid", [*value, value[0]]
    if plain(place.annotated)[1] and value is not None:
        yield "left open", "valid", None


def misspelt(word: str) -> str:
    """The word without a letter of its middle, or with two more."""
    middle = len(word) // 2
    shorter = word[:middle] + word[middle + 1 :]
    return shorter if len(word) > 3 else f"{word}xx"


# ---- mutants of one file


def mutants_of(file: str) -> Iterator[Mutant]:
    for place in places(file):
        if place.path:
            yield from _of_value(file, place)
        if isinstance(place.value, dict) and is_dataclass(place.kind):
            yield from _of_keys(file, place)
    yield from _of_text(file)


def _of_value(file: str, place: Place) -> Iterator[Mutant]:
    if isinstance(place.value, Mapping) and "same_as" in place.value and place.kind is int:
        return  # an ablation's `{same_as: <key>}`
    for what, value in bad_values(place.annotated):
        yield with_value(file, place.path, what, value, "refused")
    for what, fate, value in good_values(place):
        yield with_value(file, place.path, what, value, fate)
    if place.is_name and isinstance(place.value, str) and place.value:
        yield with_value(file, place.path, "no such name", misspelt(place.value), "refused")


def with_value(file: str, path: tuple[Key, ...], what: str, value: object, fate: Fate) -> Mutant:
    def change(section: Any) -> None:
        section[path[-1]] = value

    shown = value if isinstance(value, str | int | float) and value != "" else ...
    write = _changed(file, path[:-1], change)
    return Mutant(file, f"{what} ({value!r:.40})", dotted(path), write, fate, shown)


def _changed(
    file: str, path: tuple[Key, ...], change: Callable[[Any], object]
) -> Callable[[], str]:
    """Writes the file with a change of the section at `path`."""

    def write() -> str:
        values = deepcopy(read(file))
        change(functools.reduce(lambda section, key: section[key], path, cast(Any, values)))
        return dump(values)

    return write


def dotted(path: tuple[Key, ...]) -> str:
    return ".".join(map(str, path))


def _of_keys(file: str, place: Place) -> Iterator[Mutant]:
    def mutant(what: str, name: str, fate: Fate, change: Callable[[Any], object]) -> Mutant:
        key = dotted((*place.path, name)) if name else ""
        return Mutant(file, what, key, _changed(file, place.path, change), fate)

    required = {
        one.name
        for one in fields(place.kind)
        if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
    }
    yield mutant("unknown key", "nonsense", "refused", lambda section: section.update(nonsense=1))
    for name in place.value:
        other = misspelt(name)
        if other not in place.value and name != "extends":
            yield mutant("misspelt key", other, "refused", partial(_rename, name, other))
        has_default = (name, file.split("/")[0]) == ("scale", "scales")  # the file's name
        if name in required and not has_default and _is_whole(file, place):
            yield mutant("missing", name, "refused", partial(_drop, name))
    yield mutant("keys in another order", "", "harmless", _reverse)


def _rename(name: str, other: str, section: dict[str, Any]) -> None:
    items = [(other if key == name else key, value) for key, value in section.items()]
    section.clear()
    section.update(items)


def _drop(name: str, section: dict[str, Any]) -> None:
    del section[name]


def _reverse(section: dict[str, Any]) -> None:
    items = list(section.items())
    section.clear()
    section.update(reversed(items))


def _is_whole(file: str, place: Place) -> bool:
    """Whether nothing below, such as a parent or a recipe, says what the section leaves out."""
    if "extends" in read(file) or "on_nanotron_0_4" in place.path:
        return False
    inside = (
        ("nanotron", "posttrain", "evaluation", "standin") if file.startswith("scales/") else ()
    )
    return not place.path or (place.path[0] not in inside and "variants" not in place.path)


def _of_text(file: str) -> Iterator[Mutant]:
    text = (RECIPES / file).read_text("utf-8")
    first = next(iter(read(file)))
    texts: dict[str, tuple[str, Fate]] = {
        "a comment": (f"# a comment\n{text}# and another\n", "harmless"),
        "an open bracket": (f"{text}\nzz: [1, 2\n", "refused"),
        "a tab": (f"{text}\nzz:\n\t- 1\n", "refused"),
        "a list": ("- 1\n- 2\n", "refused"),
        "nothing": ("", "refused"),
        "a key twice": (f"{text}\n{first}: 1\n", "refused"),
    }
    for what, (changed, fate) in texts.items():
        yield Mutant(file, what, "", partial(str, changed), fate)


def drawn(file: str, seed: int, count: int) -> list[Mutant]:
    """`count` mutants of a file, spread over the kinds of mistakes."""
    generator = random.Random(f"{seed} {file}")
    by_kind: dict[str, list[Mutant]] = {}
    for mutant in mutants_of(file):
        by_kind.setdefault(f"{mutant.fate} {mutant.what.split(' (')[0]}", []).append(mutant)
    kinds, chosen = sorted(by_kind), []
    generator.shuffle(kinds)
    for number in range(count):
        if group := by_kind[kinds[number % len(kinds)]]:
            chosen.append(group.pop(generator.randrange(len(group))))
    return chosen
