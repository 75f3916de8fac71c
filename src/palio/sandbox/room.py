"""What a team's program sees and may use, as the argument list that starts it. Pure, but for looking which
system folders exist.

    /entry                       the team's files                         read-only
    /base_model, /dataset,       inputs of the contract                   read-only
    /adapter, /model
    /output                      the work folder of a training program    writable, watched
    /tmp, /dev/shm               scratch, gone at the end                 writable, of fixed size
    /usr, /lib*, /bin, /etc/…    the system, or an image in its place     read-only
    Palio's Python environment   at its own path, unless there is an image  read-only

There is nothing else: no home, no other entry, no stage. bubblewrap builds it in namespaces of its own
(user, process, mount, network, IPC, host name), as an ordinary user. If Palio itself runs as root, it first
becomes a user id that no other process has; folders that this id could not reach are staged for it.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from palio.config import Isolation, Program, Track
from palio.sandbox import gpu

GIB = 1 << 30
UID = 1000
"""Of the program, as it sees itself."""
FILES, OUTPUT = "/entry", "/output"

_SYSTEM = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")
_ETC = (
    "alternatives",
    "hosts",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "nsswitch.conf",
    "ssl/certs",
    "ssl/openssl.cnf",
)
_CPU_FACTS = "/sys/devices/system/cpu"
"""Numeric libraries ask it for cores and caches."""
_OURS = frozenset(
    {"proc", "dev", "sys", "tmp", "run", "entry", "output", "base_model", "dataset", "adapter", "model"}
)
"""Top folders of an image that the room makes itself."""


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes."""

    memory: int
    processes: int
    scratch: int
    output: int
    cpus: int
    gpu_memory: int | None = None

    @classmethod
    def of(cls, track: Track, isolation: Isolation, cpus: int | None = None) -> Limits:
        return cls(
            memory=track.ram_gb * GIB,
            processes=isolation.processes,
            scratch=int(isolation.scratch_gb * GIB),
            output=int(isolation.output_gb * GIB),
            cpus=cpus or track.cpus,
            gpu_memory=int(track.gpu_memory_gb * 1e9) if track.gpu_memory_gb else None,
        )


@dataclass(frozen=True)
class Room:
    limits: Limits
    files: Path | None = None
    inputs: Mapping[str, Path] = field(default_factory=dict)
    """Folder of the host by its place inside, e.g. /dataset."""
    output: Path | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    network: bool = False
    visible: tuple[str, ...] = ()
    system: Path | None = None
    """An image's root folder, in place of the host's system."""


@dataclass(frozen=True)
class Mount:
    source: Path
    place: str
    writable: bool = False


def mounts(room: Room) -> tuple[list[Mount], list[tuple[str, str]]]:
    """What of the host is seen where, and symbolic links of the room (target, place)."""
    if room.system is None:
        found, links = _top_folders([Path("/", name) for name in _SYSTEM if Path("/", name).exists()])
        etc = [*_ETC, "resolv.conf"] if room.network else _ETC
        found += [Mount(path.resolve(), str(path)) for name in etc if (path := Path("/etc", name)).exists()]
        found += [Mount(path, str(path)) for path in _python_environment()]
    else:
        found, links = _top_folders([path for path in room.system.iterdir() if path.name not in _OURS])
    if Path(_CPU_FACTS).exists():
        found.append(Mount(Path(_CPU_FACTS), _CPU_FACTS))
    if room.limits.gpu_memory is not None:
        found.append(Mount(Path("/sys"), "/sys"))  # CUDA looks up the PCI bus there
    found += [Mount(Path(path).resolve(), path) for path in room.visible]
    found += [Mount(path.resolve(), place) for place, path in room.inputs.items()]
    if room.files is not None:
        found.append(Mount(room.files.resolve(), FILES))
    if room.output is not None:
        found.append(Mount(room.output.resolve(), OUTPUT, writable=True))
    return found, links


def _top_folders(paths: list[Path]) -> tuple[list[Mount], list[tuple[str, str]]]:
    """Each at its name below `/`; a symbolic link, such as /lib to usr/lib, stays one."""
    found = [Mount(path, f"/{path.name}") for path in sorted(paths) if not path.is_symlink()]
    return found, [(str(path.readlink()), f"/{path.name}") for path in sorted(paths) if path.is_symlink()]


def _python_environment() -> list[Path]:
    """The interpreter and the libraries that Palio itself uses, but for what lies in /usr already."""
    prefixes = dict.fromkeys(Path(prefix) for prefix in (sys.base_prefix, sys.prefix))
    return [prefix for prefix in prefixes if not prefix.is_relative_to("/usr")]


def environment(room: Room, *, confined: bool = True) -> dict[str, str]:
    """All variables of the program; nothing of Palio's own environment is among them."""
    threads = str(room.limits.cpus)
    variables = {
        "HOME": "/tmp",  # noqa: S108 (its own)
        "LANG": "C.UTF-8",
        "PATH": f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin"
        if room.system is None
        else "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        **room.variables,
    }
    if not room.network:
        variables["HF_HUB_OFFLINE"] = "1"
    if room.limits.gpu_memory is not None:
        variables["CUDA_VISIBLE_DEVICES"] = gpu.visible_inside()
    if not confined:
        real = {place: str(path.resolve()) for place, path in room.inputs.items()}
        real[OUTPUT] = str(room.output.resolve()) if room.output else ""
        real[FILES] = str(room.files.resolve()) if room.files else ""
        for name, value in variables.items():
            place = "/" + value.removeprefix("/").partition("/")[0]
            if value.startswith("/") and place in real:
                variables[name] = real[place] + value.removeprefix(place)
    return variables


