"""Run entries: HELM's run-entries files read and checked, and the questions that each entry gets."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pyhocon import ConfigFactory

from palio.config import Competition, Scenario, expand
from palio.errors import BadInput
from palio.evaluation.helm.folder import MODEL
from palio.evaluation.helm.registry import helm_version, known_run_specs
from palio.provenance import fingerprint
from palio.settings import ScenarioRuns, StageRuns


def run_entries(path: Path) -> list[tuple[str, str]]:
    """Description and group of every entry in a file of HELM's run-entries format, in its order.

    The group is the first of the entry's `groups`; without any, the entry is a group of its own, named by
    its description.

    Raises:
        BadInput: no such file, not HOCON, no entries, an entry that sets what the stage sets, or one that
            HELM does not know.
    """
    try:
        parsed = ConfigFactory.parse_string(path.read_text(encoding="utf-8"))
        entries = [
            (description := str(entry["description"]), str((entry.get("groups", None) or [description])[0]))
            for entry in parsed["entries"]
        ]
    except FileNotFoundError:
        raise BadInput(path, why="no such run-entries file", fix="correct run_entries") from None
    except Exception as error:
        raise BadInput(path, "entries", why=f"not HELM's run-entries format ({error})") from None
    if not entries:
        raise BadInput(path, "entries", why="is empty", fix="add at least one run entry")
    for description, _ in entries:
        _check_description(path, description)
    return entries


def _check_description(path: Path, description: str) -> None:
    name = description.partition(":")[0]
    if name not in known_run_specs():
        near = difflib.get_close_matches(name, known_run_specs(), 1)
        fix = f"did you mean {near[0]}?" if near else ""
        raise BadInput(path, "entries", name, why=f"HELM {helm_version()} has no such scenario", fix=fix)
    for key in ("model", "max_eval_instances", "eval_split"):
        if re.search(rf"[:,]{key}=", description):
            raise BadInput(path, "entries", description, fix=f"drop {key}=, the stage sets it")


def shares(total: int, parts: int) -> list[int]:
    """`total` in `parts` whole numbers that differ by at most 1, the larger ones spread evenly."""
    return [total * (part + 1) // parts - total * part // parts for part in range(parts)]


def budgets(groups: Sequence[str], questions: int) -> list[int]:
    """Questions of each run entry: even over the groups, and in a group even over its entries.

    The sum is `questions`; with fewer questions than entries some get none.
    """
    names = list(dict.fromkeys(groups))
    in_group = {
        name: iter(shares(share, groups.count(name)))
        for name, share in zip(names, shares(questions, len(names)), strict=True)
    }
    return [next(in_group[group]) for group in groups]


def stage_runs(competition: Competition, stage: str) -> StageRuns:
    """The slice of a competition that decides a stage's instances: run files digested, budgets scaled."""
    settings = competition.stage(stage)

    def scaled(budget: int | None) -> int | None:
        return None if budget is None else max(1, round(budget * settings.scale))

    return StageRuns(
        competition=competition.competition,
        stage="open" if stage == "open" else "closed",
        closed_store=competition.closed_store,
        scenarios={
            name: ScenarioRuns(
                run_entries=scenario.run_entries,
                max_eval_instances=scaled(scenario.max_eval_instances),
                questions=scaled(scenario.questions),
                split=_scored_split(scenario),
                shortfall=scenario.shortfall,
                sha256=fingerprint(run_entries(expand(scenario.run_entries))),
            )
            for name, scenario in settings.scenarios.items()
        },
    )


def _scored_split(scenario: Scenario) -> Literal["test", "valid"] | None:
    """Return the split that all metrics of a scenario look at; None if they look at both.

    HELM draws questions from both splits, and a metric looks at one: in 2023 half of BIG-bench's questions
    counted for nothing, and a run of few questions may have none that counts.
    """
    splits = {metric.split for metric in scenario.metrics.values()}
    return splits.pop() if len(splits) == 1 else None


def stage_entries(runs: StageRuns) -> dict[str, list[str]]:
    """HELM run descriptions by scenario, with the scenario's budget and our model: what decides a run.

    Raises:
        BadInput: a run file changed since `runs` was made.
    """
    entries: dict[str, list[str]] = {}
    for name, scenario in runs.scenarios.items():
        in_file = run_entries(expand(scenario.run_entries))
        if fingerprint(in_file) != scenario.sha256:
            raise BadInput(scenario.run_entries, why="changed while the workflow ran", fix="start it again")
        if scenario.questions:
            counts = budgets([group for _, group in in_file], scenario.questions)
        else:
            counts = [scenario.max_eval_instances or 0] * len(in_file)
        ours = f"eval_split={scenario.split},model={MODEL}" if scenario.split else f"model={MODEL}"
        entries[name] = [
            f"{description}{',' if ':' in description else ':'}max_eval_instances={count},{ours}"
            for (description, _), count in zip(in_file, counts, strict=True)
            if count
        ]
    return entries


def asked_of_runs(descriptions: Sequence[str]) -> dict[str, int]:
    """Questions by description, without its number of questions, of `stage_entries`."""
    number = re.compile(r"max_eval_instances=(\d+),")
    return {number.sub("", one): int(number.findall(one)[0]) for one in descriptions}
