"""A source before it is one: its first records as the file has them, what format they look like, and what to
write.

Formats are not guessed from names: the readers that curation uses are tried on the first records.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from palio.config import DataSource, parse
from palio.curation.files import Numbered
from palio.curation.formats import FORMATS, format_of, is_missing
from palio.curation.rows import Malformed, Record, shortened
from palio.curation.source import source_records
from palio.errors import BadInput
from palio.markup import visible

TRIED = 100
"""Records that the formats are tried on."""
LINE = 200
"""Characters shown of a line."""
LIKE_PROMPTS = (
    "question",
    "instruction",
    "prompt",
    "query",
    "problem",
    "input",
    "dialogue",
    "article",
    "text",
)
LIKE_COMPLETIONS = (
    *("answer", "response", "completion", "output", "solution", "target", "summary", "chosen", "label"),
)
"""Parts of keys that are likely to hold a question or an answer, the likeliest first."""


class Trial(NamedTuple):
    """One format on the first records."""

    settings: dict[str, str]
    """What the entry would say."""
    read: int
    """Records that give rows; of messages, trees."""
    faults: Counter[str]
    """Why the others do not, and how often."""


def raw_lines(address: str, shown: int = 3) -> Iterator[str]:
    """Yield lines about a source: a file, a saved folder or `hub:org/name@revision`.

    Raises BadInput, RuleViolation: it cannot be read.
    """
    where = {"hub": address.removeprefix("hub:")} if address.startswith("hub:") else {"path": address}
    source = parse(DataSource, {"licence": "", **where}, address)
    records = list(islice(source_records(source, ()), TRIED))
    if not records:
        raise BadInput(address, why="has no records", fix="put rows into it, or correct the path")
    whole = [record for _, record in records if not isinstance(record, Malformed)]
    for line, record in records[:shown]:
        broken = isinstance(record, Malformed)
        text = str(record) if broken else json.dumps(record, indent=2, default=str, ensure_ascii=False)
        parts = (part if len(part) < LINE else f"{part[:LINE]}…" for part in text.split("\n"))
        yield f"--- {line}"
        yield visible("\n".join(parts))
    yield f"--- the first {len(records)} records, {len(records) - len(whole)} of them broken"
    yield from _keys(whole)
    best = _best(whole, records)
    if best is None:
        yield "looks like no known format; a template says which keys are prompt and completion:"
        yield from _snippet(where, _template(whole))
        return
    yield f"looks like {best.settings['format']}: {best.read} of {len(whole)} records can be read"
    for reason, count in best.faults.most_common(5):
        yield visible(f"  {count} not: {reason}")
    yield "in the entry:"
    yield from _snippet(where, [f"{key}: {value}" for key, value in best.settings.items()])


def _keys(records: Sequence[Record]) -> Iterator[str]:
    """Yield a line for each key: its types, how often it is missing, an example."""
    for key in _keys_of(records):
        values = [record.get(key) for record in records]
        given = [value for value in values if not is_missing(value)]
        kinds = ", ".join(sorted({type(value).__name__ for value in given})) or "null"
        missing = f", missing in {len(values) - len(given)}" if len(given) < len(values) else ""
        example = shortened(json.dumps(given[0], default=str, ensure_ascii=False), 60) if given else ""
        yield visible(f"  {key}: {kinds}{missing} {example}".rstrip())


def _keys_of(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(str(key) for record in records for key in record))


def _best(records: Sequence[Record], numbered: Sequence[Numbered]) -> Trial | None:
    """Return the format that reads most records, of several the first; None if none reads half of them."""
    trials = []
    for name in (name for name in FORMATS if name not in ("transcript", "text")):
        trials.append(_trial({"format": name}, numbered))
    keys = _keys_of(records)
    trials += [_trial({"format": "transcript", "text": key}, numbered) for key in keys]
    if not any(trial.read for trial in trials) and keys == ["text"]:
        trials.append(_trial({"format": "text"}, numbered))
    best = max(trials, key=lambda trial: trial.read)
    if best.read:
        return best
    # Conversations none of which can be read are recognised by the only fault that they have then.
    talks = [trial for trial in trials if any(fault.startswith("turn ") for fault in trial.faults)]
    return talks[0] if talks else None


def _trial(settings: dict[str, str], records: Sequence[Numbered]) -> Trial:
    rows_of, gather = format_of(DataSource.model_validate({"path": "x", "licence": "", **settings}))
    read, faults = 0, Counter[str]()
    for _, record in gather(records) if gather else records:
        try:
            if isinstance(record, Malformed):
                raise record
            read += all(text.strip() for row in rows_of(record) for text in row[-1:])
        except Malformed as fault:
            faults[str(fault)] += 1
    if settings.get("text") == "text":
        settings.pop("text")
    return Trial(settings, read, faults)


def _template(records: Sequence[Record]) -> list[str]:
    keys = [key for key in _keys_of(records) if key.isidentifier()]
    prompt = _likely(keys, LIKE_PROMPTS) or next(iter(keys), "question")
    completion = _likely([key for key in keys if key != prompt], LIKE_COMPLETIONS) or next(
        (key for key in keys if key != prompt), "answer"
    )
    return ["template:", f'  prompt: "{{{{ {prompt} }}}}"', f'  completion: " {{{{ {completion} }}}}"']


def _likely(keys: Sequence[str], parts: Sequence[str]) -> str | None:
    exact = (key for part in parts for key in keys if key.lower() in (part, part[0]))
    inside = (key for part in parts for key in keys if part in key.lower())
    return next(exact, None) or next(inside, None)


def _snippet(where: dict[str, str], settings: Sequence[str]) -> Iterator[str]:
    ((key, address),) = where.items()
    for number, line in enumerate([f"{key}: {address}", *settings, "licence: <SPDX id>"]):
        yield ("  - " if number == 0 else "    ") + line
