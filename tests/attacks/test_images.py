"""Attacks through an image: what its config says, and what its layers put where."""

from __future__ import annotations

import gzip
import stat
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from palio.config import Program
from palio.errors import RuleViolation
from palio.sandbox.image import Image, image_folder
from palio.sandbox.process import Confined
from palio.sandbox.room import GIB, Limits, Room, building
from tests.support.images import Member, folder, host_files, layer, member, oci_archive, symlink

LIMITS = Limits(memory=GIB, processes=16, scratch=1 << 20, output=1 << 20, cpus=1)
CONTRACT = {"PALIO_BASE_MODEL": "/base_model", "PORT": "8080"}


@pytest.fixture(scope="module")
def shell() -> list[Member]:
    return [*host_files("/bin/cat", "/usr/bin/id", "/bin/ls"), folder("tmp")]


def unpacked(work: Path, members: list[Member], config: Mapping[str, Any] | None = None) -> Image:
    image = image_folder(str(oci_archive(work / "image.tar", [layer(members)], config)), work, 1 << 28)
    assert image is not None
    return image


def said(image: Image, log: Path, text: str | None = None) -> tuple[int | None, list[str]]:
    room = Room(LIMITS, image=image, variables=CONTRACT)
    with Confined(Program(run=text, image="image.tar"), room, log) as running:
        code = running.wait(20)
    return code, log.read_text().splitlines()


# --- config ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"Env": ["X=1\0--bind\0/\0/host"]},
        {"Env": ["X\0--share-net\0=1"]},
        {"Cmd": ["true", "a\0b"]},
        {"Entrypoint": ["\0"]},
        {"WorkingDir": "/\0--bind\0/\0/host"},
        {"User": "0\0"},
        {"Env": [["X=1"]]},
        {"Cmd": "true"},
        {"Cmd": [{"a": 1}]},
        {"Env": ["=1"]},
        {"Env": ["X=\udc80"]},
        {"ExposedPorts": {"0/tcp": {}}},
        {"ExposedPorts": {"99999": {}}},
        {"ExposedPorts": {"8" * 5000: {}}},
        {"User": "4294967296"},
        {"User": "-1"},
        {"User": "0:9" + "9" * 40},
        {"Env": ["X=" + "a" * (1 << 20)]},
    ],
)
def test_a_config_that_would_be_more_than_a_config_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    """A null byte would end an argument of bubblewrap's, and begin another."""
    with pytest.raises(RuleViolation, match=r"of the image|the image's config"):
        unpacked(tmp_path, [folder("etc")], config)


def test_variables_change_neither_the_contract_nor_what_builds_the_room(
    shell: list[Member], tmp_path: Path
) -> None:
    hostile = ["PALIO_BASE_MODEL=/etc", "PORT=1", "LD_PRELOAD=/evil.so", "BASH_ENV=/evil", "ENV=/evil"]
    members = [*shell, member("evil", b"echo TAKEN\n", mode=0o755), member("evil.so", b"\x7fELF")]
    image = unpacked(tmp_path, members, {"Env": hostile})
    code, lines = said(image, tmp_path / "log", 'echo "$PALIO_BASE_MODEL $PORT"')
    assert code == 0
    assert [line for line in lines if "LD_PRELOAD" not in line] == ["/base_model 8080"]
    assert "TAKEN" not in lines


def test_an_entrypoint_that_looks_like_options_is_a_program_that_is_not_there(
    shell: list[Member], tmp_path: Path
) -> None:
    image = unpacked(tmp_path, shell, {"Entrypoint": ["--bind", "/", "/host"], "Cmd": ["/bin/ls", "/host"]})
    code, lines = said(image, tmp_path / "log")
    assert code == 1
    assert lines == ["bwrap: execvp --bind: No such file or directory"]


def test_an_entrypoint_is_confined_as_any_program(shell: list[Member], tmp_path: Path) -> None:
    (tmp_path / "closed").write_text("of the closed stage")
    looks = f"cat {tmp_path}/closed /proc/1/root{tmp_path}/closed /oldroot{tmp_path}/closed; ls /s /overlay"
    image = unpacked(tmp_path, shell, {"Entrypoint": ["/bin/sh", "-c", looks]})
    code, lines = said(image, tmp_path / "log")
    assert code != 0
    assert all("No such file" in line or "ermission denied" in line or "cannot" in line for line in lines), (
        lines
    )


