"""The README's longest how-to, in a file of its own: the other half of CI's time goes on beside it."""

from pathlib import Path

import pytest
from test_how_tos import HOW_TOS, clone, finished, run

__all__ = ["clone"]  # the fixture


@pytest.mark.slow
@pytest.mark.timeout(1200)  # minutes, beside another slow test
def test_the_whole_chain_runs_on_text_of_ones_own(clone: Path) -> None:
    how_to = HOW_TOS["train on my own text"]
    (command,) = how_to.commands
    printed = run(clone, command)
    assert finished(clone, "tiny-notes/report")
    page = (clone / "runs" / "tiny-notes" / "report.html").read_text("utf-8")
    for text in (printed, page):
        assert "notes (source text)" in text
        assert "10 duplicates" in text
        assert "held out" in text
    assert "text of its maker's own" in (
        clone / "runs" / "tiny-notes" / "release" / "README.md"
    ).read_text("utf-8")
