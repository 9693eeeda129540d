"""The trackers of TRACK=: each writes to this machine, or where its user is logged in.

All take a run's own name again after a stop, and the steps after the last one that they have.
"""

import netrc
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from ground.alarms import Alarm

FINISH_SECONDS = 60.0


class Tracker(Protocol):
    """`last` is the last step that it has."""

    last: int

    def __init__(self, folder: Path, project: str, run: str, last: int): ...

    def describe(self, recipe: str) -> None:
        """The stage's resolved recipe, YAML."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def alarm(self, alarm: Alarm) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files: `tensorboard --logdir runs/<scale>/tracking`."""

    def __init__(self, folder: Path, project: str, run: str, last: int):
        from torch.utils.tensorboard import SummaryWriter

        self.last = last
        # What was written after the last step that was noted does not count.
        self.writer = SummaryWriter(str(folder / run), purge_step=last + 1 if last else None)

    def describe(self, recipe: str) -> None:
        if not self.last:
            self.writer.add_text("recipe", f"```yaml\n{recipe}\n```", 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def alarm(self, alarm: Alarm) -> None:
        self.writer.add_text(f"alarm/{alarm.kind}", alarm.text, alarm.step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Trackio:
    """One SQLite file a project: `TRACKIO_DIR=runs/<scale>/tracking trackio show`."""

    def __init__(self, folder: Path, project: str, run: str, last: int):
        os.environ.setdefault("TRACKIO_DIR", str(folder))  # read when it is imported
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        self.run = trackio.init(
            project=project, name=run, resume="allow", embed=False,
            auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip
        # A thread writes: what was noted last may not be there after a kill, or more.
        stored = SQLiteStorage.get_max_step_for_run(project, run)
        self.last = last if stored is None and "TRACKIO_SPACE_ID" in os.environ else stored or 0

    def describe(self, recipe: str) -> None:
        self.run.config.update(_values(recipe))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def alarm(self, alarm: Alarm) -> None:
        self.run.alert(title=alarm.kind, text=alarm.text, step=alarm.step)

    def flush(self) -> None:
        """Its thread writes twice a second."""

    def close(self) -> None:
        self.run.finish()


class Wandb:
    """Offline unless its user is logged in: `wandb sync runs/<scale>/tracking/wandb/offline-run-*`."""

    def __init__(self, folder: Path, project: str, run: str, last: int):
        import wandb

        self.last = last
        os.environ.setdefault("WANDB_DIR", str(folder))
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _is_logged_in() else "offline")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or project, id=run, name=run, resume="allow",
            mode=mode,
            settings=wandb.Settings(console="off", finish_timeout=FINISH_SECONDS),
        )  # fmt: skip

    def describe(self, recipe: str) -> None:
        self.run.config.update(_values(recipe), allow_val_change=True)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def alarm(self, alarm: Alarm) -> None:
        self.run.alert(title=alarm.kind, text=f"step {alarm.step}: {alarm.text}")

    def flush(self) -> None:
        """Its own process writes."""

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb,
}  # fmt: skip


def _values(recipe: str) -> dict[str, Any]:
    import yaml

    return dict(yaml.safe_load(recipe) or {})


def _is_logged_in() -> bool:
    """By `wandb login`, which writes to .netrc, or by its variable."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        if netrc.netrc().authenticators(host):
            return True
    return "WANDB_API_KEY" in os.environ
