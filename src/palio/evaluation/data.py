"""The files of a scenario's dataset: which of a folder's they are, read strictly.

A dataset folder may be laid out as people have it:

    test.csv, cm_test.tsv, data/test.jsonl           a file per split, named after it, or its folder is
    test-00000-of-00002.parquet, …                   shards: all of them
    test/algebra/1.json, test/0000.parquet           numbered files below a folder named after the split
    3.0.0/test.csv                                   versions: one must be chosen
    perturbation_by_paraphrase_test.csv, test_hard   variants: not the split, unless asked for

What is not there, or there more than once, is a `DataError` that lists what was found; files are never mixed.
Messages hold names of files and columns and numbers, never a text: the closed stage shows them.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

DATA_VARIABLE = "PALIO_HELM_DATA"
FILE_TYPES = (".parquet", ".csv", ".tsv", ".jsonl", ".json")
SPLIT_WORDS = {"train": "train", "val": "valid", "valid": "valid", "validation": "valid", "dev": "valid"}
SPLIT_WORDS |= {"test": "test"}
VARIANT_WORDS = ("hard", "ood", "ambig")
MAX_LEFT_OUT = 0.01
"""Share of a file's rows that may have a blank text; a file with more is broken."""
LEFT_OUT = "rows left out: "
"""Begins the line on standard output, so in HELM's log, that says how many there were."""

Row = Mapping[str, Any]


class DataError(ValueError):
    """A dataset's files are not as they must be. Its message quotes no text of them."""


# --- which files ------------------------------------------------------------------------------------------


def split_files(folder: Path, split: str, names: Sequence[str] = (), *, hard: bool = False) -> list[Path]:
    """Return the files of one split of a dataset.

    Args:
        folder: where the dataset lies; files of hidden folders are not part of it.
        split: train, valid or test.
        names: words of which one must be in a file's path, for a folder with several subsets.
        hard: take the variant that is called hard, instead of the split itself.

    Raises:
        DataError: there is none, there are several, or shards are missing.
    """
    wanted = [
        path
        for path in data_files(folder)
        if split_of(path, folder) == split
        and (not names or set(names) & _words(path, folder))
        and _variant(path, folder) == ("hard" if hard else "")
    ]
    what = f"{' or '.join([*names[:1], split])}{'_hard' if hard else ''}"
    return _only_set(folder, wanted, what)


def only_file(folder: Path, names: Sequence[str] = (), *, hard: bool = False) -> list[Path]:
    """Return the one file of an undivided dataset; of a divided one the test split, as `split_files`."""
    undivided = [
        path
        for path in data_files(folder)
        if split_of(path, folder) is None
        and (not names or set(names) & _words(path, folder))
        and not _variant(path, folder)
    ]
    if undivided:
        return _only_set(folder, undivided, names[0] if names else "data")
    return split_files(folder, "test", names, hard=hard)


def version_folder(folder: Path, version: str) -> Path:
    """Return the folder of a version such as 3.0.0 if the dataset has several, else the dataset's own.

    Raises:
        DataError: it has versions and this is none of them.
    """
    there = sorted({path.name for path in folder.glob("**/*.*.*") if _is_version(path)})
    if not version or not there:
        return folder
    if version not in there:
        raise DataError(f"{folder}: has the versions {', '.join(there)}; give one as version=, not {version}")
    return next(path for path in sorted(folder.glob(f"**/{version}")) if _is_version(path))


def _is_version(path: Path) -> bool:
    return path.is_dir() and re.fullmatch(r"\d+\.\d+\.\d+", path.name) is not None


def data_files(folder: Path) -> list[Path]:
    """Return all files of a known type, sorted; `folder` may be one file."""
    if folder.is_file():
        return [folder]
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in FILE_TYPES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.stem not in ("dataset_info", "dataset_infos", "dataset_dict", "state")
    ]


def split_of(path: Path, folder: Path) -> str | None:
    """Return the split that a file's name says, or else the nearest folder's."""
    for part in reversed(path.relative_to(folder).parts):
        found = {SPLIT_WORDS[word] for word in _words_of(part) if word in SPLIT_WORDS}
        if len(found) == 1:
            return found.pop()
    return None


