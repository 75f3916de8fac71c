"""An entry: what one team submits to one track."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from palio.config.base_model import BaseModelSource
from palio.config.common import PlainText, Strict
from palio.config.dataset import DatasetRecipe
from palio.config.finetune import FinetuneRecipe
from palio.config.program import Program, ServerProgram
from palio.config.team import team_id
from palio.errors import InvalidValue

PARTS = {
    "recipe": ("dataset", "finetune"),
    "command": ("dataset", "command"),
    "server": ("server",),
}
"""The sections that entries of each kind have beside those that all entries have."""
OPTIONAL = {"recipe": ("server",), "command": ("server",), "server": ()}
"""The sections that entries of each kind may have."""


def _team(value: str) -> str:
    if not team_id(value):
        raise InvalidValue(why="has neither letters nor digits", fix="name the team")
    return value


class Entry(Strict):
    """One submission of one team to one track. Its id is the name of its file."""

    team: Annotated[PlainText, Field(min_length=1), AfterValidator(_team)]
    """Name of the team. Case, blanks and punctuation tell no two teams apart."""
    team_members: tuple[PlainText, ...] = ()
    """Names of the people in the team, where the rules limit their number."""
    track: str
    """Id of a track in the competition."""
    kind: Literal["recipe", "command", "server"] = "recipe"
    """`recipe`: Palio's own curation and trainer; `command`: the team's own training program; `server`: the
    team's own inference server."""
    title: PlainText = ""
    """Shown in the report."""
    base_model: BaseModelSource
    """The model to start from."""
    dataset: DatasetRecipe | None = None
    """For kinds `recipe` and `command`. In a recipe, omit it together with `finetune` for an untuned base
    model."""
    finetune: FinetuneRecipe | None = None
    """For kind `recipe`: how Palio's trainer fine-tunes."""
    command: Program | None = None
    """For kind `command`: the team's own training program, see docs/command_entries.md."""
    server: ServerProgram | None = None
    """The team's own inference server, see docs/server_entries.md. In kinds `recipe` and `command` it serves
    what was trained, in place of Palio's server."""

    @model_validator(mode="after")
    def _parts_of_its_kind(self) -> Entry:
        parts = PARTS[self.kind]
        for other in {part for of in PARTS.values() for part in of}.difference(parts, OPTIONAL[self.kind]):
            if getattr(self, other) is not None:
                raise InvalidValue(
                    why=f"kind {self.kind} has no section {other}", fix="remove it, or correct the kind"
                )
        texts = self.dataset and any(source.format == "text" for source in self.dataset.sources)
        if texts and self.finetune and self.finetune.chat_template:
            why = "finetune.chat_template has no place for text without a prompt (format: text)"
            raise InvalidValue(why=why, fix="leave out one of them")
        missing = [part for part in parts if getattr(self, part) is None]
        if self.kind == "recipe" and len(missing) == 1:
            raise ValueError("give both dataset and finetune, or neither for an untuned base model")
        if self.kind == "recipe" and missing and self.server:
            raise InvalidValue(why="a server without training is of kind server", fix="write kind: server")
        if self.kind != "recipe" and missing:
            raise InvalidValue(why=f"kind {self.kind} needs the section {missing[0]}", fix="add it")
        return self

    @property
    def trained(self) -> bool:
        """True if the workflow fine-tunes this entry."""
        return self.finetune is not None or self.command is not None

    @property
    def programs(self) -> dict[str, Program]:
        """The team's own programs by their section."""
        return {
            name: program
            for name, program in (("command", self.command), ("server", self.server))
            if program is not None
        }
