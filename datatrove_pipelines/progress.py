"""How far a build is: a bar on a terminal, else a line now and then, with rate and time left.

Read from the finished units on the disk, whoever writes them.
"""

import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from datatrove_pipelines.shards import UNIT_FILE

LINE_SECONDS = 60.0


@contextmanager
def progress(expected_tokens: Mapping[Path, float], token_bytes: int) -> Iterator[None]:
    """Show the tokens that are written; `expected_tokens` by folder of units."""
    ended, written = threading.Event(), _Written([*expected_tokens], token_bytes)
    total = round(sum(expected_tokens.values()))
    thread = threading.Thread(target=_show, args=(written, total, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _show(written: "_Written", total: int, ended: threading.Event) -> None:
    from tqdm import tqdm

    start, begun = written.tokens(), time.monotonic()
    if not sys.stderr.isatty():
        while not ended.wait(LINE_SECONDS):
            print(_line(start, written.tokens(), total, time.monotonic() - begun), flush=True)
        return
    with tqdm(total=total, initial=start, unit=" tokens", unit_scale=True, leave=False) as bar:
        while not ended.wait(1.0):
            bar.n = written.tokens()
            bar.total = max(total, bar.n)
            bar.refresh()


class _Written:
    """Tokens of units in these folders: those that are finished, each read once, and those in work."""

    def __init__(self, folders: list[Path], token_bytes: int):
        self.folders, self.token_bytes = folders, token_bytes
        self.finished = dict[Path, int]()

    def tokens(self) -> int:
        in_work = 0
        for folder in self.folders:
            for unit in folder.glob("[0-9]*[0-9]"):
                if unit not in self.finished:
                    with suppress(OSError, ValueError, KeyError):
                        text = (unit / UNIT_FILE).read_text("utf-8")
                        self.finished[unit] = json.loads(text)["tokens"]
            for shard in folder.glob("*.partial/*unshuffled.ds"):
                with suppress(OSError):
                    in_work += shard.stat().st_size // self.token_bytes
        return sum(self.finished.values()) + in_work


def _line(start: int, now: int, total: int, seconds: float) -> str:
    rate = (now - start) / seconds
    is_known = rate and now < total
    left = timedelta(seconds=round((total - now) / rate)) if is_known else "an unknown time"
    return f"{now:,} of about {max(total, now):,} tokens, {rate:,.0f} a second, {left} left"
