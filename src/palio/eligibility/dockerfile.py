"""What a Dockerfile does that is likely to fail later: notices for its team, before anything is built.

Of the Dockerfiles of 2023, 117 of 186 installed core libraries without a version, 71 started from images of
the night, 44 installed from git without a commit, and 151 of 247 held a token. Most no longer build.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from palio.records import Violation

RULE = "dockerfile"
START_BYTES = 1 << 20
"""The most of a program's file that is searched for downloads at start."""
_SECRET = re.compile(r"(?i)(?:^|_)(?:token|secret|password|passwd|api_?key|access_?key)(?:$|_)")
_PLACEHOLDER = re.compile(r"[<$\"'{]|^$|(?i:^x+$|your|changeme|none|null|true|false)|^\d+$|^/")
_PIP = re.compile(r"(?:^|/)(?:pip[\d.]*|uv)$")
_PINNED = re.compile(r"(?:===?|@|~=)")
_PIP_VALUES = frozenset(
    {
        "-r",
        "--requirement",
        "-c",
        "--constraint",
        "-i",
        "--index-url",
        "--extra-index-url",
        "-f",
        "--find-links",
    }
    | {"-t", "--target", "--prefix", "--root", "--python", "--trusted-host", "--cache-dir", "--timeout"}
)
"""Options of pip that a value follows."""
_COMMIT = re.compile(r"@[0-9a-f]{7,40}(?:#|$)")
_CHECKED_OUT = re.compile(r"\bgit\s+(?:checkout|reset\s+--hard|switch\s+--detach)\b")
_DOWNLOADS = re.compile(
    r"snapshot_download\(|hf_hub_download\(|huggingface-cli\s+download|\bwget\s|\bcurl\s+[^|]*https?:"
    r"|huggingface_hub\.login\(|(?<![\w.])login\(\s*token"
)
_LOADS = re.compile(r"from_pretrained\(\s*[\"']([\w.-]+/[\w.-]+)[\"']")
_NIGHTLY = re.compile(r"(?i)nightly|\bdev\d{8}\b")
_DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")


@dataclass(frozen=True)
class Instruction:
    line: int
    """Counts from 1."""
    name: str
    """In capitals."""
    value: str


def instructions(text: str) -> Iterator[Instruction]:
    """Yield a Dockerfile's instructions, continued lines joined and comments left out."""
    start, parts = 0, list[str]()
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if stripped.startswith("#") or (not stripped and not parts):
            continue
        start = start if parts else number
        parts.append(stripped.removesuffix("\\").strip())
        if stripped.endswith("\\"):
            continue
        name, _, value = " ".join(parts).partition(" ")
        parts = []
        yield Instruction(start, name.upper(), value.strip())


def dockerfile_violations(text: str, key: str) -> Iterator[Violation]:
    """Yield the values of ENV and ARG that are named like secrets: an image is public."""
    for one in instructions(text):
        if one.name in ("ENV", "ARG"):
            for name, value in _assignments(one.value):
                if _SECRET.search(name) and not _PLACEHOLDER.search(value):
                    yield Violation(
                        rule="credentials",
                        key=key,
                        why=f"line {one.line} of the Dockerfile sets {name}, which images show to everybody",
                        fix="remove it, and revoke it where it was made; builds and servers need no token",
                    )


def dockerfile_notices(text: str, files: Mapping[str, str], key: str) -> Iterator[Violation]:
    """Yield what is likely to fail at build or at start.

    Args:
        text: the Dockerfile.
        files: text of the programs and lists of packages beside it, by name.
        key: of the folder in the entry file.
    """
    for one in instructions(text):
        for why, fix in _faults(one):
            yield Violation(rule=RULE, key=key, why=f"line {one.line} of the Dockerfile {why}", fix=fix)
    for name, content in sorted(files.items()):
        for why, fix in _file_faults(name, content):
            yield Violation(rule=RULE, key=key, why=f"{name} {why}", fix=fix)


