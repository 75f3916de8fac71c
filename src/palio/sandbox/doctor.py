"""Whether this machine can confine teams' programs, run them in images and build their Dockerfiles, found out
by doing so, and what is lost if not."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from palio.config import Program
from palio.errors import PalioError
from palio.layout import BuildFolder
from palio.sandbox import gpu
from palio.sandbox.build import BUILD, Building, clear
from palio.sandbox.gpu_libraries import NEEDED, PLACE
from palio.sandbox.image import Image
from palio.sandbox.process import Confined
from palio.sandbox.room import GIB, Limits, Room
from palio.text import last_lines

CANNOT = "programs of teams cannot be confined"
LOST = (
    "Until then command and server entries are refused; isolation.unconfined: true runs them with your "
    "rights: they can read the closed stage and your home, reach the network and outlive their run"
)
_SMALL = Limits(memory=GIB, processes=64, scratch=1 << 20, output=64 << 20, cpus=1)
_TRUE = Program(run=("true",), files=".")
_LAYS_NO_OVERLAY = (
    "an overlay in a user namespace needs Linux 5.11; until then entries with an image cannot run"
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
    findings.append(
        Finding(True, f"{apptainer} apptainer, which docker:// and .sif images need; .tar needs none")
    )
    who = "root, which no program becomes; an ordinary user is better" if os.geteuid() == 0 else "a user"
    findings.append(Finding(True, f"Palio runs as {who}"))
    if not missing:
        findings += [examine_images(), examine_builds(), *([examine_gpu()] if gpu.device_files() else [])]
    return [*findings, _confines()]


def examine_images() -> Finding:
    """Try a program in an image, of which only the system's own folders are not the host's."""
    return _try_in_image(
        "programs of teams run in images: tried with `true`", _TRUE, _SMALL, [], _LAYS_NO_OVERLAY
    )


def examine_gpu() -> Finding:
    """Try whether CUDA starts in an image, with the driver's libraries that it is given."""
    code = f"import ctypes, sys; sys.exit(ctypes.CDLL('{PLACE}/{NEEDED}').cuInit(0))"
    prefixes = [prefix for prefix in {sys.prefix, sys.base_prefix} if not prefix.startswith("/usr")]
    limits = replace(_SMALL, memory=64 * GIB, gpu_memory=4 * GIB)
    program = Program(run=(sys.executable, "-c", code), files=".")
    fix = (
        "CUDA's cuInit fails with the driver's libraries; is the driver installed as the kernel's module is?"
    )
    return _try_in_image("images have the GPU: tried with cuInit", program, limits, prefixes, fix)


def _try_in_image(what: str, program: Program, limits: Limits, more: list[str], fix: str) -> Finding:
    visible = ["/usr", *more]
    with tempfile.TemporaryDirectory() as name:
        image = Path(name, "image")
        image.mkdir()
        for path in (Path("/bin"), Path("/lib"), Path("/lib64")):
            if path.is_symlink():
                (image / path.name).symlink_to(path.readlink())
            elif path.exists():
                visible.append(str(path))
        room = Room(limits, image=Image(image), visible=tuple(visible))
        try:
            with Confined(program, room, Path(name, "log")) as running:
                code = running.wait(30)
        except PalioError as error:
            return Finding(False, what, f"{error}. {fix}")
        said = last_lines(Path(name, "log").read_text(encoding="utf-8", errors="replace"), 1)
    return Finding(code == 0, what, f"{said}. {fix}")


def examine_builds() -> Finding:
    """Try to build a Dockerfile. Only entries with one need it."""
    what = "Dockerfiles of teams are built"
    if shutil.which("buildah") is None:
        return Finding(True, "without buildah, which entries with a Dockerfile need")
    with tempfile.TemporaryDirectory() as name:
        trial = BuildFolder(Path(name))
        trial.context.mkdir()
        trial.output.mkdir()
        (trial.context / "Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")
        room = Room(_SMALL, files=trial.context, output=trial.output)
        try:
            with Building(BUILD, room, trial.log) as building:
                code = building.wait(60)
        except PalioError as error:
            return Finding(False, what, f"{error}. {_advice()}Until then entries with a Dockerfile wait")
        finally:
            clear(room, trial.log)
        said = last_lines(trial.log.read_text(encoding="utf-8", errors="replace"), 1)
    return Finding(code == 0, f"{what}: tried with one", f"buildah says: {said}")


def _confines() -> Finding:
    with tempfile.TemporaryDirectory() as folder:
        try:
            log = Path(folder, "log")
            with Confined(_TRUE, Room(_SMALL), log) as running:
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
