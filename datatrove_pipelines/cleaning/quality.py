"""The steps `gopher`, `c4` and `fineweb`: datatrove's filters, with the thresholds of a language.

English has those of FineWeb, other languages those of FineWeb2 (thresholds.yaml). They were made for
pages of the web. Notes, poems, lists and code break them without being bad: a text of fewer than 50
words is left out, one with a refrain, with many short lines or with a `{`.
"""

from typing import Any

from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)

from datatrove_pipelines.cleaning.thresholds import thresholds_of
from datatrove_pipelines.cleaning.words import WORDS


def gopher(language: str) -> list[Any]:
    """Filters on repetition and on quality."""
    if language == "eng":
        return [GopherRepetitionFilter(language=WORDS), GopherQualityFilter(language=WORDS)]
    row = thresholds_of(language)
    repetition = GopherRepetitionFilter(
        dup_line_frac=row.line,
        dup_para_frac=0,  # these three are off in FineWeb2
        dup_line_char_frac=0,
        dup_para_char_frac=0,
        top_n_grams=tuple(zip((2, 3, 4), row.top, strict=False)),
        dup_n_grams=tuple(zip(range(5, 11), row.repeated, strict=False)),
        language=WORDS,
    )
    quality = GopherQualityFilter(
        min_avg_word_length=row.length[0],
        max_avg_word_length=row.length[1],
        max_non_alpha_words_ratio=row.alpha,
        min_stop_words=2 if row.stop_words else None,
        stop_words=list(row.stop_words),
        language=WORDS,
    )
    return [repetition, quality]


def c4() -> list[Any]:
    """C4's filter as FineWeb has it: lines need no full stop. It drops lines, too."""
    return [C4QualityFilter(filter_no_terminal_punct=False, language=WORDS)]


def fineweb(language: str) -> list[Any]:
    if language == "eng":
        return [FineWebQualityFilter(language=WORDS)]
    row = thresholds_of(language)
    # short_line_thr and char_duplicates_ratio as in FineWeb2
    return [
        FineWebQualityFilter(
            line_punct_thr=row.punctuation,
            short_line_thr=999,
            char_duplicates_ratio=0.1,
            new_line_ratio=row.newlines,
            language=WORDS,
        )
    ]
