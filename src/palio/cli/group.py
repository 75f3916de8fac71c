"""The command group, and what its verbs share: options, and what they read from them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from palio import __version__

if TYPE_CHECKING:
    from palio.config import Competition, Entry

DEFAULT_CONFIG = "config/config.yaml"
ExistingPath = click.Path(path_type=Path)


class Verb(click.Command):
    """A command whose help ends with an example that runs on the demo."""

    def __init__(self, *args: Any, example: str, **kwargs: Any) -> None:
        super().__init__(*args, **{"epilog": f"\b\nExample:\n  {example}", **kwargs})


ROLES = {
    "For a team": "palio.cli.participant",
    "Steps of the workflow": "palio.cli.steps",
    "For organizers and readers": "palio.cli.organizer",
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
                        if verb.callback.__module__ == module
                    ]
                )


@click.group(cls=Palio, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="palio")
def palio() -> None:
    """Run an LLM fine-tuning competition: entries in, a leaderboard that can be trusted out.

    Snakemake calls these verbs; participants and researchers may call them by hand.
    """


@contextmanager
def entry_step(step: str, entry_dir: Path) -> Iterator[None]:
    """One attempt at a step of an entry, on record whatever ends it."""
    from palio.operating.attempt import attempt

    with attempt(step, entry_dir):
        yield


def competition_of(given: str) -> Competition:
    """The competition in a YAML file, or in the JSON that a Snakemake rule passes on."""
    from palio.config import load_competition

    return load_competition(json.loads(given)) if given.startswith("{") else load_competition(Path(given))


competition_option = click.option(
    "--competition",
    default=DEFAULT_CONFIG,
    show_default=True,
    metavar="FILE",
    help="The competition's config, or its content as JSON.",
)
entry_dir_option = click.option(
    "--entry-dir", type=ExistingPath, required=True, help="The entry's folder, results/<track>/<entry>."
)
isolation_option = click.option(
    "--isolation", default="{}", help="JSON of the competition's isolation, for the entry's own program."
)
fresh_start_option = click.option(
    "--fresh-start", type=int, metavar="N", help="The organizer's Nth grant: set earlier work and time aside."
)
competition_id_option = click.option("--competition-id", required=True, help="The competition's id.")


def track_and_entry(entry_dir: Path) -> tuple[str, str]:
    return entry_dir.parent.name, entry_dir.name


def entries_by_track(competition: Competition) -> dict[str, dict[str, Entry | None]]:
    """track -> id -> entry; None for a file that is not valid, shown in the first track."""
    from palio.config import load_entries

    entries = load_entries(competition)
    first = next(iter(competition.tracks))
    return {
        track: {
            name: entry
            for name, entry in entries.items()
            if (entry.track if entry and entry.track in competition.tracks else first) == track
        }
        for track in competition.tracks
    }
