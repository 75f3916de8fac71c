"""Errors in HELM's log, which holds the traceback of every run that failed.

A message may quote a prompt: of the closed stage only `public_error` of it may leave the closed store.
"""

from __future__ import annotations

import re

from palio.evaluation.data import DataError
from palio.evaluation.helm.folder import plain_name
from palio.layout import HelmFolder

NETWORK_ERRORS = re.compile("URLError|ConnectionError|OfflineModeIsEnabled|LocalEntryNotFound|Max retries")
_ERROR_LINE = re.compile(r"^(?:\S+ \S+ \w+ +)?\s*((?:\w+\.)*\w*(?:Error|Exception|NotFound)\b.*)$", re.M)
DATA_ERROR = DataError.__name__
_RUNNER_ERROR = re.compile(r"(\w+\.)*RunnerError")
"""HELM's last word, which only counts the runs that failed."""


def log_error(folder: HelmFolder, run: str | None = None) -> str:
    """The last line of the last traceback in HELM's log (of `run`, if named): class and message."""
    for name, text in reversed(_failures(folder)):
        if run in (None, name):
            errors = [line for line in _ERROR_LINE.findall(text) if not _RUNNER_ERROR.match(line)]
            if errors:
                return str(errors[-1])[:300]
    return ""


def _failures(folder: HelmFolder) -> list[tuple[str, str]]:
    """Plain name of each run that failed ("" for HELM itself) and the log from there to the next failure."""
    log = folder.log
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    before, *parts = re.split(r"Error when running (\S+):\n", text)
    return [
        ("", before),
        *((plain_name(name), after) for name, after in zip(*[iter(parts)] * 2, strict=True)),
    ]


def failed_download(folder: HelmFolder) -> str:
    """The run whose data HELM could not download, and the part of HELM that wanted it."""
    run, text = _failures(folder)[-1]
    part = re.findall(r"benchmark/(?:scenarios|augmentations)/(\w+)\.py", text)
    return f"{run} ({part[-1]})" if part else run


def public_error(error: str) -> str:
    """What of a `log_error` quotes no text: its class, or the message of a `DataError`."""
    name = error.partition(":")[0].rpartition(".")[2]
    return error.partition(": ")[2] if name == DATA_ERROR else name


def first_failed(folder: HelmFolder) -> str:
    """The plain name of the first run that failed; empty if HELM itself did."""
    return next((name for name, _ in _failures(folder) if name), "")


def printed(folder: HelmFolder, beginning: str) -> list[str]:
    """The lines in HELM's log that begin so, without the beginning, each once."""
    log = folder.log
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return list(dict.fromkeys(line.partition(beginning)[2] for line in lines if beginning in line))
