"""The base classes of all records, and how one is read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from palio.errors import BadInput
from palio.provenance import write_json


class Part(BaseModel):
    """A piece of a record: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Record(Part):
    """A JSON file that one step writes and others read."""

    schema_version: Literal[1] = 1
    """Changes when the meaning of a field does."""

    def write(self, path: Path) -> None:
        """Write the record as JSON, atomically."""
        write_json(path, self.model_dump(mode="json"))


class TrackRecord(Record):
    """A record about one track of a competition."""

    competition: str
    """Competition id."""
    track: str
    """Track id."""


class Made(Part):
    """What a record was made with and from. `palio.planning` compares it with the config."""

    settings: dict[str, str]
    """Fingerprints of the settings of its step and of every step before it that decides its content."""
    limits: str = ""
    """Fingerprint of the limits, which decide only where an unfinished step ended."""
    inputs: dict[str, str] = {}
    """Identities of the records and handed-in files that the step read."""


class EntryRecord(TrackRecord):
    """A record about one entry of a track."""

    entry: str
    """Entry id."""
    made: Made | None = None
    """What it was made with; None until its step has ended."""


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_record(model: type[AnyRecord], path: Path) -> AnyRecord:
    """Read a record. Raises BadInput if it does not exist or does not match `model`."""
    try:
        return model.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(path, why="no such record", fix="run the step that makes it") from None
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not text"
        raise BadInput(path, why=f"cannot be read ({why})", fix="give the record's file") from None
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise BadInput(path, key, why=fault["msg"], fix="run the step again") from None
