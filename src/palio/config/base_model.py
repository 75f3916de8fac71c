"""The base model that an entry starts from."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import model_validator

from palio.config.common import Strict
from palio.provenance import fingerprint


class BaseModelSource(Strict):
    """Where an entry's base model comes from: exactly one of `hub`, `path`, `gguf`."""

    hub: str | None = None
    """`org/name@revision` on the Hugging Face hub; the revision is a 40-character commit id."""
    path: str | None = None
    """A folder in Hugging Face format, readable from every node."""
    gguf: str | None = None
    """`package/file.gguf` inside an installed Python package; converted once to safetensors."""

    @model_validator(mode="after")
    def _one_source(self) -> BaseModelSource:
        given = [name for name in ("hub", "path", "gguf") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError("give exactly one of hub, path, gguf")
        if self.hub and not re.fullmatch(r"[\w.-]+/[\w.-]+(@\S+)?", self.hub):
            raise ValueError("write hub as org/name@revision")
        if self.gguf and "/" not in self.gguf:
            raise ValueError("write gguf as package/file.gguf")
        return self

    @property
    def kind(self) -> str:
        return "hub" if self.hub else "path" if self.path else "gguf"

    @property
    def address(self) -> str:
        """`kind:value` without the revision, which the rule set's approved patterns match."""
        value = self.hub or self.path or self.gguf or ""
        return f"{self.kind}:{value.partition('@')[0] if self.hub else value}"

    @property
    def revision(self) -> str | None:
        return self.hub.partition("@")[2] or None if self.hub else None

    @property
    def id(self) -> str:
        """A readable folder name, different for every source and revision."""
        stem = Path(self.address.partition(":")[2]).with_suffix("").as_posix() if self.gguf else self.address
        name = re.sub(r"[^A-Za-z0-9.]+", "-", stem.partition(":")[2] or stem).strip("-.")
        return f"{name}-{fingerprint(self.model_dump())[:8]}"
