"""Check, before the first job, that a SLURM site and a profile fit a competition; each finding names its fix.

`findings` compares the tracks' needs with sinfo's output, and is pure. `node_findings` asks SLURM whether it
would accept such a job, and whether a node sees the folder, the closed store and the same Palio.
"""

from __future__ import annotations

import re
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from palio import __version__
from palio.config import Competition, Track, expand, read_yaml
from palio.cpu import multiplies_bf16
from palio.errors import BadInput, PalioError
from palio.layout import STAGES
from palio.operating import slurm
from palio.pipeline import STEPS
from palio.sandbox.doctor import Finding
from palio.vllm import PROGRAM, vllm_version

COMMANDS = ("sbatch", "squeue", "scancel", "sinfo", "scontrol", "srun")
NODE_SECONDS = 60
"""How long a test job may wait for a free node."""


@dataclass(frozen=True)
class Group:
    """Identical nodes of a partition: a line of sinfo."""

    partition: str
    minutes: float
    """The partition's longest job."""
    gpus: frozenset[str]
    """GPU types."""
    memory_mb: int
    cpus: int


@dataclass(frozen=True)
class Site:
    groups: tuple[Group, ...]
    min_job_age: int
    """Seconds for which squeue remembers a finished job."""
    accounting: bool

    @property
    def partitions(self) -> list[str]:
        return sorted({group.partition for group in self.groups})


@dataclass(frozen=True)
class Need:
    """One GPU rule of one track, as it is submitted."""

    track: str
    rule: str
    partition: str
    minutes: int
    limits: Track


def minutes(text: str) -> float:
    """Parse SLURM's time format: `30:00`, `1-02:00:00`, or `infinite` as inf."""
    if text.strip() in ("infinite", "n/a", "UNLIMITED"):
        return float("inf")
    days, _, clock = text.strip().rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    hours, mins, seconds = [0] * (3 - len(parts)) + parts
    return int(days or 0) * 1440 + hours * 60 + mins + seconds / 60


def read_site() -> Site:
    """Read the cluster's partitions and settings from sinfo and scontrol."""
    groups = []
    for line in slurm.ask("sinfo", "--noheader", "--format=%R|%l|%G|%m|%c").splitlines():
        partition, limit, gres, memory, cpus = line.split("|")
        types = frozenset(re.findall(r"gpu:([^:(,]+):\d+", gres))
        numbers = [int(re.sub(r"\D", "", number)) for number in (memory, cpus)]
        groups.append(Group(partition, minutes(limit), types, *numbers))
    config = slurm.ask("scontrol", "show", "config")
    age = re.search(r"MinJobAge\s*=\s*(\d+)", config)
    storage = re.search(r"AccountingStorageType\s*=\s*(\S+)", config)
    accounting = storage is not None and not storage[1].endswith("none")
    return Site(tuple(groups), int(age[1]) if age else 0, accounting)


def partition_of(profile: dict[str, Any], rule: str, track: str) -> str:
    """Return the profile's partition for a rule of a track, evaluated as Snakemake does."""
    default = profile.get("default-resources", {}).get("slurm_partition", "")
    text = str(profile.get("set-resources", {}).get(rule, {}).get("slurm_partition", default))
    try:
        # the organizer's own profile, which Snakemake evaluates too
        return str(eval(text, {}, {"wildcards": SimpleNamespace(track=track)}))  # noqa: S307
    except (NameError, SyntaxError):
        return text


def needs(competition: Competition, profile: dict[str, Any]) -> list[Need]:
    return [
        Need(
            track_id,
            step.rule,
            partition_of(profile, step.rule, track_id),
            step.limit(competition, track_id).job_minutes,
            track,
        )
        for track_id, track in competition.tracks.items()
        for step in STEPS
        if step.limit
    ]


def findings(competition: Competition, profile: dict[str, Any], file: Path, site: Site) -> Iterator[Finding]:
    """Check everything that needs no job."""
    known = ", ".join(site.partitions)
    cpu = str(profile.get("default-resources", {}).get("slurm_partition", ""))
    yield Finding(
        cpu in site.partitions,
        f"partition {cpu} of steps without a GPU",
        f"{file}: default-resources.slurm_partition: no such partition; use one of {known}",
    )
    for need in needs(competition, profile):
        where = f"{file}: set-resources.{need.rule}.slurm_partition"
        groups = [group for group in site.groups if group.partition == need.partition]
        at = f"{need.track} {need.rule} on {need.partition}"
        if not groups:
            fix = f"{where}: no such partition; use one of {known}"
            yield Finding(False, f"{at} does not exist", fix)
            continue
        model = need.limits.gpu_model
        fitting = [group for group in groups if (model in group.gpus if model else group.gpus)]
        types = ", ".join(sorted({gpu for group in groups for gpu in group.gpus})) or "none"
        yield Finding(
            bool(fitting),
            f"{at}: a GPU of type {model or 'any'}",
            f"it has {types}; correct tracks.{need.track}.gpu_model in the competition, or {where}",
        )
        longest = max(group.minutes for group in groups)
        yield Finding(
            longest >= need.minutes,
            f"{at}: {need.minutes} min",
            f"its limit is {longest:g} min; name a longer one in {where}, or ask the site",
        )
        wanted = need.limits.ram_gb * 1024
        yield Finding(
            any(group.memory_mb >= wanted and group.cpus >= need.limits.cpus for group in fitting or groups),
            f"{at}: {need.limits.ram_gb} GB and {need.limits.cpus} CPUs on a node",
            f"no node has them; lower tracks.{need.track}.ram_gb or cpus in the competition",
        )
    yield _status_command(profile, file, site)


