"""What crosses a step's border: small typed JSON records and two tidy Parquet tables.

A record holds content only: no dates, hosts or durations (those go to `run.json` sidecars), so equal
content gives an equal file. `schema_version` changes when a field's meaning does.

results/<track>/<entry>/
    check.json                    Check
    dataset/manifest.json         DatasetManifest     dataset/train.parquet, dataset/card.md
    contamination.json            Contamination
    adapter.json                  AdapterManifest     adapter/, train.parquet
    package.json                  PackageManifest     package/
    probe.json                    ProbeReport         of its server
    open.json, closed.json        StageRecord         helm/<stage>/{metrics,instances}.parquet
    work/                         what must survive a retry; never a declared output
    work/failures/<step>.json     StepFailure
results/leaderboard/<track>.json  Leaderboard
results/leaderboard/<track>.analysis.json  Analysis
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from palio.config import BaseModelSource
from palio.errors import BadInput, State
from palio.provenance import write_json


class Part(BaseModel):
    """What records are made of."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Record(Part):
    schema_version: Literal[1] = 1

    def write(self, path: Path) -> None:
        write_json(path, self.model_dump(mode="json"))


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_record(model: type[AnyRecord], path: Path) -> AnyRecord:
    """Read a record of a finished step. Raises `BadInput` if it is absent or of another schema."""
    try:
        return model.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(path, "", None, "no such record; run the step that makes it") from None
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise BadInput(path, key, None, f"{fault['msg']}; run the step again") from None


class Violation(Part):
    """One broken rule: which, where, why, and how to fix it."""

    rule: str
    key: str
    why: str
    fix: str

    def __str__(self) -> str:
        where = f"{self.key}: " if self.key else ""
        return f"{where}{self.why}; {self.fix} [{self.rule}]"


class Check(Record):
    competition: str
    track: str
    entry: str
    rules_version: str
    base_model_family: str
    notices: list[Violation] = []
    """What the organizers should look at; it does not stop the entry."""


class BaseModelManifest(Record):
    id: str
    source: BaseModelSource
    files: dict[str, str]
    """sha256 by relative path."""

    @property
    def fingerprint(self) -> str:
        from palio.provenance import fingerprint

        return fingerprint(self.files)


class SourceReport(Part):
    name: str
    sha256: str
    """Of the file; of a saved folder or a pinned hub dataset, of what identifies its content."""
    revision: str | None = None
    """Commit of a hub dataset."""
    licence: str
    generator: str | None
    rows: int
    """Well-formed rows read."""
    quarantined: int
    """Malformed lines set aside."""


class OperationReport(Part):
    op: str
    settings: dict[str, Any]
    rows_in: int
    rows_out: int
    changed: int = 0
    """Rows rewritten but kept."""
    dropped_by_source: dict[str, int] = {}
    examples: list[str] = []
    """At most three dropped or changed rows, shortened."""


class DatasetManifest(Record):
    """The curated dataset; `sha256` of train.parquet is its identity for the trainer."""

    competition: str
    track: str
    entry: str
    recipe_version: str
    seed: int
    rows: int
    sha256: str
    sources: list[SourceReport]
    operations: list[OperationReport]
    rows_by_source: dict[str, int]
    characters: dict[str, list[int]]
    """Histograms of prompt and completion lengths: counts in bins of powers of two characters."""


class StageInstances(Record):
    """What is public of a stage's evaluation instances: counts and a digest, never a text."""

    competition: str
    stage: str
    helm_version: str
    scenarios: dict[str, int]
    """Evaluation instances by scenario."""
    sha256: str
    """Of the table of normalised texts, kept in the stage's store."""


class Contamination(Record):
    """Overlap of one training dataset with the evaluation instances of both stages: counts only."""

    competition: str
    track: str
    entry: str
    ngram: int
    dataset_sha256: str
    instances: dict[str, dict[str, int]]
    """Evaluation instances by stage and scenario."""
    contaminated: dict[str, dict[str, int]]
    """Of these, how many share their whole text or an n-gram of words with a training row."""


class Contained(Record):
    """What a team's program or server did wrong and its confinement held back, beside its log; of all
    attempts. Words of ours only, never a prompt or a reply."""

    counts: dict[str, int]
    """How often, by what it was."""

    def __str__(self) -> str:
        return ", ".join(f"{count} × {what}" for what, count in self.counts.items())

    @staticmethod
    def file(log: Path) -> Path:
        return log.with_suffix(".contained.json")

    @classmethod
    def beside(cls, log: Path) -> Contained:
        """What stands beside a log; nothing where nothing does."""
        file = cls.file(log)
        return read_record(cls, file) if file.exists() else cls(counts={})