@pytest.mark.parametrize("directory", ["/work", "/work/deep/er", "../../../../../../tmp/escaped", "work"])
def test_a_workdir_behind_a_link_is_made_inside_the_image(
    directory: str, shell: list[Member], tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    up = "../" * 20
    image = unpacked(tmp_path, [*shell, symlink("work", f"{up}{outside}")], {"WorkingDir": directory})
    assert list(outside.iterdir()) == []
    code, lines = said(image, tmp_path / "log", "pwd -P; echo x > written && cat written")
    assert (code, lines[-1]) == (0, "x"), lines
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize(
    ("members", "config"),
    [
        ([symlink("a", "b"), symlink("b", "a")], {"WorkingDir": "/a/c"}),
        ([member("file")], {"WorkingDir": "/file/c"}),
        ([symlink("etc", "etc")], {}),
        ([folder("etc/hosts")], {}),
    ],
)
def test_a_workdir_or_etc_that_cannot_be_is_named(
    members: list[Member], config: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(RuleViolation, match="the image"):
        unpacked(tmp_path, members, config)


def test_tables_of_users_and_hosts_are_read_and_written_inside_the_image(tmp_path: Path) -> None:
    for name in ("passwd", "hosts"):
        (tmp_path / name).write_text("bob:x:1:1::/home/bob:/bin/sh\n")
    up = "../" * 20
    links = [symlink(f"etc/{name}", f"{up}{tmp_path}/{name}") for name in ("passwd", "hosts")]
    with pytest.raises(RuleViolation, match="USER 'bob' of the image is no user of it"):
        unpacked(tmp_path, links, {"User": "bob"})
    assert (tmp_path / "hosts").read_text().startswith("bob")


# --- layers ------------------------------------------------------------------------------------------------


def test_devices_pipes_and_setuid_bits_do_not_come_along(shell: list[Member], tmp_path: Path) -> None:
    members = [
        *shell,
        member("dev/sda", type=tarfile.BLKTYPE, devmajor=8, devminor=0, mode=0o666),
        member("memory", type=tarfile.CHRTYPE, devmajor=1, devminor=1, mode=0o666),
        member("pipe", type=tarfile.FIFOTYPE),
        member("become-root", b"#!/bin/sh\nid -u\n", mode=0o6755),
    ]
    image = unpacked(tmp_path, members, {"User": "1234"})
    kinds = {stat.S_IFMT(path.lstat().st_mode) for path in image.root.rglob("*")}
    assert kinds <= {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK}
    assert all(not path.stat().st_mode & 0o6000 for path in image.root.rglob("*") if path.is_file())
    code, lines = said(image, tmp_path / "log", "/become-root; ls /dev/sda /memory")
    assert lines[0] == "1234"
    assert code != 0


@pytest.mark.parametrize(
    "members",
    [
        [member("../../../escaped", b"x")],
        [member("/escaped", b"x")],
        [symlink("up", "../../.."), member("up/escaped", b"x")],
        [symlink("up", "{outside}"), member("up/escaped", b"x")],
        [symlink("escaped", "{outside}/escaped"), member("escaped", b"x")],
        [symlink("a", "{outside}"), symlink("b", "a"), folder("b/escaped")],
        [symlink("a", "{outside}"), member("a/.wh.kept")],
        [symlink("a", "{outside}"), member("a/.wh..wh..opq")],
        [member(".wh..."), member("..wh../.wh..")],
    ],
)
def test_a_layer_writes_and_removes_inside_the_image_only(members: list[Member], tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    for info, _ in members:
        info.linkname = info.linkname.format(outside=outside)
    before = set(tmp_path.rglob("*"))
    image = unpacked(tmp_path, members)
    inside = {path for path in tmp_path.rglob("*") if path.is_relative_to(image.root.parent.parent)}
    assert set(tmp_path.rglob("*")) - before - inside == {tmp_path / "image.tar"}
    assert (outside / "kept").read_text() == "kept"


@pytest.mark.parametrize("target", ["/etc/shadow", "../../../../etc/shadow", "nowhere", "link"])
def test_a_hard_link_leads_to_a_file_of_the_image_or_nowhere(target: str, tmp_path: Path) -> None:
    members = [symlink("link", "/etc/shadow"), member("hard", type=tarfile.LNKTYPE, linkname=target)]
    try:
        image = unpacked(tmp_path, members)
    except RuleViolation as refused:
        assert "links to no file" in str(refused)
    else:
        assert (image.root / "hard").is_symlink()


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([gzip.compress(layer([member("zeros", bytes(300 << 20))]))], "more than 0 GiB"),
        ([layer([folder("/".join("a" * 300))])], "nested deeper than 200"),
        ([layer([member("a", b"x" * 5000)])[:2000]], "is damaged"),
        ([b"no tar file at all" * 100], "is damaged"),
        ([gzip.compress(b"x" * 1000)[:-20]], "is damaged"),
        ([layer([member("a" * 300)])], "is refused: File name too long"),
        ([b""] * 600, "has 600 layers"),
    ],
    ids=["bomb", "deep", "torn", "no tar", "torn gzip", "long", "many"],
)
def test_a_layer_that_is_no_layer_is_named(layers: list[bytes], reason: str, tmp_path: Path) -> None:
    with pytest.raises(RuleViolation, match=reason):
        image_folder(str(oci_archive(tmp_path / "image.tar", layers)), tmp_path, 1 << 28)


def test_a_blob_is_what_its_digest_says(tmp_path: Path) -> None:
    path = oci_archive(tmp_path / "image.tar", [layer([member("file", b"as it was reviewed")])])
    path.write_bytes(path.read_bytes().replace(b"as it was reviewed", b"as it has become :"))
    with pytest.raises(RuleViolation, match="is not what its digest says"):
        image_folder(str(path), tmp_path, GIB)


@pytest.mark.parametrize("name", ["index.json", "manifest.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"[[[[", b'{"manifests": [{"digest": "../../x"}]}', b'[{"Config": "/etc/shadow"}]'],
)
def test_an_index_that_is_none_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image.tar"
    path.write_bytes(layer([member(name, content)]))
    with pytest.raises(RuleViolation, match="is not an image's archive"):
        image_folder(str(path), tmp_path, GIB)


def test_what_organizers_show_is_never_mounted_through_a_link_of_the_image(tmp_path: Path) -> None:
    """bubblewrap makes mount points as it finds them, also behind a link out of the room."""
    image = unpacked(tmp_path, [symlink("usr", f"/oldroot{tmp_path}"), symlink("opt", "/srv")])
    for shown in ("/usr/local/cuda", "/opt"):
        room = Room(LIMITS, image=image, visible=(shown,))
        with pytest.raises(
            RuleViolation, match=f"is a link in the image, and the organizers show {shown} there"
        ):
            building(room, files={}, seccomp=0, info=0, block=0, uid=None)