def _assignments(value: str) -> Iterator[tuple[str, str]]:
    try:
        words = shlex.split(value)
    except ValueError:
        words = value.split()
    if words and "=" not in words[0]:  # ENV NAME value
        yield words[0], " ".join(words[1:])
        return
    for word in words:
        name, _, content = word.partition("=")
        yield name, content


def _faults(one: Instruction) -> Iterator[tuple[str, str]]:
    if one.name == "FROM":
        yield from _base_faults(one.value)
    elif one.name == "RUN":
        yield from _run_faults(one.value)
    elif one.name in ("CMD", "ENTRYPOINT") and _DOWNLOADS.search(one.value):
        yield _at_start("downloads")


def _base_faults(value: str) -> Iterator[tuple[str, str]]:
    image = next((word for word in value.split() if not word.startswith("--")), "")
    if _NIGHTLY.search(image):
        yield (
            f"starts from {image!r:.100}, an image of the night, which is removed soon",
            "start from a release",
        )
    elif not _DIGEST.search(image) and ":" not in image.rpartition("/")[2] and image != "scratch":
        yield f"starts from {image!r:.100}, which is another image every week", "add @sha256:<digest>"


def _run_faults(value: str) -> Iterator[tuple[str, str]]:
    if _NIGHTLY.search(value):
        yield "installs a build of the night, which is removed soon", "install a release"
    unpinned = [name for command in _commands(value) for name in _unpinned(command)]
    if unpinned:
        names = ", ".join(unpinned[:5]) + (", …" if len(unpinned) > 5 else "")
        yield (
            f"installs {names:.200} without a version",
            "write name==version: what is newest may not fit tomorrow",
        )
    without_commit = [
        word for word in value.split() if word.strip("\"'").startswith("git+") and not _is_fixed(word)
    ]
    cloned = re.search(r"\bgit\s+clone\b", value) and not _CHECKED_OUT.search(value)
    if without_commit or cloned:
        yield "installs from git without a commit", "add @<commit> to the address, or git checkout <commit>"


def _is_fixed(word: str) -> bool:
    return _COMMIT.search(word.strip("\"'")) is not None


def _commands(value: str) -> Iterator[list[str]]:
    """The commands of a shell line, as words."""
    for part in re.split(r"&&|\|\||[;|\n]", value):
        try:
            yield shlex.split(part, comments=False)
        except ValueError:
            yield part.split()


def _unpinned(words: list[str]) -> Iterator[str]:
    """The packages that a `pip install` names without a version."""
    pip = next((place for place, word in enumerate(words) if _PIP.search(word)), None)
    if pip is None or "install" not in words[pip:]:
        return
    named = words[words.index("install", pip) + 1 :]
    for place, word in enumerate(named):
        follows_option = place > 0 and named[place - 1] in _PIP_VALUES
        if (
            follows_option
            or word.startswith(("-", "git+", ".", "/", "http"))
            or word.endswith((".whl", ".txt"))
        ):
            continue
        if not _PINNED.search(word):
            yield word


def _file_faults(name: str, content: str) -> Iterator[tuple[str, str]]:
    if name.endswith(".txt") and "requirement" in name.lower():
        lines = [line.partition("#")[0].strip() for line in content.splitlines()]
        wanted = [line for line in lines if line and not line.startswith("-")]
        loose = [line for line in wanted if "git+" not in line and not _PINNED.search(line)]
        if loose:
            yield (
                f"names {', '.join(loose[:5]):.200} without a version",
                "write name==version, e.g. by pip freeze",
            )
        if any("git+" in line and not _is_fixed(line.split()[-1]) for line in wanted):
            yield "installs from git without a commit", "add @<commit> to the address"
    elif name.endswith((".py", ".sh")):
        if found := _LOADS.search(content):
            yield _at_start(f"loads {found[1]!r:.100} by its name on the hub")
        elif _DOWNLOADS.search(content):
            yield _at_start("downloads or logs in")


def _at_start(what: str) -> tuple[str, str]:
    fix = "download it in a RUN, or load it from PALIO_BASE_MODEL: at start there is no network"
    return f"{what}; if that happens at start, it fails", fix
