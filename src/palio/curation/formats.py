"""Formats of sources: functions from a record to its rows.

A function raises `Malformed` for a record that it cannot read, and never guesses: a role it does not know, a
tool's turn or two turns of one speaker in a row are faults, since a reader would lose or misplace what was
said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple, get_args

import jinja2
import jinja2.sandbox

from palio.config import DataSource, RowTemplate
from palio.curation.files import MAX_LINE, Numbered
from palio.curation.rows import Malformed, Record, Turns
from palio.errors import BadInput
from palio.limits import TooMuch

Reader = Callable[[Record], list[Turns]]
"""Returns the rows of a record, most often one."""
ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""Names of speakers that every conversation knows, in lower case."""
TOOL_ROLES = ("tool", "function", "observation", "ipython")
"""Speakers whose name begins so are tools."""


class Format(NamedTuple):
    rows: Reader
    gather: Callable[[Iterable[Numbered]], Iterator[Numbered]] | None = None
    """Makes the records that `rows` reads of those that the source has."""


def format_of(source: DataSource) -> Format:
    """Return the format of a source. Raises BadInput if its template is not Jinja."""
    if source.template is not None:
        try:
            return Format(_each(_template(source.template)))
        except (jinja2.TemplateSyntaxError, SyntaxError, RecursionError) as error:
            raise BadInput(source.address, "template", why=f"is not a Jinja template: {error}") from None
    conversation = partial(_conversation, roles=source.roles, drop_greeting=source.drop_greeting)
    formats = {
        "pairs": Format(_each(_pairs)),
        "alpaca": Format(_each(_alpaca)),
        "dolly": Format(_each(_dolly)),
        "sharegpt": Format(_each(partial(conversation, key="conversations"))),
        "lima": Format(_each(_lima)),
        "messages": Format(_each(partial(conversation, key="messages"))),
        "oasst": Format(_each(_oasst)),
        "oasst_flat": Format(_each(_oasst), _trees),
        "flan": Format(_each(_flan)),
        "natural_instructions": Format(_natural_instructions),
        "transcript": Format(_each(_transcript(source))),
        "text": Format(_each(lambda record: ("", _text(record, source.text)))),
    }
    return formats[source.format]


FORMATS: tuple[str, ...] = get_args(DataSource.model_fields["format"].annotation)
"""Names of all formats."""


def _each(row: Callable[[Record], Turns]) -> Reader:
    return lambda record: [row(record)]


def _text(record: Record, key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise Malformed(f"{key} is missing" if is_missing(value) else f"{key} is not a text")
    return value


def is_missing(value: object) -> bool:
    """Return whether a value is null, or the NaN that pandas writes for one."""
    return value is None or (isinstance(value, float) and math.isnan(value))


# --- questions and answers --------------------------------------------------------------------------------


def _pairs(record: Record) -> Turns:
    return _text(record, "prompt"), _text(record, "completion")


def _with_context(instruction: str, context: object) -> str:
    return f"{instruction}\n\n{context}" if isinstance(context, str) and context.strip() else instruction


def _after(system: object, turns: Turns) -> Turns:
    """Put what a system prompt says before the first question."""
    if not isinstance(system, str) or not system.strip():
        return turns
    return [f"{system}\n\n{turns[0]}" if turns[0].strip() else turns[0], *turns[1:]]


def _alpaca(record: Record) -> Turns:
    """Read instruction, input and output; `system` and `history` are those of LLaMA-Factory's alpaca
    format."""
    history = record.get("history") or []
    pairs = isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    if not pairs or not all(isinstance(turn, str) for pair in history for turn in pair):
        raise Malformed("history is not a list of pairs of texts")
    earlier = [turn for pair in history for turn in pair]
    question = _with_context(_text(record, "instruction"), record.get("input"))
    return _after(record.get("system"), [*earlier, question, _text(record, "output")])


def _dolly(record: Record) -> Turns:
    return _with_context(_text(record, "instruction"), record.get("context")), _text(record, "response")


def _flan(record: Record) -> Turns:
    return _text(record, "inputs"), _text(record, "targets")


def _natural_instructions(record: Record) -> list[Turns]:
    """Read a task with its definition: all its instances, each with the first of its outputs."""
    definition, instances = record.get("Definition"), record.get("Instances")
    if isinstance(definition, list):
        definition = "\n".join(map(str, definition))
    if not isinstance(definition, str) or not isinstance(instances, list):
        raise Malformed("has no Definition or no Instances")
    rows: list[Turns] = []
    for instance in instances:
        output = instance.get("output") if isinstance(instance, dict) else None
        if not isinstance(output, list) or not output or not isinstance(output[0], str):
            raise Malformed("an instance has no output")
        rows.append((_with_context(definition, _text(instance, "input")), output[0]))
    return rows


# --- conversations ----------------------------------------------------------------------------------------


def _to_the_last_answer(turns: Turns) -> Turns:
    """A question that nobody answers teaches nothing."""
    return turns[: len(turns) // 2 * 2]


def _conversation(record: Record, *, key: str, roles: Mapping[str, str], drop_greeting: bool) -> Turns:
    """Read a list of turns, each with `from` and `value` or `role` and `content`."""
    turns = record.get(key)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Malformed(f"{key} is {'missing' if is_missing(turns) else 'not a list of turns'}")
    if record.get("tools") and str(record["tools"]).strip() not in ("", "[]"):
        raise Malformed("has tools; conversations with tools are not read")
    said = []
    for number, turn in enumerate(turns, start=1):
        speaker, text = ("from", "value") if "from" in turn else ("role", "content")
        name = turn.get(speaker)
        role = _role(name, number, roles)
        if turn.get("tool_calls") or turn.get("function_call"):
            raise Malformed(f"turn {number} by {name!r} calls a tool; conversations with tools are not read")
        if role != "system" or not (is_missing(turn.get(text)) or _blank(turn.get(text))):
            said.append((number, name, role, _text(turn, text)))
    return _alternating(said, record.get("system"), drop_greeting)


def _blank(text: object) -> bool:
    return isinstance(text, str) and not text.strip()


def _role(name: object, number: int, roles: Mapping[str, str]) -> str:
    if not isinstance(name, str):
        raise Malformed(f"turn {number} names no role")
    if role := roles.get(name) or ROLES.get(name.lower()):
        return role
    if name.lower().startswith(TOOL_ROLES):
        raise Malformed(f"turn {number} is by the tool {name!r}; conversations with tools are not read")
    raise Malformed(
        f"turn {number} is by {name!r}, which is no known role; map it, as roles: {{{name}: assistant}}"
    )


def _alternating(said: list[tuple[int, object, str, str]], system: object, drop_greeting: bool) -> Turns:
    """Return the texts of turns that begin with the user's and alternate. A system turn precedes the first
    question.

    Args:
        said: number, speaker, role and text of each turn.
        system: a system prompt beside the turns.
    """
    context = [system] if isinstance(system, str) and system.strip() else []
    while said and said[0][2] == "system":
        context, said = [*context, said[0][3]], said[1:]
    if drop_greeting and said and said[0][2] == "assistant":
        said = said[1:]
    for (number, name, role, _), due in zip(said, cycle(("user", "assistant")), strict=False):
        if role != due:
            greeting = (
                "; drop_greeting: true drops a greeting" if number == said[0][0] and role != "system" else ""
            )
            raise Malformed(f"turn {number} is by {name!r} where the {due}'s is due{greeting}")
    if len(said) < 2:
        raise Malformed("has no question with an answer")
    return _to_the_last_answer(_after("\n\n".join(context), [text for *_, text in said]))


def _lima(record: Record) -> Turns:
    turns = record.get("conversations")
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, str) for turn in turns):
        raise Malformed("conversations is not a list of two texts or more")
    return _to_the_last_answer(turns)


