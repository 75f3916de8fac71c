"""Building a team's Dockerfile: buildah in a room of its own, whose lines of RUN are a stranger's programs.

    /entry       the folder with the Dockerfile                   read-only
    /output      storage of the build, and image.tar, its result  writable, watched
    /usr, …      the system with buildah                          read-only

As in every room (`palio.sandbox.room`) there is nothing else. Unlike others it has a range of user ids, since
packages install files of several users: buildah is root in a user namespace, and nobody outside of it. No
daemon, no root of the machine's. The network is the organizer's, where the rule set allows it, or none.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from palio.config import Program
from palio.errors import Interrupted, PalioError
from palio.sandbox.process import Confined, cannot_confine, memory_file
from palio.sandbox.room import Mount, Room, limited, mounts, source_of, stage
from palio.sandbox.seccomp import filter_program

RANGE = 1 << 16
"""User ids of a build: those that an image may have."""
FIRST_RANGE, RANGES = 1 << 30, 1 << 14
"""Ranges for a Palio that runs as root, one for each process id, above those of /etc/subuid."""
SETTINGS = {
    "/etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "/etc/group": "root:x:0:\n",
    "/etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "/etc/containers/policy.json": '{"default": [{"type": "insecureAcceptAnything"}]}\n',
    "/etc/containers/registries.conf": 'unqualified-search-registries = ["docker.io"]\n',
    "/etc/containers/storage.conf": (
        '[storage]\ndriver = "overlay"\ngraphroot = "/output/storage"\nrunroot = "/output/run"\n'
    ),
}
"""Small files of the room: pulls are anonymous, and what they bring is judged as the team's."""
VARIABLES = {
    "HOME": "/output/tmp",
    "TMPDIR": "/output/tmp",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "BUILDAH_ISOLATION": "chroot",
    "_CONTAINERS_USERNS_CONFIGURED": "done",  # buildah is to make no namespace of its own
}
BUILD = """\
mkdir -p /output/tmp && cd /entry &&
buildah bud --http-proxy=false --format oci --tag localhost/entry . &&
buildah push --quiet localhost/entry oci-archive:/output/image.tar
"""
CLEAR = "rm -rf /output/storage /output/run /output/tmp /output/image.tar"


class IdRange(NamedTuple):
    """User ids of the machine that stand for 0, 1, … in the room."""

    own: int
    """Stands for 0."""
    first: int
    """Stands for 1."""
    others: int
    """How many stand for 1 and above."""

    @property
    def lines(self) -> str:
        """As /proc/<pid>/uid_map has them."""
        return f"0 {self.own} 1\n1 {self.first} {self.others}\n"