def program_arguments(program: Program, *, image: bool = False) -> list[str]:
    """The program and its arguments; in an image with the variables that the image declares."""
    line = ["sh", "-c", program.run] if isinstance(program.run, str) else list(program.run)
    if not image:
        return line
    declared = 'for file in /.singularity.d/env/*docker*.sh; do [ -r "$file" ] && . "$file"; done; exec "$@"'
    return ["sh", "-c", declared, "sh", *line]


def limited(room: Room, arguments: list[str]) -> list[str]:
    """`arguments` under the kernel's limits for each process."""
    limits = room.limits
    allowed = sorted(os.sched_getaffinity(0))
    cpus = sorted(random.sample(allowed, min(limits.cpus, len(allowed))))
    return [
        "prlimit",
        f"--nproc={limits.processes}",
        f"--fsize={max(limits.output, limits.scratch)}",
        f"--data={limits.memory}",
        "--core=0",
        "--",
        *("taskset", "--cpu-list", ",".join(map(str, cpus))),
        *arguments,
    ]


def building(room: Room, *, files: Mapping[str, int], seccomp: int, info: int, uid: int | None) -> list[str]:
    """bubblewrap's arguments that build the room.

    `files` are open descriptors of small files by their place, `seccomp` one of a filter, `info` one that
    bubblewrap writes the first process' id to. `uid`, given if Palio is root, is what it becomes.
    """
    found, links = mounts(room)
    arguments = [
        *("--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"),
        *("--uid", str(UID), "--gid", str(UID), "--hostname", "entry", "--info-fd", str(info)),
        *("--seccomp", str(seccomp)),
        *(["--share-net"] if room.network else []),
    ]
    for target, place in links:
        arguments += ["--symlink", target, place]
    scratch = str(room.limits.scratch)
    # before the mounts: Palio's environment may lie below the host's /tmp
    arguments += ["--perms", "1777", "--size", scratch, "--tmpfs", "/tmp"]  # noqa: S108 (its own)
    for mount, source in zip(found, _sources(found, uid), strict=True):
        for parent in reversed(Path(mount.place).parents[:-1]):
            arguments += ["--perms", "0755", "--dir", str(parent)]
        arguments += ["--bind" if mount.writable else "--ro-bind", source, mount.place]
    for place, descriptor in files.items():
        arguments += ["--ro-bind-data", str(descriptor), place]
    arguments += ["--proc", "/proc", "--dev", "/dev"]
    if room.limits.gpu_memory is not None:
        for device in gpu.device_files():
            arguments += ["--dev-bind", device, device]
    arguments += ["--perms", "1777", "--size", scratch, "--tmpfs", "/dev/shm"]  # noqa: S108 (its own)
    arguments += ["--remount-ro", "/dev", "--remount-ro", "/", "--clearenv"]
    for name, value in environment(room).items():
        arguments += ["--setenv", name, value]
    return [*arguments, "--chdir", FILES if room.files else "/"]


def command_line(room: Room, program: Program, *, described: int, uid: int | None) -> list[str]:
    """What to start. `described` is a descriptor of the arguments of `building`: on the command line, the
    program could read the host's paths in them."""
    inside = program_arguments(program, image=room.system is not None)
    line = limited(room, ["bwrap", "--args", str(described), "--", *inside])
    return line if uid is None else [*_staging(room, uid), *line]


def _sources(found: list[Mount], uid: int | None) -> list[str]:
    """Where bubblewrap finds the mounts' sources: staged, if it could not reach them itself."""
    return [str(mount.source) if uid is None else f"/s/{number}" for number, mount in enumerate(found)]


def _staging(room: Room, uid: int) -> list[str]:
    """As root: bring the sources, which `uid` may not be able to reach, where it can; become `uid`."""
    arguments = ["bwrap", "--die-with-parent", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    arguments += ["--cap-add", "CAP_SETPCAP"]
    system, links = _top_folders([Path("/", name) for name in _SYSTEM if Path("/", name).exists()])
    for target, place in links:
        arguments += ["--symlink", target, place]
    for mount in system:
        arguments += ["--ro-bind", str(mount.source), mount.place]
    arguments += ["--bind", "/proc", "/proc", "--dev-bind", "/dev", "/dev", "--perms", "0755", "--dir", "/s"]
    arguments += ["--perms", "0755", "--tmpfs", "/tmp"]  # noqa: S108 (bubblewrap builds the room on it)
    found, _ = mounts(room)
    for mount, place in zip(found, _sources(found, uid), strict=True):
        arguments += ["--bind" if mount.writable else "--ro-bind", str(mount.source), place]
    who = f"{uid}"
    become = ("setpriv", "--reuid", who, "--regid", who, "--clear-groups", "--inh-caps=-all")
    return [*arguments, "--", *become, "--bounding-set=-all", "--"]
