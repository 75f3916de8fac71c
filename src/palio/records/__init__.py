"""Small typed JSON records and two tidy Parquet tables: everything that one step hands to another.

A record contains content only: no dates, hosts or durations (those go to `*.run.json` sidecars), so equal
content gives an equal file. `schema_version` changes when a field's meaning does.

results/<track>/<entry>/
    check.json                    Check
    dataset/manifest.json         DatasetManifest     dataset/train.parquet, dataset/card.md
    contamination.json            Contamination
    adapter.json                  AdapterManifest     adapter/, train.parquet
    image.json                    ImageManifest       image.tar
    package.json                  PackageManifest     package/
    probe.json                    ProbeReport         of its server
    open.json, closed.json        StageRecord         helm/<stage>/{metrics,instances}.parquet
    <step>.run.json               RunFacts            when, where, how long
    work/                         what must survive a retry; never a declared output
    work/failures/<step>.json     StepFailure
results/leaderboard/<track>.json  Leaderboard
results/leaderboard/<track>.analysis.json  Analysis
results/leaderboard/<track>.decision.json  Decision
"""

from palio.records.analysis import (
    Analysis,
    ContaminationCount,
    Correlation,
    EntryUncertainty,
    Fall,
    FallShares,
    Interval,
    Overfitting,
    OverfittingEntry,
    PrizeVerdict,
    RankMove,
    Removal,
    Robustness,
    Scheme,
    Selection,
    Separation,
    TrainingNoise,
    Uncertainty,
)
from palio.records.common import AnyRecord, EntryRecord, Made, Part, Record, TrackRecord, read_record
from palio.records.decision import Award, Boundary, Chance, Comparison, Decision, Remedy
from palio.records.entry import (
    AdapterManifest,
    BaseModelManifest,
    Check,
    Contained,
    Contamination,
    DatasetManifest,
    ImageConfig,
    ImageManifest,
    Layers,
    OperationReport,
    PackageManifest,
    SourceReport,
    StepFailure,
    Unsupported,
    Violation,
    coarse,
    extra_tokens_faults,
)
from palio.records.evaluation import (
    HelmRun,
    ProbeCheck,
    ProbeReport,
    ScenarioCounts,
    StageInstances,
    StageRecord,
)
from palio.records.plan import QuestionPlan, Separating, Way
from palio.records.scores import (
    Cell,
    Column,
    DidNotFinish,
    Leaderboard,
    Panel,
    PanelEntry,
    Replicate,
    ScoredEntry,
)
from palio.records.sidecars import (
    AskedQuestions,
    CurateRun,
    FinetuneRun,
    RunFacts,
    StageRun,
    TrainingFacts,
    UsedSeconds,
    timed_run,
)

__all__ = [
    "AdapterManifest",
    "Analysis",
    "AnyRecord",
    "AskedQuestions",
    "Award",
    "BaseModelManifest",
    "Boundary",
    "Cell",
    "Chance",
    "Check",
    "Column",
    "Comparison",
    "Contained",
    "Contamination",
    "ContaminationCount",
    "Correlation",
    "CurateRun",
    "DatasetManifest",
    "Decision",
    "DidNotFinish",
    "EntryRecord",
    "EntryUncertainty",
    "Fall",
    "FallShares",
    "FinetuneRun",
    "HelmRun",
    "ImageConfig",
    "ImageManifest",
    "Interval",
    "Layers",
    "Leaderboard",
    "Made",
    "OperationReport",
    "Overfitting",
    "OverfittingEntry",
    "PackageManifest",
    "Panel",
    "PanelEntry",
    "Part",
    "PrizeVerdict",
    "ProbeCheck",
    "ProbeReport",
    "QuestionPlan",
    "RankMove",
    "Record",
    "Remedy",
    "Removal",
    "Replicate",
    "Robustness",
    "RunFacts",
    "ScenarioCounts",
    "Scheme",
    "ScoredEntry",
    "Selection",
    "Separating",
    "Separation",
    "SourceReport",
    "StageInstances",
    "StageRecord",
    "StageRun",
    "StepFailure",
    "TrackRecord",
    "TrainingFacts",
    "TrainingNoise",
    "Uncertainty",
    "Unsupported",
    "UsedSeconds",
    "Violation",
    "Way",
    "coarse",
    "extra_tokens_faults",
    "read_record",
    "timed_run",
]
