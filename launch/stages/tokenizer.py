"""The tokenizer stage: the published table at the full scale, else a BPE that is trained."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ground.files import read_json_object
from ground.hub import Repository
from launch.recipe.book import load_recipe
from launch.recipe.pretrain import Tokenizer
from launch.recipe.scale import Scale
from launch.recipe.tables import StageRow, StandInRow
from launch.run.folder import StageRun
from launch.stages.sources import (
    Data,
    StandInData,
    build_standins,
    mixture_of,
    mixtures_of,
    repositories,
    source_job,
    stand_in_values,
    standins_of,
)

# A stand-in that the first mixture hardly uses still shows the tokenizer its script.
MINIMUM_TRAIN_BYTES = 40_000


@dataclass(frozen=True)
class PublishedTokenizer:
    published: Tokenizer


@dataclass(frozen=True)
class TrainedTokenizer:
    """A byte-level BPE; `train_bytes` of each stand-in, and of each source of another kind."""

    vocab_size: int
    held_out_fraction: float
    train_bytes: dict[str, int]
    standins: dict[str, StandInRow]
    sources: dict[str, Data] = field(default_factory=dict)  # those that are not stand-ins


@dataclass(frozen=True, kw_only=True)
class TokenizerStage(StageRun):
    kind: ClassVar = "tokenizer"
    libraries: ClassVar = ("tokenizers",)
    small_outputs: ClassVar = True
    recipe: PublishedTokenizer | TrainedTokenizer

    @staticmethod
    def resolve(row: StageRow, at: Scale) -> PublishedTokenizer | TrainedTokenizer:
        """What the tokenizer depends on."""
        says, first = at.values, row.mixture_of[0]
        if not says.tokenizer.vocab_size:
            return PublishedTokenizer(load_recipe(first).published.nanotron.tokenizer)
        every, weights = mixtures_of(row.mixture_of, at), mixture_of(first, at).weights
        train_bytes: dict[str, float] = {}
        for name, data in sorted(every.data.items()):
            key = data.name if isinstance(data, StandInData) else name
            share = weights.get(name, 0.0) * says.tokenizer.train_bytes
            train_bytes[key] = train_bytes.get(key, 0.0) + share
        return TrainedTokenizer(
            says.tokenizer.vocab_size,
            says.held_out.fraction,
            {key: max(round(size), MINIMUM_TRAIN_BYTES) for key, size in train_bytes.items()},
            standins_of(every.data),
            {n: one for n, one in every.data.items() if not isinstance(one, StandInData)},
        )

    def recipe_values(self) -> dict[str, Any]:
        recipe = self.recipe
        if isinstance(recipe, PublishedTokenizer):
            return asdict(recipe)
        values: dict[str, Any] = {
            "vocab_size": recipe.vocab_size,
            "held_out_fraction": recipe.held_out_fraction,
            "train_bytes": recipe.train_bytes,
            "standins": {name: stand_in_values(row) for name, row in recipe.standins.items()},
        }
        if recipe.sources:
            values["sources"] = {name: data.values() for name, data in recipe.sources.items()}
        return values

    @property
    def vocab_size(self) -> int:
        """Tokens of the table, special ones included."""
        from datatrove_pipelines.tokenizer import LLAMA_VOCAB_SIZE

        if isinstance(self.recipe, PublishedTokenizer):
            return LLAMA_VOCAB_SIZE
        return self.recipe.vocab_size

    @property
    def token_ids(self) -> dict[str, int]:
        """Ids of the special tokens."""
        from datatrove_pipelines.tokenizer import special_ids

        return special_ids(self.vocab_size)

    @property
    def tokenizer(self) -> Path:
        """The folder that transformers loads."""
        return self.folder / "tokenizer"

    @property
    def outputs(self) -> Iterable[Path]:
        return [self.tokenizer]

    def needs_of_hub(self) -> Iterable[Repository]:
        recipe = self.recipe
        if isinstance(recipe, TrainedTokenizer):
            return repositories(recipe.sources)
        from datatrove_pipelines.tokenizer import is_cached

        named = recipe.published
        name, revision = named.tokenizer_name_or_path, named.tokenizer_revision or "main"
        if is_cached(name, revision):
            return ()
        where = "recipes/pretrain/stage1.yaml: nanotron.tokenizer.tokenizer_name_or_path"
        return [Repository("model", name, revision, where)]

    def work(self, lock: int) -> dict[str, Any]:
        from datatrove_pipelines.tokenizer import llama_tokenizer, train_bpe

        recipe = self.recipe
        if isinstance(recipe, PublishedTokenizer):
            named = recipe.published
            revision = named.tokenizer_revision or "main"
            llama_tokenizer(named.tokenizer_name_or_path, self.tokenizer, revision)
        else:
            files = build_standins(recipe.standins) if recipe.standins else {}
            train_bpe(_training_texts(recipe, files), recipe.vocab_size, self.tokenizer)
        table = read_json_object(self.tokenizer / "tokenizer.json")
        return {"vocab_size": len(table["model"]["vocab"]) + len(table["added_tokens"])}


def _training_texts(recipe: TrainedTokenizer, files: Mapping[str, Path]) -> Iterator[str]:
    """The first documents of each source that are not held out, up to its share of bytes."""
    from datatrove_pipelines.held_out import is_held_out
    from datatrove_pipelines.sources import check_readable, read_documents

    standins = {name: StandInData(name, row, (0.0, 1.0)) for name, row in recipe.standins.items()}
    data: dict[str, Data] = {**recipe.sources, **standins}
    jobs = {name: source_job(name, data[name], files, 0.0) for name in sorted(recipe.train_bytes)}
    check_readable(jobs.values())
    for name, job in jobs.items():
        size, limit = 0, recipe.train_bytes[name]
        for document in read_documents(job):
            if size >= limit:
                break
            if not is_held_out(document.text, recipe.held_out_fraction):
                size += len(document.text.encode())
                yield document.text
