"""YAML to typed values, each file read once; a mistake is one line that names the file with it.

A recipe is a stack of layers: the files that it extends, the file itself, what a scale lays over it,
and the user's own file on top. The message for a bad key names the layer with the key.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from ground.errors import UserError, did_you_mean
from launch.recipe.values import Overlay, Refused

# Sections that an upper file replaces whole: half a mixture, or two minima of a rate, mean nothing.
WHOLE = ("mixture", "lr_scheduler_kwargs")
RECIPES = Path(__file__).parent.parent.parent / "recipes"
Typed = TypeVar("Typed")


class _Loader(yaml.CSafeLoader):
    """YAML 1.1 with the numbers of 1.2 (`2e-5` is one) and without repeated keys."""


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
# Without those of YAML 1.1, in which 040 is 32 and 1:30 is 90.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][\d_]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+0123456789."),
)  # fmt: skip


def _mapping(loader: yaml.CSafeLoader, node: yaml.MappingNode) -> dict[object, object]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    seen: set[object] = set()
    for (key_node, _), key in zip(node.value, keys, strict=True):
        if not isinstance(key, str | int | float | bool | None):
            raise yaml.MarkedYAMLError(problem="a key is text", problem_mark=key_node.start_mark)
        if key in seen and key != "<<":
            problem = f"key {key!r} stands twice"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return {
        loader.construct_object(key): loader.construct_object(value, deep=True)
        for key, value in node.value
    }


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


@cache
def read_yaml(file: Path) -> Mapping[str, object]:
    """The mapping in a file. Raises UserError for no file, broken YAML or a repeated key."""
    try:
        values = yaml.load(file.read_text("utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"{short(file)}: no such file") from None
    except OSError as error:
        raise UserError(f"{short(file)}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{short(file)}{where}: not valid YAML: {problem}") from None
    if not isinstance(values, dict):
        raise UserError(f"{short(file)}: expected a mapping of keys to values")
    if odd := [key for key in values if not isinstance(key, str)]:
        raise UserError(f"{short(file)}: {odd[0]}: unknown key; a key is text")
    return values


@dataclass(frozen=True)
class Layer:
    """Values and where they come from: a file, and the dotted key in it above them."""

    file: Path
    values: Mapping[str, object]
    where: str = ""

    def has(self, path: Sequence[object]) -> bool:
        """Whether the layer has a value at this key."""
        values: Any = self.values
        for part in path:
            is_item = isinstance(values, list) and isinstance(part, int) and part < len(values)
            if is_item or (isinstance(values, Mapping) and part in values):
                values = cast(Any, values)[part]
            else:
                return False
        return True

    def named(self, path: Sequence[object]) -> str:
        """`<file>: <key>`, the start of a message."""
        return f"{short(self.file)}: {_joined(self.where, *path)}"

    def below(self, key: str) -> "Layer":
        """The layer of one section."""
        values = self.values.get(key)
        where = f"{self.where}.{key}" if self.where else key
        return Layer(self.file, values if isinstance(values, Mapping) else {}, where)


def is_recipe_file(word: str) -> bool:
    """Whether a stage or a scale is named by a file, in place of a name."""
    return word.endswith((".yaml", ".yml"))


def chain(file: Path, children: tuple[Path, ...] = ()) -> list[Layer]:
    """A recipe file and those that it extends, the file itself last."""
    values = dict(read_yaml(file))
    if "extends" not in values:
        return [Layer(file, values)]
    name, children = values.pop("extends"), (*children, file)
    parent = extended(file, name)
    if parent in children:
        remedy = "drop one of the two lines"
        raise UserError(f"{short(file)}: extends: {name}: it extends this file in turn; {remedy}")
    return [*chain(parent, children), Layer(file, values)]


def extended(file: Path, name: object) -> Path:
    """The file that `extends: <name>` of `file` names: beside it, in recipes/ or in recipes/scales/."""
    if isinstance(name, str) and name:
        for folder in (file.parent, RECIPES, RECIPES.parent, RECIPES / "scales"):
            if (folder / name).is_file():
                return (folder / name).resolve()
    remedy = "write a path relative to this file, to recipes/ or to recipes/scales/"
    raise UserError(f"{short(file)}: extends: {name or 'empty'}: no such file; {remedy}")


def compose(layers: Sequence[Layer], kind: type[Typed]) -> Typed:
    """The layers laid over each other, first to last, as `kind`. Raises UserError."""
    merged: dict[str, object] = {}
    for layer in layers:
        merged = lay_over(merged, layer.values)
    return parse(merged, kind, layers)


def lay_over(values: Mapping[str, object], overlay: Mapping[str, object]) -> dict[str, object]:
    """`overlay` over `values`: sections key by key, anything else replaced."""
    merged = dict(values)
    for key, value in overlay.items():
        below = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        both = both and key not in WHOLE
        merged[key] = lay_over(cast(Overlay, below), cast(Overlay, value)) if both else value
    return merged


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def parse(values: object, kind: type[Typed], layers: Sequence[Layer]) -> Typed:
    """`values` as the dataclass `kind`. Raises UserError: file, key, value and remedy in one line."""
    if not isinstance(values, Mapping):
        layer = layers[-1]
        raise UserError(f"{short(layer.file)}: {_joined(layer.where)}: {_shown(values)}: {SECTION}")
    _refuse_lost_sections(layers, kind)
    try:
        return cast(Typed, _adapter(cast(Any, kind)).validate_python(values))
    except ValidationError as error:
        # A misspelt key is also missing under its right name: report the misspelling first.
        details = min(error.errors(include_url=False), key=_rank)
        path, problem = _problem(details, kind)
        layer = _owner(layers, path)
        key = _joined(layer.where, *path)
        raise UserError(f"{short(layer.file)}: {key}: {problem}") from None


def _owner(layers: Sequence[Layer], path: Sequence[object]) -> Layer:
    """The topmost layer with the key, or with the section that lacks it; else the first."""
    for part in (path, path[:-1]):
        if part and (found := [one for one in layers if one.has(part)]):
            return found[-1]
    return layers[0]


def _refuse_lost_sections(layers: Sequence[Layer], kind: type) -> None:
    """A value where a later layer has a section would go unseen, and take the keys below it along."""
    for number, layer in enumerate(layers):
        for later in layers[number + 1 :]:
            for path, value in _replaced(layer.values, later.values):
                if _takes_section(kind, path, value):
                    raise UserError(f"{layer.named(path)}: {_shown(value)}: {SECTION}")


def _replaced(
    values: Mapping[str, object], overlay: Mapping[str, object]
) -> Iterator[tuple[list[str], object]]:
    """The paths at which `overlay` has a section and `values` something else, and that."""
    for key in (key for key in values if key in overlay):
        value, section = values[key], overlay[key]
        if isinstance(section, Mapping) and isinstance(value, Mapping):
            yield from (([key, *path], below) for path, below in _replaced(value, section))
        elif isinstance(section, Mapping):
            yield [key], value


def _takes_section(kind: type, path: Sequence[object], value: object) -> bool:
    """Whether a key is known to take a section, and nothing else such as this value."""
    found = _kind_at(kind, path)
    section = _section_of(found)
    is_section = is_dataclass(section) or get_origin(section) is dict
    return is_section and not (value is None and section is not found)


SECTION = "write a section `key: value`"
_RANK = {"unexpected_keyword_argument": 0, "missing": 2, "missing_argument": 2, "too_short": 3}


def _rank(error: ErrorDetails) -> int:
    """Which of several errors is told. That a list is no text is told where no list will do."""
    is_list = error["type"] == "string_type" and isinstance(error["input"], list)
    return 4 if is_list else _RANK.get(error["type"], 1)


# pydantic's name of what is wrong: what to write instead, filled from its context.
_REMEDIES = {
    "int_type": "write a whole number",
    "float_type": "write a number",
    "bool_type": "write true or false",
    "string_type": "write text",
    "dataclass_type": SECTION,
    "dict_type": "write one `name: value` a line",
    "tuple_type": "write a list, one `- value` a line",
    "finite_number": "write a finite number",
    "greater_than": "write a number above {gt:g}",
    "greater_than_equal": "write at least {ge:g}",
    "less_than": "write a number below {lt:g}",
    "less_than_equal": "write at most {le:g}",
    "literal_error": "write {expected}",
    "string_too_short": "write text",
    "string_pattern_mismatch": "write letters, digits, `.`, `_`, `-`; the pattern is {pattern}",
    "none_required": "write null",
}


def _problem(details: ErrorDetails, kind: type) -> tuple[list[object], str]:
    """(the path of the key, what is wrong with it and what to do)."""
    path, name, context = _plain_path(details["loc"], kind), details["type"], details.get("ctx", {})
    value = _shown(details["input"])
    if name in ("missing", "missing_argument"):
        return path, "missing; add it"
    if name == "unexpected_keyword_argument":
        known = _keys(kind, path[:-1])
        return path, f"unknown key; {did_you_mean(str(path[-1]), known)}"
    cause = context.get("error")
    if isinstance(cause, Refused):
        value = cause.value if isinstance(cause.value, str) else _shown(cause.value)
        return [
            *path,
            *(int(p) if p.isdigit() else p for p in cause.key.split(".")),
        ], f"{value}: {cause.remedy}"
    if name == "too_short":
        return path, f"{value}: name at least {context['min_length']}"
    remedy = _REMEDIES.get(name)
    if remedy is None:
        return path, f"{value}: {details['msg'].lower()}"
    return path, f"{value}: {remedy.format(**context)}"


def _plain_path(loc: Sequence[int | str], kind: type) -> list[object]:
    """pydantic's path without the names of a union's members, which no file has."""
    path: list[object] = []
    for part in loc:
        is_member = isinstance(part, str) and bool(
            re.search(r"[\[(]|^(int|float|str|bool|tuple)$|^constrained-", part)
        )
        if not (is_member and (not path or part not in _keys(kind, path))) and part != "[key]":
            path.append(part)
    return path


def _keys(kind: Any, path: Sequence[object]) -> list[str]:
    """The keys of the section at `path` below `kind`; none where that is not a section."""
    kind = _section_of(_kind_at(kind, path))
    return [field.name for field in fields(kind)] if is_dataclass(kind) else []


def _kind_at(kind: Any, path: Sequence[object]) -> Any:
    """The type of the value at `path` below `kind`; None where it has none."""
    for part in path:
        kind = _section_of(kind)
        if is_dataclass(kind):
            kind = get_type_hints(kind).get(str(part))
        else:
            kind = next((a for a in reversed(get_args(kind)) if a is not ...), None)
    return kind


def _section_of(kind: Any) -> Any:
    """The type without null."""
    while type(None) in get_args(kind):
        kind = get_args(kind)[0]
    return kind


def has_key(kind: type, path: Sequence[str]) -> bool:
    """Whether a section has a key at this path."""
    return all(part in _keys(kind, path[:depth]) for depth, part in enumerate(path))


def _joined(*parts: object) -> str:
    return ".".join(str(part) for part in parts if part != "") or "(the file)"


def _shown(value: object) -> str:
    if value is None:
        return "empty"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def short(file: Path) -> str:
    """A path as a user of the repository would type it."""
    try:
        return str(file.resolve().relative_to(RECIPES.parent))
    except ValueError:
        return str(file)
