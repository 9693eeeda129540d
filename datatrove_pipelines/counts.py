"""What a pipeline counts of the documents that it passes on, leaves out and changes."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datatrove.data import Document

Step = Callable[..., "Iterator[Document]"]


@dataclass
class Counts:
    """Documents that a pipeline has passed on, left out, by reason, and changed, by step."""

    read: int = 0  # documents, before any is left out
    documents: int = 0
    bytes: int = 0  # of the documents' text
    left_out: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)  # of those passed on by that step

    def count_change(self, step: str, is_changed: bool) -> None:
        self.changed[step] = self.changed.get(step, 0) + is_changed


def count_read(counts: Counts) -> Step:
    """The step after a reader."""

    def count(data: "Iterator[Document]", rank: int = 0, world_size: int = 1) -> Any:
        for document in data:
            counts.read += 1
            yield document

    return count


def leave_out_where(counts: Counts, reason: str, holds: Callable[[str], bool]) -> Step:
    """A step that drops the documents of whose text `holds` is true, and counts them."""
    counts.left_out[reason] = 0

    def leave_out(data: "Iterator[Document]", rank: int = 0, world_size: int = 1) -> Any:
        for document in data:
            if holds(document.text):
                counts.left_out[reason] += 1
            else:
                yield document

    return leave_out


def summed(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """The sums of several counts by their keys."""
    total = dict[str, int]()
    for one in counts:
        for key, number in one.items():
            total[key] = total.get(key, 0) + number
    return total
