"""A user's mistake: one line that names file, key, value and remedy; exit status 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What the command line prints as `error: ...` before it exits with status 2."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A remedy for a misspelt name: the nearest known one, or all when they are few."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"known: {', '.join(names)}" if len(names) <= 20 else f"{len(names)} are known"
