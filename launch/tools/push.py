"""`make push`: the release as a repository of the hub, in one commit, so that no half of it is ever there.

A file that the repository has already is not sent again: the same command goes on after a broken upload.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ground.checksums import FILE as SEAL
from ground.checksums import verify
from ground.errors import Outage, UserError, first_line
from ground.hub import end_silence, refusal
from launch.run.folder import StageRun
from launch.tools.export import GGUF
from launch.tools.options import Origin, Scale, Text, scale_at

if TYPE_CHECKING:
    from launch.recipe.scale import Scale as ScaleOf

# Of the stage, not of the model.
LEFT_OUT = ("manifest.json", "recipe.yaml", SEAL)
REPORTS = ("report.html", "report.json", "report.png")
# Weights as transformers names them: those of an earlier push would be loaded with these.
WEIGHTS = re.compile(r"(yarn/)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")

Repo = Annotated[str, typer.Option(envvar="REPO", help="<owner>/<name> on the hub")]
Dry = Annotated[bool, typer.Option(envvar="DRY", help="only list it: 1, or send it: 0")]
Private = Annotated[
    bool, typer.Option(envvar="PRIVATE", help="a new repository is private: 1, or public: 0")
]


def command(
    repo: Repo, scale: Scale, text: Text = "", origin: Origin = "",
    dry: Dry = True, private: Private = True,
) -> None:  # fmt: skip
    """Send the release to a repository of the hub: weights, yarn/, GGUF, card, report; DRY=0 sends."""
    check_repository(repo)
    upload = release_upload(repo, scale_at(scale, text, origin))
    upload.show()
    if dry:
        what = f"{'private' if private else 'public'} where it is new"
        print(f"nothing was sent; DRY=0 sends it to {repo}, {what}, in one commit")
        return
    print(f"{Hub(repo, private).commit(upload)}: all of it is there")


@dataclass(frozen=True)
class Upload:
    """One commit: files by their names in the repository, the card's text, a branch."""

    files: Mapping[str, Path]
    card: str
    message: str
    branch: str = "main"

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files.values()) + len(self.card.encode())

    def show(self) -> None:
        for name, file in sorted(self.files.items()):
            print(f"  {file.stat().st_size:>15,}  {name}")
        print(f"  {len(self.card.encode()):>15,}  README.md, which says:\n")
        print("\n".join(f"    {line}".rstrip() for line in self.card.splitlines()))
        print(f"\n{len(self.files) + 1} files, {self.bytes / 1e9:.3f} GB")


