"""A base model's own code, in the sandbox: what it tries is contained, and only approved code runs."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.numpy import load_file, save_file

from palio.base_model import fetch_base_model
from palio.errors import Crashed, OutOfMemory, RuleViolation
from palio.layout import TrainingFolder
from palio.packaging.verify import verify_package
from palio.records import AdapterManifest, TrainingFacts
from palio.sandbox.handed_in import take_weights
from palio.training.confined import FACTS, FIELDS, _copy_heartbeat, _telemetry, typed
from tests.support.own_code import MODELING, SOURCES, approved, fetched, siena
from tests.support.training import Entry


@pytest.fixture
def listener() -> Iterator[int]:
    """A port of this machine that takes connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def modeling(code: str) -> dict[str, str]:
    return SOURCES | {"modeling_siena.py": code}


# --- other code than the approved ------------------------------------------------------------------------


def test_code_that_differs_from_its_hash_is_not_fetched(base_model: Path, tmp_path: Path) -> None:
    source = siena(tmp_path / "published", base_model)
    code = approved(tmp_path / "published")
    (tmp_path / "published" / "modeling_siena.py").write_text(f"{MODELING}print('mine')")
    changed = approved(tmp_path / "published")["modeling_siena.py"]
    with pytest.raises(RuleViolation) as refused:
        fetch_base_model(source, tmp_path / source.id, code=code)
    expected = f"modeling_siena.py: expected sha256 {code['modeling_siena.py']}, found {changed}"
    assert expected in str(refused.value)
    assert not (tmp_path / source.id / "manifest.json").exists()


def test_a_file_beside_the_approved_ones_is_not_fetched(base_model: Path, tmp_path: Path) -> None:
    source = siena(tmp_path / "published", base_model)
    code = approved(tmp_path / "published")
    (tmp_path / "published" / "torch.py").write_text("print('mine')")
    with pytest.raises(RuleViolation, match=r"torch\.py: expected sha256 none, it is not approved, found"):
        fetch_base_model(source, tmp_path / source.id, code=code)


def test_a_link_is_what_it_leads_to(base_model: Path, tmp_path: Path) -> None:
    source = siena(tmp_path / "published", base_model)
    code, path = approved(tmp_path / "published"), tmp_path / "published" / "modeling_siena.py"
    path.unlink()
    (tmp_path / "elsewhere.py").write_text("SECRET = 1")
    path.symlink_to(tmp_path / "elsewhere.py")
    with pytest.raises(RuleViolation, match=r"modeling_siena\.py: expected sha256"):
        fetch_base_model(source, tmp_path / source.id, code=code)
    (tmp_path / "elsewhere.py").write_text(MODELING)  # as a snapshot of the hub links to its files
    assert fetch_base_model(source, tmp_path / source.id, code=code).unsupported is None
    taken = tmp_path / source.id / "model" / "modeling_siena.py"
    assert not taken.is_symlink()
    assert taken.stat().st_nlink == 1  # a copy: its owner cannot change it later


@pytest.mark.parametrize("how", ["changed", "added", "linked"])
def test_code_that_changes_after_it_was_fetched_does_not_run(how: str, own: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(own, tmp_path / own.name))
    path = base / "model" / "modeling_siena.py"
    if how == "linked":
        path.unlink()
        path.symlink_to("/proc/self/cmdline")
    else:
        other = path if how == "changed" else path.with_name("numpy.py")
        other.write_text("raise SystemExit('it ran')")
    entry = Entry.create(tmp_path / "results" / "t" / "e", base)
    with pytest.raises(RuleViolation, match="the model's code is not the approved one"):
        entry.finetune(track={"cpus": 1}, target_modules=["value"])
    (log,) = entry.folder.glob("work/train/*/program.log")
    assert "it ran" not in log.read_text()


def test_a_package_whose_code_differs_is_refused_and_not_loaded(own: Path, tmp_path: Path) -> None:
    entry = Entry.create(tmp_path / "results" / "t" / "e", own)
    entry.package(adapter=False)
    path = entry.folder / "package" / "modeling_siena.py"
    path.unlink()  # it may be a link to the base model's
    path.write_text(f"{MODELING}raise SystemExit('it ran')")
    found = {one.check: (one.state, one.why) for one in verify_package(entry.folder / "package")}
    assert found["files"][0] == "fail"
    assert found["no code"][0] == "fail"
    assert "modeling_siena.py: expected sha256" in found["no code"][1]
    assert found["loads without Palio"] == ("skipped", "nothing is loaded while 'files' fails")


# --- approved code that attacks --------------------------------------------------------------------------

ATTACK = """
import os, socket
from pathlib import Path
found = []
for path in ({secret!r}, "/root/.ssh", "/home"):
    try:
        found.append(f"read {{path}}: {{os.listdir(path) if os.path.isdir(path) else open(path).read()}}")
    except OSError:
        pass
for folder in ("/base_model", "/entry", "/entry/palio", {out!r}):
    try:
        Path(folder, "mine").write_text("x")
        found.append("wrote " + folder)
    except OSError:
        pass
for address in (("127.0.0.1", {port}), ("1.1.1.1", 53)):
    try:
        socket.create_connection(address, 2)
        found.append(f"reached {{address[0]}}")
    except OSError:
        pass
found += [f"read ${{name}}" for name in os.environ if "SECRET" in name]
if len([name for name in os.listdir("/proc") if name.isdigit()]) > 8:
    found.append("saw other processes")
"""
FORK = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv("/usr/bin/env", ["env", "sleep", "1234.5"])
    os._exit(0)
