"""Watching a trained stage: its metrics.jsonl is followed from outside, so that nothing here can
change a run.

    runs/<scale>/<stage>/tracking.json   the run's name, and the last step that each tracker has
    runs/<scale>/tracking/               what trackers write, and what they say (<stage>.log)

The process that starts a stage's trainers looks for new lines in a thread, which says what is alarming
(ground/alarms.py). With TRACK= a process of its own, this module, sends the lines to a tracker under
the names that they have in metrics.jsonl; a step that the tracker has is not sent again. It ends with
its standard input, once all is sent.
"""

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from typing import Any

from ground.alarms import Alarm, Alarms
from ground.errors import UserError, did_you_mean
from ground.files import read_json_object, write_json
from ground.trackers import TRACKERS, Tracker

FILE, STATE, FOLDER = "metrics.jsonl", "tracking.json", "tracking"
POLL_SECONDS = 1.0
CLOSING_SECONDS = 90.0  # that a tracker has for what is left, once the stage has ended
BLOCK = 1 << 24  # bytes read at once


def check() -> None:
    """Raises UserError where TRACK names a tracker that is not known, or not installed."""
    name = os.environ.get("TRACK", "")
    if name and name not in TRACKERS:
        raise UserError(f"TRACK={name}: no such tracker; {did_you_mean(name, TRACKERS)}")
    if name and not find_spec(name):
        raise UserError(
            f"TRACK={name}: {name} is not installed: pip install -e '.[track]', or leave TRACK out"
        )


class Lines:
    """The lines of a metrics.jsonl as they come. One that was cut back is read from its start again."""

    def __init__(self, file: Path):
        self.file, self.inode, self.end = file, 0, 0

    def new(self) -> list[dict[str, Any]]:
        """The next lines; none where there is nothing new."""
        with suppress(FileNotFoundError), self.file.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self.inode or status.st_size < self.end:
                self.inode, self.end = status.st_ino, 0
            file.seek(self.end)
            text = file.read(BLOCK)
            whole = text[: text.rfind(b"\n") + 1]  # the last line may not be written to its end
            self.end += len(whole)
            return [line for one in whole.splitlines() if (line := _parsed(one))]
        return []


def _parsed(text: bytes) -> dict[str, Any] | None:
    with suppress(ValueError):
        line = json.loads(text)
        if isinstance(line, dict) and {"step", "loss"} <= line.keys():
            return line
    return None


# ---- in the process that starts a stage's trainers


@contextmanager
def watched(folder: Path, is_paused: Callable[[int], bool]) -> Iterator[None]:
    """Watch a run folder's metrics.jsonl during a `with`; raises UserError for a wrong TRACK alone.

    `is_paused` says whether after a step something else is done, as scores: no stall.
    """
    check()
    process = _start(folder) if os.environ.get("TRACK") else None
    watch = _Watch(folder, is_paused, process)
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        watch.ended.set()
        thread.join(CLOSING_SECONDS)
        watch.close()


