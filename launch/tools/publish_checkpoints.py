"""`make publish-checkpoints`: each kept checkpoint as a revision of one repository, as SmolLM3's are published.

Branches are named as there (HuggingFaceTB/SmolLM3-3B-checkpoints): stage1-step-40000, steps counted over
stages 1-3; lc-4k-to-32k-step-4000; it-SFT. One commit makes a branch's model whole; main has the list.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ground.checksums import FILE as SEAL
from ground.checksums import verify
from ground.errors import UserError
from ground.files import checkpoints
from launch.run.folder import StageRun
from launch.tools.options import Origin, Scale, Text, scale_at
from launch.tools.push import Dry, Hub, Private, Repo, Upload, check_repository

if TYPE_CHECKING:
    from launch.recipe.scale import Scale as ScaleOf

# The published names of the published stages; another keeps its own.
NAMES = {
    "pretrain-stage1": "stage1", "pretrain-stage2": "stage2", "pretrain-stage3": "stage3",
    "longctx-32k": "lc-4k-to-32k", "longctx-64k": "lc-32k-to-64k",
    "midtrain": "it-mid-training", "sft": "it-SFT", "soup": "it-soup-APO",
}  # fmt: skip


@dataclass(frozen=True)
class Revision:
    """A model of a branch; `write` makes its transformers folder from `source`, which is sealed."""

    branch: str
    source: Path
    stage: str
    write: Callable[[Path], None]

    @property
    def bytes(self) -> int:
        """Of the weights, as they lie in the checkpoint."""
        return sum(file.stat().st_size for file in self.source.rglob("*.safetensors"))


def command(
    repo: Repo, scale: Scale, text: Text = "", origin: Origin = "",
    dry: Dry = True, private: Private = True,
) -> None:  # fmt: skip
    """Send each kept checkpoint to a branch of a repository of the hub; DRY=0 sends."""
    check_repository(repo)
    at = scale_at(scale, text, origin)
    revisions = list(kept(at))
    if not revisions:
        raise UserError(f"{at.arguments}: no stage of this recipe has kept a checkpoint; train one")
    for one in revisions:
        print(f"  {one.bytes:>15,}  {one.branch:30} {one.source}")
    if dry:
        print(f"nothing was sent; DRY=0 sends {len(revisions)} revisions to {repo}, a commit each")
        return
    hub = Hub(repo, private)
    for one in revisions:
        print(f"{one.branch}: {send(hub, one, at)}", flush=True)
    names = sorted({*hub.branches()} - {"main"})
    readme = Upload({}, card(repo, at.arguments, names), f"{len(names)} checkpoints")
    print(f"{hub.commit(readme)}: {len(names)} revisions are there")


def kept(at: "ScaleOf") -> Iterator[Revision]:
    """The kept checkpoints of pretraining, and the models that post-training ends with."""
    from launch.recipe.tables import load_pipeline
    from launch.stages.merge import MergeStage
    from launch.stages.posttrain import PosttrainStage
    from launch.stages.pretrain import PretrainStage
    from launch.walk import resolve

    for stage in load_pipeline():
        run, name = resolve(stage, at), NAMES.get(stage, stage)
        if isinstance(run, PretrainStage) and _is_of_this_recipe(run):
            for folder in checkpoints(run.folder):
                write = partial(_converted, folder, run.tokenizer)
                yield Revision(f"{name}-step-{folder.name}", folder, stage, write)
        if isinstance(run, PosttrainStage | MergeStage) and stage in NAMES and run.is_finished():
            folder = run.folder / "hf"
            yield Revision(name, folder, stage, partial(_copied, folder))


def _is_of_this_recipe(run: StageRun) -> bool:
    manifest = run.manifest()
    is_same = (manifest or {}).get("identity") == run.identity
    if manifest and not is_same:
        print(f"{run.folder}: left out: made from another recipe ({run.what_changed(manifest)})")
    return is_same


def _converted(checkpoint: Path, tokenizer: Path, target: Path) -> None:
    from nanotron_ext.convert import to_hf

    to_hf(checkpoint, target, tokenizer)


def _copied(folder: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for file in folder.iterdir():
        (target / file.name).symlink_to(file.resolve())


def send(hub: Hub, one: Revision, at: "ScaleOf") -> str:
    """Convert and commit a revision; what it was converted to is deleted. Returns its address."""
    from launch.run.folder import runs_root

    verify(one.source, f"`rm -r {one.source}` leaves it out")
    folder = runs_root() / at.name / ".publish" / one.branch
    shutil.rmtree(folder, ignore_errors=True)
    try:
        one.write(folder)
        files = {
            file.name: file
            for file in sorted(folder.iterdir())
            if file.name not in (SEAL, "README.md")
        }
        text = card(hub.repo, at.arguments, [one.branch])
        return hub.commit(Upload(files, text, f"{one.stage}: {one.source.name}", one.branch))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def card(repo: str, arguments: str, branches: list[str]) -> str:
    """The README: how a revision is loaded, and which there are."""
    from huggingface_hub import ModelCardData

    head = ModelCardData(license="apache-2.0", library_name="transformers", tags=["smollm3"])
    return f"""---
{head.to_yaml()}
---

# Checkpoints of the SmolLM3 recipe at {arguments}

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{repo}", revision="{branches[0]}")
```

Steps are counted over stages 1 to 3. Revisions:

{chr(10).join(f"- `{branch}`" for branch in branches)}
"""
