"""The last step of a source's pipeline: documents become a shard, in the bytes of datatrove's DocumentTokenizer.

*.ds        the tokens of all documents, each with its EOS, documents shuffled by the seed
*.ds.index  uint64, where each document ends, in tokens
*.ds.rows   uint32, for each document in the same order: which row or line of its file it is

Memory is about 50 bytes a document, whatever its length.
"""

import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from datatrove_pipelines.fast_tokenizer import encoder

if TYPE_CHECKING:
    from datatrove.data import Document

# As datatrove names them.
UNSHUFFLED, SHUFFLED = "00000_unshuffled.ds", "00000_00000_doc_shuffled.ds"


def row_of(document: "Document") -> int:
    """The number that its id ends in, `<file>/<row>` or, where it is written again, `<file>/<row>-<n>`."""
    return int(document.id.rpartition("/")[2].partition("-")[0])


@dataclass
class TokenWriter:
    output: Path
    tokenizer: Path  # folder
    seed: int

    def __call__(self, data: "Iterable[Document]", rank: int = 0, world_size: int = 1) -> None:
        self.run(data)

    def run(self, data: "Iterable[Document]") -> None:
        """Write the tokens, and then once more in the shuffled order; nothing without documents."""
        self.output.mkdir(parents=True, exist_ok=True)
        unshuffled = self.output / UNSHUFFLED
        ends, rows = self._tokenized(data, unshuffled)
        if len(rows):
            order = np.random.default_rng(self.seed).permutation(len(rows))
            shard = self.output / SHUFFLED
            rows[order].tofile(f"{shard}.rows")
            copy_documents(unshuffled, ends, order, shard, encoder(self.tokenizer).token_bytes)
            # Of the same memory: the lengths in the new order, then where they end.
            ends[1:] -= ends[:-1].copy()
            np.cumsum(ends[order], dtype="<u8").tofile(f"{shard}.index")
        unshuffled.unlink()

    def _tokenized(
        self, data: "Iterable[Document]", file: Path
    ) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        """The ends of the documents in tokens [D], and their rows [D]."""
        encode = encoder(self.tokenizer)
        kind = "H" if encode.token_bytes == 2 else "I"
        ends, rows, end = array("Q"), array("I"), 0
        with file.open("wb") as stream:
            for document in data:
                tokens = encode(document.text)
                stream.write(array(kind, tokens))
                end += len(tokens)
                ends.append(end)
                rows.append(row_of(document))
        return np.frombuffer(ends, np.uint64), np.frombuffer(rows, np.uint32)


def copy_documents(
    source: Path, ends: NDArray[np.uint64], order: NDArray[np.int64], file: Path, token_bytes: int
) -> None:
    """Write the documents of `source` in this order."""
    with source.open("rb", buffering=0) as stored, file.open("wb", buffering=1 << 20) as stream:
        for document in order:
            start = int(ends[document - 1]) if document else 0
            size = (int(ends[document]) - start) * token_bytes
            stream.write(os.pread(stored.fileno(), size, start * token_bytes))


def write_tokens(output: Path, tokenizer: Path, seed: int) -> TokenWriter:
    """datatrove's DocumentTokenizer with a faster core, in bounded memory, which also writes the rows."""
    return TokenWriter(output, tokenizer, seed)
