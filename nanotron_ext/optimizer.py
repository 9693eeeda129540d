"""Which parameters decay. Published: all except `.*token_embedding.*`; RMSNorm weights decay."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from nanotron_ext import compat

compat.activate()

from nanotron.optim.named_optimizer import NamedOptimizer  # noqa: E402


def split_by_decay(
    named_params: Iterable[tuple[str, Any]], exclude: Sequence[str]
) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """(decayed, excluded): a name that matches a pattern of `exclude` from its start is excluded.

    The tied head carries its embedding's name, so it is excluded with it.
    """
    decayed: list[tuple[str, Any]] = []
    excluded: list[tuple[str, Any]] = []
    for name, parameter in named_params:
        hit = any(re.match(pattern.strip(), name) for pattern in exclude)
        (excluded if hit else decayed).append((name, parameter))
    return decayed, excluded


def exclude_from_decay(exclude: Sequence[str]) -> None:
    """Make nanotron build two groups, one without weight decay."""

    class DecayGroups(NamedOptimizer):
        def __init__(self, named_params_or_groups: Iterable[Any], optimizer_builder: Any):
            groups = list(named_params_or_groups)
            if groups and not isinstance(groups[0], dict):
                groups = [{"named_params": groups}]
            split = []
            for group in groups:
                decayed, excluded = split_by_decay(group["named_params"], exclude)
                # Both groups even when empty: every rank then has the same state_dict layout.
                split.append({**group, "named_params": decayed})
                split.append({**group, "named_params": excluded, "weight_decay": 0.0})
            super().__init__(split, optimizer_builder)

    compat.replace_named_optimizer(DecayGroups)
