"""Commands for researchers: other conventions, why ranks differ, the published tables."""

from __future__ import annotations

from pathlib import Path

import click

from palio.cli.group import (
    ExistingPath,
    Verb,
    competition_of,
    competition_option,
    palio,
    results_of,
    results_option,
)
from palio.layout import Boards, Results


@palio.command(cls=Verb, example="palio rescore results/leaderboard/laptop.json --convention helm2023")
@click.argument("leaderboard", type=ExistingPath)
@competition_option
@results_option
@click.option("--convention", help="How values become win rates; default: the competition's.")
@click.option("--missing", help="Policy for missing values; default: the competition's.")
def rescore(
    leaderboard: Path, competition: str, results: Path, convention: str | None, missing: str | None
) -> None:
    """Score a leaderboard again by another convention or policy, from its stored HELM results."""
    from palio.scoring.analysis import analyze_track
    from palio.scoring.tables import print_leaderboard
    from palio.scoring.versions import difference, read_leaderboard, write_version
    from palio.scoring.versions import rescore as scored_again

    rules = competition_of(competition)
    folders = results_of(rules, results)
    before = read_leaderboard(leaderboard)
    board = scored_again(before, rules, folders, convention=convention, missing=missing)
    analysis = analyze_track(rules, board, folders)
    written = write_version(board, Boards(leaderboard.parent), analysis)
    print_leaderboard(board, analysis)
    print(difference(before, board))
    print(written)


@palio.command(
    cls=Verb, example="palio diff results/leaderboard/laptop.json results/leaderboard/versions/laptop.v2.json"
)
@click.argument("a", type=ExistingPath)
@click.argument("b", type=ExistingPath)
@click.option("--json", "as_json", is_flag=True, help="Print the record instead of text.")
def diff(a: Path, b: Path, as_json: bool) -> None:
    """Explain every rank that moved from leaderboard A to B, one change at a time."""
    from palio.scoring.versions import difference, read_leaderboard

    found = difference(read_leaderboard(a), read_leaderboard(b))
    print(found.model_dump_json(indent=2) if as_json else found)


@palio.command(cls=Verb, example="palio published resources/neurips2023 --fetch")
@click.argument("folder", type=ExistingPath)
@click.option("--fetch", is_flag=True, help="First download into FOLDER what is not there; sha256 checked.")
@click.option("--convention", help="Score by this one; default: the one each file was made with.")
@click.option("--out", type=ExistingPath, default=Results().published.path, show_default=True)
def published(folder: Path, fetch: bool, convention: str | None, out: Path) -> None:
    """Recompute the published tables of NeurIPS 2023 in FOLDER, then analyze and report them like our own.

    Exits with 1 if a published win rate or score does not follow from the metric columns.
    """
    from palio.config import Prizes
    from palio.neurips2023.download import fetch_published
    from palio.neurips2023.figure_data import published_figures
    from palio.neurips2023.report import published_report
    from palio.neurips2023.tables import REMARK, published_leaderboards
    from palio.neurips2023.tables import published as recomputed
    from palio.scoring.analysis import analyze
    from palio.scoring.decision import decide
    from palio.scoring.decision_document import write_decision
    from palio.scoring.tables import write_leaderboard

    if fetch:
        fetch_published(folder)
    found = recomputed(folder)
    for file in found.files:
        print(file)
    for track, agreement in found.open_against_hidden.items():
        print(f"{track}: open against hidden scores, {agreement}")
    print(
        f"{len(found.files)} files, {found.cells} cells, {found.mismatches} mismatches, "
        f"max_abs_error {found.max_abs_error:.2e}"
    )
    boards = []
    for board in published_leaderboards(folder, convention):
        analysis = analyze(board, remark=REMARK)
        write_leaderboard(board, Boards(out), analysis)
        final = board.track.endswith("_final")
        decision = decide(board, {}, Prizes(), remark=REMARK) if final else None
        boards.append((board, analysis, decision))
        if decision:
            write_decision(decision, Boards(out), board.track)
            for award in decision.awards:
                print(f"{board.track}: {award.text}")
    print(published_report(boards, published_figures(folder), Boards(out).report))
    raise click.exceptions.Exit(1 if found.mismatches else 0)
