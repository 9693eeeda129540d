"""A stage's run folder: its identity, whether it is whole, and who is writing to it.

    runs/<scale>/<stage>/   recipe.yaml (resolved)  manifest.json  metrics.jsonl  log.txt  ...

A folder's identity is the hash of the resolved recipe's values, the identities of the stages it
takes and the engines' versions. Our own code is recorded in the manifest, not hashed.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ground.checksums import Damaged, sizes_differ, verify, verify_if_sealed
from ground.errors import UserError, did_you_mean
from ground.files import (
    CHECKSUM,
    checkpoints,
    read_json_object,
    read_record,
    write_record,
    write_text,
)
from ground.hub import Repository
from launch.run.lock import locked

Kind = TypeVar("Kind", bound="StageRun")
UNKNOWN = "unknown"  # whose results the folder holds


def runs_root() -> Path:
    return Path(os.environ.get("RUNS") or "runs")


def cache_root() -> Path:
    return Path(os.environ.get("CACHE") or ".cache")


def shard_urls() -> list[str]:
    """SHARDS: where copies of the shards are, or go to."""
    return [url for url in (os.environ.get("SHARDS") or "").split(",") if url]


def node_cache() -> tuple[Path, int]:
    """NODE_CACHE and NODE_CACHE_GB: the folder of a node for shards that are not on its disk, and bytes."""
    from ground.storage import DEFAULT_FOLDER, DEFAULT_GB

    folder, size = os.environ.get("NODE_CACHE"), os.environ.get("NODE_CACHE_GB") or DEFAULT_GB
    if folder:
        _check_root("NODE_CACHE", Path(folder))
    try:
        if not (limit := int(float(size) * 1e9)) > 0:
            raise ValueError
    except (ValueError, OverflowError):
        raise UserError(f"NODE_CACHE_GB={size}: not a size; write GB, such as 500") from None
    return Path(folder) if folder else DEFAULT_FOLDER, limit


def check_roots() -> None:
    """Make both folders. Raises UserError where one cannot be made or written to."""
    for variable, root in (("RUNS", runs_root()), ("CACHE", cache_root())):
        _check_root(variable, root)


def _check_root(variable: str, root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        problem = "" if os.access(root, os.W_OK) else "no permission to write in it"
    except OSError as error:
        problem = os.strerror(error.errno or 0).lower()
    if problem:
        raise UserError(f"{variable}={root}: {problem}; name a folder that can be written to")


@cache
def _version(library: str) -> str:
    return version(library)


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """One stage at one scale, with what it depends on. Each kind of stage is a subclass.

    A kind defines which libraries its result depends on, how its recipe is resolved (a class
    method), what is refused before anything is done, the work, and what is shown afterwards.
    """

    kind: ClassVar[str] = ""  # as pipeline.yaml names it under `engine`
    libraries: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[str, ...]] = ()  # kinds of stages that it needs
    small_outputs: ClassVar[bool] = False  # whose readers do not check them: the walk does
    models: ClassVar[str] = ""  # folders in it that other stages may take: a regular expression
    # Said where there is no checkpoint.
    left_by_a_signal: ClassVar[str] = "it has no checkpoint and begins again"
    seals_models: ClassVar[bool] = True  # False: they may be from elsewhere, without checksums

    stage: str
    scale: str  # the folder below RUNS
    arguments: str  # that select the scale on a command line: SCALE=... and what belongs to it
    recipe: Any  # resolved; a frozen dataclass
    inputs: Mapping[str, "StageRun"] = field(default_factory=dict)
    file: Path | None = None  # with the recipe, for messages
    is_own: bool = False  # a user's recipe, which is not a stage of pipeline.yaml
    rerun_on_change: bool = False
    # `<file>: <key>` of the file that sets a key of the recipe, for messages.
    named: Callable[[str], str] | None = field(default=None, repr=False, compare=False)

    @staticmethod
    def resolve(source: Any, at: Any) -> Any:
        """The recipe resolved at a scale, from the stage's own file or its row of pipeline.yaml."""
        raise NotImplementedError

    @property
    def shapes_results(self) -> bool:
        """Whether a change of this stage changes the results of the stages that take it; False where
        it only gives the text that they are scored on."""
        return True

    def refuse(self) -> None:
        """Raise UserError for what this machine cannot do, before any stage is run."""

    def needs_of_hub(self) -> Iterable[Repository]:
        """What it fetches from the hub; asked for when nothing else is refused."""
        return ()

    def refuse_loss(self, lost: str) -> None:
        """Raise UserError where a lost output of a finished stage is not to be made again unasked."""

    def work(self, lock: int) -> dict[str, Any]:
        """Do the stage; returns the manifest's results. `lock` is passed on to processes."""
        raise NotImplementedError

    @property
    def outputs(self) -> Iterable[Path]:
        """Sealed folders (ground/checksums.py) that a finished stage leaves."""
        return ()

    def lost(self, thorough: bool = False) -> str | None:
        """What of a finished stage's outputs is missing or changed; None where all are there.

        Sizes are compared; where `thorough`, and no reader does that itself, contents too.
        """
        for folder in self.outputs:
            if problem := sizes_differ(folder):
                return problem
            try:
                if thorough and self.small_outputs:
                    verify(folder, "")
            except Damaged as error:
                return str(error).removesuffix("; ")
        return None

    @property
    def needed(self) -> Iterable["StageRun"]:
        """The inputs that its work reads."""
        return self.inputs.values()

    def show(self) -> None:
        """Print what people want to see of a finished stage."""

    def started_from(self, starts: Sequence["StageRun"]) -> "StageRun":
        """The stage with other models in place of those of the stages before (FROM=)."""
        raise UserError(
            f"FROM= starts a stage that trains on chats, or a merge; {self.stage} starts from no "
            "model of that kind: leave FROM= out"
        )

    def input_of(self, kind: type[Kind]) -> Kind:
        """The first input of a kind."""
        return next(run for run in self.inputs.values() if isinstance(run, kind))

    def check_taken(self, key: str, model: str) -> None:
        """Refuse a `<stage>/<folder>` of a stage that is not an input or lacks that folder."""
        stage, _, folder = model.partition("/")
        if stage not in self.inputs:
            raise UserError(
                f"{self.where(key)}: {model}: {self.stage} takes no stage '{stage}' "
                f"(recipes/pipeline.yaml); {did_you_mean(stage, self.inputs)}"
            )
        if not re.fullmatch(pattern := self.inputs[stage].models, folder):
            remedy = f"{stage} leaves no such model; write {pattern or 'no folder'} of it"
            raise UserError(f"{self.where(key)}: {model}: {remedy}")

    def model_folder(self, model: str) -> Path:
        """The transformers folder that `<stage>/<folder>` names; checkpoints/-1 is the last one."""
        stage, _, below = model.partition("/")
        folder = self.inputs[stage].folder
        parent, _, number = below.partition("/")
        if parent != "checkpoints" or not number.startswith("-"):
            return folder / below
        saved = checkpoints(folder)
        if not number[1:].isdigit() or not 0 < int(number[1:]) <= len(saved):
            names = ", ".join(path.name for path in saved) or "none"
            raise UserError(
                f"{model}: {folder / 'checkpoints'} has {len(saved)} checkpoints ({names}); save "
                f"more often in the recipe of {stage}, or count from -1"
            )
        return saved[int(number)]

    def whole_model(self, model: str) -> Path:
        """`model_folder`, every file of which is as it was written. Raises Damaged."""
        folder = self.model_folder(model)
        self.inputs[model.partition("/")[0]].verify_model(folder)
        return folder

    def verify_model(self, folder: Path) -> None:
        """Raise Damaged where a model that this stage has written is not as it was."""
        if not self.seals_models:
            verify_if_sealed(folder, "name a whole transformers folder in FROM=")
            return
        again = f"`rm -r {folder}`, and `{self.command}` writes it again"
        # A checkpoint that is not the last is no output: without it another one would be taken.
        verify(
            folder, again if folder in self.outputs else f"`{self.command} FORCE=1` trains again"
        )

    def recipe_values(self) -> dict[str, Any]:
        """The recipe as plain values: what is stored, and what the identity depends on."""
        return asdict(self.recipe)

    @property
    def folder(self) -> Path:
        return runs_root() / self.scale / self.stage

    def where(self, key: str) -> str:
        """The file that sets a key of the recipe, and the key: the start of a message."""
        return self.named(key) if self.named else f"{os.path.relpath(self.file or '.')}: {key}"

    @property
    def command(self) -> str:
        """What a user types to run the stage."""
        target = f"run RECIPE={shlex.quote(str(self.file))}" if self.is_own else self.stage
        return f"make {target} {self.arguments}"

    @property
    def versions(self) -> dict[str, str]:
        return {name: _version(name) for name in self.libraries}

    @cached_property
    def identity(self) -> str:
        """Hash of all that the result depends on, except our own code."""
        parts = {
            "recipe": self.recipe_values(),
            "inputs": {
                name: run.identity for name, run in self.inputs.items() if run.shapes_results
            },
            "versions": self.versions,
        }
        return _digest(parts)

    def manifest(self) -> dict[str, Any] | None:
        """The folder's manifest; None where there is none."""
        file = self.folder / "manifest.json"
        if not file.exists():
            return None
        values: dict[str, Any] = read_json_object(file, self._remedy)
        if "identity" not in values:
            raise UserError(f"{file}: not a manifest (no identity in it); {self._remedy}")
        # Those of earlier versions have no checksum.
        return read_record(file, self._remedy) if CHECKSUM in values else {"identity": UNKNOWN}

    def is_finished(self) -> bool:
        manifest = self.manifest()
        return bool(manifest and manifest.get("finished") and manifest["identity"] == self.identity)

    def begin(self, force: bool) -> None:
        """Claim the folder for this identity; one with another identity is set aside or refused.

        A finished run stays as it is: it has lost an output, and its results hold.
        """
        if not force and self.is_finished():
            return
        manifest = self.manifest() if not force else {"identity": "forced"}
        if manifest is None and self._has_results():
            manifest = {"identity": UNKNOWN}
        if self.folder.exists() and manifest and manifest["identity"] != self.identity:
            if not (force or self.rerun_on_change):
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
        import yaml

        recipe = self.recipe_values()
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
        write_text(self.folder / "recipe.yaml", text)
        manifest = {
            "stage": self.stage,
            "scale": self.scale,
            "identity": self.identity,
            "recipe_hash": _digest(recipe),
            "inputs": {name: run.identity for name, run in self.inputs.items()},
            "versions": self.versions,
            "git_commit": git_commit(),
            **values,
        }
        write_record(self.folder / "manifest.json", manifest)

    @property
    def _remedy(self) -> str:
        return f"`{self.command} FORCE=1` sets the folder aside and starts again"

    def _has_results(self) -> bool:
        """Whether the folder holds more than a first, interrupted `_write_manifest` leaves."""
        paths = self.folder.glob("[!.]*") if self.folder.exists() else ()
        return any(path.name != "recipe.yaml" for path in paths)

    def what_changed(self, manifest: dict[str, Any]) -> str:
        """The first difference between the folder's manifest and this run, as text."""
        if manifest["identity"] == UNKNOWN:
            return "its manifest.json is gone, or an earlier version's"
        for name, then in manifest.get("versions", {}).items():
            if self.versions.get(name) != then:
                return f"{name} {then}, now {self.versions.get(name)}"
        for name, run in self.inputs.items():
            if run.shapes_results and manifest.get("inputs", {}).get(name) != run.identity:
                return f"its input {name} changed"
        return f"{self.folder / 'recipe.yaml'} differs"

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Hold the stage's lock; yields its descriptor, to be a child's standard input.

        A stage whose main process was killed stays locked until its workers are gone too.
        """
        with locked(runs_root() / self.scale / f".{self.stage}.lock", self.folder) as lock:
            yield lock


def _digest(values: Any) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def git_commit() -> str | None:
    """HEAD of our own checkout, `+` where it has uncommitted changes; None outside git or without it."""
    if not shutil.which("git"):
        return None
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
