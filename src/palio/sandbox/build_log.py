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
    """Its first group, if any, is shown."""
    fix: str


NO_NETWORK = Kind(
    "no network",
    r"(?:Temporary failure|failure) in name resolution|Could not resolve|Name or service not known"
    r"|Network is unreachable|no such host|server misbehaving|dial (?:tcp|udp)[^\n]*",
    "the rules allow no network while images are built: put base images, packages and weights into the folder",
)
KINDS = (
    Kind(
        "disk full",
        r"No space left on device|Disk quota exceeded",
        "make the image smaller: fewer packages and weights, removed caches",
    ),
    Kind(
        "gated model without a token",
        r"(?:Cannot access gated repo[^\n]*|GatedRepoError|Access to model \S+ is restricted"
        r"|401 Client Error[^\n]*|Repository Not Found for url[^\n]*)",
        "no token is given to builds: put the weights into the folder, or take them from PALIO_BASE_MODEL",
    ),
    Kind(
        "package gone",
        r"(?:No matching distribution found for ([^\n]+)|Could not find a version that satisfies the"
        r" requirement (\S+)|Unable to locate package (\S+)|Package '([^']+)' has no installation candidate"
        r"|Version '[^']*' for '([^']+)' was not found|PackagesNotFoundError|404 +Not Found)",
        "pin a version that still exists, or put the package into the folder",
    ),
    Kind(
        "base image not found",
        r"(?:manifest unknown|reading manifest [^\n]*|requested access to the resource is denied"
        r"|initializing source (\S+)|creating build container: ([^\n]*)|: image not known)",
        "name one that exists, by its digest: FROM name@sha256:<digest>",
    ),
    Kind(
        "conflicting packages",
        r"(?:ResolutionImpossible|Cannot install ([^\n]+) because these package versions have conflicting)",
        "pin versions that fit together",
    ),
    Kind(
        "missing file",
        r"(?:no items matching glob|checking on sources[^\n]*|copier: stat: [^\n]*no such file or directory)",
        "COPY and ADD see the Dockerfile's own folder only: put the file there",
    ),
    Kind("invalid Dockerfile", r"(?:Unknown instruction: \S+|dockerfile parse error[^\n]*|no FROM)", "correct it"),
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
        return Reason(NO_NETWORK, _shown(log, found))
    for kind in KINDS:
        if found := re.search(kind.pattern, log, re.IGNORECASE):
            return Reason(kind, _shown(log, found))
    return Reason(OTHER, last_lines(log, 3) or "it said nothing")


def lost_network(log: str) -> bool:
    """Whether a build that had a network lost it: the machine's fault."""
    return re.search(NO_NETWORK.pattern, log[-TAIL:], re.IGNORECASE) is not None


def _shown(log: str, found: re.Match[str]) -> str:
    """The whole line of a match, printable."""
    start, end = log.rfind("\n", 0, found.start()) + 1, log.find("\n", found.end())
    return last_lines(log[start : end if end >= 0 else None], 1)
