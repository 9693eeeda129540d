"""What a pipeline counts of the documents that it passes on, leaves out and changes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datatrove.data import Document

Step = Callable[..., "Iterator[Document]"]


@dataclass
class Counts:
    """Documents that a pipeline has passed on, left out, by reason, and changed, by step."""

    documents: int = 0
    bytes: int = 0  # of the documents' text
    left_out: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)  # of those passed on by that step

    def count_change(self, step: str, is_changed: bool) -> None:
        self.changed[step] = self.changed.get(step, 0) + is_changed


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
