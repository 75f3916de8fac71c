"""Records of a stage and of an entry's evaluation in it."""

from __future__ import annotations

from typing import Literal

from palio.errors import State
from palio.records.common import EntryRecord, Made, Part, Record


class StageInstances(Record):
    """The public part of a stage's evaluation instances: counts and a digest, never a text."""

    competition: str
    """Competition id."""
    stage: str
    """open or closed."""
    helm_version: str
    """Version of HELM that made them."""
    scenarios: dict[str, int]
    """Evaluation instances by scenario."""
    sha256: str
    """Digest of the table of normalized texts, which stays in the stage's store."""
    made: Made | None = None
    """The settings that it was made with."""


class ProbeCheck(Part):
    """Outcome of one check of a running server."""

    name: str
    """Name of the check."""
    required: bool
    """A required check that fails ends the entry before HELM runs; the others cost points or time."""
    state: Literal["pass", "fail", "skipped"]
    """How it ended."""
    why: str
    """What was observed."""
    fix: str
    """What to change; empty for a check that passed."""


class ProbeReport(Record):
    """Conformance of one server, its checks in the order they ran. Contains measured times: not content."""

    package_fingerprint: str | None = None
    """Identity of the package that was served, if the workflow served it."""
    checks: tuple[ProbeCheck, ...]
    """All checks."""
    planned_requests: int
    """Requests of the whole stage."""
    time_limit: float
    """Limit of the stage, in seconds."""
    projected_seconds: float | None
    """Projected duration of the stage, from the timed requests; None if they failed."""

    @property
    def conforms(self) -> bool:
        """Whether every required check passed."""
        return all(check.state == "pass" for check in self.checks if check.required)

    @property
    def failed(self) -> list[str]:
        """Names of the failed checks."""
        return [check.name for check in self.checks if check.state == "fail"]


class HelmRun(Part):
    """One HELM run (one run spec) and how it ended."""

    scenario: str
    """Scenario, as the competition names it."""
    run: str
    """HELM's name of the run."""
    state: State
    """How it ended."""
    reason: str = ""
    """Why it did not finish."""
    instances: int
    """Evaluation instances planned, over all splits."""
    answered: int
    """Of these, how many got an answer to every request: the plain one and the perturbed ones."""


class StageRecord(EntryRecord):
    """One entry's evaluation in one stage. Its tables are helm/<stage>/{metrics,instances}.parquet."""

    stage: str
    """open or closed."""
    package_fingerprint: str
    """Identity of the package that was evaluated."""
    instances_sha256: str
    """Identity of the stage's instances."""
    helm_version: str
    """Version of HELM."""
    engine: str = ""
    """Name and version of what served the model, e.g. `vllm 0.33.0`; empty for a team's own server."""
    state: State
    """finished: every instance is answered; time_limit: some are not, the stage's limit ran out."""
    reason: str = ""
    """How many instances are unanswered."""
    unanswered: Literal["missing", "wrong"] = "missing"
    """What an unanswered instance counts as: `wrong` scores it as an empty completion."""
    cut_at_stop_sequences: bool = True
    """Whether answers were cut at the first stop sequence."""
    completions_cut: int = 0
    """Answers that continued after a stop sequence and were cut there."""
    contained: dict[str, int] = {}
    """What the confinement of a team's own server held back, and how often; the probe's odd requests
    included."""
    runs: list[HelmRun]
    """All HELM runs of the stage."""
    metrics_sha256: str
    """Digest of metrics.parquet."""
    instances_table_sha256: str
    """Digest of instances.parquet."""