def _variant(path: Path, folder: Path) -> str:
    words = _words(path, folder)
    if any(word.startswith("perturb") for word in words):
        return "perturbed"
    return next((word for word in VARIANT_WORDS if word in words), "")


def _words(path: Path, folder: Path) -> set[str]:
    return {word for part in path.relative_to(folder).parts for word in _words_of(part)}


def _words_of(part: str) -> list[str]:
    return re.split(r"[_.\s-]", part.lower())


def _only_set(folder: Path, files: Iterable[Path], what: str) -> list[Path]:
    """Return the files if they are one file, the shards of one, or one numbered series."""
    sets: dict[str, list[Path]] = {}
    for path in files:
        sets.setdefault(_series(path, folder), []).append(path)
    if not sets:
        there = [_series(path, folder) for path in data_files(folder)]
        found = _listed(there) if there else "no data file" if folder.exists() else "no such folder"
        raise DataError(f"{folder}: no {what} file among {', '.join(FILE_TYPES)}; found: {found}")
    if len(sets) > 1:
        fix = "keep one of them, or choose with data= or version="
        raise DataError(f"{folder}: {len(sets)} matches for the {what} file: {_listed(sorted(sets))}; {fix}")
    name, paths = next(iter(sets.items()))
    if (shards := re.search(r"-of-(\d+)", name)) and len(paths) != int(shards[1]):
        raise DataError(f"{folder}: {len(paths)} of {int(shards[1])} shards of {name}; fetch the others")
    return paths


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def _series(path: Path, folder: Path) -> str:
    """Return a name that the files of one series share; of a file on its own its path."""
    relative = path.relative_to(folder) if path != folder else Path(path.name)
    if shard := re.fullmatch(r"(.*)-\d+-of-(\d+)", path.stem):
        return relative.with_name(f"{shard[1]}-*-of-{shard[2]}{path.suffix}").as_posix()
    if path.stem.isdigit():
        split_folders = [part for part in relative.parent.parts if set(_words_of(part)) & set(SPLIT_WORDS)]
        if split_folders:
            depth = relative.parts.index(split_folders[-1]) + 1
            return Path(*relative.parts[:depth], f"*{path.suffix}").as_posix()
    return relative.as_posix()


# --- where they are ---------------------------------------------------------------------------------------


def copy_of(cache: Path, data: str) -> Path:
    """Return where a stage's store keeps the copy of a dataset: HELM's cache, or a folder beside it."""
    key = f"-{hashlib.sha256(data.encode()).hexdigest()[:12]}" if data else ""
    return cache.parent / f"{cache.name}{key}"


def dataset_folder(name: str, data: str, cache: Path) -> Path:
    """Return where a scenario's files lie: the copy in the store if it is there, else their origin."""
    copied = copy_of(cache, data)
    return copied if data_files(copied) else origin(name, data) or copied


def origin(name: str, data: str, download_to: Path | None = None) -> Path | None:
    """Return the file or folder that a dataset is taken from; None: only HELM's cache may have it.

    `data` is a path, or `org/name@commit` on the Hugging Face hub, optionally followed by `/` and a file or
    folder of it; else $PALIO_HELM_DATA/<name>, if that is set.

    Raises:
        DataError: no such folder, or a hub id without a commit.
    """
    if not data:
        root = os.environ.get(DATA_VARIABLE)
        return Path(root).expanduser() / name if root else None
    if (path := Path(data).expanduser()).exists():
        return path.resolve()
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([^/]*))?(?:/(.+))?", data)
    if hub is None or data.startswith("."):
        raise DataError(f"data={data}: no such file or folder; give one, or org/name@commit of the hub")
    address, commit, part = hub.groups()
    if not re.fullmatch("[0-9a-f]{40}", commit or ""):
        raise DataError(f"data={data}: pin the dataset, org/name@ and its 40-character commit id")
    from huggingface_hub import snapshot_download

    below = Path(
        snapshot_download(
            address,
            repo_type="dataset",
            revision=commit,
            allow_patterns=[part, f"{part}/**"] if part else None,
            local_dir=download_to,
        )
    )
    return below / part if part else below


# --- what is in them --------------------------------------------------------------------------------------


