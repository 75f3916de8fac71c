"""How many more questions or seeds separate entries, at the measured prices: `palio plan-questions`.

A question is asked of everybody on the leaderboard, whose scores are relative to each other; it takes the
seconds that the stage took an entry per request, times the requests of a question. A training takes what the
entry's own took, and then answers all questions. The workflow runs what the printed lines of the config add:
`palio.evaluation.earlier` takes the answers that there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from palio import markup
from palio.config import Competition, Prizes, expand
from palio.config import Scenario as ScenarioConfig
from palio.errors import BadInput
from palio.evaluation.helm import budgets, run_entries
from palio.layout import EntryFolder, Resources, Results, Stage, stage_named
from palio.provenance import fingerprint
from palio.records import (
    FinetuneRun,
    Leaderboard,
    QuestionPlan,
    Separating,
    StageInstances,
    StageRun,
    Way,
    read_record,
)
from palio.scoring.analysis import has_instances, read_answers
from palio.scoring.conventions import Array
from palio.scoring.decision import decide
from palio.scoring.separation import (
    ErrorParts,
    Prices,
    Retrained,
    error_parts,
    largest_error,
    limits,
    ways,
)
from palio.text import duration, markdown_table

HOUR = 3600.0
POWER = 0.8
ASSUMPTIONS = (
    "The difference seen is the true one. That of the first of many is probably smaller (winner's curse).",
    "Differences are normally distributed, and their variance falls with the number of questions and of "
    "trainings. Win rates among few entries are coarse, and so are these numbers then.",
    "New questions are like the old ones: of the same HELM runs, as hard, and as many as are asked for; "
    "`prepare_stage` refuses a scenario that has too few.",
    "A question is asked of every entry on the leaderboard, and answering it takes as long as it took on the "
    "stage's average. A seed trains again the two and every entry that has replicates, each as long as its "
    "own training took. Loading and packaging are not counted.",
)


def plan_questions(
    competition: Competition,
    board: Leaderboard,
    results: Results,
    named: Sequence[str],
    prizes: Prizes,
    *,
    power: float = POWER,
    training_noise: float | None = None,
) -> QuestionPlan:
    """Plan for the two entries that are named, or, without names, for each boundary that does not stand.

    Raises:
        BadInput: an entry is not on the leaderboard, or a table is not the one that was scored.
    """
    answers = read_answers(competition, board, results) if has_instances(board, results) else {}
    wanted = [(*_known(board, named), prizes.alpha)] if named else []
    if not named and (decision := decide(board, answers, prizes, training_noise=training_noise)):
        wanted = [(one.better, one.worse, one.level) for one in decision.boundaries if not one.stands]
    pairs = [(first, second) for first, second, _ in wanted]
    found = error_parts(board, answers, pairs, training_noise=training_noise)
    own = competition if board.competition == competition.competition else None
    measured = Measured.of(board, results) if own else None
    return QuestionPlan(
        competition=board.competition,
        track=board.track,
        leaderboard_fingerprint=fingerprint(board.model_dump(mode="json")),
        power=power,
        pairs=[
            _separating(board, parts, level, power, own, measured)
            for parts, (*_, level) in zip(found, wanted, strict=True)
        ],
        assumptions=list(ASSUMPTIONS),
    )


def _separating(
    board: Leaderboard,
    parts: ErrorParts,
    level: float,
    power: float,
    competition: Competition | None,
    measured: Measured | None,
) -> Separating:
    """Return what separates two entries; of another competition there are no prices and no config."""
    allowed = largest_error(parts.difference, level, power)
    prices = measured.prices(board, parts) if measured else None
    found = ways(parts, allowed, prices)
    return Separating(
        better=parts.better,
        worse=parts.worse,
        difference=parts.difference,
        standard_error=math.sqrt(parts.variance),
        largest_error=allowed,
        level=level,
        variance=_variance(parts),
        ways=found,
        limits=limits(parts, allowed, prices),
        config=_config(competition, board, parts, found[0], measured) if competition and found else "",
    )


def _known(board: Leaderboard, named: Sequence[str]) -> tuple[str, str]:
    on_it = {scored.entry for scored in board.entries}
    for name in named:
        if name not in on_it:
            fix = f"use two of {', '.join(sorted(on_it))}"
            raise BadInput("palio plan-questions", "ENTRIES", name, why="is not on the leaderboard", fix=fix)
    if len(set(named)) != 2:
        why = f"{len(named)} given, {len(set(named))} of them different"
        raise BadInput("palio plan-questions", "ENTRIES", why=why, fix="name two entries, or none")
    return named[0], named[1]


def _variance(parts: ErrorParts) -> dict[str, float]:
    by_scenario = {
        "/".join(key): float(value) for key, value in zip(parts.scenarios, parts.of_questions, strict=True)
    }
    return by_scenario | {
        "HELM runs": parts.of_runs,
        "training of the two": float(parts.training.sum()),
        "training of others": parts.of_others,
    }


# --- prices ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What the trainings on a leaderboard took; empty where no sidecar is left."""

    requests: Mapping[tuple[str, str], float]
    """Requests of a question, by (stage, scenario)."""
    stages: Mapping[str, Mapping[str, StageRun]]
    """By entry or replicate, and stage."""
    trainings: Mapping[str, float]
    """Seconds of an entry's own training."""

    @classmethod
    def of(cls, board: Leaderboard, results: Results) -> Measured:
        """Read the sidecars of everybody on the leaderboard."""
        stages: dict[str, dict[str, StageRun]] = {}
        trainings: dict[str, float] = {}
        for scored in board.entries:
            own = results.entry(board.track, scored.entry)
            numbers = {one.number for one in scored.replicates}
            for folder in (own, *(one for one in own.replicates() if one.replicate in numbers)):
                stages[folder.name] = {
                    stage: run for stage in board.stage_weights if (run := _stage_run(folder, stage))
                }
            if own.run_facts("finetune").exists():
                training = read_record(FinetuneRun, own.run_facts("finetune")).training
                if training:
                    trainings[scored.entry] = training.training_seconds
        return cls(_requests(board), stages, trainings)

    def seconds_per_request(self, name: str, stage: str) -> float:
        """Return that of the entry, or the mean over all where its sidecar is lost; NaN if all are."""
        rates = {
            of: run.used_seconds / run.requests
            for of, runs in self.stages.items()
            if (run := runs.get(stage)) and run.used_seconds is not None and run.requests
        }
        return rates.get(name, float(np.mean(list(rates.values()))) if rates else math.nan)

    def question(self, name: str, scenarios: Sequence[tuple[str, str]]) -> Array:
        """Return the GPU hours of a question to one training, by scenario."""
        return np.array(
            [self.requests[key] * self.seconds_per_request(name, key[0]) / HOUR for key in scenarios]
        )

    def prices(self, board: Leaderboard, parts: ErrorParts) -> Prices | None:
        """Return the prices of separating two entries; None if they were not measured."""
        every = sum(self.question(name, parts.scenarios) for name in self.stages)
        mean = float(np.mean(list(self.trainings.values()))) if self.trainings else math.nan
        again = set(retrained(board, parts))
        found = [
            Retrained(
                trainings=1 + len(scored.replicates),
                training=self.trainings.get(scored.entry, mean) / HOUR,
                question=self.question(scored.entry, parts.scenarios),
            )
            for scored in board.entries
            if scored.entry in again
        ]
        prices = Prices(question=np.asarray(every), retrained=found)
        known = [prices.question, *(one.question for one in found), np.array([one.training for one in found])]
        return None if any(np.isnan(of).any() for of in known) else prices


