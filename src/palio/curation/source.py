"""Reading sources: records of a known shape become rows, malformed ones are set aside with a reason."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import mmap
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import cycle
from pathlib import Path
from typing import IO, Any, BinaryIO

import jinja2
import jinja2.sandbox
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from palio.config import DataSource
from palio.curation.rows import Turns
from palio.errors import BadInput
from palio.incoming import Incoming, saved_tables
from palio.provenance import fingerprint

MAX_LINE = 16 << 20
"""Bytes of one line; a longer one is a broken file, not a question and an answer."""


UNFOLDED, MOST_UNFOLDED = 256 << 20, 200
"""A compressed file may unfold to that many bytes, or to so many times its size if that is more."""
MAX_COLUMNS = 1000


class Malformed(ValueError):
    """A record that is no row; the message is the reason shown in the quarantine."""


@dataclass(frozen=True)
class SourceRow:
    line: int
    """From 1; of Parquet and hub datasets the record."""
    turns: Turns
    id: str
    score: float | None = None


@dataclass(frozen=True)
class Quarantined:
    line: int
    reason: str
    excerpt: str


def source_digest(source: DataSource, team_folders: Sequence[Path]) -> str:
    """What the source's rows depend on: content of its files, or the address of a pinned hub dataset.

    Raises:
        BadInput: there is no such file.
        RuleViolation: it is not a plain file or folder below one of `team_folders`.
    """
    if source.path is None:
        return fingerprint([source.hub, source.config, source.split])
    try:
        return Incoming.locate(Path(source.path), team_folders).sha256()
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(
            source.path, why="no such file", fix="correct dataset.sources, or fetch it again"
        ) from None


def read_source(source: DataSource, team_folders: Sequence[Path]) -> Iterator[SourceRow | Quarantined]:
    """Every record of the source as a row (of some formats as several) or, with the reason, as a
    quarantined one.

    Raises:
        BadInput: the source is absent, of an unknown kind, or broken as a whole.
        RuleViolation: it is not a plain file or folder below one of `team_folders`.
    """
    shape = _shape(source)
    seen: set[bytes] = set()
    given = Incoming.locate(Path(source.path), team_folders) if source.path else None
    for line, record in _records(given) if given else _hub(source):
        if isinstance(record, Malformed):
            yield Quarantined(line, str(record), "")
            continue
        try:
            found = shape(record)
            score = _score(record, source.score)
            given = record.get("id")
            name = f"{source.label}:{line}" if given is None else str(given)
            rows = [
                SourceRow(line, turns, name if len(found) == 1 else f"{name}.{number}", score)
                for number, turns in enumerate(found, start=1)
            ]
            for row in rows:
                _check(row, seen)
        except Malformed as fault:
            yield Quarantined(line, str(fault), json.dumps(record, ensure_ascii=True, default=str)[:200])
        except UnicodeEncodeError:
            yield Quarantined(line, "holds half a surrogate pair, which is no text", "")
        else:
            seen.update(_digest(row) for row in rows)
            yield from rows


def _check(row: SourceRow, seen: set[bytes]) -> None:
    if _digest(row) in seen:
        raise Malformed(f"duplicate id {row.id!r}")
    for place, text in enumerate(row.turns):
        if not text.strip():
            raise Malformed(f"{('prompt', 'completion')[place % 2]} is empty")
        text.encode()


def _digest(row: SourceRow) -> bytes:
    return blake2b(row.id.encode(), digest_size=16).digest()


def _score(record: Record, key: str | None) -> float | None:
    value = record.get(key) if key else None
    if key is None or (isinstance(value, int | float) and math.isfinite(value)):
        return value
    raise Malformed(f"{key} is no number")


# --- files ----------------------------------------------------------------------------------------

Record = Mapping[str, Any]


def _hub(source: DataSource) -> Iterator[tuple[int, Record | Malformed]]:
    """Records of a hub dataset: from the cache if they are there, else fetched. No code of it is run."""
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
        first = next(iter(str(error).splitlines()), type(error).__name__)
        why = f"could not be read ({first})"
        fix = "check id, config and split, or fetch it on a node with network"
        raise BadInput(f"hub:{source.hub}", why=why, fix=fix) from None


def _cached(newest: Any, source: DataSource) -> Any:
    """The pinned revision; offline, `datasets` takes the newest that the cache has of any."""
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


def _saved(folder: Incoming) -> Iterator[tuple[int, Record | Malformed]]:
    """Records of a folder that `datasets` saved. Read without that library, which opens whatever file a
    record, or the state beside the tables, names."""
    if "dataset_dict.json" in folder.names():
        raise BadInput(str(folder), why="has several splits", fix=f"give one, as {folder}/train")
    line = 0
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
                    line += 1
                    yield line, record
    except (OSError, ValueError, pa.ArrowException) as error:
        raise BadInput(str(folder), why=f"is not a saved dataset ({error})", fix="save it again") from None


def _records(source: Incoming) -> Iterator[tuple[int, Record | Malformed]]:
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
            name = name.removesuffix(".gz").removesuffix(".zst")
            if not name.endswith((".jsonl", ".csv")):
                raise BadInput(
                    shown, why="is none of .jsonl, .jsonl.gz, .jsonl.zst, .csv, .parquet", fix="convert it"
                )
            yield from _csv(shown, stream) if name.endswith(".csv") else _jsonl(stream)
    except (EOFError, OSError, zlib.error) as error:
        raise BadInput(shown, why=f"is broken or cut short ({error})", fix="fetch it again") from None


class _Allowance:
    """What a compressed file may still unfold to. Raises BadInput where it unfolds further."""

    def __init__(self, shown: str, size: int) -> None:
        self.shown, self.size = shown, size
        self.left = max(UNFOLDED, MOST_UNFOLDED * size)

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            most = max(UNFOLDED, MOST_UNFOLDED * self.size) >> 20
            why = f"has {self.size} bytes and unfolds to more than {most} MB"
            raise BadInput(self.shown, why=why, fix="give the file without compression")


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


def _decompressed(file: BinaryIO, name: str, allowance: _Allowance) -> IO[bytes]:
    if name.endswith(".gz"):
        return io.BufferedReader(_Unfolded(gzip.GzipFile(fileobj=file), allowance), 1 << 20)
    if name.endswith(".zst"):
        stream = pa.input_stream(file, compression="zstd")
        return io.BufferedReader(_Unfolded(stream, allowance), 1 << 20)
    return file


def _require_few_columns(shown: str, count: int) -> None:
    if count > MAX_COLUMNS:
        raise BadInput(shown, why=f"has {count} columns", fix=f"keep at most {MAX_COLUMNS}")


def _jsonl(stream: IO[bytes]) -> Iterator[tuple[int, Record | Malformed]]:
    line = 0
    while content := stream.readline(MAX_LINE):
        line += 1
        if len(content) == MAX_LINE and not content.endswith(b"\n"):
            while (rest := stream.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                pass
            yield line, Malformed(f"is longer than {MAX_LINE >> 20} MiB")
            continue
        if not content.strip():
            continue
        try:
            record = json.loads(content.decode("utf-8"))
        except UnicodeDecodeError:
            yield line, Malformed("is not UTF-8")
        except (ValueError, RecursionError) as error:
            yield line, Malformed(f"is not JSON: {error}")
        else:
            yield line, record if isinstance(record, dict) else Malformed("is not a JSON object")


def _csv(path: str, stream: IO[bytes]) -> Iterator[tuple[int, Record | Malformed]]:
    csv.field_size_limit(MAX_LINE)
    reader = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""))
    try:
        _require_few_columns(path, len(reader.fieldnames or ()))
        for record in reader:
            whole = None not in record and None not in record.values()
            yield (
                reader.line_num,
                record if whole else Malformed("has another number of fields than the header"),
            )
    except UnicodeDecodeError:
        raise BadInput(
            path, f"line {reader.line_num}", why="is not UTF-8", fix="save the file as UTF-8"
        ) from None
    except csv.Error as error:
        raise BadInput(path, f"line {reader.line_num}", why=f"is not CSV: {error}") from None


def _parquet(path: str, file: BinaryIO, allowance: _Allowance) -> Iterator[tuple[int, Record | Malformed]]:
    line = 0
    try:
        opened = pq.ParquetFile(file)
        _require_few_columns(path, opened.metadata.num_columns)
        for batch in opened.iter_batches(batch_size=1024):
            allowance.take(batch.nbytes)
            for record in batch.to_pylist():
                line += 1
                yield line, record
    except pa.ArrowMemoryError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise BadInput(path, why=f"is not a whole Parquet file ({error})", fix="fetch it again") from None


# --- shapes of records ----------------------------------------------------------------------------


def _text(record: Record, key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise Malformed(f"{key} is missing" if value is None else f"{key} is not a text")
    return value


def _pairs(record: Record) -> Turns:
    return _text(record, "prompt"), _text(record, "completion")


def _with_context(instruction: str, context: object) -> str:
    return f"{instruction}\n\n{context}" if isinstance(context, str) and context.strip() else instruction


def _alpaca(record: Record) -> Turns:
    return _with_context(_text(record, "instruction"), record.get("input")), _text(record, "output")


def _dolly(record: Record) -> Turns:
    return _with_context(_text(record, "instruction"), record.get("context")), _text(record, "response")


def _to_the_last_answer(turns: Turns) -> Turns:
    """A question that nobody answers teaches nothing."""
    return turns[: len(turns) // 2 * 2]


def _conversation(turns: object, speaker: str, text: str, human: str, model: str) -> Turns:
    """What a system's turn says stands before the first question."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Malformed("holds no list of turns")
    system = _text(turns[0], text) if turns and turns[0].get(speaker) == "system" else ""
    spoken = turns[1:] if system else turns
    if len(spoken) < 2 or any(
        turn.get(speaker) != expected for turn, expected in zip(spoken, cycle((human, model)), strict=False)
    ):
        raise Malformed(f"is not by turns of {human} and {model}")
    first, *others = (_text(turn, text) for turn in spoken)
    return _to_the_last_answer([_with_context(system, first) if system else first, *others])


