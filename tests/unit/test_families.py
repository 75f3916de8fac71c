"""Palio's own steps compute what plain transformers computes: a family of each kind, in small.

All of them: `python benchmarks/families.py`, and its table in docs/base_models.md.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from palio.config import FinetuneRecipe

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import families

KINDS = {
    ("llama", "full"): ("exact", "end to end", "shared prefixes"),
    ("gpt2", "qlora"): ("exact", "end to end", "shared prefixes"),  # Conv1D
    ("mistral", "lora"): ("exact", "padded", "one sequence at a time"),  # a window shorter than a row
    ("mixtral", "lora"): ("exact", "padded", "one sequence at a time"),  # experts in one tensor
    ("falcon", "qlora"): ("refused", "", ""),  # a linear layer of its own
    ("bert", "full"): ("refused", "", ""),  # an encoder
}


@pytest.mark.parametrize(("family", "method"), KINDS)
def test_a_family_is_exact_or_refused(family: str, method: str, tmp_path: Path) -> None:
    (cell,) = families.run(family, tmp_path, [method], trace=True)
    assert (cell.state, cell.rows, cell.served) == KINDS[family, method], cell


def test_a_wrong_result_is_not_called_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's adapter has another scale than the plain one."""
    right = families.plain_training

    def other(folder: Path, recipe: FinetuneRecipe, *others: Any, **settings: Any) -> torch.Tensor:
        return right(folder, recipe.model_copy(update={"lora_alpha": 9}), *others, **settings)

    monkeypatch.setattr(families, "plain_training", other)
    (cell,) = families.run("llama", tmp_path, ["lora"])
    assert (cell.state, cell.why.partition(":")[0]) == ("differs", "trained")
