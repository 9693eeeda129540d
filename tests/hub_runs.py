"""Stages of a small scale that read from a hub on loopback: a checkout, its runs, what they left."""

import hashlib
import json
import re
import shutil
import subprocess
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from conftest import ROOT
from loopback_hub import Hub
from small_checkout import CODE, Checkout
from test_sizes_chain import SMALL

from launch.recipe.tables import SourceRow, load_sources

TOKENS = 200 * 4096  # of stages 1 to 3: the large sources draw several units of several files
LARGE = {"fineweb-edu": 2_000_000, "dclm": 2_000_000}  # bytes of text, more than is drawn
SCALE = SMALL | {
    "tokens": TOKENS,
    "held_out": {"fraction": 0.05, "bytes_per_category": 4000},
    "decontaminate": "off",
}


@dataclass(frozen=True)
class HubCheckout(Checkout):
    """A checkout whose processes know the hub alone."""

    variables: dict[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return {k: v for k, v in super().environment.items() if k != "HF_TOKEN"} | self.variables

    def copy(self, folder: Path) -> "HubCheckout":
        shutil.copytree(self.folder, folder, symlinks=True)
        home = {"HF_HOME": str(folder / "hf")}
        return replace(self, folder=folder, variables=self.variables | home)

    def failed(self, stage: str, *statuses: int) -> str:
        """The one line of a run that fails."""
        done = subprocess.run(
            self.command("run", stage), cwd=self.folder, env=self.environment,
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode in (statuses or (2, 69)), (done.returncode, done.stderr[-3000:])
        assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr[-3000:]
        return done.stderr

    def shards(self) -> dict[str, str]:
        """Digests of all files of finished shard folders."""
        root = self.cache / "shards"
        return {
            str(file.relative_to(root)): hashlib.blake2b(file.read_bytes()).hexdigest()
            for file in sorted(root.rglob("*"))
            if file.is_file() and not re.search(r"\.building/|\.lock$", str(file))
        }

    def infos(self) -> dict[str, list[dict[str, Any]]]:
        """What each source's shard folders say of themselves."""
        found = defaultdict[str, list[dict[str, Any]]](list)
        for file in sorted((self.cache / "shards").glob("*/info.json")):
            info = json.loads(file.read_text()) | {"folder": str(file.parent)}
            found[info["name"]].append(info)
        return found


def hub_rows() -> dict[str, SourceRow]:
    return {name: row for name, row in load_sources().items() if row.hub_id}


def make_hub_checkout(
    folder: Path, hub: Hub, mixture: dict[str, float] | None = None, **scale: Any
) -> HubCheckout:
    """`mixture` of stage 1, which is then the only one; `scale`: keys of the scale file."""
    folder.mkdir(parents=True)
    for name in CODE:
        (folder / name).symlink_to(ROOT / name)
    recipes = folder / "recipes"
    shutil.copytree(ROOT / "recipes", recipes)
    sources = recipes / "sources.yaml"
    # The real sets' numbers of tokens are not these repositories'.
    sources.write_text(re.sub(r" tokens: [0-9_.e+]+,", "", sources.read_text()))
    (recipes / "scales/small.yaml").write_text(yaml.safe_dump(SCALE | scale, sort_keys=False))
    if mixture:
        stage1 = recipes / "pretrain/stage1.yaml"
        stage1.write_text(yaml.safe_dump(yaml.safe_load(stage1.read_text()) | {"mixture": mixture}))
        pipeline = recipes / "pipeline.yaml"
        pipeline.write_text(
            re.sub(r"(mixture_of: \[pretrain-stage1), .*", r"\1]", pipeline.read_text())
        )
    for row in hub_rows().values():
        repo = f"datasets/{row.hub_id}"
        if row.revision and row.revision != "main" and repo in hub.repositories:
            hub.revisions[repo, row.revision] = hub.repositories[repo]
    return HubCheckout(folder, variables=hub.variables(folder / "hf"))
