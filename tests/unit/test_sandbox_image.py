"""An image's files take the place of the system, and what it says of its program is done; the confinement is
the same."""

from __future__ import annotations

import gzip
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import zstandard

from palio.config import Program
from palio.errors import PalioError, RuleViolation
from palio.sandbox.image import Image, account, check_image, image_folder, served_port
from palio.sandbox.process import Confined
from palio.sandbox.room import GIB, Limits, Room
from tests.support.images import docker_archive, folder, host_files, layer, member, oci_archive, symlink

LIMITS = Limits(memory=GIB, processes=16, scratch=1 << 20, output=1 << 20, cpus=1)
PASSWD = b"root:x:0:0:root:/root:/bin/sh\nbob:x:1234:99:Bob:/home/bob:/bin/sh\n"
FILES = [
    member("etc/passwd", PASSWD),
    member("usr/share/made-by", b"the team\n"),
    folder("root", 0o700),
    member("root/.cache/huggingface/weights", b"filled at build\n", mode=0o600),
    folder("home/bob", 0o700),
    folder("tmp"),
    member("entry/mine", b"of the image\n"),
]


@pytest.fixture(scope="module")
def base() -> bytes:
    """A layer with a shell and a few files."""
    return layer([*host_files("/bin/cat", "/usr/bin/id"), *FILES])


def unpacked(work: Path, layers: list[bytes], config: Mapping[str, Any] | None = None) -> Image:
    work.mkdir(parents=True, exist_ok=True)
    image = image_folder(str(oci_archive(work / "image.tar", layers, config)), work, GIB)
    assert image is not None
    return image


def said(image: Image, work: Path, program: Program) -> list[str]:
    """What a program in the image prints."""
    with Confined(program, Room(LIMITS, image=image), work / "log") as running:
        code = running.wait(20)
    lines = (work / "log").read_text().splitlines()
    assert code == 0, lines
    return lines


def line(text: str | None = None) -> Program:
    return Program(run=text, image="image.tar")


def test_a_program_runs_among_the_images_files_and_sees_none_of_the_hosts(
    base: bytes, tmp_path: Path
) -> None:
    image = unpacked(tmp_path, [base])
    text = (
        "cat /usr/share/made-by /root/.cache/huggingface/weights /entry/mine; "
        "[ -e /usr/bin/env ] || echo alone; [ -e /work ] || [ -e /home/user ] || echo hidden"
    )
    expected = ["the team", "filled at build", "of the image", "alone", "hidden"]
    assert said(image, tmp_path, line(text)) == expected


