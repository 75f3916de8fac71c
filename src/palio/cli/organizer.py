"""Verbs for the organizers and for whoever studies a competition: scores, reports, a run under way."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from palio.cli.group import (
    ExistingPath,
    Verb,
    competition_of,
    competition_option,
    entries_by_track,
    palio,
)
from palio.cli.steps import evaluate, package
from palio.errors import BadInput, PalioError


@palio.command(cls=Verb, example="palio score --track laptop")
@competition_option
@click.option("--track", required=True)
@click.option("--results", type=ExistingPath, default=Path("results"), show_default=True)
@click.option("--out", type=ExistingPath, default=Path("results/leaderboard"), show_default=True)
def score(competition: str, track: str, results: Path, out: Path) -> None:
    """The final leaderboard of a track. Every entry must be finished or withdrawn."""
    _score(competition, [track], results, out, final=True)


@palio.command(cls=Verb, example="palio standings")
@competition_option
@click.option("--results", type=ExistingPath, default=Path("results"), show_default=True)
@click.option("--out", type=ExistingPath, default=Path("results/standings"), show_default=True)
def standings(competition: str, results: Path, out: Path) -> None:
    """The provisional leaderboard on whatever is finished now, at any time, beside a running workflow."""
    _score(competition, list(competition_of(competition).tracks), results, out, final=False)


def _score(given: str, tracks: list[str], results: Path, out: Path, *, final: bool) -> None:
    from palio.errors import BadInput
    from palio.scoring.analysis import analyse_track
    from palio.scoring.leaderboard import score_track
    from palio.scoring.tables import print_leaderboard, write_leaderboard

    competition = competition_of(given)
    entries = entries_by_track(competition)
    for track in tracks:
        board = score_track(competition, track, results, entries[track], final=final)
        try:
            analysis = analyse_track(competition, board, results)
        except BadInput as error:
            if final:
                raise
            analysis = None  # a job beside us has begun to replace what was just scored
            print(f"no analysis: {error}", file=sys.stderr)
        write_leaderboard(board, out, analysis)
        print_leaderboard(board, analysis)


@palio.command(cls=Verb, example="palio rescore results/leaderboard/laptop.json --convention helm2023")
@click.argument("leaderboard", type=ExistingPath)
@competition_option
@click.option("--results", type=ExistingPath, default=Path("results"), show_default=True)
@click.option("--convention", help="How values become win rates; default: the competition's.")
@click.option("--missing", help="Policy for missing values; default: the competition's.")
def rescore(
    leaderboard: Path, competition: str, results: Path, convention: str | None, missing: str | None
) -> None:
    """A new version of a leaderboard from the HELM results it was made from; nothing is run again."""
    from palio.scoring.analysis import analyse_track
    from palio.scoring.tables import print_leaderboard
    from palio.scoring.versions import difference, read_leaderboard, write_version
    from palio.scoring.versions import rescore as scored_again

    rules = competition_of(competition)
    before = read_leaderboard(leaderboard)
    board = scored_again(before, rules, results, convention=convention, missing=missing)
    analysis = analyse_track(rules, board, results)
    written = write_version(board, leaderboard.parent, analysis)
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
@click.option("--out", type=ExistingPath, default=Path("results/published"), show_default=True)
def published(folder: Path, fetch: bool, convention: str | None, out: Path) -> None:
    """Recompute the published tables of NeurIPS 2023 in FOLDER, then analyse and report them like our own.

    Exits with 1 if a published win rate or score does not follow from the metric columns.
    """
    from palio.report.build import published_report
    from palio.scoring.analysis import analyse
    from palio.scoring.published import REMARK, published_leaderboards
    from palio.scoring.published import published as recomputed
    from palio.scoring.published_figures import published_figures
    from palio.scoring.published_files import fetch_published
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
        analysis = analyse(board, remark=REMARK)
        write_leaderboard(board, out, analysis)
        boards.append((board, analysis))
    published_report(boards, published_figures(folder), out / "report")
    print(out / "report" / "index.html")
    raise click.exceptions.Exit(1 if found.mismatches else 0)


@palio.command(cls=Verb, example="palio report --out results/report")
@competition_option
@click.option("--results", type=ExistingPath, default=Path("results"), show_default=True)
@click.option("--leaderboards", type=ExistingPath, default=Path("results/leaderboard"), show_default=True)
@click.option("--out", type=ExistingPath, default=Path("results/report"), show_default=True)
def report(competition: str, results: Path, leaderboards: Path, out: Path) -> None:
    """One self-contained HTML file with leaderboards, plots and a page per entry."""
    from palio.report.build import build_report

    build_report(competition_of(competition), results=results, leaderboards=leaderboards, out=out)
    print(out / "index.html")


@palio.command(cls=Verb, example="palio panel results/leaderboard/laptop.json")
@click.argument("leaderboard", type=ExistingPath)
@competition_option
def panel(leaderboard: Path, competition: str) -> None:
    """Publish the open values of the reference panel, for teams to place themselves with palio try."""
    from palio.records import Leaderboard, read_record
    from palio.scoring.panel import panel_of, panel_path

    board = read_record(Leaderboard, leaderboard)
    made = panel_of(board, competition_of(competition).scoring.reference_panel)
    path = panel_path(made.competition, made.track)
    made.write(path)
    print(path)


@palio.command(cls=Verb, example="palio release --out release/demo")
@competition_option
@click.option("--results", type=ExistingPath, default=Path("results"), show_default=True)
@click.option("--leaderboards", type=ExistingPath, default=Path("results/leaderboard"), show_default=True)
@click.option("--report", type=ExistingPath, default=Path("results/report"), show_default=True)
@click.option("--out", type=ExistingPath, required=True, help="Folder of the release.")
def release(competition: str, results: Path, leaderboards: Path, report: Path, out: Path) -> None:
    """Gather a competition into a folder that anybody can score again, without secrets or closed texts."""
    from palio.release.gather import gather

    made = gather(
        competition_of(competition), results=results, leaderboards=leaderboards, report=report, out=out
    )
    files = [path for path in made.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"{made}: {len(files)} files, {size / 1e6:.1f} MB; check it with: palio verify {made}")


@palio.command(
    cls=Verb,
    example="palio reproduce results/laptop/curated --out results/reproduced/laptop/curated --stage open",
)
@click.argument("entry_dir", type=ExistingPath)
@competition_option
@click.option("--out", type=ExistingPath, required=True, help="Folder to train in: another <track>/<entry>.")
@click.option(
    "--base-model", type=ExistingPath, help="Default: resources/base_models/<id in the entry's manifest>."
)
@click.option(
    "--stage",
    "stages",
    multiple=True,
    type=click.Choice(["open", "closed"]),
    help="Package and evaluate too, and compare the scores; may be given twice.",
)
@click.option("--threads", type=int, help="CPU threads; default: the track's.")
@click.pass_context
def reproduce(
    context: click.Context,
    entry_dir: Path,
    competition: str,
    out: Path,
    base_model: Path | None,
    stages: tuple[str, ...],
    threads: int | None,
) -> None:
    """Train a finished entry again from its manifest; compare adapter and scores: the check of winners.

    Ends with 0 if both agree within the noise that docs/training.md states, else with 1.
    """
    from palio.config import StageLimits
    from palio.errors import BadInput
    from palio.evaluation.helm import stage_runs
    from palio.records import AdapterManifest, read_record
    from palio.training.reproduce import reproduce as run
    from palio.training.reproduce import score_differences
    from palio.workflow import slice_of

    settings = competition_of(competition)
    manifest = read_record(AdapterManifest, entry_dir / "adapter.json")
    track = settings.tracks.get(manifest.track)
    if track is None:
        raise BadInput(competition, "tracks", manifest.track, "is not there; give the entry's competition")
    base_model = base_model or Path("resources/base_models") / manifest.base_model
    threads = threads or track.cpus
    found = run(entry_dir=entry_dir, base_model=base_model, track=track, out=out, threads=threads)
    print("adapter: ", end="")
    print(
        "identical"
        if found.identical
        else f"weights {found.weight_distance:.3f}, final loss {found.loss_difference:.4f} nats apart"
    )
    if stages:
        context.invoke(
            package, competition_id=manifest.competition, entry_dir=out, base_model=base_model, adapter=True
        )
    for name in stages:
        stage = settings.stage(name)
        context.invoke(
            evaluate,
            entry_dir=out,
            runs=slice_of(stage_runs(settings, name)),
            limits=slice_of(StageLimits(time_limit=stage.time_limit, threads=stage.threads)),
            track_limits=slice_of(track),
            instances=Path("resources/stages") / name / "stage.json",
            threads=threads,
        )
        scores = score_differences(entry_dir, out, name, stage.scenarios)
        found = found.model_copy(update={"scores": (*found.scores, *scores)})
        for score in scores:
            print(
                f"{name} {score.scenario}, {score.metric}: {score.first:.3f}, again {score.second:.3f} "
                f"(noise {score.noise:.3f}, {score.n} instances)"
            )
    found.write(out / "reproduction.json")
    if not found.reproduced:
        raise PalioError(f"{entry_dir} is not reproduced: see {out / 'reproduction.json'}")
    print("reproduced")


@palio.command(cls=Verb, example="palio status --watch")
@competition_option
@click.option("--results", type=ExistingPath, default=Path("results"), show_default=True)
@click.option("--watch", is_flag=True, help="Show it again every few seconds, until Ctrl-C.")
@click.option("--html", type=ExistingPath, help="Write the same as one HTML page.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def status(competition: str, results: Path, watch: bool, html: Path | None, as_json: bool) -> None:
    """Where every entry is: waiting, running (node, budget, end), done, or failed and why. Takes no lock."""
    from dataclasses import asdict

    from palio.operating import controller, status_view
    from palio.operating.status import competition_status
    from palio.provenance import write_text

    def look() -> Any:
        now = competition_status(competition_of(competition), results, controller.running())
        if html:
            write_text(html, status_view.html_page(now))
        return now

    if watch:
        status_view.watch_status(look)
    elif as_json:
        print(json.dumps(asdict(look()), indent=2))
    else:
        status_view.print_status(look())


@palio.command(cls=Verb, example='palio withdraw raw --why "the team asked to"')
@competition_option
@click.argument("entry")
@click.option("--why", required=True, help="Shown in the leaderboard.")
def withdraw(competition: str, entry: str, why: str) -> None:
    """Take an entry out of a running competition, on record in config/overrides/."""
    from palio.operating import overrides

    overrides.withdraw(competition_of(competition), entry, why)
    print(f"{entry} is withdrawn; start the workflow again to score without it")


@palio.command(cls=Verb, example="palio retry curated --step open")
@competition_option
@click.argument("entry")
@click.option("--step", "steps", multiple=True, help="finetune, open or closed; default: what failed.")
@click.option("--results", type=ExistingPath, default=Path("results"), show_default=True)
def retry(competition: str, entry: str, steps: tuple[str, ...], results: Path) -> None:
    """Grant steps of an entry a fresh start: new budget, nothing kept. On record in config/overrides/."""
    from palio.operating import overrides
    from palio.operating.status import competition_status

    found = competition_of(competition)
    if not steps:
        entries = competition_status(found, results).entries
        mine = [one for one in entries if one.entry == entry]
        steps = tuple(step.step for one in mine for step in one.steps if step.state == "failed")
        if mine and not steps:
            raise BadInput("--step", "", None, f"no step of {entry} has failed; name the one to run again")
    overrides.retry(found, entry, list(steps))
    print(f"{entry}: {', '.join(steps)} will start afresh with the next run of the workflow")


@palio.command(cls=Verb, example="palio doctor --slurm --competition config/neurips2023.yaml")
@competition_option
@click.option(
    "--slurm", is_flag=True, help="Check a SLURM site; else whether this machine confines programs."
)
@click.option("--profile", type=ExistingPath, default=Path("profiles/slurm/config.yaml"), show_default=True)
def doctor(competition: str, slurm: bool, profile: Path) -> None:
    """Check, before the first run, that this machine can confine what teams hand in, or that a SLURM site and
    a profile fit the competition; print the lines to fix."""
    from palio.operating.doctor import examine
    from palio.sandbox.doctor import examine_confinement

    wrong = 0
    for finding in examine(competition_of(competition), profile) if slurm else examine_confinement():
        wrong += not finding.ok
        print(finding, flush=True)
    if wrong:
        raise PalioError(f"{wrong} to fix before the first run")


@palio.command(cls=Verb, example="palio schema entry")
@click.argument("kind", type=click.Choice(["entry", "competition", "ruleset"]))
def schema(kind: str) -> None:
    """Print the JSON schema of entry files, competitions or rule sets, for editors and other tools."""
    from palio.config.reference import json_schema

    print(json_schema(kind), end="")
