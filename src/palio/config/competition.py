"""A competition: tracks, stages, scoring, and how it is run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from palio.config.common import Seconds, Strict, Weight, expand, seconds
from palio.cpu import CpuDtype
from palio.errors import InvalidValue
from palio.layout import STAGES, ClosedStore


class Track(Strict):
    """A class of hardware with its own leaderboard."""

    title: str
    """Shown in leaderboard and report."""
    gpu_model: str | None = None
    """SLURM's GPU type (`sinfo -o %G`); omit it where any will do."""
    gpu_memory_gb: PositiveFloat | None = None
    """Cap on GPU memory in GB, enforced on larger GPUs too. Omit it on a track without a GPU, where none is
    used."""
    ram_gb: PositiveInt
    """Memory of each GPU job in GB; raise it if jobs run out of memory."""
    cpus: PositiveInt = 2
    """CPU cores of each GPU job; raise it if data loading limits the GPU."""
    training_budget: Seconds
    """Wall-clock time of training over all attempts; the trainer stops and saves before it runs out. 24h in
    2023."""
    training_margin: Seconds = seconds("2h")
    """Time added to the budget for the job's limit: loading, saving, final checks."""


class Metric(Strict):
    """A column of a scenario's table: a HELM metric, averaged over the scenario's HELM runs."""

    metric: str
    """HELM's name of the metric, e.g. `exact_match`."""
    split: Literal["test", "valid"] = "test"
    """HELM's split; TruthfulQA has only `valid`. If all metrics of a scenario use one split, only its
    questions are asked."""
    perturbation: str | None = None
    """`robustness` or `fairness`: the worst case over perturbed inputs; omit it for the plain value. The run
    entry must ask for `data_augmentation`."""
    run: str | None = None
    """Only HELM runs whose name contains this, e.g. for a column per subset; omit it for all runs."""
    higher_is_better: bool = True
    """Checked against HELM's own schemas; required where HELM does not know the metric (bias, toxicity)."""
    missing: Literal["worst", "exclude"] | None = None
    """How a missing value of this column counts; default: `exclude` for bias metrics, which have no value
    where no completion mentions the groups, and `scoring.missing` for all others."""
    group: str | None = None
    """Counts under this name in the stage's score, instead of its scenario's: in the open round of 2023 all
    accuracies were averaged, all robustness columns, and all fairness columns."""


class Scenario(Strict):
    """A named group of HELM runs that is scored as one; a stage's score is the geometric mean over them."""

    run_entries: str
    """A file in HELM's run-entries format, without `model=`, `max_eval_instances=` and `eval_split=`, which
    the stage sets; `~` and `$VARIABLES` are expanded. Keep a secret stage's outside the repository. Palio's
    own scenarios (`palio_*`) read `$PALIO_HELM_DATA/<folder>`, see src/palio/evaluation/scenarios.py."""
    max_eval_instances: PositiveInt | None = None
    """Instances of each run entry: more for certainty, fewer for speed."""
    questions: PositiveInt | None = None
    """Instead: instances of all run entries together, shared evenly by the groups of the run file, then by
    the run entries of a group. For scenarios of many runs."""
    metrics: dict[str, Metric] = Field(min_length=1)
    """Columns of the scenario's table, by a name of your choice."""

    shortfall: Literal["refuse", "accept"] = "refuse"
    """What `prepare_stage` does if less than 90 % of the questions are there, or a prompt has none of the
    examples that its run entry asks for; `accept` says so in log, record and report only."""
    scored: bool = True
    """False: asked and recorded, but not part of the score, as CNN/DailyMail in the open stage of 2023."""

    @model_validator(mode="after")
    def _one_budget(self) -> Scenario:
        if (self.max_eval_instances is None) == (self.questions is None):
            raise ValueError("give either max_eval_instances or questions")
        return self


class Stage(Strict):
    """An evaluation stage: its scenarios, its weight and its limits."""

    title: str
    """Shown in leaderboard and report."""
    weight: Weight
    """Share of the final score; both stages add up to 1. `1/3` and `2/3` in 2023. A stage of weight 0 is
    asked, but is not in the score."""
    time_limit: Seconds
    """Wall-clock time of the stage for one entry over all attempts; nothing is asked after it."""
    unanswered: Literal["missing", "wrong"] = "missing"
    """A question without an answer, by timeout or server error: `missing` leaves its HELM run without a
    value, for `scoring.missing` to decide; `wrong` scores an empty completion, as in 2023."""
    cut_at_stop_sequences: bool = True
    """Cut completions at HELM's stop sequences, even if a server ignores them; not done in 2023."""
    scale: PositiveFloat = 1
    """Factor on every scenario's budget, at least one question each: 0.05 for a rehearsal."""
    margin: Seconds = seconds("30m")
    """Time added to the limit for the job's limit: loading the model, summarizing."""
    threads: PositiveInt = 8
    """Concurrent requests; raise it if the server takes more."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What serves the packages. `vllm`, for large models on a GPU, must be on PATH: see docs/serving.md."""
    cpu_dtype: CpuDtype = "float32"
    """The dtype models are served in on a track without a GPU. `bfloat16` needs AVX512-BF16 or AMX."""
    scenarios: dict[str, Scenario] = Field(min_length=1)
    """Scenarios by id."""


