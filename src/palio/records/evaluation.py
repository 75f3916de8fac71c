"""Records of a stage and of an entry's evaluation in it."""

from __future__ import annotations

from typing import Literal

from palio.errors import State
from palio.records.common import EntryRecord, Made, Part, Record


class ScenarioCounts(Part):
    """What a scenario asks, against what it was meant to ask."""

    asked: int
    """Questions that its run entries ask for."""
    prepared: int
    """Questions there are."""
    requests: int
    """Requests: more than questions where inputs are perturbed or each choice is asked."""
    examples_asked: int
    """Examples that a prompt is meant to show."""
    examples_min: int
    """Fewest examples that a prompt shows, before a model's window takes some."""
    examples_median: float
    """Median of the same."""
    prompts_short_of_examples: int
    """Prompts with fewer examples than asked for."""
    prompts_without_examples: int
    """Prompts that are to show examples and show none."""
    longest_prompt_words: int
    """Words of the longest prompt; a tokenizer makes at least a token of each."""
    window_tokens: int
    """Tokens that the context leaves for a prompt: without the completion."""
    prompts_over_window: int
    """Prompts of more words than that, which lose examples or are cut under any tokenizer."""
    labels: dict[str, int] = {}
    """Questions by the letter of their right answer, of multiple choice."""
    constant_answer: float | None = None
    """What always answering the commonest letter would score; None if it is no multiple choice."""


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
    counts: dict[str, ScenarioCounts] = {}
    """What each scenario asks, and what it lacks."""
    left_out: list[str] = []
    """Rows of the data that were left out for want of a text: file and number."""
    sha256: str
    """Digest of the table of normalized texts, which stays in the stage's store."""
    made: Made | None = None
    """The settings that it was made with."""


class ProbeCheck(Part):
    """Outcome of one check of a running server."""

    name: str
    """Name of the check, as the competition's `probe` section has it."""
    required: bool
    """A required check that fails ends the entry before HELM runs; the others are warnings."""
    state: Literal["pass", "fail", "unknown", "skipped"]
    """How it ended; unknown: it cannot tell, which is no failure; skipped: nobody was left to ask."""
    why: str
    """What was observed."""
    cost: str = ""
    """What it costs the entry; empty for a check that passed."""
    fix: str = ""
    """What to change; empty for a check that passed."""


class ProbeReport(Record):
    """Conformance of one server, its checks in the order they ran. Contains measured times: not content."""

    package_fingerprint: str | None = None
    """Identity of the package that was served, if the workflow served it."""
    checks: tuple[ProbeCheck, ...]
    """All checks."""
    died: str = ""
    """Name of the check at which the server ended; empty if it lives."""
    planned_requests: int
    """Requests of the whole stage."""
    time_limit: float
    """Limit of the stage, in seconds."""
    projected_seconds: float | None
    """Projected duration of the stage, from the timed requests; None if they failed."""

    @property
    def conforms(self) -> bool:
        """Whether the server lives and fails no required check."""
        return not self.died and not any(check.required for check in self.checks if check.state == "fail")

    @property
    def failed(self) -> list[str]:
        """Names of the failed checks."""
        return [check.name for check in self.checks if check.state == "fail"]

    @property
    def required(self) -> dict[str, bool]:
        """Which checks were made, and which of them are required."""
        return {check.name: check.required for check in self.checks}


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
    prompts_short: int = 0
    """Prompts that lost examples, for they did not fit in the window."""
    prompts_cut: int = 0
    """Prompts whose question was cut, for it alone did not fit in the window."""
    empty_answers: int = 0
    """Answers of no characters but blanks."""


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
    """Name and version of what served the model, e.g. `vllm 0.33.0`, and its dtype where a stage chose it;
    empty for a team's own server."""
    code: str = ""
    """Fingerprint of the model's own code, which ran in the sandbox; empty if there was none."""
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
