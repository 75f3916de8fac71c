"""A team's own program on a GPU: it finds the one it is given, and gets the track's memory of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from palio.errors import OutOfMemory
from tests.support.programs import HANDS_IN, program_of, run_command
from tests.support.training import Entry, tiny_base_model

pytestmark = pytest.mark.gpu

TRACK = {"title": "t", "ram_gb": 64, "gpu_memory_gb": 8}
TAKES = """
import time
import torch
taken = torch.ones(int({gigabytes} * 1e9 / 4), device="cuda")
print(torch.cuda.device_count(), torch.cuda.get_device_name(), flush=True)
time.sleep(3)
"""


@pytest.fixture
def entry(tmp_path: Path, base_model: Path) -> Entry:
    return Entry.create(tmp_path / "entry", tiny_base_model(tmp_path / "base", base_model))


def test_a_program_finds_its_gpu_inside_the_sandbox(entry: Entry, tmp_path: Path) -> None:
    program = program_of(tmp_path / "files", HANDS_IN + TAKES.format(gigabytes=2) + "hand_in()\n")
    assert run_command(entry, program, track=TRACK).state == "finished"


def test_a_program_that_takes_more_than_the_tracks_memory_is_ended(entry: Entry, tmp_path: Path) -> None:
    program = program_of(tmp_path / "files", HANDS_IN + "hand_in()\n" + TAKES.format(gigabytes=12))
    with pytest.raises(OutOfMemory, match=r"GB of GPU memory, 8.0 GB are allowed"):
        run_command(entry, program, track=TRACK)
