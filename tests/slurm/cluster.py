"""A real SLURM cluster on one machine, for as long as a block or a command runs.

    python -m tests.slurm.cluster snakemake --profile slurm     one command inside a cluster of its own
    python -m tests.slurm.cluster bash                          or a shell, to look around (sinfo, squeue)

Debian's `slurm-wlm` and `munge`, no systemd and no accounting: munged with its own key and socket,
slurmctld, and a slurmd for each emulated node, all on loopback, on free ports, in a folder of their own.
A SLURM of the machine is neither read nor touched: every command of ours gets SLURM_CONF. The GPUs are
fake (a device file that nobody opens), their allocation is SLURM's own.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "squeue")
GPU_FILES = ("/dev/null", "/dev/zero", "/dev/full")
"""Character devices that every machine has, one for each fake GPU of a node."""


@dataclass(frozen=True)
class Node:
    name: str
    gpu_model: str = ""
    gpus: int = 0
    cpus: int = 8

    @property
    def gres(self) -> str:
        return f" Gres=gpu:{self.gpu_model}:{self.gpus}" if self.gpus else ""


NODES = (
    Node("a1", "a100", 2),
    Node("a2", "a100", 1),
    Node("r1", "rtx4090", 1),
    Node("r2", "rtx4090", 1),
    Node("c1"),
)


def missing_programs() -> list[str]:
    """Which of Debian's programs the machine lacks."""
    return [program for program in PROGRAMS if not shutil.which(program, path=_path())]


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin"  # the daemons' place, not on every PATH


