"""Records of files, saved folders and hub datasets, each with its line or number; broken ones with the
reason.

A fault of one record is a `Malformed` in its place. Where a fault could swallow records unseen (an unclosed
quote, a broken array, bytes that are not text), the whole source is refused.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import mmap
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from palio.config import DataSource
from palio.curation.rows import Malformed, Record
from palio.errors import BadInput
from palio.incoming import Incoming, saved_tables

MAX_LINE = 16 << 20
"""Bytes of a line, characters of a JSON value or a CSV field; a longer one is a broken file, not a question
and an answer."""
UNFOLDED, MOST_UNFOLDED = 256 << 20, 200
"""A compressed file may unfold to that many bytes, or to so many times its size if that is more."""
MAX_COLUMNS = 1000
FILE_TYPES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".zst")
QUOTES = 'double each quote inside a quoted field (""), without backslashes, or save the source as .jsonl'
"""What mends a CSV file that cannot be parsed."""
_ARRAY = re.compile(rb"\s*\[\s*\{")

Numbered = tuple[int, Record | Malformed]
"""A record with the line it begins in, from 1; of arrays, Parquet and datasets with its own number."""


def file_records(source: Incoming) -> Iterator[Numbered]:
    """Yield the records of a file, or of a folder that `datasets` saved.

    Raises:
        BadInput: there is none, it is of an unknown type, or broken as a whole.
    """
    name, shown = source.name.lower(), str(source)
    try:
        if source.is_folder():
            yield from _saved(source)
            return
        with source.open() as file:
            allowance = _Allowance(shown, source.size())
            if name.endswith(".parquet"):
                yield from _parquet(shown, file, allowance)
                return
            stream = _decompressed(file, name, allowance)
            for ending in COMPRESSED:
                name = name.removesuffix(ending)
            if not name.endswith(FILE_TYPES):
                why = f"is none of {', '.join(FILE_TYPES)} (all but .parquet also as .gz and .zst)"
                raise BadInput(shown, why=why, fix="convert it")
            yield from _text_records(shown, name, stream)
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(shown, why="no such file", fix="correct the path, or fetch it again") from None
    except UnicodeDecodeError:
        raise BadInput(shown, why="is not UTF-8", fix="save the file as UTF-8") from None
    except pa.ArrowMemoryError:
        raise
    except (EOFError, OSError, zlib.error, pa.ArrowException) as error:
        raise BadInput(shown, why=f"is broken or cut short ({error})", fix="fetch it again") from None


def _text_records(shown: str, name: str, stream: io.BufferedReader) -> Iterator[Numbered]:
    head = stream.peek(64).removeprefix(codecs.BOM_UTF8)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BadInput(shown, why="is UTF-16", fix="save the file as UTF-8")
    if name.endswith((".csv", ".tsv")):
        yield from _csv(shown, stream, "," if name.endswith(".csv") else "\t")
    elif name.endswith(".json") or _ARRAY.match(head):
        yield from _json_values(shown, _JsonText(stream))
    else:
        yield from _json_lines(stream)


class _Allowance:
    """What a compressed file may still unfold to. Raises BadInput where it unfolds further."""

    def __init__(self, shown: str, size: int) -> None:
        self._shown, self._size = shown, size
        self._left = max(UNFOLDED, MOST_UNFOLDED * size)

    def take(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            most = max(UNFOLDED, MOST_UNFOLDED * self._size) >> 20
            why = f"has {self._size} bytes and unfolds to more than {most} MB"
            raise BadInput(self._shown, why=why, fix="give the file without compression")


class _Unfolded(io.RawIOBase):
    """A decompressed stream that keeps to an allowance."""

    def __init__(self, stream: Any, allowance: _Allowance) -> None:
        self._stream, self._allowance = stream, allowance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        self._allowance.take(len(content))
        buffer[: len(content)] = content
        return len(content)


def _decompressed(file: BinaryIO, name: str, allowance: _Allowance) -> io.BufferedReader:
    if name.endswith(".gz"):
        return io.BufferedReader(_Unfolded(gzip.GzipFile(fileobj=file), allowance), 1 << 20)
    if name.endswith(".zst"):
        stream = pa.input_stream(file, compression="zstd")
        return io.BufferedReader(_Unfolded(stream, allowance), 1 << 20)
    return io.BufferedReader(file)  # type: ignore[arg-type]  # what Incoming opens is one already


def _require_few_columns(shown: str, count: int) -> None:
    if count > MAX_COLUMNS:
        raise BadInput(shown, why=f"has {count} columns", fix=f"keep at most {MAX_COLUMNS}")


# --- JSON -----------------------------------------------------------------------------------------------


def _json_lines(stream: IO[bytes]) -> Iterator[Numbered]:
    line = 0
    while content := stream.readline(MAX_LINE):
        line += 1
        if len(content) == MAX_LINE and not content.endswith(b"\n"):
            while (rest := stream.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                pass
            yield line, Malformed(f"is longer than {MAX_LINE >> 20} MiB")
            continue
        content = content.removeprefix(codecs.BOM_UTF8)  # of any line: files with one are also concatenated
        if not content.strip():
            continue
        try:
            record = json.loads(content.decode("utf-8"))
        except UnicodeDecodeError:
            yield line, Malformed("is not UTF-8")
        except (ValueError, RecursionError) as error:
            yield line, Malformed(f"is not JSON: {error}")
        else:
            yield line, _object(record)


def _object(value: Any) -> Record | Malformed:
    return value if isinstance(value, dict) else Malformed("is not a JSON object")


def _json_values(shown: str, text: _JsonText) -> Iterator[Numbered]:
    """Yield the items of an array, or JSON objects one after the other, with or without line breaks
    inside."""
    number = 0
    try:
        if text.next_character() != "[":
            while text.next_character():
                number += 1
                yield number, _object(text.value())
            return
        text.skip()
        if text.next_character() != "]":
            while True:
                number += 1
                yield number, _object(text.value())
                if text.next_character() != ",":
                    break
                text.skip()
        if text.next_character() != "]":
            raise ValueError("the array is not closed")
        text.skip()
        if text.next_character():
            raise ValueError("something follows the array")
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        why = f"is not JSON: {error}"
        raise BadInput(shown, f"record {number}", why=why, fix="mend it, or fetch it again") from None


class _JsonText:
    """A JSON text read value by value; memory holds a block, or the longest value."""

    _blank = re.compile(r"[ \t\r\n]*")
    _decoder = json.JSONDecoder()
    _block = 1 << 16

    def __init__(self, stream: BinaryIO) -> None:
        self._text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        self._buffer, self._position = "", 0

    def next_character(self) -> str:
        """Return the next character that is not blank, without passing it; empty at the end."""
        while True:
            blank = self._blank.match(self._buffer, self._position)
            self._position = blank.end() if blank else self._position
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if not self._read_on():
                return ""

    def skip(self) -> None:
        self._position += 1

    def value(self) -> Any:
        """Return the value that begins at the next character. Raises ValueError if there is none."""
        self.next_character()
        while True:
            fault = ""
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
                if end < len(self._buffer):
                    self._position = end
                    return value
            except json.JSONDecodeError as error:
                fault = error.msg  # its line counts from the buffer's beginning
            if len(self._buffer) - self._position > MAX_LINE:
                raise ValueError(f"a value is longer than {MAX_LINE >> 20} MiB, or broken")
            if not self._read_on():  # the end: what there is must do
                if fault:
                    raise ValueError(fault)
                self._position = len(self._buffer)
                return value

    def _read_on(self) -> bool:
        rest = self._buffer[self._position :]
        read = self._text.read(max(self._block, len(rest)))  # doubling: a long value is not parsed often
        self._buffer, self._position = rest + read, 0
        return bool(read)


# --- CSV ------------------------------------------------------------------------------------------------


def _csv(shown: str, stream: BinaryIO, delimiter: str) -> Iterator[Numbered]:
    """Yield the records of a CSV file by RFC 4180 (TSV: the same with tabs), numbered by their first line.

    A quoted field may have line breaks, so a quote too many can swallow records. Where strict parsing does
    not find out, the records that span lines are looked at: see `_Swallowed`.
    """
    csv.field_size_limit(MAX_LINE)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    lines: list[str] = []
    """Of the record at hand."""
    reader = csv.reader((lines.append(line) or line for line in text), delimiter=delimiter, strict=True)  # type: ignore[func-returns-value]
    header: list[str] | None = None
    swallowed = _Swallowed(delimiter)
    line = 1
    try:
        for values in reader:
            if header is None:
                header = values if values else None
                _require_few_columns(shown, len(values))
                if twice := {name for name in values if values.count(name) > 1}:
                    why = f"two columns are called {min(twice)!r}"
                    raise BadInput(shown, f"line {line}", why=why, fix="rename one")
            elif values:
                swallowed.look_at(line, lines, len(header))
                whole = len(values) == len(header)
                fault = Malformed(f"has {len(values)} fields, the header has {len(header)}")
                yield line, dict(zip(header, values, strict=True)) if whole else fault
            line = reader.line_num + 1
            lines.clear()
    except csv.Error as error:
        if "unexpected end" in str(error):
            why = "a quote opened in this record is never closed"
        else:
            where = f" in line {reader.line_num}" if reader.line_num > line else ""
            why = f"a quote in this record is wrong{where} ({error})" if '"' in "".join(lines) else str(error)
        raise BadInput(shown, f"line {line}", why=why, fix=QUOTES) from None
    except UnicodeDecodeError:
        where = f"line {reader.line_num + 1} or soon after"
        raise BadInput(shown, where, why="is not UTF-8", fix="save the file as UTF-8") from None
    swallowed.refuse(shown)


class _Swallowed:
    """Records of three lines or more, each of which would be a record of its own: the mark of a quote that
    another record's quote closed. A text may look so too; if most of a file's records of many lines do, they
    are no texts."""

    def __init__(self, delimiter: str) -> None:
        self._delimiter = delimiter
        self._spanning, self._suspicious = 0, 0
        self._first = (0, 0)

    def look_at(self, line: int, lines: list[str], columns: int) -> None:
        if len(lines) < 3 or columns == 1:
            return
        self._spanning += 1
        if all(text.count(self._delimiter) == columns - 1 for text in lines):
            self._suspicious += 1
            self._first = self._first if self._first[0] else (line, line + len(lines) - 1)

    def refuse(self, shown: str) -> None:
        """Raise BadInput if records were swallowed."""
        if 2 * self._suspicious > self._spanning:
            first, last = self._first
            why = f"a quote opened here is closed only in line {last}; each line between looks like a record"
            fix = "mend the quote; if it is one text, save the source as .jsonl"
            raise BadInput(shown, f"line {first}", why=why, fix=fix)


# --- Arrow ----------------------------------------------------------------------------------------------


def _parquet(shown: str, file: BinaryIO, allowance: _Allowance) -> Iterator[Numbered]:
    number = 0
    try:
        opened = pq.ParquetFile(file)
        _require_few_columns(shown, opened.metadata.num_columns)
        for batch in opened.iter_batches(batch_size=1024):
            allowance.take(batch.nbytes)
            for record in _arrow_records(shown, batch, number):
                number += 1
                yield number, record
    except pa.ArrowMemoryError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise BadInput(shown, why=f"is not a whole Parquet file ({error})", fix="fetch it again") from None


def _arrow_records(shown: str, batch: pa.RecordBatch, before: int) -> list[Record]:
    """Return the records of a batch. Raises BadInput if a text is not UTF-8, which Arrow does not check."""
    try:
        return batch.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        for row in range(batch.num_rows):
            for name in batch.schema.names:
                try:
                    batch[name][row].as_py()
                except UnicodeDecodeError as error:
                    why = f"is not UTF-8 ({error.reason})"
                    key = f"column {name}, row {before + row + 1}"
                    raise BadInput(shown, key, why=why, fix="write the column as UTF-8") from None
        raise


def _saved(folder: Incoming) -> Iterator[Numbered]:
    """Yield the records of a folder that `datasets` saved. Read without that library, which opens whatever
    file a record, or the state beside the tables, names."""
    if "dataset_dict.json" in folder.names():
        splits = json.loads((folder / "dataset_dict.json").read())["splits"]
        why = f"has the splits {', '.join(map(str, splits))}"
        raise BadInput(str(folder), why=why, fix=f"give one, as {folder}/{splits[0]}")
    number = 0
    try:
        for table in saved_tables(folder):
            with table.open() as stream:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            allowance = _Allowance(str(table), table.size())
            for batch in pa.ipc.open_stream(pa.py_buffer(mapped)):
                _require_few_columns(str(table), batch.num_columns)
                batch.validate(full=True)
                allowance.take(batch.nbytes)
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (OSError, ValueError, pa.ArrowException) as error:
        raise BadInput(str(folder), why=f"is not a saved dataset ({error})", fix="save it again") from None


# --- the hub --------------------------------------------------------------------------------------------


def hub_records(source: DataSource) -> Iterator[Numbered]:
    """Yield the records of a hub dataset, from the cache or else fetched. None of its code is run.

    Raises:
        BadInput: it cannot be read; of a wrong config or split the message lists those that there are.
    """
    from datasets import load_dataset_builder

    name = str(source.hub).partition("@")[0]
    try:
        builder = load_dataset_builder(name, source.config, revision=source.revision)
        if builder.hash != source.revision:
            builder = _cached(builder, source)
        if source.streaming:
            found = builder.as_streaming_dataset(source.split)
        else:
            builder.download_and_prepare()
            found = builder.as_dataset(source.split)
        yield from enumerate(found, start=1)
    except (OSError, ValueError, RuntimeError) as error:
        said = (
            " ".join(str(error).split())[:600] or type(error).__name__
        )  # its choices may be on a second line
        fix = "check id, config and split, or fetch it on a node with network"
        raise BadInput(f"hub:{source.hub}", why=f"could not be read ({said})", fix=fix) from None


def _cached(newest: Any, source: DataSource) -> Any:
    """Return the pinned revision; offline, `datasets` takes the newest that the cache has of any."""
    if not Path(newest.cache_dir).with_name(str(source.revision)).is_dir():
        why, fix = f"is not in the cache, which has {newest.hash} of it", "fetch it on a node with network"
        raise BadInput(f"hub:{source.hub}", why=why, fix=fix)
    return type(newest)(
        repo_id=newest.repo_id,
        dataset_name=newest.dataset_name,
        config_name=newest.config.name,
        version=str(newest.config.version),
        hash=source.revision,
    )
