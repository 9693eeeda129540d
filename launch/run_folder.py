"""A stage's run folder: who it is, whether it is whole, and who is writing to it.

    runs/<scale>/<stage>/   recipe.yaml (resolved)  manifest.json  metrics.jsonl  log.txt  ...

A folder's identity is the hash of the resolved recipe's values, the identities of the stages it
takes and the engines' versions. Our own code is recorded in the manifest, not hashed.
"""

import fcntl
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launch.errors import UserError

ENGINES = {
    "tokenizer": ("tokenizers",),
    "data": ("datatrove", "tokenizers"),
    "pretrain": ("nanotron", "torch", "transformers"),
    "chats": (),
    "posttrain": ("accelerate", "torch", "transformers", "trl"),
    "merge": ("mergekit", "torch", "transformers"),
    "release": ("tokenizers", "transformers"),
    "eval": ("lighteval", "torch", "transformers"),
    "report": ("jinja2", "matplotlib"),
}


def runs_root() -> Path:
    return Path(os.environ.get("RUNS") or "runs")


def cache_root() -> Path:
    return Path(os.environ.get("CACHE") or ".cache")


def write_aside(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@dataclass(frozen=True)
class StageRun:
    """One stage at one scale, with what it depends on."""

    stage: str
    scale: str
    engine: str
    recipe: dict[str, Any]  # resolved, plain values
    inputs: Mapping[str, "StageRun"] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return runs_root() / self.scale / self.stage

    @property
    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ENGINES[self.engine]}

    @property
    def identity(self) -> str:
        """Hash of all that the result depends on, our own code excepted."""
        parts = {
            "recipe": self.recipe,
            "inputs": {name: run.identity for name, run in self.inputs.items()},
            "versions": self.versions,
        }
        return _digest(parts)

    def manifest(self) -> dict[str, Any] | None:
        """What the folder says of itself; None where there is none."""
        file = self.folder / "manifest.json"
        try:
            loaded: dict[str, Any] = json.loads(file.read_text("utf-8"))
            if isinstance(loaded, dict) and "identity" in loaded:
                return loaded
            problem = "no identity in it"
        except FileNotFoundError:
            return None
        except ValueError as error:
            problem = str(error)
        raise UserError(f"{file}: not a manifest ({problem}); {self._remedy}")

    def is_finished(self) -> bool:
        manifest = self.manifest()
        return bool(manifest and manifest.get("finished") and manifest["identity"] == self.identity)

    def begin(self, rerun_on_change: bool, force: bool) -> None:
        """Claim the folder for this identity; a folder of another one is set aside or refused."""
        manifest = self.manifest() if not force else {"identity": "forced"}
        if manifest is None and self._has_results():
            manifest = {"identity": "unknown"}
        if self.folder.exists() and manifest and manifest["identity"] != self.identity:
            if not (force or rerun_on_change):
                raise UserError(
                    f"{self.folder}: was made from another recipe, input or library version "
                    f"({self.what_changed(manifest)}); {self._remedy}"
                )
            old = self.folder.with_name(
                f"{self.folder.name}.old-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
            )
            self.folder.rename(old)
            print(f"{self.stage}: set the old run aside as {old}", flush=True)
        started = (self.manifest() or {}).get("started") or _now()
        self._write_manifest({"started": started, "finished": None})

    def finish(self, **results: Any) -> None:
        manifest = self.manifest() or {}
        self._write_manifest({"started": manifest.get("started"), "finished": _now(), **results})

    def _write_manifest(self, values: dict[str, Any]) -> None:
        from omegaconf import OmegaConf

        write_aside(self.folder / "recipe.yaml", OmegaConf.to_yaml(OmegaConf.create(self.recipe)))
        manifest = {
            "stage": self.stage,
            "scale": self.scale,
            "identity": self.identity,
            "recipe_hash": _digest(self.recipe),
            "inputs": {name: run.identity for name, run in self.inputs.items()},
            "versions": self.versions,
            "git_commit": _git_commit(),
            **values,
        }
        write_aside(self.folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")

    @property
    def _remedy(self) -> str:
        command = f"make {self.stage} SCALE={self.scale} FORCE=1"
        return f"`{command}` sets the folder aside and starts again"

    def _has_results(self) -> bool:
        """Whether the folder holds more than a first, interrupted `_write_manifest` leaves."""
        found = self.folder.glob("[!.]*") if self.folder.exists() else ()
        return any(path.name != "recipe.yaml" for path in found)

    def what_changed(self, manifest: dict[str, Any]) -> str:
        """The first difference between the folder's manifest and this run, in words."""
        if manifest["identity"] == "unknown":
            return "its manifest.json is gone"
        for name, found in manifest.get("versions", {}).items():
            if self.versions.get(name) != found:
                return f"{name} {found}, now {self.versions.get(name)}"
        for name, run in self.inputs.items():
            if manifest.get("inputs", {}).get(name) != run.identity:
                return f"its input {name} changed"
        return f"{self.folder / 'recipe.yaml'} differs"

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Hold the stage's lock; yields its descriptor, to be a child's standard input.

        The lock lives as long as any process that holds the descriptor: a stage whose runner was
        killed stays locked until its workers are gone too.
        """
        lock = runs_root() / self.scale / f".{self.stage}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{self.folder}: another process is running this stage; wait for it, or end it"
                ) from None
            yield file.fileno()


def _digest(values: Any) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git_commit() -> str | None:
    """HEAD of our own checkout, `+` where it has uncommitted changes; None outside of git."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
