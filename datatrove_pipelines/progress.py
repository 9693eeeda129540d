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
def progress(expected_tokens: Mapping[Path, float]) -> Iterator[None]:
    """Show the tokens of finished units; `expected_tokens` by folder of units."""
    ended = threading.Event()
    thread = threading.Thread(target=_show, args=(expected_tokens, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _show(expected_tokens: Mapping[Path, float], ended: threading.Event) -> None:
    from tqdm import tqdm

    total, counted = round(sum(expected_tokens.values())), dict[Path, int]()
    start, begun = _tokens(expected_tokens, counted), time.monotonic()
    if not sys.stderr.isatty():
        while not ended.wait(LINE_SECONDS):
            line = _line(start, _tokens(expected_tokens, counted), total, time.monotonic() - begun)
            print(line, flush=True)
        return
    with tqdm(total=total, initial=start, unit=" tokens", unit_scale=True, leave=False) as bar:
        while not ended.wait(1.0):
            bar.n = _tokens(expected_tokens, counted)
            bar.total = max(total, bar.n)
            bar.refresh()


def _tokens(folders: Mapping[Path, float], counted: dict[Path, int]) -> int:
    """Tokens of all finished units; `counted` keeps those that were read."""
    for folder in folders:
        for unit in folder.glob("[0-9]*[0-9]"):
            if unit not in counted:
                with suppress(OSError, ValueError, KeyError):
                    counted[unit] = json.loads((unit / UNIT_FILE).read_text("utf-8"))["tokens"]
    return sum(counted.values())


def _line(start: int, now: int, total: int, seconds: float) -> str:
    rate = (now - start) / seconds
    left = timedelta(seconds=round(max(total - now, 0) / rate)) if rate else "an unknown time"
    return f"{now:,} of about {max(total, now):,} tokens, {rate:,.0f} a second, {left} left"
