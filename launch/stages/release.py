"""The release: the merged model as one transformers folder, ready to load, serve and distribute.

runs/<scale>/release/   config.json  model*.safetensors  tokenizer*  chat_template.jinja
                        generation_config.json  README.md  yarn/ (the same for twice the window)
                        vllm_tool_parser.py
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from ground.checksums import seal
from ground.errors import UserError
from ground.files import copy_aside, folder_aside, read_json_object, write_json, write_text
from ground.weights import parameters
from launch.recipe.book import Loaded
from launch.recipe.merging import ReleaseRecipe
from launch.recipe.scale import Scale, scale
from launch.run.folder import StageRun

# Copied from the released model's folder; everything else in it is written here.
COPIED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
WRITTEN = ("config.json", "generation_config.json", "vllm_tool_parser.py")


@dataclass(frozen=True)
class ResolvedRelease:
    recipe: ReleaseRecipe
    origin: str  # of the text that was trained on: hub | standin | own


@dataclass(frozen=True, kw_only=True)
class ReleaseStage(StageRun):
    kind: ClassVar = "release"
    models: ClassVar = "(yarn)?"
    libraries: ClassVar = ("tokenizers", "transformers")
    recipe: ResolvedRelease

    @staticmethod
    def resolve(loaded: Loaded[ReleaseRecipe], at: Scale) -> ResolvedRelease:
        return ResolvedRelease(scale(loaded, at), "own" if at.text else at.values.origin)

    def recipe_values(self) -> dict[str, Any]:
        return asdict(self.recipe.recipe)

    def refuse(self) -> None:
        from datatrove_pipelines.tokenizer import SPECIAL_TOKENS

        self.check_taken("model", self.recipe.recipe.model)
        token = self.recipe.recipe.generation.eos_token
        if token not in SPECIAL_TOKENS:
            key = self.where("generation.eos_token")
            raise UserError(
                f"{key}: {token}: no special token of the tokenizer; name the end of a turn"
            )

    @property
    def outputs(self) -> Iterable[Path]:
        return [self.folder, self.folder / "yarn"]

    def work(self, lock: int) -> dict[str, Any]:
        """Write the release into the run folder itself."""
        from launch.report.card import model_card
        from runtimes.for_servers import response_template, vllm_plugin, with_older_spellings

        recipe, target = self.recipe.recipe, self.folder
        source = self.whole_model(recipe.model)
        config = with_older_spellings(read_json_object(source / "config.json"))
        for file in sorted({f for pattern in COPIED for f in source.glob(pattern)}):
            copy_aside(file, target / file.name)
        tokenizer = read_json_object(source / "tokenizer_config.json")
        tokenizer["response_template"] = response_template()
        write_json(target / "tokenizer_config.json", tokenizer, indent=2)
        write_text(target / "vllm_tool_parser.py", vllm_plugin())
        config["eos_token_id"] = _eos_id(source, recipe.generation.eos_token)
        write_json(target / "config.json", config, indent=2)
        generation = generation_config(recipe, config, source)
        write_json(target / "generation_config.json", generation, indent=2)
        yarn = write_yarn(target, recipe.yarn_factor)
        count = parameters(target)
        write_text(target / "README.md", model_card(self, self.recipe.origin, config, yarn, count))
        check_loads(target)
        # Not the model card, which its owner edits.
        seal(target, [f.name for p in (*COPIED, *WRITTEN) for f in target.glob(p)])
        return {
            "window_tokens": config["max_position_embeddings"],
            "yarn_window_tokens": yarn["max_position_embeddings"],
            "parameters": count,
            "dtype": config["dtype"],
        }

    def show(self) -> None:
        """Where the release is and how long a text it reads."""
        manifest = self.manifest() or {}
        print(
            f"release: {self.folder}, {manifest['parameters']:,} parameters, windows of "
            f"{manifest['window_tokens']:,} tokens; {self.folder / 'yarn'} reads "
            f"{manifest['yarn_window_tokens']:,}"
        )


def generation_config(
    recipe: ReleaseRecipe, config: dict[str, Any], source: Path
) -> dict[str, Any]:
    """The sampling defaults of transformers, vLLM and others."""
    file = source / "generation_config.json"
    carried = read_json_object(file) if file.is_file() else {}
    carried.pop("transformers_version", None)
    return {
        "bos_token_id": config.get("bos_token_id"),
        **carried,
        "do_sample": True,
        "eos_token_id": config["eos_token_id"],
        "temperature": recipe.generation.temperature,
        "top_p": recipe.generation.top_p,
    }


def write_yarn(release: Path, factor: float) -> dict[str, Any]:
    """yarn/: the same files by link, and a config for `factor` times the window; returns it.

    Links are relative, so that the folder may be moved; uploads follow them.
    """
    from nanotron_ext.rope import yarn_config
    from runtimes.for_servers import with_older_spellings

    plain = read_json_object(release / "config.json")
    config = with_older_spellings(yarn_config(plain, factor))
    with folder_aside(release / "yarn") as aside:
        for pattern in (*COPIED, "generation_config.json"):
            for file in release.glob(pattern):
                (aside / file.name).symlink_to(Path("..") / file.name)
        write_json(aside / "config.json", config, indent=2)
        seal(aside)
    return config


def check_loads(release: Path) -> None:
    """Refuse a folder that users could not load: template, special tokens, both configs."""
    from transformers import AutoConfig, AutoTokenizer

    for folder in (release, release / "yarn"):
        AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if not tokenizer.chat_template:
            raise UserError(
                f"{folder}: the tokenizer has no chat template; the post-training stages store it "
                "in their hf/, run them again with FORCE=1"
            )


def _eos_id(source: Path, token: str) -> int:
    from tokenizers import Tokenizer

    file = source / "tokenizer.json"
    read_json_object(file)
    token_id: int | None = Tokenizer.from_file(str(file)).token_to_id(token)
    if token_id is None:
        raise UserError(
            f"{file}: no token {token}; recipes/merge/release.yaml names the end of a turn in "
            "generation.eos_token"
        )
    return token_id
