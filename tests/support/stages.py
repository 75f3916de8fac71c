"""The stages of the 2023 competition on the real data at hand, for tests and their budgets."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from palio.config import Competition, load_competition
from palio.evaluation.helm import stage_runs
from palio.evaluation.stage import fetch_data, prepare_stage
from palio.settings import StageRuns

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("PALIO_SHARED", ROOT.parent / "shared")) / "helm_data"
BBQ = ("Age", "Disability_status", "Nationality", "Physical_appearance", "Religion", "Sexual_orientation")

needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no evaluation data in {SHARED}")


def run_file(path: Path, entries: list[tuple[str, str]]) -> str:
    """A file of HELM's run entries, from their descriptions and groups."""
    lines = [f'{{description: "{of}", priority: 1, groups: ["{group}"]}}' for of, group in entries]
    path.write_text("entries: [\n" + "\n".join(lines) + "\n]\n")
    return str(path)


def data_of_2023(folder: Path) -> Path:
    """The data at hand, as --source of both stages: the shared folders, and a few rows in the formats of what
    has no free licence (sam_sum, CNN/DailyMail) or is not there (two of ETHICS' train files)."""
    source = folder / "source"
    if source.exists():
        return source
    source.mkdir(parents=True)
    for shared in SHARED.iterdir():
        if shared.is_dir() and shared.name != "ethics":
            (source / shared.name).symlink_to(shared)
    ethics = source / "ethics"
    ethics.mkdir()
    for shared in (SHARED / "ethics").iterdir():
        (ethics / shared.name).symlink_to(shared)
    for prefix in ("cm", "util"):
        rows = (SHARED / "ethics" / f"{prefix}_test.csv").read_text().splitlines(keepends=True)
        (ethics / f"{prefix}_train.csv").write_text("".join(rows[: 1 + 60] if prefix == "cm" else rows[-60:]))
    names = ("Ada", "Bo", "Cleo", "Dan", "Eve")
    for name, columns, text in (
        ("sam_sum", ("dialogue", "summary"), "{a}: are we meeting at {n}?\n{b}: yes, bring {n} apples\n"),
        ("cnn_dailymail", ("article", "highlights"), "{a} met {b} on day {n} and spoke about {n} houses . "),
    ):
        for split, count in (("train", 40), ("test", 3000 if name == "cnn_dailymail" else 819)):
            path = source / name / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            with path.open("w") as lines:
                for n in range(count):
                    a, b = names[n % 5], names[(n + 1) % 5]
                    shown = text.format(a=a, b=b, n=f"{split} {n}") * 6
                    summary = f"{a} and {b} talk about number {n} of {split} ."
                    lines.write(json.dumps(dict(zip(columns, (shown, summary), strict=True))) + "\n")
    return source


def competition_of_2023(folder: Path, scale: float, edition: str = "neurips2023") -> Competition:
    """An edition where its data is here: six of BBQ's categories; shortfalls are accepted.

    `scale`: of the instance budgets; `folder`: for run files and the closed store.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # what `extends` is relative to
        content = load_competition(ROOT / f"config/{edition}.yaml")
    config = content.model_dump(mode="json", exclude_none=True)
    config["closed_store"] = str(folder / "closed")
    opened, closed = config["stages"]["open"], config["stages"]["closed"]
    bbq = opened["scenarios"]["BBQ"]
    bbq["run_entries"] = run_file(folder / "bbq.conf", [(f"bbq:subject={name}", name) for name in BBQ])
    for stage in (opened, closed):
        stage["scale"] = scale
        for scenario in stage["scenarios"].values():
            scenario["shortfall"] = "accept"
    return load_competition(config)


def real_stage(competition: Competition, stage: str, folder: Path) -> StageRuns:
    """The stage's runs, with its data fetched and its instances made: `folder`/`stage`.json.

    Call it, and what follows, from `folder`: the store of the open stage is relative.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # where the config's run files are
        runs = stage_runs(competition, stage)
    for name, of in runs.scenarios.items():
        copy = folder / f"{stage}_{name}.conf"  # a closed run file elsewhere must be its owner's alone
        copy.write_text((ROOT / of.run_entries).read_text())
        runs.scenarios[name] = of.model_copy(update={"run_entries": str(copy)})
    fetch_data(runs, data_of_2023(folder))
    prepare_stage(runs, folder / f"{stage}.json")
    return runs