def _transcript(source: DataSource) -> Callable[[Record], Turns]:
    """Return a reader of one text with all turns, each after its speaker's mark at the start of a line."""
    marks = source.markers.model_dump(exclude_none=True)
    names = {mark.strip(): role for role, mark in marks.items()}
    longest_first = sorted(names, key=len, reverse=True)
    mark = re.compile(rf"^[ \t]*({'|'.join(map(re.escape, longest_first))})", re.MULTILINE)

    def turns(record: Record) -> Turns:
        before, *parts = mark.split(_text(record, source.text))
        said = [
            (number, name, names[name], text.strip())
            for number, (name, text) in enumerate(zip(parts[::2], parts[1::2], strict=True), start=1)
        ]
        if not said:
            raise Malformed(f"no line of {source.text} begins with {' or '.join(map(repr, names))}")
        return _alternating(said, before.strip(), source.drop_greeting)

    return turns


# --- trees of messages ------------------------------------------------------------------------------------


def _oasst(record: Record) -> Turns:
    """Read of a tree the thread that takes the reply of the best rank (0) each time."""
    message = record.get("prompt")
    if not isinstance(message, dict) or not isinstance(message.get("replies"), list):
        raise Malformed("has no tree of messages")
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
    rank = reply.get("rank")
    return math.inf if is_missing(rank) or not isinstance(rank, int | float) else float(rank)


def _trees(messages: Iterable[Numbered]) -> Iterator[Numbered]:
    """Join messages to trees by `parent_id`. All of them are in memory; a tree has the line of its first
    message."""
    nodes: dict[object, tuple[int, dict[str, Any]]] = {}
    for line, record in messages:
        if isinstance(record, Malformed):
            yield line, record
        elif not isinstance(name := record.get("message_id"), str):
            yield line, Malformed("message_id is missing")
        elif name in nodes:
            yield line, Malformed(f"duplicate message_id {name!r}")
        else:
            nodes[name] = line, {**record, "replies": []}
    for line, message in nodes.values():
        parent = message.get("parent_id")
        if is_missing(parent) or parent == "":
            continue
        if parent in nodes and nodes[parent][1] is not message:
            nodes[parent][1]["replies"].append(message)
        else:
            yield line, Malformed(f"its parent {parent!r} is not in the source")
    for line, message in nodes.values():
        if is_missing(message.get("parent_id")) or message["parent_id"] == "":
            yield line, {**message, "prompt": message}


# --- templates --------------------------------------------------------------------------------------------


class Null(str):
    """What a template sees of a null or a NaN: an empty text, which `is none`, and is nothing in a
    condition."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return other is None or str.__eq__(self, other) is True

    __hash__ = str.__hash__


def _filled(value: Any) -> Any:
    if is_missing(value):
        return Null()
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items()}
    return [_filled(item) for item in value] if isinstance(value, list) else value


def _template(template: RowTemplate) -> Callable[[Record], Turns]:
    # Sandboxed: an entry's template is somebody else's program.
    environment = jinja2.sandbox.SandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    environment.tests["none"] = lambda value: value is None or isinstance(value, Null)
    prompt = environment.from_string(template.prompt)
    completion = environment.from_string(template.completion)

    def rendered(record: Record) -> Turns:
        values = _filled(record)
        try:
            turns = prompt.render(values), completion.render(values)
        except (MemoryError, TooMuch):
            raise
        except Exception as error:  # a template may raise anything
            said = str(error) or type(error).__name__
            raise Malformed(f"does not fit the template: {said}") from None
        if max(map(len, turns)) > MAX_LINE:
            raise Malformed(f"the template makes more than {MAX_LINE >> 20} MiB of it")
        return turns

    return rendered
