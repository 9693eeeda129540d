"""The last step of a source's pipeline: documents become a shard, in the bytes of datatrove's DocumentTokenizer.

*.ds        the tokens of all documents, each with its EOS, documents shuffled by the seed
*.ds.index  uint64, where each document ends, in tokens
*.ds.rows   uint32, for each document in the same order: which row or line of its file it is
"""

from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datatrove_pipelines.fast_tokenizer import encoder
from datatrove_pipelines.tokenizer import EOS

if TYPE_CHECKING:
    from datatrove.data import Document


def row_of(document: "Document") -> int:
    """The number that its id ends in, `<file>/<row>` or, where it is written again, `<file>/<row>-<n>`."""
    return int(document.id.rpartition("/")[2].partition("-")[0])


def write_tokens(output: Path, tokenizer: Path, seed: int) -> Any:
    """datatrove's DocumentTokenizer with a faster core, which also writes the rows."""
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.pipeline.tokens.tokenizer import TokenizedFile

    encode = encoder(tokenizer)

    class TokenWriter(DocumentTokenizer):
        def write_unshuffled(self, data: Any, filename: str) -> TokenizedFile:
            file = TokenizedFile(self.output_folder, filename, token_size=encode.token_bytes)
            kind = "H" if encode.token_bytes == 2 else "I"
            file.doc_ends = array("Q")  # a list takes five times the memory
            self.rows = array("I")
            for document in data:
                file.write_bytes(array(kind, encode(document.text)).tobytes())
                self.rows.append(row_of(document))
            file.close()
            return file

        def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
            super().run(data, rank, world_size)
            order = np.random.default_rng(seed).permutation(len(self.rows))
            for shard in output.glob("*.ds"):
                np.array(self.rows)[order].tofile(f"{shard}.rows")

    return TokenWriter(
        str(output),
        str(tokenizer / "tokenizer.json"),
        eos_token=EOS,
        seed=seed,
        save_final_metadata=False,
    )