def read_rows(path: Path, bare: Sequence[str] = ()) -> Iterator[Row]:
    """Yield the rows of a Parquet, CSV, TSV, JSON or JSON-lines file.

    Args:
        bare: columns of a CSV file that may lack a header; it has one if these, or others, are named in its
            first line by words without spaces.

    Raises:
        DataError: the file is broken; a broken row is never left out.
    """
    import pyarrow as pa  # 0.3 CPU s that each Snakemake, which imports this module, need not pay
    import pyarrow.parquet as pq

    try:
        if path.suffix.lower() == ".parquet":
            for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
                yield from batch.to_pylist()
        elif path.suffix.lower() in (".csv", ".tsv"):
            yield from _csv_rows(path, "\t" if path.suffix.lower() == ".tsv" else ",", bare)
        else:
            yield from _json_rows(path)
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8; save it as UTF-8") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: is broken ({type(error).__name__}); fetch it again") from None


def _csv_rows(path: Path, delimiter: str, bare: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(1 << 24)
    header: Sequence[str] = ()
    line = 1
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            for fields in reader:
                if not header and bare and any(" " in field for field in fields):
                    header = bare
                if not header:
                    header = fields
                elif fields:
                    if len(fields) != len(header):
                        raise DataError(
                            f"{path}: line {line}: {len(fields)} fields, the header has {len(header)};"
                            " mend the row, or fetch the file again"
                        )
                    yield dict(zip(header, fields, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            closed = "a quote opened here is never closed" if "unexpected end" in str(error) else str(error)
            raise DataError(f"{path}: line {line}: {closed}; mend it, or save the file as .jsonl") from None


def _json_rows(path: Path) -> Iterator[Row]:
    """Yield the objects of an array, of a file that is one object, or of lines, which only \\n ends."""
    text = path.read_text(encoding="utf-8-sig")
    whole: Any = None
    if path.suffix.lower() == ".json" or text.lstrip().startswith("["):
        try:
            whole = json.loads(text)
        except ValueError as error:
            if text.lstrip().startswith("["):
                raise DataError(f"{path}: is not JSON ({_place(error)}); fetch it again") from None
    if whole is not None:
        yield from (
            _object(path, number, row)
            for number, row in enumerate(whole if isinstance(whole, list) else [whole], 1)
        )
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}: line {number}: not JSON ({_place(error)}); mend it") from None
            yield _object(path, number, row)


def _place(error: ValueError) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else "a value is out of range"


def _object(path: Path, number: int, row: Any) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{path}: row {number} is not an object with named columns")
    return row


def field(row: Row, *names: str) -> Any:
    """Return the value of the first of the columns that the row has; None if it is null or NaN.

    Raises:
        DataError: it has none of the columns.
    """
    for name in names:
        if name in row:
            value = row[name]
            return None if isinstance(value, float) and math.isnan(value) else value
    shown = ", ".join(str(name) if re.fullmatch(r"\w{1,30}", str(name)) else "(a text)" for name in row)
    raise DataError(f"a row lacks the column {' or '.join(names)}; it has {shown}")


def text_field(row: Row, *names: str) -> str:
    """Return a text, empty where it is null. Raises DataError if it is something else than a text."""
    value = field(row, *names)
    if value is not None and not isinstance(value, str):
        raise DataError(f"the column {names[0]} holds a {type(value).__name__}, not a text")
    return value or ""


def label_field(row: Row, *names: str) -> int:
    """Return a label, 0 or 1, in whatever type. Raises DataError if it is neither."""
    value = field(row, *names)
    if str(value).strip().lower() in ("0", "0.0", "false"):
        return 0
    if str(value).strip().lower() in ("1", "1.0", "true"):
        return 1
    raise DataError(f"the column {names[0]} holds something else than 0 and 1")


def blank_rows(path: Path, blank: int, total: int) -> None:
    """Say how many rows of a file had no text and were left out.

    Raises:
        DataError: more than `MAX_LEFT_OUT` of them.
    """
    if blank > max(1, MAX_LEFT_OUT * total):
        raise DataError(f"{path}: {blank} of {total} rows have no text; fetch it again")
    if blank:
        print(f"{LEFT_OUT}{path.name}: {blank} of {total} have no text", flush=True)
