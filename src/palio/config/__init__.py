"""What a competition and an entry may say: frozen models, read once at the edge, trusted inside.

`load_competition` and `load_entry` turn YAML into these models or raise `BadInput` with one line that
names file, key, value and fix. config/README.md lists every field.
"""

from palio.config.base_model import BaseModelSource
from palio.config.common import ID_PATTERN, REVISION_PATTERN, STAGES, Pattern, Seconds, Strict, Weight, expand
from palio.config.competition import (
    Competition,
    Isolation,
    Metric,
    Overrides,
    Scenario,
    Scoring,
    Stage,
    Stages,
    Telemetry,
    Track,
)
from palio.config.dataset import DatasetRecipe, DataSource, RowTemplate
from palio.config.entry import Entry
from palio.config.finetune import FinetuneRecipe
from palio.config.operations import Input, Operation, operation_class, operation_names
from palio.config.program import Program, ServerProgram
from palio.config.reading import (
    Fault,
    entry_files,
    faults,
    load_competition,
    load_entries,
    load_entry,
    load_overrides,
    load_rules,
    overrides_file,
    parse,
    read_yaml,
)
from palio.config.ruleset import ApprovedModel, RuleSet
from palio.config.slices import CheckedAgainst, EntryFolders, ScenarioRuns, StageLimits, StageRuns

__all__ = [
    "ID_PATTERN",
    "REVISION_PATTERN",
    "STAGES",
    "ApprovedModel",
    "BaseModelSource",
    "CheckedAgainst",
    "Competition",
    "DataSource",
    "DatasetRecipe",
    "Entry",
    "EntryFolders",
    "Fault",
    "FinetuneRecipe",
    "Input",
    "Isolation",
    "Metric",
    "Operation",
    "Overrides",
    "Pattern",
    "Program",
    "RowTemplate",
    "RuleSet",
    "Scenario",
    "ScenarioRuns",
    "Scoring",
    "Seconds",
    "ServerProgram",
    "Stage",
    "StageLimits",
    "StageRuns",
    "Stages",
    "Strict",
    "Telemetry",
    "Track",
    "Weight",
    "entry_files",
    "expand",
    "faults",
    "load_competition",
    "load_entries",
    "load_entry",
    "load_overrides",
    "load_rules",
    "operation_class",
    "operation_names",
    "overrides_file",
    "parse",
    "read_yaml",
]