def test_an_image_is_found_by_a_relative_path(
    base: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the workflow names its folders."""
    monkeypatch.chdir(tmp_path)
    assert said(unpacked(Path("results"), [base]), tmp_path, line("cat /usr/share/made-by")) == ["the team"]


def test_the_images_files_are_scratch_of_fixed_size_and_stay_as_they_are(base: bytes, tmp_path: Path) -> None:
    image = unpacked(tmp_path, [base])
    text = (
        "for place in /root/.cache/huggingface /usr/share /tmp ${TMPDIR:-/tmp} $HOME /; do"
        " echo x 2> /dev/null > $place/x && echo $place; done; echo mine > /usr/share/made-by;"
        " cat /usr/share/made-by;for n in 1 2 3 4 5 6 7; do cat /bin/*;done > /usr/share/l 2>&1 || echo full"
    )
    written = ["/root/.cache/huggingface", "/usr/share", "/tmp", "/tmp", "/root"]
    assert said(image, tmp_path, line(text)) == [*written, "mine", "full"]
    assert (image.root / "usr/share/made-by").read_text() == "the team\n"
    assert not (image.root / "usr/share/l").exists()


def test_cmd_entrypoint_env_workdir_and_user_are_the_images(base: bytes, tmp_path: Path) -> None:
    config = {
        "Entrypoint": ["/bin/sh", "-c"],
        "Cmd": ['pwd; id -u; id -g; echo "$HOME $GREETING $PATH"'],
        "Env": ["GREETING=a = b", "PATH=/bin:/usr/bin", "PALIO_CONTRACT=mine"],
        "WorkingDir": "/srv/app",
        "User": "bob",
    }
    image = unpacked(tmp_path, [base], config)
    assert said(image, tmp_path, line()) == ["/srv/app", "1234", "99", "/home/bob a = b /bin:/usr/bin"]
    assert said(image, tmp_path / "run", line("echo instead; pwd")) == ["instead", "/srv/app"]


def test_an_image_without_user_runs_as_root_that_may_nothing(base: bytes, tmp_path: Path) -> None:
    image = unpacked(tmp_path, [base])
    rights = "while read name value; do [ $name = CapEff: ] && echo $value; done < /proc/self/status; :"
    text = f"id -u; echo $HOME; {rights}"
    assert said(image, tmp_path, line(text)) == ["0", "/root", "0000000000000000"]


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", (0, 0, "/root")),
        ("bob", (1234, 99, "/home/bob")),
        ("1234:7", (1234, 7, "/home/bob")),
        ("4321", (4321, 0, "/")),
    ],
)
def test_a_user_is_found_in_the_images_own_table(
    user: str, expected: tuple[int, int, str], tmp_path: Path
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_bytes(PASSWD)
    assert account(tmp_path, user) == expected


def test_a_user_that_the_image_does_not_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuleViolation, match="USER 'alice' of the image is no user of it; add it, or correct"):
        account(tmp_path, "alice")


@pytest.mark.parametrize("write", [oci_archive, docker_archive])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
def test_layers_of_both_formats_lie_over_each_other(write: Any, compress: Any, tmp_path: Path) -> None:
    first = layer(
        [member("a/kept", b"1"), member("a/gone", b"1"), member("b/old", b"1"), symlink("lib", "usr/lib")]
    )
    second = layer(
        [
            member("a/.wh.gone"),
            member("b/.wh..wh..opq"),
            member("b/new", b"2"),
            member("lib/in-usr", b"2", mode=0o755),
            member("a/hard", type=tarfile.LNKTYPE, linkname="a/kept"),
        ]
    )
    path = write(tmp_path / "image.tar", [compress(first), compress(second)], {"Cmd": ["x"]})
    image = image_folder(str(path), tmp_path, GIB)
    assert image is not None
    found = {str(file.relative_to(image.root)) for file in image.root.rglob("*") if file.is_file()}
    assert found == {"a/kept", "a/hard", "b/new", "usr/lib/in-usr", "etc/hosts", "etc/resolv.conf"}
    assert (image.root / "a/hard").read_bytes() == b"1"
    assert os.access(image.root / "usr/lib/in-usr", os.X_OK)
    assert image.config.arguments == ("x",)


def test_an_image_is_unpacked_once(base: bytes, tmp_path: Path) -> None:
    image = unpacked(tmp_path, [base])
    (image.root / "seen").touch()
    assert (unpacked(tmp_path, [base]).root / "seen").exists()


def test_the_port_is_the_entrys_or_the_one_that_the_image_exposes(tmp_path: Path) -> None:
    image = unpacked(tmp_path, [], {"ExposedPorts": {"80/tcp": {}, "53/udp": {}}, "Cmd": ["x"]})
    assert (served_port(image, None), served_port(image, 9000), served_port(None, None)) == (80, 9000, 8080)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, "the image has neither CMD nor ENTRYPOINT; add one, or give run"),
        (
            {"Cmd": ["x"], "ExposedPorts": {"80": {}, "443/tcp": {}}},
            "the image exposes the ports 80, 443; give one",
        ),
    ],
)
def test_an_image_that_leaves_open_what_starts_is_refused(
    config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(RuleViolation, match=reason):
        check_image(oci_archive(tmp_path / "image.tar", [], config), None, None)
    assert check_image(oci_archive(tmp_path / "image.tar", [], config), "run", 80)


def test_an_image_for_another_machine_is_refused(tmp_path: Path) -> None:
    path = oci_archive(tmp_path / "image.tar", [])
    text = path.read_bytes().replace(b'"amd64"', b'"s390x"').replace(b'"arm64"', b'"s390x"')
    path.write_bytes(text)
    with pytest.raises(RuleViolation, match=r"is not an image's archive|the image is for"):
        check_image(path, "run", None)


def test_a_sif_file_needs_apptainer_and_says_what_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "image.sif").touch()
    with pytest.raises(
        PalioError, match=r"\.sif images need apptainer, which is not installed here; .* \(\.tar\)"
    ):
        image_folder(str(tmp_path / "image.sif"), tmp_path, GIB)
