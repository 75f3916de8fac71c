"""The command group, and what its verbs share: options, and what they read from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from palio import __version__
from palio.errors import BadInput
from palio.layout import CONFIG, Results

if TYPE_CHECKING:
    from palio.config import Competition

ExistingPath = click.Path(path_type=Path)


class Verb(click.Command):
    """A command whose help ends with an example that runs on the demo."""

    def __init__(self, *args: Any, example: str, **kwargs: Any) -> None:
        super().__init__(*args, **{"epilog": f"\b\nExample:\n  {example}", **kwargs})


ROLES = {
    "For a team": "palio.cli.entry",
    "For organizers": "palio.cli.organizer",
    "For researchers": "palio.cli.research",
}


class Palio(click.Group):
    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """By who calls them, and in the order of use."""
        for role, module in ROLES.items():
            with formatter.section(role):
                formatter.write_dl(
                    [
                        (name, verb.get_short_help_str(200))  # the first sentence, whole
                        for name, verb in self.commands.items()
                        if not verb.hidden and verb.callback.__module__ == module
                    ]
                )


@click.group(cls=Palio, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="palio")
def palio() -> None:
    """Run an LLM fine-tuning competition: entries in, a leaderboard that can be trusted out."""


def competition_of(given: str) -> Competition:
    """Read the competition in a YAML file, or in the JSON that a Snakemake rule passes on."""
    from palio.config import load_competition

    return load_competition(competition_content(given))


def competition_content(given: str) -> Path | dict[str, Any]:
    """Return the competition's file, or its content.

    Raises:
        BadInput: none was given, and this folder has none.
    """
    if given == str(CONFIG) and not CONFIG.exists():
        fix = "run palio in the folder of the competition, or give --competition FILE"
        raise BadInput(CONFIG, why=f"there is none in {Path.cwd()}", fix=fix)
    return json.loads(given) if given.startswith("{") else Path(given)


def results_of(competition: Competition, root: Path) -> Results:
    """The competition's results in the folder `root`."""
    return Results(root, competition.store)


competition_option = click.option(
    "--competition",
    default=str(CONFIG),
    show_default=True,
    metavar="FILE",
    help="The competition's config, or its content as JSON.",
)
results_option = click.option(
    "--results", type=ExistingPath, default=Results().path, show_default=True, help="Folder of the results."
)
leaderboards_option = click.option(
    "--leaderboards",
    type=ExistingPath,
    default=Results().leaderboards.path,
    show_default=True,
    help="Folder of the leaderboards.",
)
