"""Why a Dockerfile could not be built, by kind, from the log of its build.

Over half of the 247 Dockerfiles of 2023 did not build: packages without a version that had moved on, base
images and models that were gone or gated. What is known is named with what to change; all else shows the last
lines.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from palio.text import last_lines

TAIL = 1 << 16
"""Bytes at the end of a log that are looked at."""


class Kind(NamedTuple):
    name: str
    pattern: str
    """What it matches is shown."""
    fix: str


MEMORY = "memory full"
_UNREACHABLE = (
    r"Temporary failure (?:in name resolution|resolving)[^\n]*|Network is unreachable|server misbehaving"
    r"|i/o timeout"
)
NO_NETWORK = Kind(
    "no network",
    rf"[^\n]*(?:{_UNREACHABLE}|no such host|Could not resolve[^\n]*|Name or service not known)",
    "the rules allow a build no network: put base images, packages and weights into the folder",
)
KINDS = (
    Kind(
        "disk full",
        r"No space left on device|Disk quota exceeded",
        "make the image smaller: fewer packages and weights, removed caches",
    ),
    Kind(
        MEMORY,
        r"MemoryError[^\n]*|Cannot allocate memory|\bKilled\b|exit status 137",
        "build with less memory at once, e.g. MAX_JOBS=1",
    ),
    Kind(
        "gated model without a token",
        r"Cannot access gated repo[^\n]*|GatedRepoError[^\n]*|Access to model \S+ is restricted"
        r"|401 Client Error[^\n]*|Repository Not Found for url[^\n]*",
        "no token is given to builds: put the weights into the folder, or take them from PALIO_BASE_MODEL",
    ),
    Kind(
        "certificate refused",
        r"CERTIFICATE_VERIFY_FAILED|x509: certificate [^\n]*|SSL certificate problem[^\n]*",
        "start from a newer base image; if it is new, the organizer's network has a certificate of its own",
    ),
    Kind(
        "conflicting packages",
        r"ResolutionImpossible|Cannot install ([^\n]+) because these package versions have conflicting",
        "pin versions that fit together",
    ),
    Kind(
        "package gone",
        r"No matching distribution found for [^\n]+|Unable to locate package \S+"
        r"|Could not find a version that satisfies the requirement \S+"
        r"|Package '?\S+ has no installation candidate|Version \S+ for \S+ was not found"
        r"|PackagesNotFoundError[^\n]*|[^\n]*\b404 +Not Found[^\n]*",
        "pin a version that still exists, or put the package into the folder",
    ),
    Kind(
        "missing file",
        r"no items matching glob[^\n]*|copier: stat: [^\n]*no such file or directory",
        "COPY and ADD see the Dockerfile's own folder only: put the file there",
    ),
    Kind(
        "base image not found",
        r"creating build container: [^\n]*",
        "name one that exists, by its digest: FROM name@sha256:<digest>",
    ),
    Kind(
        "invalid Dockerfile",
        r"Unknown instruction: \S+|dockerfile parse error[^\n]*|no FROM statement found|unexpected end of",
        "correct it",
    ),
)
OTHER = Kind("a command failed", r"", "run its last command by hand in the same base image")


@dataclass(frozen=True)
class Reason:
    kind: Kind
    said: str

    def __str__(self) -> str:
        return f"the image could not be built ({self.kind.name}): {self.said}; {self.kind.fix}"


def reason(log: str, *, network: bool) -> Reason:
    """Return why a build failed. `network`: whether it had one."""
    log = log[-TAIL:]
    if not network and (found := re.search(NO_NETWORK.pattern, log, re.IGNORECASE)):
        return Reason(NO_NETWORK, last_lines(found[0], 1))
    for kind in KINDS:
        if found := re.search(kind.pattern, log, re.IGNORECASE):
            return Reason(kind, last_lines(found[0], 1))
    said = "\n".join(line for line in log.splitlines() if not line.startswith("subprocess exited"))
    return Reason(OTHER, last_lines(said, 3) or "it said nothing")


def lost_network(log: str) -> bool:
    """Whether a build that had a network lost it: the machine's fault."""
    return re.search(_UNREACHABLE, log[-TAIL:], re.IGNORECASE) is not None
