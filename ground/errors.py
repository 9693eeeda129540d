"""A user's mistake: one line that names file, key, value and remedy; exit status 2."""

import difflib
import errno
import os
import re
import sys
from collections.abc import Iterable

SAVED = 75  # EX_TEMPFAIL, the exit status of a job that was asked to stop: the same command goes on


class UserError(ValueError):
    """What a command prints as `error: ...` before it exits with `status`."""

    status = 2


class Outage(UserError):
    """What its user did not do wrong and cannot mend: the hub does not answer."""

    status = 69  # EX_UNAVAILABLE


# What only the owner of the disk can fix.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR)


def disk_error(error: BaseException) -> str | None:
    """One line for a disk that is full or closed to us; None for any other error."""
    full = os.strerror(errno.ENOSPC)
    if full in str(error):  # safetensors says it only in words
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return f"{full.lower()}{where}: free some and run the same command again"
    if isinstance(error, OSError) and error.errno in _DISK:
        what = os.strerror(error.errno).lower()
        return f"{error.filename}: {what}; RUNS= and CACHE= choose other folders"
    return None


def memory_error(error: BaseException, remedy: str) -> str | None:
    """One line for a GPU without enough memory, with what to do; None for any other error."""
    if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
        return None
    wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    more = f" ({wanted[1]} more were needed)" if wanted else ""
    return f"a GPU's memory does not suffice{more}; {remedy}"


def line_of(error: BaseException, remedy: str) -> str | None:
    """The line of an engine's error that its user can mend; `remedy` is for a GPU's memory."""
    if isinstance(error, UserError):
        return str(error)
    return disk_error(error) or memory_error(error, remedy)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def fail(message: str, status: int = 2) -> int:
    """Print the line that launch/ and a person look for; returns the exit status."""
    color = "\033[31m" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ""
    reset = "\033[0m" if color else ""
    print(f"{color}error:{reset} {message}", file=sys.stderr, flush=True)
    return status


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A remedy for a misspelt name: the nearest known one, or all when they are few."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return (
        f"known: {', '.join(names)}"
        if len(names) <= 30
        else f"none of {len(names)} is like it; correct it"
    )