def _stage_run(folder: EntryFolder, stage: str) -> StageRun | None:
    path = folder.run_facts(stage)
    return read_record(StageRun, path) if path.exists() else None


def _requests(board: Leaderboard) -> dict[tuple[str, str], float]:
    """Return the requests of a question by scenario; 1 where the stage's record is not here."""
    found = dict.fromkeys(board.scenario_keys, 1.0)
    for stage in board.stage_weights:
        path = Resources().stage_record(stage_named(stage))
        counts = read_record(StageInstances, path).counts if path.exists() else {}
        for name, of in counts.items():
            if (stage, name) in found and of.prepared:
                found[stage, name] = of.requests / of.prepared
    return found


def retrained(board: Leaderboard, parts: ErrorParts) -> list[str]:
    """Return the entries that more seeds train again: the two, and all that have replicates."""
    two = (parts.better, parts.worse)
    return sorted(
        scored.entry
        for scored in board.entries
        if scored.trained and (scored.replicates or scored.entry in two)
    )


# --- lines for the config --------------------------------------------------------------------------------


def _config(
    competition: Competition, board: Leaderboard, parts: ErrorParts, way: Way, measured: Measured | None
) -> str:
    """Return the lines of the competition's file that a way changes."""
    lines: list[str] = []
    for stage in dict.fromkeys(key[0] for key in parts.scenarios):
        changed = _stage_lines(competition, stage_named(stage), parts, way)
        if changed:
            lines += [f"  {stage}:", *_time_limit(competition, stage_named(stage), parts, way, measured)]
            lines += ["    scenarios:", *changed]
    if lines:
        lines = ["stages:", *lines]
    if way.seeds:
        names = ", ".join(retrained(board, parts))
        lines += ["replicates:", f"  entries: [{names}]", f"  seeds: {way.seeds}"]
    return "\n".join(lines)


