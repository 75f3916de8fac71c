"""Errors in HELM's log, which holds the traceback of every run that failed.

A message may quote a prompt: of the closed stage only `error_class` of it may leave the closed store.
"""

from __future__ import annotations

import re

from palio.evaluation.helm.folder import plain_name
from palio.layout import HelmFolder

NETWORK_ERRORS = re.compile("URLError|ConnectionError|OfflineModeIsEnabled|LocalEntryNotFound|Max retries")
_ERROR_LINE = re.compile(r"^(?:\S+ \S+ \w+ +)?\s*((?:\w+\.)*\w*(?:Error|Exception|NotFound)\b.*)$", re.M)
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


def error_class(error: str) -> str:
    """The bare class name of a `log_error`."""
    return error.partition(":")[0].rpartition(".")[2]
