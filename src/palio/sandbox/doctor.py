"""Whether this machine can confine teams' programs, found out by confining one, and what is lost if not."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from palio.config import Program
from palio.errors import PalioError
from palio.sandbox.process import Confined
from palio.sandbox.room import GIB, Limits, Room

CANNOT = "programs of teams cannot be confined"
LOST = (
    "Until then command and server entries are refused; isolation.unconfined: true runs them with your "
    "rights: they can read the closed stage and your home, reach the network and outlive their run"
)
_SWITCHES = {
    "user/max_user_namespaces": ("0", "sysctl user.max_user_namespaces=15000"),
    "kernel/unprivileged_userns_clone": ("0", "sysctl kernel.unprivileged_userns_clone=1"),
    "kernel/apparmor_restrict_unprivileged_userns": (
        "1",
        "sysctl kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile for bwrap",
    ),
}
"""Below /proc/sys: the value that refuses user namespaces, and what the administrator does about it."""


@dataclass(frozen=True)
class Finding:
    ok: bool
    what: str
    fix: str = ""
    """What to do, where something is wrong."""

    def __str__(self) -> str:
        return f"ok   {self.what}" if self.ok else f"FIX  {self.what}: {self.fix}"


def examine_confinement() -> list[Finding]:
    """The last finding is the trial itself; the others may say why it failed."""
    tools = {"bwrap": "bubblewrap", "prlimit": "util-linux", "taskset": "util-linux"}
    if os.geteuid() == 0:
        tools["setpriv"] = "util-linux"
    missing = [tool for tool in tools if shutil.which(tool) is None]
    findings = [Finding(False, f"{tool} is not installed", f"apt install {tools[tool]}") for tool in missing]
    apptainer = "with" if shutil.which("apptainer") else "without"
    findings.append(Finding(True, f"{apptainer} apptainer, which entries with an image need"))
    who = "root, which no program becomes; an ordinary user is better" if os.geteuid() == 0 else "a user"
    findings.append(Finding(True, f"Palio runs as {who}"))
    return [*findings, _confines()]


def _confines() -> Finding:
    limits = Limits(memory=GIB, processes=64, scratch=1 << 20, output=1 << 20, cpus=1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            log = Path(folder, "log")
            with Confined(Program(run=("true",), files="."), Room(limits), log) as running:
                code = running.wait(10)
        except PalioError as error:
            return Finding(False, CANNOT, f"{error}. {_advice()}{LOST}")
    if code != 0:
        return Finding(False, CANNOT, f"`true` ended with code {code}. {LOST}")
    return Finding(True, "programs of teams are confined: tried with `true`")


def _advice() -> str:
    for name, (refusing, command) in _SWITCHES.items():
        path = Path("/proc/sys", name)
        if path.exists() and path.read_text().strip() == refusing:
            return f"The kernel refuses user namespaces; as root: {command}. "
    return ""
