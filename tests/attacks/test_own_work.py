"""Attacks on Palio's own work: patterns, templates and files that would take hours or all memory. Each ends
in seconds, as the entry's fault, with the key."""

from __future__ import annotations

import faulthandler
import gzip
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palio.curation import files, reading
from palio.curation.operations import drop_matches
from palio.errors import BadInput, Crashed, OutOfMemory, RuleViolation, TimeLimit
from palio.limits import TooMuch, bounded, in_child
from tests.support.curation import curate, recipe, write_jsonl

SECONDS = 20.0
"""With the CPU time of `palio.limits` in it, on a busy machine."""
LETTERS = "a" * 5000 + "!"


@pytest.fixture(autouse=True)
def in_seconds() -> Iterator[None]:
    began = time.process_time()
    yield
    assert time.process_time() - began < SECONDS, "CPU time"


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return str(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": LETTERS, "completion": "yes"}] * 3))


# --- regular expressions -----------------------------------------------------------------------------------

PATTERNS = [r"(a+)+$", r"(a|a)*$", r"(a|aa)+$", r"(.*a){25}$", r"(?:a?){40}a{40}b", r"(\w*\s?)*#"]


def test_so_is_one_that_a_field_of_the_record_is_held_to(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": "a", "tag": LETTERS}])
    given = recipe([{"path": str(path)}], {"op": "keep_where", "field": "tag", "matches": r"(a+)+$"})
    with pytest.raises(BadInput, match=r"operations\.0 is 'keep_where': takes too much"):
        curate(given, tmp_path / "dataset")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_catastrophic_pattern_is_named_with_its_operation(tmp_path: Path, rows: str, pattern: str) -> None:
    given = recipe([{"path": rows}], {"op": "drop_matches", "patterns": ["^zz", pattern]})
    with pytest.raises(BadInput, match=r"dataset: operations\.0 is 'drop_matches': takes too much: item 1 "):
        curate(given, tmp_path / "dataset")


def test_a_replacement_that_backtracks_without_end_is_named(tmp_path: Path, rows: str) -> None:
    given = recipe([{"path": rows}], "clean_markup", {"op": "replace_matches", "pattern": r"(a+)+$"})
    with pytest.raises(BadInput, match=r"operations\.1 is 'replace_matches': takes too much"):
        curate(given, tmp_path / "dataset")


def test_texts_that_double_with_each_operation_end_at_the_memory_allowed(tmp_path: Path, rows: str) -> None:
    double = {"op": "replace_matches", "pattern": "a", "by": "a" * 1000}
    with pytest.raises(BadInput, match=r"operations\.\d is 'replace_matches': takes too much: .* memory"):
        curate(recipe([{"path": rows}], *[double] * 4), tmp_path / "dataset")


def test_a_long_replacement_is_refused_when_it_is_read(rows: str) -> None:
    with pytest.raises(BadInput, match=r"operations\.0\.by"):
        recipe([{"path": rows}], {"op": "replace_matches", "pattern": "a", "by": "x" * 1001})


def test_a_pattern_that_is_slow_on_each_of_many_rows_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drop_matches, "bounded", partial(bounded, seconds=2, total=2))
    many = [{"prompt": f"{number} {'a' * 20}!", "completion": "yes"} for number in range(300)]
    path = write_jsonl(tmp_path / "rows.jsonl", many)
    given = recipe([{"path": str(path)}], {"op": "drop_matches", "patterns": [r"(a+)+c"]})
    with pytest.raises(BadInput, match=r"the items up to \d+ take more than 2 s"):
        curate(given, tmp_path / "dataset")


# --- templates ---------------------------------------------------------------------------------------------

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HUNGRY = ["{{ 'x' * 10**11 }}", "{{ 'x'|center(10**11) }}", "{{ '%99999999999d' % 1 }}"]


@pytest.mark.parametrize("text", [LOOP, "{{ 9 ** (9 ** 9) }}", *HUNGRY])
def test_a_template_without_end_is_named(tmp_path: Path, rows: str, text: str) -> None:
    template = {"prompt": text + " {{ prompt }}", "completion": "{{ completion }}"}
    with pytest.raises(BadInput, match=rf"{rows}: (template|line 1)"):
        curate(recipe([{"path": rows, "template": template}]), tmp_path / "dataset")


@pytest.mark.parametrize(
    "text",
    [
        "{{ 'x' * 20000000 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 1 / 0 }}",
        "{{ [][5].x }}",
        "{% include '/etc/passwd' %}",
        "{{ prompt.nothing.at.all }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_a_template_that_fails_quarantines_its_records(tmp_path: Path, rows: str, text: str) -> None:
    template = {"prompt": text, "completion": "{{ completion }}"}
    with pytest.raises(BadInput, match=r"3 of 3 lines are malformed"):
        curate(recipe([{"path": rows, "template": template}]), tmp_path / "dataset")


# --- files that unfold -------------------------------------------------------------------------------------


def gz(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for _ in range(100):
            stream.write(b"x" * (1 << 20))
    return path


def gz_of_lines(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for _ in range(20):
            stream.write(b"{}\n" * (1 << 18))
    return path


def zst(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl.zst"
    with pa.output_stream(path, compression="zstd") as stream:
        for _ in range(100):
            stream.write(b"x" * (1 << 20))
    return path


def csv_gz(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(b"prompt,completion\n")
        for _ in range(100):
            stream.write(b"x" * (1 << 20))
    return path


def parquet_of(tmp_path: Path, texts: pa.Array, **columns: Any) -> Path:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": texts, "completion": texts, **columns}), path, compression="zstd")
    return path


def parquet(tmp_path: Path) -> Path:
    return parquet_of(tmp_path, pa.array(["x" * (1 << 16)] * 2000))


def wide_parquet(tmp_path: Path) -> Path:
    columns = {f"c{number}": pa.array([1]) for number in range(2000)}
    return parquet_of(tmp_path, pa.array(["x"]), **columns)


def arrow(tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    table = pa.table({"prompt": ["x" * (1 << 16)] * 2000, "completion": ["y"] * 2000})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(folder / "a.arrow", table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=500)
    return folder


BOMBS: list[Callable[[Path], Path]] = [gz, gz_of_lines, zst, csv_gz, parquet, wide_parquet, arrow]


@pytest.mark.parametrize("make", BOMBS, ids=lambda make: make.__name__)
def test_a_file_that_unfolds_beyond_measure_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Path]
) -> None:
    monkeypatch.setattr(files, "UNFOLDED", 4 << 20)
    monkeypatch.setattr(files, "MOST_UNFOLDED", 2)
    path = make(tmp_path)
    with pytest.raises(BadInput, match=r"unfolds to more than \d+ MB|has \d+ columns|malformed") as stop:
        curate(recipe([{"path": str(path)}]), tmp_path / "dataset")
    assert str(path) in str(stop.value)


def test_a_parquet_of_a_thousand_bytes_does_not_take_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "bounded", partial(bounded, memory=1 << 30))
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 1024, pa.int32()), pa.array(["x" * (30 << 20)]))
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": texts, "completion": texts}), path, compression="zstd")
    assert path.stat().st_size < 1 << 20
    with pytest.raises(BadInput, match=r"rows\.parquet"):
        curate(recipe([{"path": str(path)}]), tmp_path / "dataset")


def test_a_file_of_nothing_but_broken_lines_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MANY_MALFORMED", 100)
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n" * 100_000)
    with pytest.raises(BadInput, match="100 of 100 lines are malformed"):
        curate(recipe([{"path": str(path)}]), tmp_path / "dataset")


# --- a step as a whole -------------------------------------------------------------------------------------

ENOUGH = 4 << 30


def allocate() -> None:
    bytearray(100 << 30)


def abort() -> None:
    faulthandler.disable()  # pytest's handler would report this abort as a fault
    os.abort()


def sleep() -> None:
    time.sleep(60)


@pytest.mark.parametrize(
    ("work", "seconds", "named"),
    [(allocate, 60, OutOfMemory), (abort, 60, Crashed), (sleep, 0.5, TimeLimit)],
)
def test_a_step_over_the_limits_of_its_job_has_a_state(
    work: Callable[[], None], seconds: float, named: type[Exception]
) -> None:
    with pytest.raises(named):
        in_child(work, memory=ENOUGH, seconds=seconds)


def test_what_a_step_in_a_child_raises_is_raised_here() -> None:
    def refuse() -> None:
        raise BadInput("entry", "key", 1, why="is wrong", fix="correct it")

    with pytest.raises(BadInput, match="entry: key is 1: is wrong; correct it"):
        in_child(refuse, memory=ENOUGH, seconds=60)
    with pytest.raises(RuleViolation, match="no; do"):
        in_child(lambda: (_ for _ in ()).throw(RuleViolation("no", "do")), memory=ENOUGH, seconds=60)


def test_a_watch_leaves_no_timer_and_no_handler() -> None:
    before = signal.getsignal(signal.SIGPROF)
    with pytest.raises(TooMuch), bounded(seconds=0.2) as watched:
        for _ in watched([1]):
            while True:
                pass
    assert signal.getsignal(signal.SIGPROF) == before
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
