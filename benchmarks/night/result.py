"""What a night came to: whether everything is as it must be, and what it took."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import mean

from benchmarks.chain import shared_gpus
from benchmarks.night.entries import Planned
from benchmarks.night.faults import FAULTS, Fault
from benchmarks.night.night import Night, cpu_seconds
from tests.slurm.competition import TRACKS
from tests.support.folder import WorkingFolder

from palio.errors import State
from palio.files import read_json_lines
from palio.operating.attempt import Attempt
from palio.pipeline import STEPS
from palio.provenance import canonical_json
from palio.text import duration, markdown_table

REAL = (
    "GPUs are device files; the base models have random weights; SLURM's accounting thread kills in place of "
    "cgroups; there is no accounting"
)
DIGESTS = ("inputs", "made")
"""Of a leaderboard with real steps: digests of the stages' tables, which hold log-probabilities, whose last
digits depend on the requests that were served beside."""
QUICK = "every step only writes its record (tests/support/quick.py): no training, no HELM, no server"


# --- is everything as it must be? ----------------------------------------------------------------------


def wrong(night: Night, reference: WorkingFolder) -> list[str]:
    """A line for each thing that is not as it must be."""
    return [
        *_entries(night),
        *_leaderboards(night, reference),
        *_work(night, reference),
        *(f"{event.kind}: {event.failure}" for event in night.events if event.failure),
        *(f"{kind}: not played, nothing was left to hit" for kind in night.not_played),
        *(() if night.stand_ins else _published(night)),
    ]


def _entries(night: Night) -> Iterator[str]:
    scored = {track: _scored(night.folder, track) for track in TRACKS}
    for entry in night.planned:
        if entry.role == "withdrawn" or entry.broken:
            if entry.name in scored[entry.track]:
                yield f"{entry.name} ({entry.kind}) is on the leaderboard"
        elif entry.name not in scored[entry.track]:
            yield f"{entry.name} ({entry.kind}) has no defect and is not on the leaderboard"
        if entry.broken:
            step, state, reason = night.ended.get(entry.name, ("", "", "nothing"))
            fits = step == entry.step and state == entry.state and entry.reason in reason
            if not fits:
                wanted = f"{entry.step} {entry.state} …{entry.reason}…"
                yield f"{entry.name} ({entry.kind}) ended at {step} {state}: {reason}; not {wanted}"


def _scored(folder: WorkingFolder, track: str) -> set[str]:
    """Entries on the final leaderboard: rows, or names where steps are stand-ins."""
    rows = json.loads(_board(folder, track) or '{"entries": []}')["entries"]
    return {row["entry"] if isinstance(row, dict) else row for row in rows}


def _board(folder: WorkingFolder, track: str) -> bytes:
    path = folder.path / f"results/leaderboard/{track}.json"
    return path.read_bytes() if path.exists() else b""


def _without(board: bytes, keys: Sequence[str]) -> bytes:
    """A leaderboard as it is, or without some of its keys."""
    if not board or not keys:
        return board
    return canonical_json(
        {key: value for key, value in json.loads(board).items() if key not in keys}
    ).encode()


def _leaderboards(night: Night, reference: WorkingFolder) -> Iterator[str]:
    if code := night.starts[-1].exit_code:
        yield f"the last start of the command ended with {code}"
    for track in TRACKS:
        left_out = () if night.stand_ins else DIGESTS
        mine, other = (_without(_board(folder, track), left_out) for folder in (night.folder, reference))
        if not mine or mine != other:
            yield f"the leaderboard of {track} is not the reference's"
    if due := night.folder.plan(profile="slurm"):
        yield f"still due: {sorted(due)}"


def _work(night: Night, reference: WorkingFolder) -> Iterator[str]:
    for entry in night.planned:
        folders = [folder.path / "results" / entry.track / entry.name for folder in (night.folder, reference)]
        if entry.broken or not (folders[1] / "adapter.json").exists():
            continue
        records = [json.loads((one / "adapter.json").read_text()) for one in folders]
        mine, other = (record.get("files", record) for record in records)
        if mine != other:
            yield f"{entry.name}: its adapter is not the reference's"
    for node, gpu in shared_gpus(_timed(night)):
        yield f"two steps at once on GPU {gpu} of {node}"
    if night.left:
        yield f"jobs left in the queue: {night.left}"


def _published(night: Night) -> Iterator[str]:
    """The site, and what each team may see, of broken entries too."""
    if not (night.folder.path / "public/index.html").exists():
        yield "there is no site"
    sent = night.folder.run("palio", "feedback", "--all", "--out", "feedback")
    names = {path.stem for path in (night.folder.path / "feedback").glob("*.zip")}
    if missing := {entry.name for entry in night.planned} - names:
        yield f"no feedback for {', '.join(sorted(missing))}: {sent.stderr[-300:]}"


def _timed(night: Night) -> list[Attempt]:
    """Attempts whose times can be compared: not by a moved clock, and with an end."""
    return [
        one
        for _, one in night.attempts()
        if one.ended is not None and not any(event.moved_clock_of(one) for event in night.events)
    ]


# --- what it took --------------------------------------------------------------------------------------


def lost(night: Night) -> float:
    """Count the seconds of work that was done again with the fault that hit its job. Return those of no
    fault: of a step that was ended for another reason."""
    by_step: defaultdict[tuple[str, str], list[Attempt]] = defaultdict(list)
    for entry, attempt in night.attempts():
        if not entry.broken:
            by_step[entry.name, attempt.step].append(attempt)
    other = 0.0
    for (name, _), attempts in by_step.items():
        for attempt, after in pairwise(attempts):
            if attempt.state is State.FINISHED and name == "edited":
                continue
            events = [
                event for event in night.events if attempt.job in event.jobs and event.at < after.started + 60
            ]
            end = attempt.ended or (events[-1].at if events else attempt.started)
            seconds = max(0.0, min(end - attempt.started, 3600.0))
            if events:
                events[-1].lost += seconds
            else:
                other += seconds
    return other


def survived(night: Night, defects: list[str]) -> dict[str, tuple[int, int]]:
    """By kind, how often a fault was played and survived: its entry ended as it must, or, of one that hits
    all, every entry did."""
    found: dict[str, tuple[int, int]] = {}
    for event in night.events:
        here = [
            line
            for line in defects
            if not event.entry or line.startswith((f"{event.entry} ", f"{event.entry}:"))
        ]
        played, well = found.get(event.kind, (0, 0))
        found[event.kind] = played + 1, well + (not here and not event.failure)
    return found


def table(night: Night, defects: list[str]) -> str:
    """One table of what the night took, and what in it was a stand-in."""
    other = lost(night)
    kinds = survived(night, defects)
    broken = sum(entry.broken for entry in night.planned)
    attempts = night.attempts()
    rows = [
        ("entries", f"{len(night.planned)}, {broken} of them with a defect"),
        ("starts of the command", str(len(night.starts))),
        ("wall time", f"{duration(night.seconds)}, and {duration(night.reference_seconds)} of the reference"),
        (
            "SLURM jobs",
            str(sum(start.log.count("has been submitted with SLURM jobid") for start in night.starts)),
        ),
        (
            "attempts at steps",
            f"{len(attempts)}, {sum(one.state is State.FINISHED for _, one in attempts)} finished",
        ),
        ("faults survived", f"{sum(well for _, well in kinds.values())} of {len(night.events)}"),
        *(
            (f"– {kind.kind}", _fault(night, kind, *kinds[kind.kind]))
            for kind in FAULTS
            if kind.kind in kinds
        ),
        ("work done again, not by a fault above", f"{other:.0f} s"),
        ("GPUs idle", _idle(night)),
        ("controller", _controller(night)),
        ("queries to slurmctld, a minute", _queries(night)),
        ("on disk, a scored entry", _disk(night)),
        *((f"CPU s, {what}", line) for what, line in _cpu(night)),
        (
            "leaderboards are compared",
            "whole" if night.stand_ins else f"but for their {' and '.join(DIGESTS)}",
        ),
        ("what is a stand-in", QUICK if night.stand_ins else REAL),
        ("wrong", "; ".join(defects) or "nothing"),
    ]
    return markdown_table(("of the night", "measured"), rows)


def _idle(night: Night) -> str:
    """Share of the GPUs' time, from the start of the first step on one to the end of the last. A step that
    died left no end: its GPU counts as idle."""
    steps = [one for _, one in night.attempts() if one.gpu is not None]
    timed = [one for one in _timed(night) if one.gpu is not None]
    if not timed:
        return "no step used one"
    seconds = max(one.ended or 0.0 for one in timed) - min(one.started for one in timed)
    gpus = len({(one.node, one.gpu) for one in steps})
    busy = sum(one.ended - one.started for one in steps if one.ended is not None)
    return f"{1 - busy / (seconds * gpus):.0%} of the time of {gpus} GPUs, over {duration(seconds)}"


def _fault(night: Night, kind: type[Fault], played: int, well: int) -> str:
    again = sum(event.lost for event in night.events if event.kind == kind.kind)
    return f"{well} of {played}, {again:.0f} s of work again; {kind.how}"


def _controller(night: Night) -> str:
    cpu = sum(start.cpu for start in night.starts)
    memory = max(start.memory for start in night.starts)
    return f"{cpu:.0f} CPU s with its checks of entries, peak {memory / 1e6:.0f} MB"


def _queries(night: Night) -> str:
    counts = Counter(line.split()[1] for line in night.queries.read_text().splitlines())
    minutes = night.seconds / 60
    each = ", ".join(f"{name} {count / minutes:.1f}" for name, count in counts.most_common())
    return f"{counts.total() / minutes:.1f}: {each}"


def _disk(night: Night) -> str:
    files, size = [], []
    for entry in night.planned:
        if not entry.broken and entry.role != "withdrawn":
            paths = [
                path for path in night.of(entry).path.rglob("*") if path.is_file() and not path.is_symlink()
            ]
            files.append(len(paths))
            size.append(sum({path.stat().st_ino: path.stat().st_size for path in paths}.values()))
    return f"{mean(files):.0f} files, {mean(size) / 1e6:.1f} MB"


def _cpu(night: Night) -> Iterator[tuple[str, str]]:
    """By step, CPU seconds of its own process and what it started; and of a job beside its step."""
    runs, beside = cpu_seconds(read_json_lines(night.place / "usage.jsonl"))
    order = [step.name for step in STEPS]
    for what in sorted(runs, key=lambda name: (order.index(name) if name in order else len(order), name)):
        yield what, f"{mean(map(sum, runs[what])):.1f} ({len(runs[what])} times)"
    if beside:
        yield "a SLURM job beside its step", f"{mean(beside):.1f} ({len(beside)} jobs)"


def names(entries: list[Planned]) -> str:
    return ", ".join(
        f"{count} {kind}" for kind, count in Counter(entry.kind for entry in entries).most_common()
    )
