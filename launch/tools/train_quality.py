"""`make train-quality`: the classifier of the cleaning step `educational`, from scored rows."""

import re

from ground.errors import UserError
from launch.stages.cleaning import quality_model


def train_quality(rows: str, language: str, good: float | None) -> None:
    """Train on ROWS and write the file that `clean: [educational]` of that language reads."""
    from datatrove_pipelines.cleaning.education import labelled, train

    if not rows:
        raise UserError("ROWS is missing: make train-quality ROWS=<file or hub id of scored texts>")
    if not re.fullmatch("[a-z]{3}", language):
        raise UserError(f"TEXT_LANGUAGE={language}: not three letters of ISO 639-3, as in eng")
    classifier = train(labelled(rows, good))
    path, measures = quality_model(language), classifier.measures
    classifier.write(path)
    print(
        f"{path}: of {measures.rows:,} rows held out, {measures.share:.0%} good: accuracy "
        f"{measures.accuracy:.1%}, precision {measures.precision:.1%}, recall {measures.recall:.1%} "
        f"at {measures.threshold:.2f} (trained on {measures.trained_rows:,})"
    )