def _sharegpt(record: Record) -> Turns:
    return _conversation(record.get("conversations"), "from", "value", "human", "gpt")


def _messages(record: Record) -> Turns:
    return _conversation(record.get("messages"), "role", "content", "user", "assistant")


def _lima(record: Record) -> Turns:
    turns = record.get("conversations")
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, str) for turn in turns):
        raise Malformed("conversations is not a list of two texts or more")
    return _to_the_last_answer(turns)


def _flan(record: Record) -> Turns:
    return _text(record, "inputs"), _text(record, "targets")


def _oasst(record: Record) -> Turns:
    """Of a conversation tree the thread that takes the reply of the best rank (0) each time."""
    message = record.get("prompt")
    if not isinstance(message, dict) or not isinstance(message.get("replies"), list):
        raise Malformed("holds no tree of messages")
    thread: list[str] = []
    while message is not None:
        thread.append(_text(message, "text"))
        role = ("prompter", "assistant")[len(thread) % 2]
        replies = [
            reply
            for reply in message.get("replies") or ()
            if isinstance(reply, dict) and reply.get("role") == role and not reply.get("deleted")
        ]
        message = min(replies, key=_rank, default=None)
    if len(thread) < 2:
        raise Malformed("the tree's question has no answer")
    return _to_the_last_answer(thread)


