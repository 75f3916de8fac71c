"""The tokenizer that counts a prompt's tokens is made once for all who serve with it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from palio.evaluation.window import Window
from palio.layout import Resources

TEXT = "Contrada della Lupa, 1336:\n\n naïve </s> ✓"
LOADED = """\
import sys
from pathlib import Path
from palio.evaluation.window import Window
from palio.layout import Resources
window = Window.kept(Path(sys.argv[1]), Resources(Path(sys.argv[2])))
print(window.count(sys.argv[3]), "transformers" in sys.modules)
"""


def loaded(model: Path, resources: Path) -> tuple[int, bool]:
    """The tokens of TEXT by a process of its own, and whether it imported transformers."""
    command = [sys.executable, "-c", LOADED, str(model), str(resources), TEXT]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(printed[0]), printed[1] == "True"


def test_the_second_who_asks_reads_what_the_first_has_made(tiny: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny / "model", tmp_path / "model")
    (other / "model.safetensors").write_bytes(b"other weights")
    tokens = Window.of_model(tiny / "model").count(TEXT)
    assert loaded(tiny / "model", tmp_path) == (tokens, True)
    assert loaded(other, tmp_path) == (tokens, False)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_another_tokenizer_is_made_anew(tiny: Path, tmp_path: Path, name: str) -> None:
    Window.kept(tiny / "model", Resources(tmp_path))
    other = shutil.copytree(tiny / "model", tmp_path / "model")
    (other / name).write_text((other / name).read_text() + "\n")
    Window.kept(other, Resources(tmp_path))
    assert len(list((tmp_path / "windows").iterdir())) == 2


def test_an_estimate_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert Window.kept(tmp_path / "model", Resources(tmp_path)).estimated
    assert not (tmp_path / "windows").exists()
