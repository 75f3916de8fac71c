"""One operation applied to the rows, batch by batch, from files to files.

    <folder>/00007.notes.arrow   what an operation that judges a row by all the others noted of batch 7
    <folder>/reasons.arrow       its judgement, batch by batch; the notes go then
    <folder>/00007.arrow         what became of batch 7: rows kept, rows dropped with reasons, an account

A file is there or is not. Whoever finds it missing makes it, and everybody makes the same: processes of one
machine, jobs of several, the run after a crash. So none of that is part of the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from palio.config import ByAllRows, Operation
from palio.curation.dataset import EXAMPLES
from palio.curation.operations import BY_ALL_ROWS, ROW_BY_ROW
from palio.curation.rows import ROW, Batch, Surroundings, Verdict, asked, shortened, texts_of
from palio.curation.store import Stored, batch_file, read_batch, write_batches
from palio.records import OperationReport

_REASON = pa.schema([pa.field("reason", pa.string())])
_OUTCOME = ROW.append(_REASON.field("reason"))
_KEPT, _DROPPED = 0, 1
_ACCOUNT = b"account"


@dataclass(frozen=True)
class Step:
    place: int
    """In the recipe, from 0."""
    operation: Operation
    rows: Path
    """Folder of the step before, or of the sources."""
    folder: Path
    around: Surroundings

    @property
    def name(self) -> str:
        return f"{self.place + 1} {self.operation.op}"

    @property
    def by_all_rows(self) -> bool:
        return isinstance(self.operation, ByAllRows)

    @property
    def judged(self) -> bool:
        return self._reasons in self._made()

    def without_notes(self, batches: Iterable[int]) -> list[int]:
        made = self._made()
        return [number for number in batches if self._notes(number) not in made]

    def unapplied(self, batches: Iterable[int]) -> list[int]:
        made = self._made()
        return [number for number in batches if batch_file(self.folder, number) not in made]

    def note(self, number: int) -> int:
        """Take notes of a batch; returns its number of rows."""
        batch = self._batch(number)
        noted = BY_ALL_ROWS[self.operation.op].note(self.operation, batch, self.around)
        write_batches(self._notes(number), noted.schema, [noted])
        return len(batch)

    def judge(self, batches: Sequence[int]) -> None:
        """Judge all rows by the notes of all batches."""
        files = [self._notes(number) for number in batches]
        reasons = BY_ALL_ROWS[self.operation.op].judge(self.operation, Stored(files), self.around)
        judged = (pa.record_batch([pa.array(each, pa.string())], schema=_REASON) for each in reasons)
        write_batches(self._reasons, _REASON, judged)
        for file in files:
            file.unlink()

    def apply(self, number: int) -> int:
        """Carry a verdict out on a batch; returns its number of rows."""
        batch = self._batch(number)
        if self.by_all_rows:
            verdict = Verdict(read_batch(self._reasons, number)["reason"].to_pylist())
        else:
            verdict = ROW_BY_ROW[self.operation.op](self.operation, batch, self.around)
        kept, dropped, account = self._carried_out(batch.table, verdict)
        schema = _OUTCOME.with_metadata({_ACCOUNT: account.model_dump_json()})
        write_batches(batch_file(self.folder, number), schema, [kept, dropped])
        return len(batch)

    def dropped(self, batches: Iterable[int]) -> Stored:
        """Rows as they came in, and a column `reason`."""
        return Stored([batch_file(self.folder, number) for number in batches], _DROPPED)

    def report(self, batches: Iterable[int]) -> OperationReport:
        rows_in = rows_out = changed = 0
        by_source: Counter[str] = Counter()
        examples: list[str] = []
        for number in batches:
            file = batch_file(self.folder, number)
            with pa.memory_map(str(file)) as mapped, pa.ipc.open_file(mapped) as reader:
                account = OperationReport.model_validate_json(reader.schema.metadata[_ACCOUNT])
            rows_in += account.rows_in
            rows_out += account.rows_out
            changed += account.changed
            by_source.update(account.dropped_by_source)
            examples += account.examples[: EXAMPLES - len(examples)]
        return self._report(rows_in, rows_out, changed, by_source, examples)

    def _batch(self, number: int) -> Batch:
        return Batch(read_batch(batch_file(self.rows, number), _KEPT).select(ROW.names))

    def _made(self) -> set[Path]:
        """Listed, not asked for one by one: so a network file system shows what other nodes have made."""
        return set(self.folder.glob("*.arrow"))

    def _notes(self, number: int) -> Path:
        return self.folder / f"{number:05}.notes.arrow"

    @property
    def _reasons(self) -> Path:
        return self.folder / "reasons.arrow"

    def _carried_out(
        self, before: pa.RecordBatch, verdict: Verdict
    ) -> tuple[pa.RecordBatch, pa.RecordBatch, OperationReport]:
        """The rows kept, rewritten where the verdict rewrites; the rows dropped, as they came in; and the
        account of both."""
        reasons = pa.array(verdict.reasons, pa.string())
        keep = pc.is_null(reasons)
        dropped = _outcome(before, reasons).filter(pc.invert(keep))
        kept = _outcome(verdict.rewritten or before, reasons).filter(keep)
        shown = dropped.slice(0, EXAMPLES).to_pylist()
        examples = [
            f"{row['reason']}: {shortened(asked(row))} → {shortened(row['completion'], 40)}" for row in shown
        ]
        changed = 0
        if verdict.rewritten:
            changed, rewritten = _rewritten(before.filter(keep), kept)
            examples += rewritten[: EXAMPLES - len(examples)]
        by_source = Counter(dropped["source"].to_pylist())
        return kept, dropped, self._report(before.num_rows, kept.num_rows, changed, by_source, examples)

    def _report(
        self, rows_in: int, rows_out: int, changed: int, by_source: Counter[str], examples: list[str]
    ) -> OperationReport:
        return OperationReport(
            op=self.operation.op,
            settings=self.operation.model_dump(mode="json", exclude={"op"}),
            rows_in=rows_in,
            rows_out=rows_out,
            changed=changed,
            dropped_by_source=dict(sorted(by_source.items())),
            examples=examples,
        )


def _outcome(rows: pa.RecordBatch, reasons: pa.Array) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([*rows.columns, reasons], schema=_OUTCOME)


def _rewritten(before: pa.RecordBatch, after: pa.RecordBatch) -> tuple[int, list[str]]:
    """How many rows differ, and the first turn that does, of the first of them."""
    differs = pc.not_equal(texts_of(before), texts_of(after))
    old, new = (Batch(rows.filter(differs).slice(0, EXAMPLES)).turns for rows in (before, after))
    examples = []
    for pairs in map(zip, old, new):
        one, other = next((one, other) for one, other in pairs if one != other)
        examples.append(f"{ascii(one)[:80]} → {ascii(other)[:80]}")
    return pc.sum(differs).as_py() or 0, examples