def _rank(reply: Record) -> float:
    return math.inf if reply.get("rank") is None else float(reply["rank"])


def _natural_instructions(record: Record) -> list[Turns]:
    """A task with its definition: all its instances, each with the first of its outputs."""
    definition, instances = record.get("Definition"), record.get("Instances")
    if isinstance(definition, list):
        definition = "\n".join(definition)
    if not isinstance(definition, str) or not isinstance(instances, list):
        raise Malformed("holds no Definition or no Instances")
    rows: list[Turns] = []
    for instance in instances:
        output = instance.get("output") if isinstance(instance, dict) else None
        if not isinstance(output, list) or not output or not isinstance(output[0], str):
            raise Malformed("an instance has no output")
        rows.append((_with_context(definition, _text(instance, "input")), output[0]))
    return rows


Shape = Callable[[Record], list[Turns]]


def _each(row: Callable[[Record], Turns]) -> Shape:
    return lambda record: [row(record)]


_SHAPES: dict[str, Shape] = {
    "pairs": _each(_pairs),
    "alpaca": _each(_alpaca),
    "dolly": _each(_dolly),
    "sharegpt": _each(_sharegpt),
    "lima": _each(_lima),
    "messages": _each(_messages),
    "oasst": _each(_oasst),
    "flan": _each(_flan),
    "natural_instructions": _natural_instructions,
}


def _shape(source: DataSource) -> Shape:
    if source.template is None:
        return _SHAPES[source.format]
    # Sandboxed: an entry's template is somebody else's program.
    environment = jinja2.sandbox.SandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    try:
        prompt = environment.from_string(source.template.prompt)
        completion = environment.from_string(source.template.completion)
    except jinja2.TemplateSyntaxError as error:
        raise BadInput(source.address, "template", why=f"is not a Jinja template: {error}") from None

    def rendered(record: Record) -> Turns:
        try:
            turns = prompt.render(record), completion.render(record)
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise Malformed(f"does not fit the template: {error}") from None
        except (AttributeError, RecursionError) as error:
            raise Malformed(f"does not fit the template: {type(error).__name__}") from None
        if max(map(len, turns)) > MAX_LINE:
            raise Malformed(f"the template makes more than {MAX_LINE >> 20} MiB of it")
        return turns

    return _each(rendered)
