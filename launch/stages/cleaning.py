"""How a source is cleaned: the steps of its row, and the files that they read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ground.errors import UserError
from launch.recipe.tables import SourceRow
from launch.run.folder import cache_root


@dataclass(frozen=True)
class Cleaning:
    """Steps of datatrove_pipelines/cleaning; a source that is published clean has none."""

    clean: tuple[str, ...] = ()
    language: str = "multi"
    quality_model: Path | None = None  # of the step `educational`
    language_model: Path | None = None  # fastText's, of the step `language`; None: py3langid

    def values(self) -> dict[str, Any]:
        """What the documents depend on; without steps nothing, as before there were any."""
        from datatrove_pipelines.shards import content_hash

        if not self.clean:
            return {}
        files = {"quality_model": self.quality_model, "language_model": self.language_model}
        hashes = {key: content_hash(path) for key, path in files.items() if path}
        return {"clean": self.clean, "language": self.language} | hashes


AS_PUBLISHED = Cleaning()


def quality_model(language: str) -> Path:
    """The classifier of a language, which `make train-quality` writes."""
    return cache_root() / "quality" / f"{language}.safetensors"


def cleaning_of(row: SourceRow, where: str) -> Cleaning:
    """The cleaning of a source that is read as its row says; `where` is the row's place.

    Own text whose row says nothing has the steps that leave out nothing good. Raises UserError.
    """
    from datatrove_pipelines.cleaning.language import language_model
    from datatrove_pipelines.cleaning.steps import check_steps, of_own_text

    if row.clean is None:
        clean = of_own_text(row.language) if row.path else ()
    else:
        clean = () if row.clean == "published" else tuple(row.clean)
    quality = quality_model(row.language) if "educational" in clean else None
    try:
        check_steps(clean, row.language, quality)
        language = language_model(cache_root()) if "language" in clean else None
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return Cleaning(clean, row.language, quality, language)