class AdapterManifest(Record):
    """The result of fine-tuning. `fingerprint` covers all that decides it."""

    competition: str
    track: str
    entry: str
    fingerprint: str
    recipe_version: str
    base_model: str
    base_model_fingerprint: str
    dataset_sha256: str
    recipe: dict[str, Any]
    state: Literal["finished", "budget_reached"]
    steps: int | None
    """None, as rows_too_long and final_loss, where a team's own program trained: it does not tell."""
    planned_steps: int | None
    rows: int
    rows_too_long: int | None
    final_loss: float | None
    """Mean training loss of the last ten steps."""
    best_step: int | None = None
    """The step handed in, where rows were held out for validation; None: the last."""
    validation_loss: float | None = None
    """At that step."""
    contained: dict[str, int] = {}
    """Of a team's own program: what its confinement held back or ended, in any attempt, and how often."""
    files: dict[str, str]


class PackageManifest(Record):
    """A folder that `AutoModelForCausalLM.from_pretrained` loads with no code of ours, or a team's server."""

    kind: Literal["model", "server"] = "model"
    competition: str
    track: str
    entry: str
    base_model: str
    base_model_fingerprint: str
    adapter_fingerprint: str | None
    dtype: str | None
    """None, as `parameters`, for a server: its weights are its own affair."""
    parameters: int | None
    max_logit_difference: float | None
    """Merged model against base plus adapter on probe prompts, fp32 on CPU; None without an adapter."""
    divergence: float | None = None
    """Mean KL divergence, in nats on the probe prompts, of the package from the model as it was trained:
    what the cast to `dtype` and, after qlora, dequantising changed; None where neither was done."""
    files: dict[str, str]

    @property
    def fingerprint(self) -> str:
        from palio.provenance import fingerprint

        return fingerprint(self.files)


class ProbeCheck(Part):
    """Outcome of one check of a running server."""

    name: str
    required: bool
    """A required check that fails ends the entry before HELM runs; the others cost points or time."""
    state: Literal["pass", "fail", "skipped"]
    why: str
    """What was seen."""
    fix: str
    """What to change; empty for a check that passed."""


class ProbeReport(Record):
    """Conformance of one server, its checks in the order they ran. Holds measured times: not content."""

    package_fingerprint: str | None = None
    """Of the package that was served, if the workflow did."""
    checks: tuple[ProbeCheck, ...]
    planned_requests: int
    time_limit: float
    """Seconds."""
    projected_seconds: float | None
    """Of the stage, from the timed requests; None if they failed."""

    @property
    def conforms(self) -> bool:
        """Whether every required check passed."""
        return all(check.state == "pass" for check in self.checks if check.required)

    @property
    def failed(self) -> list[str]:
        return [check.name for check in self.checks if check.state == "fail"]


class HelmRun(Part):
    """One HELM run (one run spec) and how it ended."""

    scenario: str
    run: str
    state: State
    reason: str = ""
    instances: int
    """Evaluation instances planned, over all splits."""
    answered: int
    """Of these, how many got an answer to every request: the plain one and the perturbed ones."""


class StageRecord(Record):
    """One entry's evaluation in one stage. Tables: helm/<stage>/{metrics,instances}.parquet."""

    competition: str
    track: str
    entry: str
    stage: str
    package_fingerprint: str
    instances_sha256: str
    helm_version: str
    state: State
    """finished: every instance is answered; time_limit: some are not, the stage's limit ran out."""
    reason: str = ""
    unanswered: Literal["missing", "wrong"] = "missing"
    """What an unanswered instance counts: `wrong` scores it as an empty completion."""
    cut_at_stop_sequences: bool = True
    completions_cut: int = 0
    """Answers that went on behind a stop sequence and were cut there."""
    contained: dict[str, int] = {}
    """Of a team's own server: what it did wrong and its confinement held back, and how often; the probe's
    odd requests included."""
    runs: list[HelmRun]
    metrics_sha256: str
    instances_table_sha256: str


class StepFailure(Record):
    """Why a step of an entry did not finish; written beside the outputs, removed when it does."""

    step: str
    state: State
    reason: str
    log: str | None = None