class Stages(Strict):
    """Both stages."""

    open: Stage
    """The stage whose instances teams may see."""
    closed: Stage
    """The stage whose instances stay secret."""

    @model_validator(mode="after")
    def _weights(self) -> Stages:
        total = self.open.weight + self.closed.weight
        if abs(total - 1) > 1e-9:
            raise InvalidValue(why=f"the stages' weights add up to {total:g}", fix="make them add up to 1")
        return self


class Scoring(Strict):
    """How values become a leaderboard; see docs/scoring.md."""

    convention: Literal["midrank", "helm2023", "hidden2023", "final2023"] = "midrank"
    """How a column of values becomes win rates. `midrank`: (strictly worse + (k-1)/2)/(n-1) for a k-way tie
    among n. The others reproduce published tables and have their own rule for missing values."""
    missing: Literal["worst", "exclude", "block"] = "worst"
    """A missing value: loses to every other (`worst`), is left out of its column (`exclude`), or prevents the
    leaderboard (`block`)."""
    reference_panel: tuple[str, ...] = ()
    """Ids of entries to compare everybody with as well, e.g. baselines; omit for five at evenly spaced ranks.
    `palio panel` publishes their open values for teams."""
    training_noise: PositiveFloat | None = None
    """Standard deviation of a metric from one training of an entry to the next, e.g. 0.01, for tracks without
    `replicates`: an assumption, and marked as one, half of whose variance moves all scenarios together. Omit
    it, and intervals there cover the questions only."""


class Telemetry(Strict):
    """Tracking of training. It changes no result and is not in any manifest: changing it re-runs nothing."""

    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Trackers to report to. TensorBoard writes to `results/<track>/<entry>/work/dashboards`; the others must
    be installed, and take address and key from their own environment variables; Trackio without an address
    stays on this machine."""
    usd_per_hour: dict[str, PositiveFloat] = {}
    """Price of an hour of a track's hardware, by track, for `cost_usd` in `finetune.run.json`."""


class Isolation(Strict):
    """Confinement of the programs that teams hand in; docs/security.md says what it promises."""

    unconfined: bool = False
    """Run teams' programs even if this machine cannot confine them; only if you know every team."""
    visible: tuple[str, ...] = ()
    """Folders that they may read beside `/usr`, `/lib*`, some of `/etc` and Palio's environment, e.g.
    `/opt/cuda`."""
    processes: PositiveInt = 4096
    """Maximum number of processes and threads of a program."""
    scratch_gb: PositiveFloat = 4
    """Size in GB of `/tmp` and of `/dev/shm`, which both take memory; raise it for data loading."""
    output_gb: PositiveFloat = 50
    """Maximum size in GB of a training program's output folder, checkpoints included."""
    image_gb: PositiveFloat = 100
    """Maximum size in GB of a container image, unpacked, and of all that building it takes on the disk."""
    build_time: Seconds = seconds("2h")
    """Time to build a team's Dockerfile."""
    build_ram_gb: PositiveFloat = 16
    """Memory in GB for that."""


class Replicates(Strict):
    """Entries that are trained again with other seeds, to learn how much a score owes to the seed."""

    entries: Literal["finalists", "all"] | tuple[str, ...]
    """`all`, ids, or `finalists`: the first of each track's leaderboard, known once there is one, so they are
    trained again in the next run of the workflow. An entry that is not trained here has no replicates."""
    seeds: int = Field(ge=2)
    """Trainings of each of these entries, its own included. The others have its data and settings, their own
    seed and their own budget."""
    finalists: PositiveInt = 5
    """How many entries of a track are finalists, by the score of their own training."""


Level = Literal["required", "warning", "skip"]


