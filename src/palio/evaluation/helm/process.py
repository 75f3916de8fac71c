"""`helm-run` as a process group of its own, ended with its time limit or when its caller says so."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from palio.evaluation.helm.folder import SUITE
from palio.guard import guarded
from palio.layout import HelmFolder

POLL_SECONDS = 0.5
PUNKT = Path("tokenizers/punkt_tab/english")
"""In NLTK's data: what splits English into sentences."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@dataclass(frozen=True)
class HelmExit:
    """How a `helm-run` ended."""

    code: int | None
    """None: stopped by us."""
    seconds: float


def run_helm(
    folder: HelmFolder,
    *,
    threads: int,
    time_limit: float | None = None,
    dry_run: bool = False,
    offline: bool = False,
    tick: Callable[[float], bool] = lambda seconds: True,
) -> HelmExit:
    """Run `helm-run` on a folder of `write_helm_folder`; completed runs in it are kept and skipped.

    HELM's process group is killed after `time_limit` seconds of wall clock, or when `tick`, which is
    called about twice a second with the seconds so far, returns False. The log is appended to
    folder/helm.log.
    """
    started = time.monotonic()
    with folder.log.open("ab") as log:
        process = subprocess.Popen(
            guarded(_command(folder, threads, dry_run)),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | _nltk_environment(folder) | (OFFLINE if offline else {}),
        )
        try:
            while (code := process.poll()) is None:
                seconds = time.monotonic() - started
                if not tick(seconds) or (time_limit is not None and seconds >= time_limit):
                    return HelmExit(None, seconds)
                time.sleep(POLL_SECONDS)
            return HelmExit(code, time.monotonic() - started)
        finally:
            _kill_group(process)


def _command(folder: HelmFolder, threads: int, dry_run: bool) -> list[str]:
    return [
        str(Path(sys.executable).with_name("helm-run")),
        *("--conf-paths", str(folder.run_entries)),
        *("--local-path", str(folder.config)),
        *("--output-path", str(folder.output)),
        *("--suite", SUITE),
        *("--max-eval-instances", "1000000"),  # each run entry has its own
        *("--num-threads", str(threads)),
        "--disable-cache",  # its key leaves out whose model answered
        "--skip-completed-runs",
        *(["--dry-run"] if dry_run else []),
    ]


def _nltk_environment(folder: HelmFolder) -> dict[str, str]:
    """NLTK_DATA with a copy of punkt_tab, which the package llama_index ships; empty without that package.

    A copy, since NLTK refuses a file with several hard links, which is how uv installs packages.
    """
    spec = importlib.util.find_spec("llama_index")
    copy = folder.config / "nltk_data"
    for package in spec.submodule_search_locations or [] if spec else []:
        shipped = Path(package) / "core" / "_static" / "nltk_cache" / PUNKT
        if shipped.is_dir() and not (copy / PUNKT).exists():
            shutil.copytree(shipped, copy / PUNKT, copy_function=shutil.copyfile)
    if not copy.exists():
        return {}
    given = os.environ.get("NLTK_DATA")
    return {"NLTK_DATA": os.pathsep.join([*([given] if given else []), str(copy.resolve())])}


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
