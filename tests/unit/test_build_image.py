"""A team's Dockerfile becomes an image: confined, within limits, with a reason of its kind where it fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from palio.config import Isolation, ServerProgram
from palio.errors import BadInput, Crashed, Interrupted, OutOfMemory, PalioError, RuleViolation, TimeLimit
from palio.evaluation.probe import Asked, probe
from palio.evaluation.window import Window
from palio.layout import BaseModelFolder, EntryFolder
from palio.packaging.image import build_image
from palio.packaging.server import package_server
from palio.provenance import file_sha256
from palio.records import ImageManifest
from palio.sandbox.build import own_range
from palio.sandbox.build_log import KINDS, lost_network, reason
from palio.sandbox.room import Limits
from palio.sandbox.server import team_server
from palio.settings import ImageSettings, PackageSettings
from tests.support.dockerfiles import dockerfile, require_builds, serving_dockerfile

BASE = "FROM scratch\nADD base.tar /\n"
MB = 1 << 20
LIMITS = Limits(memory=1024 * MB, processes=128, scratch=16 * MB, output=16 * MB, cpus=1)

builds = pytest.mark.usefixtures("can_build")


@pytest.fixture
def can_build() -> None:
    require_builds()


def build(folder: EntryFolder, context: Path, **isolation: object) -> ImageManifest:
    given = Isolation.model_validate({"image_gb": 1, "build_time": "60s", "scratch_gb": 0.02, **isolation})
    settings = ImageSettings(
        competition_id="c", dockerfile=str(context), isolation=given, network=False, team_folders=()
    )
    return build_image(folder, settings)


@pytest.fixture
def entry_folder(tmp_path: Path) -> EntryFolder:
    return EntryFolder.at(tmp_path / "track" / "entry")


@builds
def test_an_image_is_built_packaged_and_serves_on_port_80(
    entry_folder: EntryFolder, tiny: Path, tmp_path: Path
) -> None:
    built = build(entry_folder, serving_dockerfile(tmp_path / "context"))
    assert built.archive_sha256 == file_sha256(entry_folder.image)
    program = ServerProgram(dockerfile=str(tmp_path / "context"))
    settings = PackageSettings(competition_id="c", base_model_id="tiny", adapter=False, server=program)
    package = package_server(program, entry_folder, settings, BaseModelFolder(tiny))
    assert package.files["image.tar"] == built.archive_sha256
    server = team_server(
        entry_folder.package,
        base_model=tiny / "model",
        limits=LIMITS,
        isolation=Isolation(),
        log=tmp_path / "server.log",
        work=entry_folder.work,
    )
    with server:
        report = probe(server.base_url, Asked(), Window.of_model(tiny / "model"))
    assert report.conforms, report.failed


@builds
def test_the_same_folder_is_built_once_and_a_changed_one_again(
    entry_folder: EntryFolder, tmp_path: Path
) -> None:
    context = dockerfile(tmp_path / "context", BASE + "RUN echo built > /built\n")
    first = build(entry_folder, context)
    log = next(entry_folder.builds.glob("*/build.log"))
    assert "STEP 3/3: RUN echo built" in log.read_text()
    before = log.read_text()
    assert build(entry_folder, context) == first
    assert log.read_text() == before
    dockerfile(context, BASE + "RUN echo other > /built\n")
    assert build(entry_folder, context).digest != first.digest


def test_a_replicate_is_served_with_the_image_of_its_entry(entry_folder: EntryFolder) -> None:
    replicate = EntryFolder.at(entry_folder.path / "replicates" / "2")
    assert (replicate.image, replicate.image_manifest) == (entry_folder.image, entry_folder.image_manifest)


@builds
@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("FROM python:3.10\n", "no network", "put base images, packages and weights into the folder"),
        ("FROM oci-archive:gone.tar\n", "base image not found", "FROM name@sha256:<digest>"),
        (BASE + "COPY weights.bin /\n", "missing file", "no such file or directory; COPY and ADD see"),
        (BASE + "RUNN true\n", "invalid Dockerfile", 'Unknown instruction: "RUNN"; correct it'),
        (BASE + "RUN echo mine; exit 3\n", "a command failed", "exit status 3"),
        (
            BASE + "RUN echo 'ERROR: No matching distribution found for torch==1.9'; exit 1\n",
            "package gone",
            "No matching distribution found for torch==1.9",
        ),
    ],
)
def test_a_dockerfile_that_cannot_be_built_is_named_by_kind(
    text: str, kind: str, words: str, entry_folder: EntryFolder, tmp_path: Path
) -> None:
    with pytest.raises(Crashed) as failed:
        build(entry_folder, dockerfile(tmp_path / "context", text))
    assert str(failed.value).startswith(f"the image could not be built ({kind}): ")
    assert words in str(failed.value)
    assert failed.value.log == next(entry_folder.builds.glob("*/build.log"))
    assert not entry_folder.image_manifest.exists()


@builds
@pytest.mark.parametrize(
    ("command", "isolation", "error", "words"),
    [
        ("sleep 60", {"build_time": "3s"}, TimeLimit, r"\(timeout\): it took more than 3 s"),
        (
            "head -c 400M /dev/zero > /large",
            {"image_gb": 0.3},
            Crashed,
            "wrote .* at most 0.3 GiB|File size limit exceeded",
        ),
        (
            """python3 -c 'x = bytearray(900 << 20); import time; time.sleep(30)'""",
            {"build_ram_gb": 0.6},
            OutOfMemory,
            r"\((?:memory full|over a limit)\): ",
        ),
    ],
)
def test_a_build_has_limits(
    command: str,
    isolation: dict[str, object],
    error: type[PalioError],
    words: str,
    entry_folder: EntryFolder,
    tmp_path: Path,
) -> None:
    context = dockerfile(tmp_path / "context", f"{BASE}RUN {command}\n", python="python" in command)
    with pytest.raises(error, match=words):
        build(entry_folder, context, **isolation)
    assert [path.name for path in next(entry_folder.builds.iterdir()).iterdir() if path.is_dir()] == []


@builds
def test_a_build_sees_neither_the_host_nor_its_network(entry_folder: EntryFolder, tmp_path: Path) -> None:
    """RUN is root of its own namespace, and a program of a stranger."""
    (tmp_path / "secret").write_text("closed")
    looks = (
        f"[ -e {tmp_path}/secret ] && echo SEEN; mknod /sda b 8 0 2> /dev/null && cat /sda && echo READ;"
        " while read name rest; do echo net $name; done < /proc/net/dev; :"
    )
    build(entry_folder, dockerfile(tmp_path / "context", f"{BASE}RUN {looks}\n"))
    log = next(entry_folder.builds.glob("*/build.log")).read_text().split("RUN ", 1)[1].partition("\n")[2]
    assert "SEEN" not in log
    assert "READ" not in log
    assert {line for line in log.splitlines() if line.startswith("net ")} <= {
        "net Inter-|",
        "net face",
        "net lo:",
    }


@builds
def test_a_result_that_is_a_link_is_refused(entry_folder: EntryFolder, tmp_path: Path) -> None:
    context = dockerfile(tmp_path / "context", BASE)
    import palio.packaging.image as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BUILD", "ln -s /etc/shadow /output/image.tar")
        with pytest.raises(RuleViolation, match=r"image\.tar is a symbolic link"):
            build(entry_folder, context)


def test_users_and_groups_have_ranges_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "subgid").write_text("alice:100000:65536\nbob:300000:1000\n")
    found = own_range(100, {"1000", "bob"}, tmp_path / "subgid")
    assert found.lines == "0 100 1\n1 300000 1000\n"
    with pytest.raises(PalioError, match="subgid gives carol no ids: usermod --add-subuids"):
        own_range(100, {"1001", "carol"}, tmp_path / "subgid")


def test_a_folder_without_dockerfile_is_named(entry_folder: EntryFolder, tmp_path: Path) -> None:
    (tmp_path / "context").mkdir()
    with pytest.raises(BadInput, match=r"server\.dockerfile .* has no Dockerfile; put one there"):
        build(entry_folder, tmp_path / "context")


def test_a_machine_without_buildah_interrupts_the_entry(
    entry_folder: EntryFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        Interrupted, match="built with buildah, which is not installed here: apt install buildah"
    ):
        build(entry_folder, dockerfile(tmp_path / "context", BASE))


LOGS = {
    "memory full": "c++: fatal error: Killed signal terminated program cc1plus",
    "disk full": "write /root/x: no space left on device",
    "gated model without a token": "OSError: You are trying to access a gated repo. Cannot access gated repo "
    "for url https://huggingface.co/meta-llama/Llama-2-7b/resolve/main/config.json.",
    "package gone": "E: Unable to locate package libcudnn8=8.1",
    "base image not found": "Error: creating build container: initializing source docker://nvcr.io/a:1: "
    "reading manifest 1 in nvcr.io/a: manifest unknown",
    "conflicting packages": "ERROR: Cannot install torch==2.0 and xformers because these package versions "
    "have conflicting dependencies.\nERROR: ResolutionImpossible",
    "certificate refused": "SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]",
    "missing file": 'copier: stat: "/missing.txt": no such file or directory',
    "invalid Dockerfile": 'Build error: Unknown instruction: "RUNN"',
}


@pytest.mark.parametrize("kind", [kind.name for kind in KINDS])
def test_a_log_tells_the_kind(kind: str) -> None:
    found = reason(f"STEP 1/1: RUN x\n{LOGS[kind]}\nError: exit status 1\n", network=True)
    assert found.kind.name == kind
    assert found.kind.fix


def test_a_network_that_was_lost_is_the_machines_fault() -> None:
    assert lost_network("Temporary failure resolving 'deb.debian.org'")
    assert not lost_network("dial tcp: lookup nvcr.oi: no such host")
