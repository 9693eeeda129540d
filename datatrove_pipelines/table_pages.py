"""The sizes of a table's pages, from their headers, before any is unpacked.

pyarrow unpacks a page whole, and several times over where it is one long value; how large it is
stands neither in the file's footer nor anywhere that pyarrow would show. A page has the values of a
column that were written at once: many, or a single one.
"""

from dataclasses import dataclass
from typing import Any

from ground.errors import UserError

# Takes up to 0.9 GB; pages have 1 MB by default, and 1,024 values where these are longer.
MOST_PAGE_BYTES = 128 << 20


@dataclass
class Column:
    """A column of a row group, as it is read from first to last."""

    name: str
    start: int  # in the file, bytes
    stop: int
    header: int  # where the next page begins
    kept: bytes = b""  # what was read of its header


class Pages:
    """Follows what is read of a table, in any pieces, and refuses pages of too many bytes."""

    def __init__(self) -> None:
        self.group, self.columns = 0, list[Column]()

    def begin(self, metadata: Any, group: int, names: list[str]) -> None:
        """`names` of this row group are read next."""
        self.group, self.columns = group, []
        for number in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(number)
            if chunk.path_in_schema.split(".")[0] in names or chunk.path_in_schema in names:
                start = chunk.dictionary_page_offset or chunk.data_page_offset
                start = min(start, chunk.data_page_offset)
                stop = start + chunk.total_compressed_size
                self.columns.append(Column(chunk.path_in_schema, start, stop, start))

    @property
    def stored_bytes(self) -> int:
        return max(sum(column.stop - column.start for column in self.columns), 1)

    def check(self, at: int, data: bytes) -> None:
        for column in self.columns:
            if column.start <= at < column.stop:
                self._follow(column, at, data)

    def _follow(self, column: Column, at: int, data: bytes) -> None:
        if column.kept:
            at, data, column.kept = at - len(column.kept), column.kept + data, b""
        while at <= column.header < min(at + len(data), column.stop):
            first = column.header - at
            try:
                size, stored, stop = page_header(data, first)
            except IndexError:  # the rest of the header comes with the next piece
                column.kept = data[first:]
                return
            if size > MOST_PAGE_BYTES:
                raise UserError(
                    f"row group {self.group}: column {column.name}: a page of {size:,} bytes, and "
                    f"{MOST_PAGE_BYTES:,} are the most that are read at once; leave the file out "
                    "(`data_files`)"
                )
            column.header = at + stop + stored


def page_header(data: bytes, at: int) -> tuple[int, int, int]:
    """(bytes of the page, bytes as stored, where its header ends); Thrift's compact protocol, as in
    parquet.thrift. Raises IndexError where the header goes on behind `data`."""
    values = dict[int, int]()
    stop = _struct(data, at, values)
    return values[2], values[3], stop


def _struct(data: bytes, at: int, values: dict[int, int]) -> int:
    """The place behind a struct; `values` gets its integers, by field."""
    field = 0
    while kind := data[at]:
        at += 1
        if kind >> 4:
            field += kind >> 4
        else:
            field, at = _varint(data, at)
            field >>= 1
        match kind & 15:
            case 1 | 2:  # bool
                pass
            case 3:
                at += 1
            case 4 | 5 | 6:
                value, at = _varint(data, at)
                values[field] = value >> 1  # zigzag; sizes are positive
            case 7:
                at += 8
            case 8:
                size, at = _varint(data, at)
                at += size
            case 12:
                at = _struct(data, at, {})
            case other:
                raise ValueError(f"not a page of a parquet file (type {other} in its header)")
    return at + 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at