def _start(folder: Path) -> "subprocess.Popen[bytes] | None":
    """The process that sends the lines."""
    place, root = folder.parent / FOLDER, Path(__file__).parent.parent
    paths = filter(None, [str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        place.mkdir(exist_ok=True)
        with (place / f"{folder.name}.log").open("ab") as log:
            words = [sys.executable, "-m", "ground.tracking", str(folder)]
            # A session of its own: Ctrl-C is for the trainers.
            return subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment,
                start_new_session=True,
            )  # fmt: skip
    except OSError as error:
        print(_lost(folder, str(error)), flush=True)
        return None


def _lost(folder: Path, why: str) -> str:
    name = os.environ["TRACK"]
    return (
        f"{folder.name}: warning: TRACK={name}: {why}; the run goes on, {folder / FILE} has every line, "
        "and the next start sends what is missing"
    )


class _Watch:
    def __init__(
        self, folder: Path, is_paused: Callable[[int], bool],
        process: "subprocess.Popen[bytes] | None",
    ):  # fmt: skip
        self.folder, self.is_paused, self.process = folder, is_paused, process
        self.lines, self.alarms, self.ended = Lines(folder / FILE), Alarms(), threading.Event()

    def run(self) -> None:
        try:
            while lines := self.lines.new():
                for line in lines:
                    self.alarms.remember(line)
            while not self.ended.wait(POLL_SECONDS):
                self._look()
            self._look()
        except Exception as error:  # whatever it is, the run is worth more
            print(f"{self.folder.name}: warning: no alarms from here on: {error}", flush=True)

    def _look(self) -> None:
        now = time.monotonic()
        while lines := self.lines.new():
            for line in lines:
                for alarm in self.alarms.see(line, now):
                    self._say(alarm)
        if (late := self.alarms.late(now)) and not self.is_paused(late.step):
            self._say(late)
        if self.process and not self.ended.is_set() and self.process.poll() is not None:
            self._warn(self.process)

    def _say(self, alarm: Alarm) -> None:
        line = f"{self.folder.name}: alarm: {alarm.kind}, step {alarm.step:,}: {alarm.text}"
        print(line, flush=True)
        with (self.folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"{line}\n")
        if self.process and self.process.stdin:
            with suppress(OSError):
                self.process.stdin.write(json.dumps(asdict(alarm)).encode() + b"\n")
                self.process.stdin.flush()

    def _warn(self, process: "subprocess.Popen[bytes]", why: str = "") -> None:
        log = self.folder.parent / FOLDER / f"{self.folder.name}.log"
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        why = why or f"it ended with {process.returncode} ({lines[-1] if lines else log})"
        print(_lost(self.folder, why), flush=True)
        self.process = None

    def close(self) -> None:
        """Let the tracker send what is left."""
        if not (process := self.process) or not process.stdin:
            return
        with suppress(OSError):
            process.stdin.close()
        try:
            if process.wait(CLOSING_SECONDS):
                self._warn(process)
        except subprocess.TimeoutExpired:
            process.kill()
            self._warn(process, f"not done after {CLOSING_SECONDS:.0f} s")


# ---- in the process that sends the lines


def follow(folder: Path) -> None:
    """Send a run folder's lines, and the alarms of standard input, until that ends."""
    place, chosen = folder.parent / FOLDER, os.environ["TRACK"]
    with (place / f".{folder.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one that still sends what an earlier start left
        state = folder / STATE
        values = read_json_object(state) if state.exists() else {}
        name = values.setdefault("run", f"{folder.name}-{token_hex(3)}")  # FORCE=1 makes another
        steps: dict[str, int] = values.setdefault("steps", {})
        project = f"smollm3-{folder.parent.name}"
        tracker = TRACKERS[chosen](place, project, name, steps.get(chosen, 0))
        recipe = folder / "recipe.yaml"
        tracker.describe(recipe.read_text("utf-8") if recipe.exists() else "")
        lines, is_ended, sent = Lines(folder / FILE), False, tracker.last
        while not is_ended:
            alarms, is_ended = _alarms(POLL_SECONDS)
            sent = _send(tracker, lines, sent)
            for alarm in alarms:
                tracker.alarm(alarm)
            tracker.flush()
            if steps.get(chosen) != sent:
                steps[chosen] = sent
                write_json(state, values)
        tracker.close()


def _send(tracker: Tracker, lines: Lines, sent: int) -> int:
    """Send the lines of later steps than `sent`; returns the last one."""
    while batch := lines.new():
        for line in batch:
            if line["step"] > sent:
                sent = line["step"]
                tracker.log(sent, numbers(line))
    return sent


def numbers(line: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """The numbers of a line by the names that they have there, nested ones as `<outer>/<inner>`."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{before}{name}/")
        elif isinstance(value, int | float) and before + name != "step":
            found[before + name] = float(value)
    return found


def _alarms(seconds: float) -> tuple[list[Alarm], bool]:
    """What comes over standard input within so many seconds, and whether that has ended."""
    if not select.select([0], [], [], seconds)[0]:
        return [], False
    text = os.read(0, 1 << 16)  # alarms are short, and written whole
    return [Alarm(**json.loads(line)) for line in text.splitlines()], not text


def main(folder: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # these are for the trainers
        signal.signal(number, signal.SIG_IGN)
    follow(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