class Cluster:
    """`with Cluster() as cluster:` a running cluster; `cluster.environment` is what its users need."""

    def __init__(self, folder: Path, nodes: tuple[Node, ...] = NODES) -> None:
        self.folder, self.nodes = folder, nodes
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def config(self) -> Path:
        return self.folder / "etc" / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        outer = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        path = f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{_path()}"
        return outer | {"SLURM_CONF": str(self.config), "PATH": path}

    # --- life

    def __enter__(self) -> Cluster:
        self._write_files()
        try:
            self._start_munge()
            self.start_controller()
            for node in self.nodes:
                self.start_node(node.name)
            self.wait(lambda: set(self.node_states().values()) == {"idle"}, "all nodes to be idle")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if "slurmctld" in self._daemons:
                self._cancel_all()
        finally:
            for name in reversed(list(self._daemons)):
                self._stop(name, signal.SIGTERM)

    def start_controller(self) -> None:
        self._start("slurmctld", "slurmctld", "-D", "-f", str(self.config))
        self.wait(lambda: self.run("scontrol", "ping").stdout.find("is UP") > 0, "slurmctld to answer")

    def stop_controller(self) -> None:
        self._stop("slurmctld", signal.SIGKILL)

    def start_node(self, name: str) -> None:
        self._start(f"slurmd-{name}", "slurmd", "-D", "-f", str(self.config), "-N", name)

    def lose_node(self, name: str) -> None:
        """What a power cut does: the node's daemon and every process of its jobs are gone at once."""
        self._stop(f"slurmd-{name}", signal.SIGKILL)
        processes = [one for one in psutil.process_iter() if self._runs_on(one, name)]
        keepers = [one for process in processes for one in process.parents() if one.name() == "slurmstepd"]
        for process in (*keepers, *processes):  # keepers first, or they would report how their jobs ended
            with suppress(psutil.NoSuchProcess):
                process.kill()

    @contextmanager
    def unable_to_start_jobs(self, name: str) -> Iterator[None]:
        """What a node with a broken disk does: it takes jobs and cannot start them."""
        spool = self.folder / "spool" / name
        away = spool.with_suffix(".away")
        spool.rename(away)
        spool.touch()
        try:
            yield
        finally:
            spool.unlink()
            away.rename(spool)

    def _runs_on(self, process: psutil.Process, node: str) -> bool:
        with suppress(psutil.Error):
            environment = process.environ()
            mine = environment.get("SLURM_CONF") == str(self.config)
            return mine and environment.get("SLURMD_NODENAME") == node
        return False

    # --- what it says

    def run(self, *command: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=check, timeout=60
        )

    def node_states(self) -> dict[str, str]:
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %T").stdout.split("\n")
        return dict(line.split() for line in lines if line)

    def jobs(self, fields: str = "%i %T %R") -> list[str]:
        """A line for each job that the controller knows, finished ones included."""
        found = self.run("squeue", "--noheader", "--states=all", f"--format={fields}").stdout
        return [line.strip() for line in found.splitlines()]

    def wait(self, ready: Callable[[], bool], what: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"waited {seconds:g} s for {what}; the daemons' logs are in {self.folder}/log"
                )
            time.sleep(0.1)

    # --- inside

    def _cancel_all(self) -> None:
        states = "--states=PENDING,RUNNING,SUSPENDED,COMPLETING"
        for job in self.run("squeue", "--noheader", states, "--format=%i").stdout.split():
            self.run("scancel", job)
        ended = "no job to be left"
        self.wait(lambda: not self.run("squeue", "--noheader", states).stdout.strip(), ended, seconds=120)

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command,
                env=self.environment,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _stop(self, name: str, number: signal.Signals) -> None:
        daemon = self._daemons.pop(name)
        daemon.send_signal(number)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _start_munge(self) -> None:
        run, socket_ = self.folder / "run", self.folder / "run" / "munge.socket"
        key = self.folder / "etc" / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = (f"--key-file={key}", f"--socket={socket_}", f"--pid-file={run}/munged.pid")
        # --force: munged wants its socket readable for all users; ours is for one
        more = (f"--seed-file={run}/munged.seed", "--num-threads=2", "--foreground", "--force")
        self._start("munged", "munged", *files, f"--log-file={self.folder}/log/munged.log", *more)
        self.wait(socket_.exists, "munged's socket")

    def _write_files(self) -> None:
        for name in ("etc", "run", "log", "state", "bin", *(f"spool/{node.name}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        ports = _free_ports(len(self.nodes) + 1)
        host = socket.gethostname().partition(".")[0]
        nodes = [
            f"NodeName={node.name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={node.cpus}"
            f" RealMemory=512000{node.gres} State=UNKNOWN"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        ]
        partitions = {"cpu": [node.name for node in self.nodes if not node.gpus]}
        for node in self.nodes:
            if node.gpus:
                partitions.setdefault(node.gpu_model, []).append(node.name)
        partitions["gpu"] = [node.name for node in self.nodes if node.gpus]
        lines = [
            f"PartitionName={name} Nodes={','.join(members)} MaxTime=2-00:00:00 State=UP"
            for name, members in partitions.items()
        ]
        text = _SLURM_CONF.format(
            folder=self.folder, host=host, port=ports[0], user=pwd.getpwuid(os.getuid()).pw_name
        )
        self.config.write_text("\n".join([text, *nodes, *lines]) + "\n")
        gres = [
            f"NodeName={node.name} Name=gpu Type={node.gpu_model} File={','.join(GPU_FILES[: node.gpus])}"
            for node in self.nodes
            if node.gpus
        ]
        (self.folder / "etc" / "gres.conf").write_text("\n".join(gres) + "\n")
        # Snakemake's job step drops SLURM_CONF before it calls srun, which a real site's default path mends.
        srun = self.folder / "bin" / "srun"
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={self.config} exec {shutil.which("srun")} "$@"\n')
        srun.chmod(0o755)


# OverMemoryKill stands in for the cgroups of a real node, which need rights that a container lacks;
# cred_expire is also how long a requeued job waits (120 s by default).
_SLURM_CONF = """\
ClusterName=palio
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket,cred_expire=30
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=bf_interval=5,sched_min_interval=100000,batch_sched_delay=1
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=3600
KillWait=5
SlurmdTimeout=10
SlurmctldTimeout=30
MessageTimeout=10
JobRequeue=0
"""


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def main() -> int:
    if missing := missing_programs():
        print(f"error: {', '.join(missing)} not found; apt-get install slurm-wlm munge", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="palio-slurm-") as folder, Cluster(Path(folder)) as cluster:
        print(cluster.run("sinfo", "--format=%P %D nodes, each %G, %T").stdout, file=sys.stderr)
        return subprocess.run(sys.argv[1:] or ["bash"], env=cluster.environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