"""
TELL = """
raise RuntimeError(f"got {found}")
"""


def test_code_that_reads_writes_connects_and_forks_is_contained(
    base_model: Path, tmp_path: Path, listener: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEAM_SECRET", "x")
    secret = tmp_path / "results" / "other" / "adapter.json"
    secret.parent.mkdir(parents=True)
    secret.write_text("another entry's")
    attack = ATTACK.format(secret=str(secret), out=str(tmp_path), port=listener)
    with pytest.raises(RuntimeError) as succeeded:  # here, it would
        exec(attack + TELL, {})  # noqa: S102
    assert re.search(r"read .*another entry's.*wrote .*reached 127.0.0.1.*SECRET", str(succeeded.value))
    (tmp_path / "mine").unlink()
    source = siena(tmp_path / "published", base_model, modeling(attack + FORK + TELL))
    manifest = fetch_base_model(source, tmp_path / source.id, code=approved(tmp_path / "published"))
    assert manifest.unsupported is not None
    assert "(RuntimeError: got [])" in manifest.unsupported.why
    assert not list(tmp_path.rglob("mine"))
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in lines if "1234.5" in line]


def test_code_that_ends_the_training_ends_its_own_entry_with_a_name(base_model: Path, tmp_path: Path) -> None:
    line = "        x = self.embed"
    attack = MODELING.replace(line, f"        os._exit(7) if self.training else 0\n{line}")
    base = fetched(tmp_path / "own", base_model, modeling(f"import os\n{attack}"))
    entry = Entry.create(tmp_path / "results" / "t" / "e", base)
    with pytest.raises(Crashed, match="the process with the model's own code ended with code 7"):
        entry.finetune(track={"cpus": 1}, target_modules=["value"])
    assert not entry.at.adapter_manifest.exists()


def test_code_that_takes_more_memory_than_the_track_has_is_ended(base_model: Path, tmp_path: Path) -> None:
    line = "        x = self.embed"
    takes = "        self.taken = bytearray(3 << 30) if self.training else 0"
    hungry = MODELING.replace(line, f"{takes}\n{line}")
    base = fetched(tmp_path / "own", base_model, modeling(hungry))
    entry = Entry.create(tmp_path / "results" / "t" / "e", base)
    with pytest.raises(OutOfMemory):
        entry.finetune(track={"cpus": 1, "ram_gb": 3}, target_modules=["value"])


# --- what it leaves --------------------------------------------------------------------------------------


def test_weights_that_are_a_link_are_not_taken(own: Path, tmp_path: Path) -> None:
    left = tmp_path / "left"
    left.mkdir()
    (left / "model.safetensors").symlink_to(own / "model" / "model.safetensors")
    with pytest.raises(RuleViolation, match="symbolic link"):
        take_weights(left, tmp_path / "out", base_model=own / "model", limit=1 << 30)


def test_weights_of_another_shape_are_not_taken(own: Path, tmp_path: Path) -> None:
    weights = load_file(own / "model" / "model.safetensors")
    (tmp_path / "left").mkdir()
    save_file(weights | {"head.weight": weights["head.weight"][:4]}, tmp_path / "left" / "model.safetensors")
    with pytest.raises(RuleViolation, match=r"head\.weight has the shape"):
        take_weights(tmp_path / "left", tmp_path / "out", base_model=own / "model", limit=1 << 30)


def test_what_it_says_of_its_training_is_known_fields_of_known_types() -> None:
    said: dict[str, Any] = dict.fromkeys(FIELDS) | {"state": "finished", "rows": 3, "rows_cut": 0}
    said |= {"answers_left_out": 0, "rows_held_out": 0}
    assert typed(AdapterManifest, FIELDS, said | {"entry": "another", "fingerprint": "0"}).keys() == FIELDS
    with pytest.raises(ValueError, match="rows"):
        typed(AdapterManifest, FIELDS, said | {"rows": "many"})
    with pytest.raises(ValueError, match="versions"):
        typed(TrainingFacts, FACTS, dict.fromkeys(FACTS) | {"versions": ["x"]})


def test_steps_of_no_possible_size_are_its_own_fault() -> None:
    with pytest.raises(Crashed, match="did not report its steps"):
        _telemetry({"telemetry": [{"step": 1 << 70}]})


def test_a_heartbeat_that_is_a_link_is_not_shown(tmp_path: Path) -> None:
    work = TrainingFolder(tmp_path)
    work.program.mkdir()
    (work.program / "heartbeat.json").symlink_to("/etc/hostname")
    _copy_heartbeat(work, tmp_path / "shown.json")
    assert not (tmp_path / "shown.json").exists()
