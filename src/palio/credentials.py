"""Tokens and keys in a team's files, by the forms that their issuers document.

Packages and releases are public, and half of the Dockerfiles of 2023 held a token of the hub. What is found
is named by file, line and kind, and never shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from palio.incoming import Incoming

KINDS = {
    "Hugging Face token": rb"hf_[A-Za-z0-9]{30,}",
    "GitHub token": rb"gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60,}",
    "OpenAI or Anthropic key": rb"sk-[A-Za-z0-9_-]{32,}",
    "AWS access key": rb"AKIA[0-9A-Z]{16}",
    "Google API key": rb"AIza[A-Za-z0-9_-]{35}",
    "Slack token": rb"xox[abpr]-[A-Za-z0-9-]{20,}",
    "Weights & Biases key": rb"(?i:wandb)[^\n]{0,60}?(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])",
    "private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
_PATTERN = re.compile(
    rb"(?<![A-Za-z0-9])(?:"
    + b"|".join(b"(?P<k%d>%s)" % (place, pattern) for place, pattern in enumerate(KINDS.values()))
    + b")"
)
PLACEHOLDER = 8
"""Different characters that a token has at least: `hf_xxxxxxxx…` is none."""
TEXT_BYTES = 4 << 20
"""The most that a file with code or settings has; weights are not searched."""
FIX = "remove it, and revoke it where it was made: packages and releases are public"


@dataclass(frozen=True)
class Credential:
    kind: str
    line: int
    """Counts from 1."""

    @property
    def why(self) -> str:
        return f"line {self.line} holds what looks like a {self.kind}"


def credentials(content: bytes) -> Iterator[Credential]:
    """Yield what looks like a credential in a file's content."""
    for match in _PATTERN.finditer(content):
        if len(set(match[0])) >= PLACEHOLDER:
            kind = list(KINDS)[int((match.lastgroup or "k0")[1:])]
            yield Credential(kind, content.count(b"\n", 0, match.start()) + 1)


def credentials_in(given: Incoming) -> Iterator[tuple[Incoming, Credential]]:
    """Yield the first credential of every file that `given` is or holds. Raises RuleViolation for a link."""
    for file in given.files() if given.is_folder() else (given,):
        if file.size() <= TEXT_BYTES and (found := next(credentials(file.read()), None)):
            yield file, found
