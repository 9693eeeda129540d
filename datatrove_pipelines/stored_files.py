"""A stored file of the hub or of a local folder, read by ranges: what is needed and little more."""

import io
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datatrove_pipelines.table_pages import Pages
from datatrove_pipelines.units import StoredFile
from ground.errors import Outage
from ground.hub import SILENCE_SECONDS, end_silence

if TYPE_CHECKING:
    from datatrove_pipelines.sources import HubSplit

BLOCK_BYTES = 8 << 20  # of a request
# A line ends where the piece of the stored bytes does that holds its end.
MOST_PIECE_BYTES = 1 << 16


class StoredRange(io.RawIOBase):
    """A stored file, of which each read is a request for a range."""

    def __init__(self, split: "HubSplit", file: StoredFile):
        super().__init__()
        self.split, self.file, self.at = split, file, 0
        self.is_local = Path(split.hub_id).is_dir()
        self.kept, self.kept_at = b"", 0  # the last answer, if it is small: a table's end

    @cached_property
    def url(self) -> str:
        from huggingface_hub import hf_hub_url

        revision = self.split.revision
        return hf_hub_url(self.split.hub_id, self.file.name, repo_type="dataset", revision=revision)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.file.bytes)[whence]
        return self.at

    def read(self, size: int = -1) -> bytes:
        left = max(self.file.bytes - self.at, 0)
        size = left if size < 0 else min(size, left)
        if not size:
            return b""
        first = self.at - self.kept_at
        if not 0 <= first <= first + size <= len(self.kept):
            content = self._local(size) if self.is_local else self._fetched(size)
            if len(content) != size:
                end = f"{self.at + len(content):,} of {self.file.bytes:,} bytes"
                raise Outage(f"ends after {end}; run the command again")
            if size > MOST_PIECE_BYTES:
                self.at += size
                return content
            self.kept, self.kept_at, first = content, self.at, 0
        self.at += size
        return self.kept[first : first + size]

    def _local(self, size: int) -> bytes:
        with Path(self.split.hub_id, self.file.name).open("rb") as file:
            file.seek(self.at)
            return file.read(size)

    def _fetched(self, size: int) -> bytes:
        """The library tries again after errors of network and hub, and waits as long as it says."""
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils._http import hf_raise_for_status, http_backoff

        end_silence()
        headers = build_hf_headers() | {"range": f"bytes={self.at}-{self.at + size - 1}"}
        answer = http_backoff("GET", self.url, headers=headers, timeout=SILENCE_SECONDS)
        hf_raise_for_status(answer)
        content: bytes = answer.content
        return content if answer.status_code == 206 else content[self.at : self.at + size]


class Table(StoredRange):
    """A stored table, of which no page is unpacked that is too large."""

    def __init__(self, split: "HubSplit", file: StoredFile):
        super().__init__(split, file)
        self.pages = Pages()

    def read(self, size: int = -1) -> bytes:
        at = self.at
        data = super().read(size)
        self.pages.check(at, data)
        return data


class Pieces(io.RawIOBase):
    """The stored bytes in order, in pieces at fixed places."""

    def __init__(self, file: StoredRange):
        super().__init__()
        self.file, self.size, self.at = file, file.file.bytes, 0
        self.piece = least_bytes(self.size)
        self.stop, self.block = 0, memoryview(b"")
        self.behind = 1  # pieces to ask for behind `stop`, where a line may end or not

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """At most one piece, of a buffer that holds one."""
        if not self.block:
            pieces = -(-min(self.stop - self.at, BLOCK_BYTES) // self.piece)
            if pieces <= 0:
                pieces, self.behind = self.behind, min(2 * self.behind, BLOCK_BYTES // self.piece)
            self.block = memoryview(self.file.read(pieces * self.piece))
        size = min(self.piece - self.at % self.piece, len(self.block), len(buffer))
        buffer[:size], self.block = self.block[:size], self.block[size:]
        self.at += size
        return size


def least_bytes(size: int) -> int:
    """Of what is asked for of a stored file."""
    return min(max(size >> 10, 1 << 8), MOST_PIECE_BYTES)
