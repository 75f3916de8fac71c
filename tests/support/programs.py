"""Small programs as a team would hand them in, and the ways to run them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palio.config import Isolation, Program

if TYPE_CHECKING:
    from palio.records import AdapterManifest
    from tests.support.training import Entry

HANDS_IN = """
import json, os
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file

def hand_in(value=0.01):
    config = json.loads(Path(os.environ["PALIO_BASE_MODEL"], "config.json").read_text())
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    size = config["hidden_size"]
    shapes = {"A": (4, size), "B": (size, 4)}
    weights = {name.format(part): np.full(shape, value, "f4") for part, shape in shapes.items()}
    result = Path(os.environ["PALIO_OUTPUT"])
    save_file(weights, result / "building.tmp")
    (result / "building.tmp").replace(result / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
    settings["target_modules"] = ["q_proj"]
    (result / "adapter_config.json").write_text(json.dumps(settings))
"""
"""The head of a program that trains nothing: its `hand_in` leaves an adapter."""


def program_of(folder: Path, code: str) -> Program:
    """A team's folder with this code as main.py."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "main.py").write_text(code)
    return Program(run=("python", "main.py"), files=str(folder))


def run_command(
    entry: Entry,
    program: Program,
    *,
    budget: str = "60s",
    track: dict[str, Any] | None = None,
    isolation: Isolation | None = None,
    replace: bool = False,
    seed: int | None = None,
) -> AdapterManifest:
    """The fine-tuning step with a team's program, in this process."""
    from palio.training.command import finetune_by_command

    if replace:
        entry.at.adapter_manifest.unlink(missing_ok=True)
    limits = {"cpus": 1, "training_budget": budget, **(track or {})}
    isolation = isolation or Isolation(scratch_gb=0.05, output_gb=0.5, processes=256)
    return finetune_by_command(program, entry.step(limits, program=program, isolation=isolation, seed=seed))


def start_command(entry: Entry, program: Program, budget: str = "60s") -> subprocess.Popen[str]:
    """The same through the command line, in a process of its own."""
    isolation = Isolation(output_gb=0.5)
    return entry.start_step(entry.settings({"training_budget": budget}, program=program, isolation=isolation))