def _status_command(profile: dict[str, Any], file: Path, site: Site) -> Finding:
    command = str(profile.get("slurm-status-command", "sacct"))
    if command == "sacct":
        fix = f"{file}: slurm-status-command: squeue; without accounting a run would wait forever"
        return Finding(site.accounting, "status from sacct, which needs accounting", fix)
    seconds = 3 * int(profile.get("slurm-init-seconds-before-status-checks", 40))
    fix = f"MinJobAge is {site.min_job_age} s, less than {seconds}; {file}: slurm-status-command: sacct"
    enough = site.min_job_age >= seconds or site.accounting
    return Finding(enough, "status from squeue, which remembers jobs long enough", fix)


def node_findings(competition: Competition, profile: dict[str, Any], file: Path) -> Iterator[Finding]:
    """Submit every kind of job with --test-only, and run a short one in each partition."""
    common = _account(profile)
    for need in needs(competition, profile):
        gpus = _gpus(need)
        wanted = [f"--time={need.minutes}", f"--mem={need.limits.ram_gb * 1024}", *common]
        cpus = f"--cpus-per-task={need.limits.cpus}"
        test = ["sbatch", "--test-only", f"--partition={need.partition}", gpus, cpus, *wanted, "--wrap=true"]
        what = f"SLURM would accept {need.rule} of {need.track}"
        try:
            slurm.ask(*test)
            yield Finding(True, what)
        except PalioError as error:
            yield Finding(False, what, f"{error}; {file}: account, qos, partition")
    by_partition = {need.partition: _gpus(need) for need in needs(competition, profile)}
    by_partition.setdefault(str(profile.get("default-resources", {}).get("slurm_partition", "")), "")
    for partition, gpus in by_partition.items():
        options = [f"--partition={partition}", "--time=5", "--mem=2048", *common, *([gpus] if gpus else [])]
        yield from _on_a_node(competition, partition, options)


def _on_a_node(competition: Competition, partition: str, options: list[str]) -> Iterator[Finding]:
    """Run a job that looks at the working folder, the closed store and Palio from a node."""
    store = expand(competition.closed_store).absolute()
    probe = Path(f".doctor-{secrets.token_hex(4)}")
    probe.write_text("seen", encoding="utf-8")
    lines = [
        f"test -f {shlex.quote(str(probe.absolute()))} && echo folder",
        f"mkdir -p {shlex.quote(str(store))} && test -w {shlex.quote(str(store))} && echo store",
        f'[ "$(palio --version)" = "palio, version {__version__}" ] && echo palio',
        "command -v vllm > /dev/null && echo vllm",
    ]
    here = f"a node of {partition}"
    try:
        seen = slurm.ask(
            "srun",
            f"--immediate={NODE_SECONDS}",
            *options,
            "sh",
            "-c",
            "; ".join(lines) + "; true",
            seconds=NODE_SECONDS + 60,
        ).split()
    except PalioError as error:
        yield Finding(False, f"{here} runs a job", f"{error}; try again when a node is free")
        return
    finally:
        probe.unlink()
    folder = "run in a folder on the shared file system"
    yield Finding("folder" in seen, f"{here} sees the working folder", folder)
    closed = "closed_store: give a folder on the shared file system that you may write"
    yield Finding("store" in seen, f"{here} can write the closed store", closed)
    path = f"put {Path(sys.executable).parent} first on PATH before you start, on a path that nodes see"
    yield Finding("palio" in seen, f"{here} runs Palio {__version__}", path)
    if uses_vllm(competition) and any(option.startswith("--gpus") for option in options):
        yield Finding(
            "vllm" in seen, f"{here} has vllm on PATH", "put its bin folder on PATH; docs/serving.md"
        )


def uses_vllm(competition: Competition) -> bool:
    return any(competition.stage(stage).engine == PROGRAM for stage in STAGES)


def engine_findings(competition: Competition) -> Iterator[Finding]:
    """Check that this machine can serve as the stages ask: with the vllm on PATH, in bfloat16 on its CPU."""
    if uses_vllm(competition):
        try:
            yield Finding(True, f"vllm {vllm_version()}")
        except BadInput as error:
            yield Finding(False, "vllm serves the packages", str(error))
    on_cpu = any(not track.gpu_memory_gb for track in competition.tracks.values())
    if on_cpu and any(competition.stage(stage).cpu_dtype == "bfloat16" for stage in STAGES):
        what = "bfloat16, in which a stage serves models on CPUs"
        yield Finding(multiplies_bf16(), what, "this CPU has neither AVX512-BF16 nor AMX; use float32")


def _gpus(need: Need) -> str:
    return f"--gpus={need.limits.gpu_model}:1" if need.limits.gpu_model else "--gpus=1"


def _account(profile: dict[str, Any]) -> list[str]:
    names = {"slurm_account": "--account", "qos": "--qos", "constraint": "--constraint"}
    given = profile.get("default-resources", {})
    return [f"{option}={given[name]}" for name, option in names.items() if name in given]


def examine(competition: Competition, file: Path) -> Iterator[Finding]:
    """Yield all findings, the cheap ones first; later ones only if the earlier ones allow them."""
    absent = [command for command in COMMANDS if not shutil.which(command)]
    yield Finding(not absent, "SLURM's commands", f"{', '.join(absent)} not found; run on a login node")
    if absent:
        return
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise BadInput(file, why="is not a profile", fix="give the profile's config.yaml")
    site = read_site()
    yield Finding(True, f"slurmctld responds; partitions {', '.join(site.partitions)}")
    sound = True
    for finding in findings(competition, content, file, site):
        sound &= finding.ok
        yield finding
    if sound:
        yield from node_findings(competition, content, file)
