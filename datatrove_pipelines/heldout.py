"""The held-out text: documents that no stage trains on, for bits per byte."""

import json
from collections.abc import Iterable
from pathlib import Path

from datatrove_pipelines.sources import SourceJob, clean, read_documents
from datatrove_pipelines.split import is_held_out


def held_out_texts(job: SourceJob, limit_bytes: int) -> list[str]:
    """Held-out documents of a source, in its order, until `limit_bytes` of UTF-8 are reached."""
    texts, size = [], 0
    for document in read_documents(job):
        if not is_held_out(document.text, job.held_out_fraction):
            continue
        texts.append(clean(document.text))
        size += len(texts[-1].encode())
        if size >= limit_bytes:
            break
    return texts


def write_held_out(jobs: Iterable[tuple[str, SourceJob, int]], path: Path) -> dict[str, int]:
    """Write {category, source, text} lines for (category, job, limit_bytes); bytes per category."""
    sizes: dict[str, int] = {}
    aside = path.with_name(f"{path.name}.partial")
    with aside.open("w", encoding="utf-8") as file:
        for category, job, limit_bytes in jobs:
            for text in held_out_texts(job, limit_bytes):
                row = {"category": category, "source": job.name, "text": text}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                sizes[category] = sizes.get(category, 0) + len(text.encode())
    aside.replace(path)
    return sizes