class Hub:
    """A repository that this machine's token may write to; made where it is missing."""

    def __init__(self, repo: str, private: bool):
        from huggingface_hub import HfApi, get_token

        if not get_token():
            raise UserError(
                f"REPO={repo}: no token of the hub: run `hf auth login`, or set HF_TOKEN"
            )
        end_silence()
        self.repo, self.api = repo, HfApi()
        self._ask(lambda: self.api.create_repo(repo, private=private, exist_ok=True))

    def _ask(self, question: Any) -> Any:
        try:
            return question()
        except Exception as error:  # any of network, hub or library
            raise refused(error, self.repo) from None

    def commit(self, upload: Upload) -> str:
        """Returns the commit's address. Raises UserError, or Outage."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        if upload.branch != "main":
            self._ask(
                lambda: self.api.create_branch(self.repo, branch=upload.branch, exist_ok=True)
            )
        there = self._ask(lambda: self.api.list_repo_files(self.repo, revision=upload.branch))
        others = [name for name in there if name not in upload.files]
        old = [name for name in others if WEIGHTS.fullmatch(name)]
        for name in [name for name in others if name.endswith(".gguf")]:
            print(f"{name}: is there, and not of this release; delete it where it is not wanted")
        operations: list[Any] = [
            CommitOperationAdd(name, str(file)) for name, file in upload.files.items()
        ]
        operations += [CommitOperationAdd("README.md", upload.card.encode())]
        operations += [CommitOperationDelete(name) for name in old]
        made = self._ask(
            lambda: self.api.create_commit(
                self.repo, operations, commit_message=upload.message, revision=upload.branch
            )
        )
        return str(made.commit_url)

    def branches(self) -> list[str]:
        refs = self._ask(lambda: self.api.list_repo_refs(self.repo))
        return [branch.name for branch in refs.branches]


def check_repository(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError("the owner is missing")
    except HFValidationError as error:
        why = first_line(error).rstrip(".")
        raise UserError(f"REPO={repo}: write <owner>/<name> of the hub: {why}") from None


def refused(error: Exception, repo: str) -> UserError:
    """What an error of writing to the hub means to its user."""
    where = f"REPO={repo}"
    if isinstance(error, ValueError) and "Invalid metadata" in str(error):
        return UserError(f"{where}: README.md: {' '.join(str(error).split())}; correct the card")
    if getattr(getattr(error, "response", None), "status_code", 0) in (401, 403):
        return UserError(
            f"{where}: this token may not write there; name a repository of yours, or take a token with "
            "the role `write` (`hf auth login`)"
        )
    line = refusal(error, where, "the same command goes on with what is missing")
    if isinstance(line, Outage):
        return Outage(f"{line}; nothing half-sent is to be seen")
    return line


def release_upload(repo: str, at: "ScaleOf") -> Upload:
    """All that the scale's release is. Raises UserError where it is unfinished or damaged."""
    from launch.report.card import published_card
    from launch.walk import resolve

    run = resolve("release", at)
    if not run.is_finished():
        raise UserError(f"{run.folder}: no finished release of this recipe; first `{run.command}`")
    again = f"`{run.command} FORCE=1` writes it again"
    for folder in (run.folder, run.folder / "yarn"):
        verify(folder, again)
    card = run.folder / "README.md"
    if not card.is_file():
        raise UserError(f"{card}: no model card; {again}")
    files = {
        file.relative_to(run.folder).as_posix(): file
        for file in sorted(run.folder.rglob("*"))
        if file.is_file() and file.name not in (*LEFT_OUT, "README.md") and file.name[0] != "."
    }
    beside = run.folder.parent
    exports = sorted((beside / "export").glob("*.gguf"))
    gguf = [file for file in exports if file.name in _exported(run) and _is_of(file, run)]
    files |= {file.name: file for file in gguf}
    files |= {name: beside / name for name in REPORTS if (beside / name).is_file()}
    text = published_card(
        card.read_text("utf-8"), repo, list(_scores(at)), [file.name for file in gguf]
    )
    return Upload(files, text, f"Release of the recipe at {run.arguments}")


def _exported(run: StageRun) -> set[str]:
    """The names of the release's GGUF files: `make export MODEL=` writes others beside them."""
    name = run.recipe.recipe.model_name
    return {f"{name}{yarn}-{format}.gguf" for yarn in ("", "-yarn") for format in GGUF}


def _is_of(file: Path, run: StageRun) -> bool:
    """Whether an export was made after the weights that it is of."""
    is_later = file.stat().st_mtime >= max(
        one.stat().st_mtime for one in run.folder.glob("*.safetensors")
    )
    if not is_later:
        print(f"{file}: older than the release: left out; `make export` writes it again")
    return is_later


def _scores(at: "ScaleOf") -> Iterator[dict[str, Any]]:
    """The eval stage's rows of the release, with the data set's name on the hub."""
    from eval_tasks.task_table import expanded, read_tasks
    from launch.stages.evaluate import EvalStage, repositories_of
    from launch.walk import resolve

    run = resolve("eval", at)
    if not isinstance(run, EvalStage) or not run.is_finished():
        return
    tasks = {row.name: row.tasks for suite in run.recipe.suites.values() for row in suite.rows}
    for row in (run.manifest() or {})["evaluation"]:
        if row["model"] == "release":
            named = expanded(tasks[row["name"]], read_tasks())
            found = [one.name for one in repositories_of(named)]
            yield row | {"data_set": (found or named)[0]}  # of what is generated here: the task