def _stage_lines(competition: Competition, stage: Stage, parts: ErrorParts, way: Way) -> list[str]:
    lines = []
    for key, now in zip(parts.scenarios, parts.questions, strict=True):
        more = way.questions.get("/".join(key), 0)
        of_stage = competition.stage(stage)
        if key[0] != stage or not more or key[1] not in of_stage.scenarios:
            continue
        scenario = of_stage.scenarios[key[1]]
        name = "questions" if scenario.questions else "max_eval_instances"
        before = scenario.questions or scenario.max_eval_instances
        number = raised(scenario, 1 + more / now, of_stage.scale)
        lines += [f"      {key[1]}:", f"        {name}: {number}  # was {before}"]
    return lines


def raised(scenario: ScenarioConfig, times: float, scale: float = 1.0) -> int:
    """Return the number in the config that asks at least `times` as many questions, none fewer of any run."""

    def scaled(number: int) -> int:
        return max(1, round(number * scale))

    now = scenario.questions or scenario.max_eval_instances or 1
    wanted = math.ceil(round(scaled(now) * times, 6))
    near = math.ceil((wanted - 0.5) / scale) - 1  # about the first that is rounded to it
    numbers = (number for number in count(max(now, near)) if scaled(number) >= wanted)
    if not scenario.questions:
        return next(numbers)
    groups = [group for _, group in run_entries(expand(scenario.run_entries))]
    before = budgets(groups, scaled(now))
    return next(
        number
        for number in numbers
        if all(new >= old for new, old in zip(budgets(groups, scaled(number)), before, strict=True))
    )


def _time_limit(
    competition: Competition, stage: Stage, parts: ErrorParts, way: Way, measured: Measured | None
) -> list[str]:
    """Return the line for a longer limit, if the slowest entry would not be through within this one."""
    limit, slowest = competition.stage(stage).time_limit, 0.0
    for name, runs in (measured.stages if measured else {}).items():
        run = runs.get(stage)
        if measured and run and run.used_seconds is not None:
            added = [
                way.questions.get("/".join(key), 0) * price * HOUR
                for key, price in zip(parts.scenarios, measured.question(name, parts.scenarios), strict=True)
                if key[0] == stage
            ]
            slowest = max(slowest, run.used_seconds + sum(added))
    if slowest <= limit:
        return []
    return [f"    time_limit: {math.ceil(slowest / 60)}m  # was {duration(limit)}; for the slowest entry"]


# --- text ------------------------------------------------------------------------------------------------

KINDS = {
    "questions": "questions",
    "one_scenario": "questions of one scenario",
    "seeds": "seeds",
    "both": "questions and seeds",
}


def plan_markdown(plan: QuestionPlan) -> str:
    """Return the plan for people."""
    lines = [f"# What would separate entries of {markup.markdown(f'{plan.competition}, {plan.track}')}", ""]
    if not plan.pairs:
        lines += ["Every place with a prize is decided.", ""]
    for pair in plan.pairs:
        lines += _pair(pair, plan.power)
    lines += ["It assumes:", "", *(f"- {one}" for one in plan.assumptions)]
    return "\n".join(lines)


def _pair(pair: Separating, power: float) -> list[str]:
    who = markup.markdown(f"{pair.better} against {pair.worse}")
    lines = [
        *(f"## {who}", ""),
        f"Difference {pair.difference:.4f}, standard error {pair.standard_error:.4f}; at most "
        f"{pair.largest_error:.4f} separates it at level {pair.level:.2g} with probability {power:.0%}.",
        "",
    ]
    total = sum(pair.variance.values())
    if total > 0:
        shares = ", ".join(f"{name} {value / total:.0%}" for name, value in pair.variance.items() if value)
        lines += [markup.markdown(f"Of its square: {shares}."), ""]
    if pair.ways:
        rows = [
            [
                KINDS[way.kind],
                ", ".join(f"{name} +{more:,}" for name, more in way.questions.items()) or "none",
                "as now" if way.seeds is None else str(way.seeds),
                "not measured" if way.gpu_hours is None else f"{way.gpu_hours:,.2f}",
            ]
            for way in pair.ways
        ]
        head = ["way", "more questions", "seeds", "GPU hours"]
        lines += [markdown_table(head, rows, {"way", "more questions"}, markup.markdown), ""]
    elif not pair.limits:
        lines += ["They are separated.", ""]
    lines += [f"{one}\n" for one in pair.limits]
    if pair.config:
        lines += ["The first way, in the competition's file:", "", "```yaml", pair.config, "```", ""]
    return lines
