"""What a competition and an entry may say: frozen models, read once at the edge, trusted inside.

`load_competition` and `load_entry` turn YAML into these models or raise `BadInput` with one line that
names file, key, value and fix. config/README.md lists every field.
"""

from palio.config.base_model import BaseModelSource
from palio.config.common import ID_PATTERN, REVISION_PATTERN, Pattern, Seconds, Strict, Weight, expand
from palio.config.competition import (
    Competition,
    Isolation,
    Metric,
    Overrides,
    Probe,
    Replicates,
    Scenario,
    Scoring,
    Stage,
    Stages,
    Telemetry,
    Track,
)
from palio.config.dataset import DatasetRecipe, DataSource, Markers, RowTemplate
from palio.config.entry import Entry
from palio.config.finetune import FinetuneRecipe
from palio.config.operations import Input, Operation, operation_class, operation_names
from palio.config.program import DOCKERFILES, Program, ServerProgram
from palio.config.reading import (
    Fault,
    faults,
    load_competition,
    load_entry,
    load_overrides,
    load_rules,
    parse,
    team_and_track,
)
from palio.config.ruleset import ApprovedModel, Prizes, RuleSet
from palio.config.team import team_id, team_skeleton
from palio.config.yaml_file import read_yaml

__all__ = [
    "DOCKERFILES",
    "ID_PATTERN",
    "REVISION_PATTERN",
    "ApprovedModel",
    "BaseModelSource",
    "Competition",
    "DataSource",
    "DatasetRecipe",
    "Entry",
    "Fault",
    "FinetuneRecipe",
    "Input",
    "Isolation",
    "Markers",
    "Metric",
    "Operation",
    "Overrides",
    "Pattern",
    "Prizes",
    "Probe",
    "Program",
    "Replicates",
    "RowTemplate",
    "RuleSet",
    "Scenario",
    "Scoring",
    "Seconds",
    "ServerProgram",
    "Stage",
    "Stages",
    "Strict",
    "Telemetry",
    "Track",
    "Weight",
    "expand",
    "faults",
    "load_competition",
    "load_entry",
    "load_overrides",
    "load_rules",
    "operation_class",
    "operation_names",
    "parse",
    "read_yaml",
    "team_and_track",
    "team_id",
    "team_skeleton",
]
