"""Why a server ended: its own last lines, and what to change for the reasons that are known.

A log may show prompts: nothing of the closed stage's is quoted.
"""

from __future__ import annotations

import re
from pathlib import Path

from palio.text import last_lines

NO_NETWORK = (
    "there is no network: drop the login and the download, load weights from PALIO_BASE_MODEL or your files"
)
KNOWN = (
    (r"No module named '([\w.]{1,60})'", "hand in {0} with server.files, or an image that has it"),
    (
        r"bind.*permission denied|PermissionError: \[Errno 13\]",
        "listen on $PORT; a port below 1024 is open only if the entry says server.port",
    ),
    (r"address already in use", "listen on $PORT, once"),
    (r"huggingface|OfflineModeIsEnabled|HF_HUB_OFFLINE|LocalEntryNotFound", NO_NETWORK),
    (r"name resolution|Name or service not known|Network is unreachable|Max retries", NO_NETWORK),
    (r"CUDA out of memory|OutOfMemoryError", "use less GPU memory: PALIO_GPU_MEMORY_BYTES is what it has"),
    (r"Read-only file system", "write to /tmp: everything else is read-only"),
    (
        r"(lib[\w.+-]{1,60}): cannot open shared object",
        "put {0} into the image, or hand in an image that has it",
    ),
    (r"No such file or directory", "paths are those of the room: its files are in /entry, its start folder"),
)
TAIL_BYTES = 1 << 16


def last_words(log: Path, start: int = 0) -> str:
    """Return the end of a server's log from byte `start` on, and the fix where the reason is a known one."""
    if not log.is_file():
        return ""
    with log.open("rb") as stream:
        stream.seek(max(start, log.stat().st_size - TAIL_BYTES))
        text = stream.read().decode("utf-8", "replace")
    if not (shown := last_lines(text)):
        return "; it said nothing"
    return f", its last lines: {shown}{known_fix(shown)}"


def known_fix(text: str) -> str:
    """Return what to change, after a semicolon; empty for an unknown reason."""
    for pattern, fix in KNOWN:
        if found := re.search(pattern, text, re.IGNORECASE):
            return f"; {fix.format(*found.groups())}"
    return ""
