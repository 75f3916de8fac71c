"""A competition's rules as data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from palio.config.common import Strict
from palio.config.team import team_id
from palio.layout import TEAMS

PythonFile = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*\.py$")]
"""Name of a Python module's file."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ApprovedModel(Strict):
    """A family of base models that entries may start from."""

    family: str
    """Name shown to teams."""
    sources: tuple[str, ...] = Field(min_length=1)
    """Patterns with `*` that match `hub:org/name`, `path:folder` or `gguf:package/file`, ignoring case."""
    licences: tuple[str, ...] = Field(min_length=1)
    """Licences of the family as its model cards on the hub state them, e.g. `apache-2.0`; a downloaded card
    with any other is refused."""
    outputs_train: tuple[str, ...] | None = None
    """Families that may be trained on this family's output; omit for any."""
    code: Annotated[dict[PythonFile, Sha256], Field(min_length=1)] | None = None
    """Approved Python code of a family that transformers does not know: the sha256 of every Python file in
    the model's folder, as `palio model-code` prints it. It runs in the sandbox only. Omit to run none."""


class Prizes(Strict):
    """Prizes of every track, and what it takes to award one."""

    places: PositiveInt = 3
    """Places with a prize."""
    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    """Largest probability that any place of a track goes to one entry though another is as good."""
    not_separable: Literal["share", "more_questions", "more_seeds"] = "share"
    """What follows if entries cannot be told apart: they `share` the prizes of their places, or are asked
    `more_questions`, or trained with `more_seeds`, first. `palio decide` says about how many,
    `palio plan-questions` of which scenario and at what price."""


class RuleSet(Strict):
    """The rules that entries are checked against. docs/rules.md says what each rule looks at."""

    version: str
    """Recorded in every `check.json`."""
    base_models: tuple[ApprovedModel, ...] = Field(min_length=1)
    """Approved families of base models."""
    refused_names: tuple[str, ...] = ()
    """Patterns refused in a base model's address even within an approved family, e.g. `*-instruct*`."""
    require_revision: bool = True
    """Require a 40-character commit id for models on the hub."""
    data_licences: tuple[str, ...] = Field(min_length=1)
    """SPDX ids that a data source may have."""
    team_folders: tuple[str, ...] = (TEAMS,)
    """Folders that teams' data and programs must be in. In one that ends in `<team>` each team has its own,
    named for it in lower case with `-` for blanks and punctuation: `resources/teams/<team>` is
    `resources/teams/nobile-oca` for the team Nobile Oca, and another team's is refused. Never a folder with
    stage instances or anyone's home."""
    require_url: bool = True
    """Require a data source, unless generated, to say where the public finds it."""
    refused_generators: tuple[str, ...] = ()
    """Patterns of models whose output must not be trained on."""
    approved_generators: tuple[str, ...] = ()
    """Patterns of programs, and of models that are not approved base models, whose output may train any
    entry. Every other generator must be an approved base model."""
    max_length: PositiveInt = 2048
    """Maximum number of tokens of prompt and completion together."""
    max_entries_per_team: PositiveInt = 3
    """Maximum number of entries of a team in one track."""
    network_in_training: bool = False
    """Let `command` entries use the network while they train."""
    network_in_build: bool = False
    """Let the build of a team's Dockerfile use the network: base images, packages and weights are downloaded
    then, or never."""
    prizes: Prizes | None = None
    """Prizes; omit for none. They decide nothing about an entry, so a change of them checks none again."""
    max_team_size: PositiveInt | None = None
    """Maximum number of people in a team, counted over its entries; omit for no limit."""

    def folders_of(self, team: str) -> tuple[str, ...]:
        """Return the `team_folders` of a team."""
        return tuple(folder.replace("<team>", team_id(team)) for folder in self.team_folders)

    @model_validator(mode="after")
    def _families_exist(self) -> RuleSet:
        families = {model.family for model in self.base_models}
        for model in self.base_models:
            for family in model.outputs_train or ():
                if family not in families:
                    raise ValueError(
                        f"outputs_train of {model.family} names {family!r}, which is not a family"
                    )
        return self