class Probe(Strict):
    """Checks of a running server before HELM asks it. `required`: an entry that fails is not evaluated;
    `warning`: it is told what that costs it; `skip`: not looked at. The defaults require only what would make
    scores impossible or unfair."""

    answers: Level = "required"
    """Answers each kind of request that the open stage makes with a text."""
    same_answer: Level = "required"
    """Gives the same answer to the same request at temperature 1e-7, HELM's for greedy decoding. `warning` in
    2023."""
    parallel_requests: Level = "required"
    """Answers requests that come in parallel."""
    any_prompt: Level = "required"
    """Still answers after odd prompts: empty, emoji, a null character, as long as the window."""
    log_probabilities: Level | None = None
    """Returns log-probabilities that are finite, differ, and add up; default: `required` where the stage
    ranks choices by them, else `warning`."""
    echo_prompt: Level | None = None
    """Returns the prompt before the completion where asked to, and only there; default: as
    `log_probabilities`."""
    not_empty: Level = "warning"
    """Returns answers that are more than blanks."""
    odd_prompts: Level = "warning"
    """Answers prompts that fill the window, and does not fail (HTTP 500) at the other odd ones."""
    stop_sequences: Level = "warning"
    """Stops at stop sequences; Palio cuts there too, if `cut_at_stop_sequences`."""
    max_new_tokens: Level = "warning"
    """Returns at most as many tokens as asked for."""
    temperature_0: Level = "warning"
    """Answers at a temperature of exactly 0, which HELM never asks for."""
    missing_fields: Level = "warning"
    """Answers a request of nothing but a prompt; HELM sends every field."""
    unknown_fields: Level = "warning"
    """Ignores fields that it does not know; HELM sends none today."""
    request_time: Level = "warning"
    """Returns in `request_time` the seconds that it took; Palio measures itself."""
    tokenizer: Level = "warning"
    """Counts tokens at /tokenize as the declared base model's tokenizer does, and decodes them; Palio needs
    neither."""
    blocking: Level = "warning"
    """Takes requests while it generates."""
    speed: Level = "warning"
    """Would be through with the stage within its limit."""


class Competition(Strict):
    """A competition, and the file that `--configfile` names."""

    competition: str
    """Id of letters, digits, `-` and `_`; part of every record and of file names."""
    title: str
    """Shown in leaderboard and report."""
    extends: str | None = None
    """Path of another competition's file, of which this one gives the differences only: mappings are merged,
    everything else is replaced, and null removes a key."""
    demo: bool = False
    """True only for a competition without secrets: its closed store may be inside the repository."""
    entries: tuple[str, ...] = Field(min_length=1)
    """Folders of entry files; each `<id>.yaml` in them is an entry."""
    rules: str
    """Path of the rule set."""
    closed_store: str
    """Folder for everything that shows a closed prompt: instances, HELM's runs and logs; created with mode
    0700. Must be outside the repository, readable by you alone and visible to all nodes; `~` and `$VARIABLES`
    are expanded."""
    withdrawn: dict[str, str] = {}
    """Entry id → reason. Withdrawn entries are shown in the leaderboard and not run: the final leaderboard
    needs every entry finished or withdrawn. Usually written by `palio withdraw`."""
    retries: dict[str, dict[str, PositiveInt]] = {}
    """Entry id → step → number of fresh starts granted. Written by `palio retry`, never by hand."""
    shards: dict[str, PositiveInt] = {}
    """Entry id → number of jobs that share its curation, for data too large for one machine; 1 for entries
    not listed. Does not change the dataset: see docs/curation.md."""
    replicates: Replicates | None = None
    """Training of entries again with other seeds; omit for none. See docs/scoring.md."""
    notify: str | None = None
    """Shell command run on news, with `PALIO_EVENT` (`finish`, `failure`, `stall`), `PALIO_MESSAGE` and
    `PALIO_COMPETITION` set, e.g. `mail -s "$PALIO_EVENT" me@example.org <<< "$PALIO_MESSAGE"`."""
    site: str | None = None
    """Folder of a static site that the workflow makes again whenever an entry has finished, as `palio
    publish-site` does; omit for none. See docs/operating.md."""
    stalled_after: Seconds = seconds("1h")
    """A running step whose log has not grown for this long counts as stalled."""
    scoring: Scoring = Scoring()
    """How values become a leaderboard."""
    isolation: Isolation = Isolation()
    """Confinement of teams' programs."""
    probe: Probe = Probe()
    """Checks of every entry's server before the open stage."""
    telemetry: Telemetry = Telemetry()
    """Tracking of training."""
    tracks: dict[str, Track] = Field(min_length=1)
    """Tracks by id."""
    stages: Stages
    """The open and the closed stage."""

    @property
    def store(self) -> ClosedStore:
        """Where everything of the closed stage lies."""
        return ClosedStore(expand(self.closed_store) / self.competition)

    @property
    def stage_weights(self) -> dict[str, float]:
        """Weights of the stages that are in the score."""
        return {name: weight for name in STAGES if (weight := self.stage(name).weight) > 0}

    def stage(self, name: str) -> Stage:
        return self.stages.open if name == "open" else self.stages.closed


class Overrides(Strict):
    """The organizer's decisions in a running competition; they take precedence over its config."""

    withdrawn: dict[str, str] = {}
    """Entry id → reason, by `palio withdraw`."""
    retries: dict[str, dict[str, PositiveInt]] = {}
    """Entry id → step → number of fresh starts granted, by `palio retry`."""
