"""The steps by name, which of them a source can have, and what each does to its documents."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datatrove_pipelines.cleaning.language import CODES, is_other_language
from datatrove_pipelines.cleaning.thresholds import thresholds
from datatrove_pipelines.counts import Counts, Step, count_read, leave_out_where
from datatrove_pipelines.duplicates import SeenTexts
from datatrove_pipelines.sources import SourceJob, clean, reader
from datatrove_pipelines.units import Unit
from ground.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from datatrove.data import Document

    from datatrove_pipelines.cleaning.education import Classifier

# In this order, whatever the order in a row.
STEPS = (
    "language",  # surely another language than the row's; none for code and `multi`
    "gopher",  # Gopher's quality and repetition
    "c4",  # C4's rules for pages and their lines, English alone
    "fineweb",  # FineWeb's own rules
    "educational",  # below the threshold of a classifier of one's own (education.py)
    "duplicates",  # equal to an earlier document of the source
    "near_duplicates",  # nearly equal to an earlier document, of this or an earlier source
    "pii",  # e-mail and public IP addresses are replaced
)
# A change of a step's code or constants raises CLEANING_RULE in shards.py.
# What leaves out nothing that is only short, listed, rhymed or code.
GENTLE = ("language", "duplicates", "near_duplicates", "pii")


def of_own_text(language: str) -> tuple[str, ...]:
    """The steps of own text whose row does not say any."""
    return tuple(step for step in GENTLE if language in _languages(step, language))


def check_steps(clean: Sequence[str], language: str, model: Path | None) -> None:
    """Refuse steps that there are not, or not for a language; `model` is the classifier's file."""
    for step in clean:
        if step not in STEPS:
            raise UserError(f"clean: {step}: unknown; {did_you_mean(step, STEPS)}")
        if language not in (known := _languages(step, language)):
            names = ", ".join(sorted(known))
            raise UserError(f"clean: {step}: not for language {language}; it is for {names}")
    if "educational" in clean and not (model and model.is_file()):
        raise UserError(
            f"clean: educational: {model}: no such file; "
            f"`make train-quality ROWS=<rows with text and score> TEXT_LANGUAGE={language}` writes it"
        )


def _languages(step: str, language: str) -> Collection[str]:
    """The languages that a step is for; most are for any."""
    match step:
        case "language":
            return CODES
        case "c4":  # FineWeb2 leaves it out for the others
            return ("eng",)
        case "gopher" | "fineweb":
            return ("eng", *thresholds())
        case _:
            return (language,)


def passed_by_filters(job: SourceJob, unit: Unit, counts: Counts) -> list[Step]:
    """The first steps of a unit's pipeline, from its reader on, but for `near_duplicates`."""
    is_empty = leave_out_where(counts, "empty", lambda text: not clean(text).strip())
    return [reader(job, unit, counts), count_read(counts), is_empty, *filters(job, counts)]


def in_order(jobs: Sequence[SourceJob]) -> list[SourceJob]:
    """The jobs of a stage: each that drops near duplicates knows those before it that do."""
    ordered, earlier = list[SourceJob](), list[SourceJob]()
    for job in jobs:
        if "near_duplicates" in job.clean:
            ordered.append(replace(job, earlier=tuple(earlier)))
            earlier.append(job)
        else:
            ordered.append(job)
    return ordered


def filters(job: SourceJob, counts: Counts) -> list[Step]:
    """The steps of a source that look at one document alone, and `duplicates`."""
    steps = list[Step]()
    for name in STEPS:
        if name not in job.clean:
            continue
        match name:
            case "language":
                is_other = is_other_language(job.language, job.language_model)
                steps.append(leave_out_where(counts, name, is_other))
            case "educational":
                from datatrove_pipelines.cleaning.education import Classifier

                assert job.quality_model
                classifier = Classifier.read(job.quality_model)
                steps.append(_leave_out_below(counts, name, classifier))
            case "gopher" | "c4" | "fineweb":
                steps.append(_library(counts, name, job.language))
            case "duplicates":
                steps.append(leave_out_where(counts, name, SeenTexts().has))
    return steps


def _library(counts: Counts, name: str, language: str) -> Step:
    """datatrove's filters of that name as one step."""
    from datatrove_pipelines.cleaning import quality

    make = {"gopher": quality.gopher, "fineweb": quality.fineweb}
    of_name = quality.c4() if name == "c4" else make[name](language)
    counts.left_out[name] = 0

    def keep(data: "Iterator[Document]", rank: int = 0, world_size: int = 1) -> Any:
        for document in data:
            text = document.text
            if not all(each.filter(document) is True for each in of_name):
                counts.left_out[name] += 1
                continue
            counts.count_change(name, text != document.text)
            yield document

    return keep


def _leave_out_below(counts: Counts, name: str, classifier: "Classifier") -> Step:
    """Many documents at a time, which takes a tenth of the time."""
    counts.left_out[name] = 0

    def leave_out(data: "Iterator[Document]", rank: int = 0, world_size: int = 1) -> Any:
        while documents := list(islice(data, 256)):
            for document, is_below in zip(
                documents, classifier.are_below([d.text for d in documents]), strict=True
            ):
                if is_below:
                    counts.left_out[name] += 1
                else:
                    yield document

    return leave_out


def replace_personal(counts: Counts) -> Step:
    """E-mail and public IP addresses become made-up ones (datatrove's, those of FineWeb)."""
    from datatrove.pipeline.formatters import PIIFormatter

    formatter = PIIFormatter()

    def run(data: "Iterator[Document]", rank: int = 0, world_size: int = 1) -> Any:
        for document in data:
            text, document.text = document.text, formatter.format(document.text)
            counts.count_change("pii", text != document.text)
            yield document

    return run
