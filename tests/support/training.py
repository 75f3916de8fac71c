"""An entry to fine-tune: a tiny model with a real tokenizer, and rows that can be learned."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from palio.config import BaseModelSource, FinetuneRecipe, Telemetry, Track
from palio.curation.rows import ROW
from palio.layout import BaseModelFolder, EntryFolder
from palio.provenance import file_sha256, folder_sha256
from palio.records import (
    AdapterManifest,
    BaseModelManifest,
    DatasetManifest,
    FinetuneRun,
    PackageManifest,
    read_record,
)
from palio.settings import FinetuneSettings, PackageSettings, RunOptions, slice_of
from palio.training.step import TrainingStep


def tiny_base_model(
    out: Path, tokenizer_of: Path, dtype: torch.dtype = torch.float32, head_dim: int = 8
) -> Path:
    """A two-layer Llama of random weights with the tokenizer of the model folder `tokenizer_of`."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(dtype).save_pretrained(out / "model")
    for path in tokenizer_of.iterdir():
        if path.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(path, out / "model" / path.name)
    for path in (out / "model").iterdir():
        path.chmod(0o644)  # as of a fetched base model: a team's program may run as another user
    manifest = BaseModelManifest(
        id="tiny", source=BaseModelSource(path="tiny"), files=folder_sha256(out / "model")
    )
    manifest.write(out / "manifest.json")
    return out


def copy_rows(count: int) -> list[dict[str, str]]:
    """Rows whose completion repeats a word of the prompt."""
    draw = random.Random(0)
    words = ["red", "green", "blue", "black", "white"]
    rows = []
    for _ in range(count):
        word = draw.choice(words)
        rows.append({"prompt": f"Say {word} {draw.randint(0, 99)}:", "completion": f" {word}"})
    return rows


@dataclass
class Entry:
    """A folder of an entry with its dataset, and the base model it starts from."""

    folder: Path
    base: Path

    @classmethod
    def create(cls, folder: Path, base: Path, rows: int = 64) -> Entry:
        entry = cls(folder, base)
        entry.write_rows(copy_rows(rows))
        return entry

    def write_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        dataset = self.folder / "dataset"
        dataset.mkdir(parents=True, exist_ok=True)
        schema = pa.schema([ROW.field(name) for name in ("prompt", "completion", "history", "source")])
        table = pa.Table.from_pylist([{"history": [], "source": "rows", **row} for row in rows], schema)
        pq.write_table(table, dataset / "train.parquet")
        DatasetManifest(
            competition="c",
            track="t",
            entry="e",
            recipe_version="1",
            seed=0,
            rows=len(rows),
            sha256=file_sha256(dataset / "train.parquet"),
            sources=[],
            operations=[],
            rows_by_source={},
            characters={},
        ).write(dataset / "manifest.json")
        (dataset / "card.md").write_text(f"# Training data\n\n{len(rows)} rows\n")

    @property
    def at(self) -> EntryFolder:
        return EntryFolder.at(self.folder)

    def finetune(
        self,
        *,
        track: dict[str, Any] | None = None,
        telemetry: dict[str, Any] | None = None,
        replace: bool = True,
        **recipe: Any,
    ) -> AdapterManifest:
        """Run the step in this process; `replace`: after what Snakemake does, removing its record."""
        from palio.training.finetune import finetune

        if replace:
            self.at.adapter_manifest.unlink(missing_ok=True)
        settings = FinetuneRecipe.model_validate({"learning_rate": 1e-3, **recipe})
        return finetune(settings, self.step(track, telemetry=Telemetry.model_validate(telemetry or {})))

    def step(
        self, track: dict[str, Any] | None = None, telemetry: Telemetry | None = None, **settings: Any
    ) -> TrainingStep:
        """The entry's training, with one thread."""
        return TrainingStep(
            self.at,
            self.settings(track, **settings),
            RunOptions(threads=1, telemetry=telemetry or Telemetry()),
            BaseModelFolder(self.base),
        )

    def settings(self, track: dict[str, Any] | None = None, **settings: Any) -> FinetuneSettings:
        limits = {"title": "t", "ram_gb": 4, "training_budget": "600s", **(track or {})}
        return FinetuneSettings(
            competition_id="c", base_model_id=self.base.name, track=Track.model_validate(limits), **settings
        )

    def package(self, *, adapter: bool = True) -> PackageManifest:
        from palio.packaging.package import build_package
        from palio.serving.model import serving_of

        settings = PackageSettings(competition_id="c", base_model_id=self.base.name, adapter=adapter)
        return build_package(self.at, settings, BaseModelFolder(self.base), serving_of)

    def start(
        self, *, budget: str = "600s", track: dict[str, Any] | None = None, **recipe: Any
    ) -> subprocess.Popen[str]:
        """Run the step through the command line in a process of its own; its stderr can be read."""
        settings = FinetuneRecipe.model_validate({"learning_rate": 1e-3, **recipe})
        return self.start_step(self.settings({"training_budget": budget, **(track or {})}, recipe=settings))

    def start_step(self, settings: FinetuneSettings) -> subprocess.Popen[str]:
        models = self.folder / "project/resources/base_models"
        models.mkdir(parents=True, exist_ok=True)
        if not (models / self.base.name).exists():
            (models / self.base.name).symlink_to(self.base.resolve())
        command = [
            *(sys.executable, "-m", "palio.cli", "step", "finetune", str(self.folder.resolve())),
            *("--settings", slice_of(settings), "--threads", "1"),
        ]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=self.folder / "project")

    def run(self) -> FinetuneRun:
        """What the last run of the step took."""
        return read_record(FinetuneRun, self.folder / "finetune.run.json")

    def work(self) -> Path:
        """The folder of the only training run so far."""
        (work,) = (self.folder / "work" / "train").iterdir()
        return work


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    """Read the log of a running step until it reports `step` or a later one."""
    assert process.stderr is not None
    for line in process.stderr:
        if (match := re.match(r"step (\d+)/", line)) and int(match[1]) >= step:
            return
    raise AssertionError(f"training ended before step {step}")
