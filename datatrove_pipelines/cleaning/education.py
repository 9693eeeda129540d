"""The step `educational`: a linear classifier on hashed words and pairs of words.

FineWeb-Edu's idea (a judge's scores of some hundred thousand pages, a classifier trained on them, a
threshold), with a logistic regression that reads megabytes a second in place of an encoder. One
file holds it: weights, and as JSON its threshold and what was measured on rows it did not train on.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from ground.errors import UserError
from ground.files import written_aside
from ground.hub import end_silence, refusal

FEATURES = 1 << 18
READ_CHARACTERS = 2_000  # of a document; FineWeb-Edu's encoder reads 512 tokens
HELD_OUT = 10  # one row of so many, by a hash of its text, for threshold and measures
LEAST_ROWS = 20  # of each class
REMEDY = "`make train-quality` writes it again"
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Measures:
    """Of held-out rows, at the threshold."""

    threshold: float  # least probability of what is kept
    accuracy: float
    precision: float
    recall: float
    share: float  # of rows that are good
    rows: int
    trained_rows: int


@dataclass(frozen=True)
class Classifier:
    weights: Floats  # (FEATURES,)
    bias: float
    measures: Measures

    @cached_property
    def vectorizer(self) -> Any:
        return _vectorizer()

    def probabilities(self, texts: Iterable[str]) -> Floats:
        """The probability of each text to be good."""
        features = self.vectorizer.transform(text[:READ_CHARACTERS] for text in texts)
        return _logistic(features @ self.weights + self.bias)

    def are_below(self, texts: Sequence[str]) -> list[bool]:
        """Of each text whether it is to be left out."""
        below: list[bool] = (self.probabilities(texts) < self.measures.threshold).tolist()
        return below

    def write(self, path: Path) -> None:
        from safetensors.numpy import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        values = {"weights": self.weights.astype(np.float32), "bias": np.array([self.bias])}
        with written_aside(path) as aside:
            save_file(values, aside, {"measures": json.dumps(asdict(self.measures))})

    @classmethod
    def read(cls, path: Path) -> "Classifier":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "np") as file:
                weights, bias = file.get_tensor("weights"), file.get_tensor("bias")
                measures = Measures(**json.loads(file.metadata()["measures"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: no classifier of this kind ({error}); {REMEDY}") from error
        if weights.shape != (FEATURES,):
            raise UserError(f"{path}: {len(weights)} weights, not {FEATURES}; {REMEDY}")
        return cls(weights.astype(np.float64), float(bias[0]), measures)


def _vectorizer() -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer

    # \w\w+ would find no words in scripts without spaces.
    return HashingVectorizer(
        n_features=FEATURES,
        ngram_range=(1, 2),
        token_pattern=r"[^\W\d_]+|\d|[^\w\s]",
        alternate_sign=False,
    )


def _logistic(values: Floats) -> Floats:
    return 1 / (1 + np.exp(-np.clip(values, -50, 50)))


def train(rows: Iterable[tuple[str, bool]]) -> Classifier:
    """A classifier of texts that are good or not; the threshold is that of the best F1."""
    from sklearn.linear_model import LogisticRegression

    held_out, good = list[bool](), list[bool]()

    def texts() -> Iterable[str]:
        for text, is_good in rows:
            held_out.append(crc32(text.encode()) % HELD_OUT == 0)
            good.append(is_good)
            yield text[:READ_CHARACTERS]

    features = _vectorizer().transform(texts())
    kept, labels = np.array(held_out), np.array(good)
    for name, part in (("to train on", ~kept), ("held out", kept)):
        least = min(np.sum(labels[part]), np.sum(~labels[part])) if part.any() else 0
        wanted = LEAST_ROWS if name == "to train on" else 1
        if least < wanted:
            raise UserError(
                f"{least} rows of the rarer class {name}, where {wanted} are needed: "
                "give more rows, or another score from which a text is good"
            )
    model = LogisticRegression(C=10.0, solver="liblinear").fit(features[~kept], labels[~kept])
    weights, bias = model.coef_[0], float(model.intercept_[0])
    probabilities = _logistic(features[kept] @ weights + bias)
    measures = _measure(probabilities, labels[kept], int(np.sum(~kept)))
    return Classifier(weights, bias, measures)


def _measure(probabilities: Floats, labels: Any, trained_rows: int) -> Measures:
    from sklearn.metrics import precision_recall_curve

    precision, recall, thresholds = precision_recall_curve(labels, probabilities)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(np.argmax(f1[:-1]))
    # Between the last that is kept and the first that is not.
    below = probabilities[probabilities < thresholds[best]].max(initial=0.0)
    threshold = float(thresholds[best] + below) / 2
    right = (probabilities >= threshold) == labels
    return Measures(
        threshold, float(np.mean(right)), float(precision[best]), float(recall[best]),
        float(np.mean(labels)), len(labels), trained_rows,
    )  # fmt: skip


def labelled(rows: str, least: float | None) -> Iterator[tuple[str, bool]]:
    """(text, whether it is good) of a file, a folder or a set on the hub, with columns `text` and
    `score` (good from 3, as for FineWeb-Edu) or `label` (good from 1); `least` is another limit.

    Raises UserError for what cannot be read.
    """
    for number, row in enumerate(_rows(rows), start=1):
        column = "score" if "score" in row else "label"
        text, score = row.get("text"), row.get(column)
        if not isinstance(text, str) or not isinstance(score, int | float):
            raise UserError(
                f"ROWS={rows}: row {number}: no text with a number as score or label among {sorted(row)}"
            )
        limit = {"score": 3, "label": 1}[column] if least is None else least
        yield text, score >= limit


def _rows(rows: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    kind = "parquet" if rows.endswith(".parquet") else "json"
    end_silence()
    try:
        if Path(rows).is_file():
            yield from load_dataset(kind, data_files=rows, split="train", streaming=True)
        else:
            yield from load_dataset(rows, split="train", streaming=True)
    except UserError:
        raise
    except Exception as error:  # any error of a file's format, of network, hub or licence gate
        raise refusal(
            error, f"ROWS={rows}", "name a jsonl or parquet file, or a set on the hub"
        ) from error