METRICS_SCHEMA = pa.schema(
    [
        pa.field("competition", pa.string(), nullable=False),
        pa.field("track", pa.string(), nullable=False),
        pa.field("entry", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("scenario", pa.string(), nullable=False),
        pa.field("run", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("perturbation", pa.string()),
        pa.field("value", pa.float64()),
        pa.field("n", pa.int64(), nullable=False),
    ]
)
"""One row per HELM statistic: its mean over `n` instances; `value` is null where n is 0."""

INSTANCES_SCHEMA = pa.schema(
    [
        pa.field("competition", pa.string(), nullable=False),
        pa.field("track", pa.string(), nullable=False),
        pa.field("entry", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("scenario", pa.string(), nullable=False),
        pa.field("run", pa.string(), nullable=False),
        pa.field("instance", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("perturbation", pa.string()),
        pa.field("value", pa.float64()),
    ]
)
"""One row per instance and metric; `instance` is HELM's id, never a text."""


# --- scores ----------------------------------------------------------------------------------------


class Column(Part):
    """One scored column: a metric of a scenario of a stage."""

    stage: str
    scenario: str
    metric: str
    """Name in the competition's config."""
    higher_is_better: bool = True


class Cell(Part):
    """One entry's value in one column, or the state that explains why there is none."""

    value: float | None
    state: State = State.FINISHED
    reason: str = ""
    n: int = 0
    """Instances behind the value."""
    win_rate: float | None = None
    """None where the value is missing and the policy excludes it."""


class ScoredEntry(Part):
    entry: str
    team: str
    rank: int
    final_score: float
    stage_scores: dict[str, float]
    scenario_win_rates: dict[str, dict[str, float]]
    """stage -> scenario -> mean win rate over the scenario's columns."""
    cells: list[Cell]
    """In the order of the leaderboard's columns."""
    notes: list[str] = []
    """Footnotes: missing values and what they cost, a stage score of 0 and why."""


class DidNotFinish(Part):
    entry: str
    team: str
    step: str
    """The step that has no result."""
    state: State
    reason: str
    log: str | None = None


class Leaderboard(Record):
    competition: str
    track: str
    final: bool
    """False for standings: provisional, on whatever is finished."""
    convention: str
    convention_version: str
    missing: str
    stage_weights: dict[str, float]
    columns: list[Column]
    entries: list[ScoredEntry]
    """By rank; entries of equal score share the better rank, in the order of their ids."""
    did_not_finish: list[DidNotFinish]
    inputs: dict[str, str]
    """sha256 of each stage record and table that went in, by path."""


class PanelEntry(Part):
    entry: str
    values: list[float | None]
    """In the order of the panel's columns; None where it has none."""
    instances: list[int]
    """Behind each value."""


class Panel(Record):
    """The open values of some entries, published by the organizers for teams to compare with."""

    competition: str
    track: str
    columns: list[Column]
    """Of the open stage alone."""
    entries: list[PanelEntry]


# --- analysis of a leaderboard: results/leaderboard/<track>.analysis.json -----------------------------


class Interval(Part):
    """Limits between which a quantity lies at the analysis' level (95 %)."""

    low: float
    high: float


class EntryUncertainty(Part):
    """How sure one entry's score and rank are."""

    entry: str
    final_score: Interval
    stage_scores: dict[str, Interval]
    rank: Interval
    """Whole numbers; 1 is best."""
    p_first: float
    """Share of the replicates in which the entry has rank 1, alone or shared."""
    p_top3: float
    """Share of the replicates in which its rank is 3 or better."""
    p_above_next: float | None
    """Share of the replicates in which it scores higher than the next entry of the leaderboard (a tie
    counts one half); None for the last."""
    group: int
    """Number of its group in `Uncertainty.groups`, from 0."""


class Separation(Part):
    """What it would take to tell the first two entries apart."""

    first: str
    second: str
    difference: Interval
    """Of their final scores, first minus second, paired."""
    separated: bool
    """Whether the interval of the difference leaves out 0."""
    instances: int
    """Evaluation instances behind the two scores now, over all columns' distinct questions."""
    instances_needed: int | None
    """At the observed difference, its interval shrinking with the square root of the number of instances: no
    fewer than now unless the two are separated. None where the observed difference is 0."""


class Uncertainty(Part):
    """What another draw of evaluation instances would have changed. In the order of the leaderboard."""

    method: Literal["bootstrap", "parametric", "mixed"]
    """bootstrap: instances are drawn again, the same for all entries. parametric: no instance values
    exist, so each value is drawn around the observed one, independently by entry. mixed: some columns so,
    some so."""
    explanation: str
    """One plain paragraph for readers: method, assumptions, and what the intervals do not cover."""
    level: float
    replicates: int
    seed: int
    instances: int
    """Distinct evaluation instances drawn from (0 if parametric)."""
    parametric_columns: list[str]
    """stage/scenario/metric of the columns without instance values."""
    entries: list[EntryUncertainty]
    groups: list[list[str]]
    """Entries that cannot be told apart from the best of their group, by rank."""
    separation: Separation | None
    """None with fewer than two entries."""


class RankMove(Part):
    entry: str
    before: int
    """Rank among the entries that both rankings hold."""
    after: int


class Removal(Part):
    """The ranking without one entry or one scenario."""

    removed: str
    """Entry id, or stage/scenario."""
    order: list[str]
    """The remaining entries by rank."""
    moved: list[RankMove]
    """Entries whose rank **relative to the other remaining ones** changed; empty: the order stands."""


class Scheme(Part):
    """One way to turn the same values into a ranking."""

    name: str
    """midrank/geometric and the like, or borda, bradley_terry, one_per_team, reference_panel."""
    description: str
    ranks: dict[str, int]
    """Rank by entry; entries outside the scheme's pool are absent."""
    scores: dict[str, float]
    moved: list[RankMove]
    """Against the leaderboard, among the entries that both hold."""


class PrizeVerdict(Part):
    """What one of the first ranks depends on, in plain words."""

    rank: int
    entry: str
    stable: bool
    """True if no removal and no scheme gives this place to somebody else."""
    depends_on_entries: list[str]
    """Entries whose removal gives this place to somebody else."""
    depends_on_scenarios: list[str]
    """stage/scenario likewise."""
    depends_on_schemes: list[str]
    """Names of schemes that give this place to somebody else."""
    text: str


class Robustness(Part):
    """What the ranking depends on besides the entries' answers."""

    without_entry: list[Removal]
    """One per entry, by rank."""
    without_scenario: list[Removal]
    """One per scenario, in the order of the columns."""
    schemes: list[Scheme]
    """The leaderboard's own first."""
    verdicts: list[PrizeVerdict]
    """For ranks 1 to 3, as far as there are entries."""


class Correlation(Part):
    """Between open and closed scores over the entries of a track; all None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    reason: str = ""
    """Why there is no value."""

    def __str__(self) -> str:
        if self.value is None or self.low is None or self.high is None:
            return f"no correlation: {self.reason}"
        return f"{self.value:.2f}, 95 % interval {self.low:.2f} to {self.high:.2f}, {self.n} entries"


class ContaminationCount(Part):
    instances: int
    """Evaluation instances of the stage."""
    contaminated: int
    """Of these, found in the entry's training data."""
    by_scenario: dict[str, int]
    """Contaminated instances by scenario."""


class OverfittingEntry(Part):
    """One entry's open and closed results side by side."""

    entry: str
    open_score: float
    closed_score: float
    open_interval: Interval | None
    closed_interval: Interval | None
    """None where no uncertainty was computed."""
    open_rank: int
    closed_rank: int
    rank_drop: int
    """closed_rank - open_rank: positive if the entry did worse on the questions it had not seen."""
    contamination: dict[str, ContaminationCount] | None
    """By stage; None if the entry has no report."""
    contamination_reason: str
    """Why there is no report: no training data, or not made."""


class Overfitting(Part):
    """Whether the open stage told who would do well on the closed one."""

    entries: list[OverfittingEntry]
    """By rank."""
    pearson: Correlation
    spearman: Correlation
    text: str
    """One plain paragraph."""


class Analysis(Record):
    """Everything that says how far a leaderboard can be trusted."""

    competition: str
    track: str
    final: bool
    convention: str
    convention_version: str
    leaderboard_fingerprint: str
    """Of the Leaderboard this belongs to: fingerprint(leaderboard.model_dump(mode="json"))."""
    uncertainty: Uncertainty | None
    """None without scored entries."""
    robustness: Robustness | None
    """None without scored entries."""
    overfitting: Overfitting | None
    """None without scored entries, or where only one stage is scored."""
