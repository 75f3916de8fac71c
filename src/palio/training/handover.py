"""The finished adapter of a training run: whether it is there, and how it gets into the entry's folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from palio.config import Track
from palio.errors import BadInput, Crashed
from palio.provenance import atomic_path, folder_sha256
from palio.records import AdapterManifest, read_record
from palio.training.ledger import read_ledger


def refuse_to_replace(file: Path, key: str) -> None:
    """Hours of training are not overwritten by the way. Snakemake removes what a rule is to make anew."""
    if file.is_file() and (kept := read_record(AdapterManifest, file).fingerprint) != key:
        fix = "was trained with another recipe, dataset or base model; give --retrain to replace it"
        raise BadInput(file, "fingerprint", kept[:16], fix)


def ended(work: Path, track: Track) -> bool:
    """Whether `work` holds the adapter; one that ended at a smaller budget than today's is trained on."""
    if not (work / "adapter.json").is_file():
        return False
    budgets = [line["budget"] for line in read_ledger(work / "ledger.jsonl") if line["event"] == "start"]
    state = read_record(AdapterManifest, work / "adapter.json").state
    return state == "finished" or max(budgets) >= track.training_budget


def publish(work: Path, entry_dir: Path) -> AdapterManifest:
    """Hard links to (copies of) adapter/, train.parquet and adapter.json of `work`, the manifest last."""
    manifest = read_record(AdapterManifest, work / "adapter.json")
    if folder_sha256(work / "adapter") != manifest.files:
        raise Crashed(f"the finished adapter in {work} was changed; delete that folder to train again")
    building = entry_dir / "work" / "adapter.tmp"
    shutil.rmtree(building, ignore_errors=True)
    shutil.copytree(work / "adapter", building, copy_function=_link)
    (entry_dir / "adapter.json").unlink(missing_ok=True)
    shutil.rmtree(entry_dir / "adapter", ignore_errors=True)
    building.rename(entry_dir / "adapter")
    with atomic_path(entry_dir / "train.parquet") as temporary:
        shutil.copyfile(work / "train.parquet", temporary)
    manifest.write(entry_dir / "adapter.json")
    return manifest


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