class Building(Confined):
    """buildah, or what cleans up after it, in the room of a build. As `Confined`."""

    def __init__(self, script: str, room: Room, log: Path) -> None:
        super().__init__(Program(run=script, files="."), room, log)
        self._users, self._groups = ranges_of_ids()

    def _start_confined(self) -> None:
        assert self.room.output is not None
        as_root = os.geteuid() == 0
        if as_root:
            os.chown(self.room.output, self._users.own, self._groups.own)
        files = {place: memory_file(text.encode()) for place, text in SETTINGS.items()}
        seccomp = memory_file(filter_program())
        (reported, info), (block, release) = os.pipe(), os.pipe()
        arguments = building(self.room, files=files, seccomp=seccomp, info=info, block=block, staged=as_root)
        described = memory_file("".join(f"{argument}\0" for argument in arguments).encode())
        inside = ["sh", "-c", str(self.program.run)]
        line = limited(self.room, ["bwrap", "--args", str(described), "--", *inside])
        staging = stage(_mounts(self.room), uid=self._users.own) if as_root else []
        self._begin([*staging, *line], [*files.values(), seccomp, info, block, described], reported, release)

    def _before_start(self, pid: int) -> None:
        """Give the room its user ids."""
        for kind, ids in (("uid", self._users), ("gid", self._groups)):
            if os.geteuid() == 0:
                Path(f"/proc/{pid}/{kind}_map").write_text(ids.lines)
                continue
            line = [f"new{kind}map", str(pid), *ids.lines.split()]
            done = subprocess.run(line, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise cannot_confine(done.stderr.strip() or f"{line[0]} failed")


def ranges_of_ids() -> tuple[IdRange, IdRange]:
    """Return user and group ids of a build. An ordinary user has those of /etc/subuid and /etc/subgid.

    Raises PalioError if there are none, or no buildah.
    """
    if shutil.which("buildah") is None:
        raise Interrupted(
            "a Dockerfile is built with buildah, which is not installed here: apt install buildah"
        )
    if os.geteuid() == 0:
        first = FIRST_RANGE + os.getpid() % RANGES * RANGE
        return (IdRange(first, first + 1, RANGE - 1),) * 2
    names = {str(os.getuid())}
    with suppress(KeyError):
        names.add(pwd.getpwuid(os.getuid()).pw_name)
    return (
        own_range(os.getuid(), names, Path("/etc/subuid")),
        own_range(os.getgid(), names, Path("/etc/subgid")),
    )


def own_range(own: int, names: set[str], table: Path) -> IdRange:
    """Return the ids that a table gives to a user, known by any of `names`. Raises PalioError if none."""
    with suppress(OSError, ValueError):
        for line in table.read_text(encoding="utf-8").splitlines():
            name, first, count = line.split(":")
            if name in names:
                return IdRange(own, int(first), min(int(count), RANGE - 1))
    raise cannot_confine(f"{table} gives {max(names)} no ids: usermod --add-subuids and --add-subgids do")


def _mounts(room: Room) -> list[Mount]:
    """What the host shows: /sys too, which containers have."""
    found, _ = mounts(replace(room, network=True))  # certificates and resolver are harmless without
    return [mount for mount in found if not mount.place.startswith("/sys")] + [Mount(Path("/sys"), "/sys")]


def building(
    room: Room, *, files: dict[str, int], seccomp: int, info: int, block: int, staged: bool
) -> list[str]:
    """bubblewrap's arguments that build the room; descriptors as in `palio.sandbox.room.building`."""
    arguments = [
        *("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
        *([] if room.network else ["--unshare-net"]),
        *("--die-with-parent", "--new-session", "--uid", "0", "--gid", "0", "--cap-add", "ALL"),
        *("--hostname", "build", "--info-fd", str(info), "--userns-block-fd", str(block)),
        *("--seccomp", str(seccomp)),
    ]
    _, links = mounts(room)
    for target, place in links:
        arguments += ["--symlink", target, place]
    scratch = str(room.limits.scratch)
    for place in ("/tmp", "/var/tmp", "/run"):  # noqa: S108 (its own)
        arguments += ["--perms", "1777", "--size", scratch, "--tmpfs", place]
    for number, mount in enumerate(_mounts(room)):
        for parent in reversed(Path(mount.place).parents[:-1]):
            arguments += ["--perms", "0755", "--dir", str(parent)]
        arguments += ["--bind" if mount.writable else "--ro-bind", source_of(mount, number, staged=staged)]
        arguments.append(mount.place)
    for place, descriptor in files.items():
        arguments += ["--ro-bind-data", str(descriptor), place]
    arguments += ["--proc", "/proc", "--dev", "/dev", "--clearenv"]
    for name, value in VARIABLES.items():
        arguments += ["--setenv", name, value]
    return [*arguments, "--chdir", "/"]


def clear(room: Room, log: Path) -> None:
    """Remove what a build left in its output: files of user ids that may be nobody's here."""
    assert room.output is not None
    if not room.output.exists():
        return
    try:
        shutil.rmtree(room.output)
    except PermissionError:
        with suppress(PalioError), Building(CLEAR, room, log) as removing:
            removing.wait(600)
        shutil.rmtree(room.output)
