"""The stages of the 2023 competition on the real data at hand, for tests and their budgets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from palio.config import Competition, load_competition, read_yaml
from palio.evaluation.helm import run_entries, stage_runs
from palio.evaluation.stage import fetch_data, prepare_stage
from palio.settings import StageRuns

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("PALIO_SHARED", ROOT.parent / "shared")) / "helm_data"
BBQ = ("Age", "Disability_status", "Nationality", "Physical_appearance", "Religion", "Sexual_orientation")
ETHICS = ("justice", "virtue", "deontology", "commonsense", "utilitarianism")

needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no evaluation data in {SHARED}")


def run_file(path: Path, entries: list[tuple[str, str]]) -> str:
    """A file of HELM's run entries, from their descriptions and groups."""
    lines = [f'{{description: "{of}", priority: 1, groups: ["{group}"]}}' for of, group in entries]
    path.write_text("entries: [\n" + "\n".join(lines) + "\n]\n")
    return str(path)


def competition_of_2023(folder: Path, scale: float) -> Competition:
    """config/neurips2023.yaml where its data is here: no summaries, no vitaminc, six of BBQ's categories, and
    of the closed stage ETHICS.

    `scale`: of the instance budgets; `folder`: for run files and the closed store.
    """
    config = read_yaml(ROOT / "config/neurips2023.yaml")
    config["closed_store"] = str(folder / "closed")
    opened, closed = config["stages"]["open"], config["stages"]["closed"]
    del opened["scenarios"]["CNN-DailyMail"]
    closed["scenarios"] = {"ethics": closed["scenarios"]["ethics"]}
    big_bench = opened["scenarios"]["BIG-bench"]
    there = run_entries(ROOT / big_bench["run_entries"])
    big_bench["run_entries"] = run_file(
        folder / "big_bench.conf", [(of, group) for of, group in there if "vitaminc" not in of]
    )
    bbq = opened["scenarios"]["BBQ"]
    del bbq["questions"]
    bbq |= {
        "max_eval_instances": 18,
        "run_entries": run_file(folder / "bbq.conf", [(f"bbq:subject={name}", name) for name in BBQ]),
    }
    # The training files of two subsets are not here, so these prompts show no examples.
    bare = {"commonsense": ",examples=false", "utilitarianism": ",examples=false"}
    closed["scenarios"]["ethics"]["run_entries"] = run_file(
        folder / "ethics.conf",
        [
            (f"palio_ethics:subset={name}{bare.get(name, '')},data_augmentation=canonical", name)
            for name in ETHICS
        ],
    )
    # Columns that nothing fills: these inputs are not perturbed.
    opened["scenarios"]["GSM8K"]["metrics"]["EM (Robustness)"] = {
        "metric": "final_number_exact_match",
        "perturbation": "robustness",
    }
    opened["scale"] = closed["scale"] = scale
    return load_competition(config)


def real_stage(competition: Competition, stage: str, folder: Path) -> StageRuns:
    """The stage's runs, with its data fetched and its instances made: `folder`/`stage`.json.

    Call it, and what follows, from `folder`: the store of the open stage is relative.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # where the config's run files are
        runs = stage_runs(competition, stage)
    for name, of in runs.scenarios.items():
        runs.scenarios[name] = of.model_copy(update={"run_entries": str(ROOT / of.run_entries)})
    fetch_data(runs, SHARED)
    prepare_stage(runs, folder / f"{stage}.json")
    return runs
