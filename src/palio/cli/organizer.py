"""Verbs for the organizers: scores, reports, a run in progress."""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from palio.cli.group import (
    ExistingPath,
    Verb,
    competition_content,
    competition_of,
    competition_option,
    leaderboards_option,
    palio,
    results_of,
    results_option,
)
from palio.errors import BadInput, PalioError
from palio.layout import SLURM_PROFILE, STAGES, Boards, ReportFolder, Results, Stage

if TYPE_CHECKING:
    from palio.config import Competition, Prizes
    from palio.operating.status import StepState
    from palio.records import Leaderboard
    from palio.workflow import Workflow


@palio.command(cls=Verb, example="palio score --track laptop")
@competition_option
@click.option("--track", required=True)
@results_option
@click.option("--out", type=ExistingPath, default=Results().leaderboards.path, show_default=True)
def score(competition: str, track: str, results: Path, out: Path) -> None:
    """The final leaderboard of a track. Every entry must be finished or withdrawn."""
    from palio.operating.attempt import RUN_VARIABLE
    from palio.workflow import Workflow

    # in a run: what it planned, whatever has been edited since
    planned = Workflow.planned_by(os.environ.get(RUN_VARIABLE))
    workflow = planned or Workflow(competition_content(competition), competition)
    if track not in workflow.tracks:
        raise BadInput("palio score", "--track", track, fix=f"use one of {', '.join(workflow.tracks)}")
    _score(workflow, [track], results, out, final=True)


@palio.command(cls=Verb, example="palio standings")
@competition_option
@results_option
@click.option("--out", type=ExistingPath, default=Results().standings.path, show_default=True)
def standings(competition: str, results: Path, out: Path) -> None:
    """The provisional leaderboard on whatever is finished now, at any time, beside a running workflow."""
    from palio.workflow import Workflow

    workflow = Workflow(competition_content(competition), competition)
    _score(workflow, workflow.tracks, results, out, final=False)


def _score(workflow: Workflow, tracks: list[str], results: Path, out: Path, *, final: bool) -> None:
    from palio.scoring.analysis import analyze_track
    from palio.scoring.decision_document import decide_track, remove_decision
    from palio.scoring.leaderboard import score_track
    from palio.scoring.tables import print_leaderboard, write_leaderboard

    competition = workflow.competition
    folders = results_of(competition, results)
    entries = workflow.entries.by_track()
    for track in tracks:
        board = score_track(
            competition,
            track,
            folders,
            entries[track],
            final=final,
            due=lambda folder, _: workflow.due_in(folder),
            replicates=workflow.replicates,
        )
        board = board.model_copy(update={"made": workflow.scored_with(track)})
        try:
            analysis = analyze_track(competition, board, folders)
        except BadInput as error:
            if final:
                raise
            analysis = None  # a job beside us has begun to replace what was just scored
            print(f"no analysis: {error}", file=sys.stderr)
        write_leaderboard(board, Boards(out), analysis)
        print_leaderboard(board, analysis)
        remove_decision(Boards(out), track)  # of an earlier leaderboard
        if analysis and workflow.rules.prizes:
            prizes, assumed = workflow.rules.prizes, competition.scoring.training_noise
            for line in decide_track(
                competition, board, folders, prizes, Boards(out), training_noise=assumed
            ):
                print(line)


places_option = click.option(
    "--places", type=click.IntRange(min=1), help="Places with a prize; default: the rule set's."
)
alpha_option = click.option(
    "--alpha", type=click.FloatRange(0, 0.5, min_open=True, max_open=True), help="Default: the rule set's."
)
training_noise_option = click.option(
    "--training-noise",
    type=click.FloatRange(0, min_open=True),
    help="Assume this standard deviation of values between trainings, if no entry has replicates.",
)


@palio.command(cls=Verb, example="palio decide results/leaderboard/laptop.json --places 3")
@click.argument("leaderboard", type=ExistingPath)
@competition_option
@results_option
@places_option
@alpha_option
@training_noise_option
def decide(
    leaderboard: Path,
    competition: str,
    results: Path,
    places: int | None,
    alpha: float | None,
    training_noise: float | None,
) -> None:
    """Who gets the prizes of a track, how sure that is, and what would change it, as a document beside the
    leaderboard."""
    from palio.records import Leaderboard, read_record
    from palio.scoring.decision_document import decide_track

    board, settings = read_record(Leaderboard, leaderboard), competition_of(competition)
    prizes = _prizes("palio decide", settings, board, places, alpha)
    folders, boards = results_of(settings, results), Boards(leaderboard.parent)
    assumed = _assumed(settings, board, training_noise)
    for line in decide_track(
        settings, board, folders, prizes, boards, name=leaderboard.stem, training_noise=assumed
    ):
        print(line)


@palio.command(cls=Verb, example="palio plan-questions results/leaderboard/laptop.json curated raw")
@click.argument("leaderboard", type=ExistingPath)
@click.argument("entries", nargs=-1)
@competition_option
@results_option
@places_option
@alpha_option
@click.option(
    "--power",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.8,
    show_default=True,
    help="Probability of separating them, if the difference seen is the true one.",
)
@training_noise_option
@click.option("--json", "as_json", is_flag=True, help="Print the record instead of text.")
def plan_questions(
    leaderboard: Path,
    entries: tuple[str, ...],
    competition: str,
    results: Path,
    places: int | None,
    alpha: float | None,
    power: float,
    training_noise: float | None,
    as_json: bool,
) -> None:
    """How many more questions of which scenario, or how many more seeds, separate two entries at the least
    cost in GPU hours; without ENTRIES, those at each place with a prize that could not be decided."""
    from palio.operating.question_plan import plan_markdown
    from palio.operating.question_plan import plan_questions as plan
    from palio.records import Leaderboard, read_record

    board, settings = read_record(Leaderboard, leaderboard), competition_of(competition)
    places = places or (1 if entries else None)  # named entries are no prizes
    found = plan(
        settings,
        board,
        results_of(settings, results),
        entries,
        _prizes("palio plan-questions", settings, board, places, alpha),
        power=power,
        training_noise=_assumed(settings, board, training_noise),
    )
    print(found.model_dump_json(indent=2) if as_json else plan_markdown(found))


def _prizes(
    verb: str, competition: Competition, board: Leaderboard, places: int | None, alpha: float | None
) -> Prizes:
    """Return the prizes of the rule set, as far as the command line says nothing else."""
    from palio.config import Prizes, load_rules

    own = board.competition == competition.competition
    prizes = load_rules(Path(competition.rules)).prizes if own else None
    if prizes is None and places is None:
        raise BadInput(verb, "--places", why="the rule set has no prizes", fix="give --places")
    given = {"places": places, "alpha": alpha}
    return (prizes or Prizes()).model_copy(update={key: of for key, of in given.items() if of is not None})


def _assumed(competition: Competition, board: Leaderboard, given: float | None) -> float | None:
    """Return the assumed noise of training: the command line's, or that of the leaderboard's competition."""
    own = board.competition == competition.competition
    return given or (competition.scoring.training_noise if own else None)


@palio.command(cls=Verb, example="palio report --out results/report")
@competition_option
@results_option
@leaderboards_option
@click.option("--out", type=ExistingPath, default=Results().report, show_default=True)
def report(competition: str, results: Path, leaderboards: Path, out: Path) -> None:
    """Leaderboards, plots and a page per entry in one HTML file; beside it, the answers of the open stage."""
    from palio.answers.pages import write_pages
    from palio.report.build import build_report

    settings = competition_of(competition)
    folders = results_of(settings, results)
    answers = write_pages(settings, folders, ReportFolder(out).answers)
    boards = Boards(leaderboards)
    print(build_report(settings, results=folders, leaderboards=boards, out=out, answers=answers))


@palio.command("publish-site", cls=Verb, example="palio publish-site public")
@click.argument("folder", metavar="DIR", type=ExistingPath)
@competition_option
@results_option
@leaderboards_option
def publish_site_verb(folder: Path, competition: str, results: Path, leaderboards: Path) -> None:
    """Make or update a static site: leaderboards and their history, entries, open answers, downloads.

    Of a track without a final leaderboard the standings are published.
    """
    from datetime import UTC, datetime

    from palio.site.building import publish_site

    settings = competition_of(competition)
    folders, boards = results_of(settings, results), Boards(leaderboards)
    site = publish_site(settings, results=folders, leaderboards=boards, out=folder, now=datetime.now(UTC))
    print(site.page)


@palio.command(cls=Verb, example="palio feedback --all --out feedback")
@click.argument("entry", required=False)
@click.option("--all", "everybody", is_flag=True, help="Of every entry.")
@click.option("--out", type=ExistingPath, required=True, help="Folder for <entry>.html and <entry>.zip.")
@competition_option
@results_option
@leaderboards_option
def feedback(
    entry: str | None, everybody: bool, out: Path, competition: str, results: Path, leaderboards: Path
) -> None:
    """What a team may see of its entry, as a page and a zip: how each step ended, scores, answers, logs."""
    from palio.feedback.gathering import Gathering
    from palio.feedback.writing import write_feedback
    from palio.release.gather import Leak
    from palio.workflow import Workflow

    if (entry is None) != everybody:
        raise click.UsageError("give an entry, or --all")
    workflow = Workflow(competition_content(competition), competition)
    gathering = Gathering(workflow, results_of(workflow.competition, results), Boards(leaderboards))
    failed = 0
    for entry_id in workflow.entries if entry is None else [workflow.entries.known(entry)]:
        try:
            print(*write_feedback(gathering, entry_id, out))
        except Leak as leak:
            failed += 1
            print(f"{entry_id}: {leak}", file=sys.stderr)
    if failed:
        raise PalioError(f"{failed} entries have no feedback: it would hold what must not be handed out")


@palio.command(cls=Verb, example="palio panel results/leaderboard/laptop.json")
@click.argument("leaderboard", type=ExistingPath)
@competition_option
def panel(leaderboard: Path, competition: str) -> None:
    """Publish the open values of the reference panel, for teams to place themselves with palio try."""
    from palio.layout import panel as panel_file
    from palio.records import Leaderboard, read_record
    from palio.scoring.panel import panel_of

    board = read_record(Leaderboard, leaderboard)
    made = panel_of(board, competition_of(competition).scoring.reference_panel)
    path = panel_file(made.competition, made.track)
    made.write(path)
    print(path)


@palio.command(cls=Verb, example="palio release --out release/demo")
@competition_option
@results_option
@leaderboards_option
@click.option("--report", type=ExistingPath, default=Results().report, show_default=True)
@click.option("--out", type=ExistingPath, required=True, help="Folder of the release.")
def release(competition: str, results: Path, leaderboards: Path, report: Path, out: Path) -> None:
    """Gather a competition into a folder that anybody can score again, without secrets or closed texts."""
    from palio.release.gather import gather

    settings = competition_of(competition)
    made = gather(
        settings,
        results=results_of(settings, results),
        leaderboards=Boards(leaderboards),
        report=report,
        out=out,
    )
    files = [path for path in made.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"{made}: {len(files)} files, {size / 1e6:.1f} MB; check it with: palio verify {made}")


@palio.command(cls=Verb, example="palio reproduce results/laptop/curated --out reproduced --stage open")
@click.argument("entry_dir", type=ExistingPath)
@competition_option
@click.option(
    "--out", type=ExistingPath, required=True, help="Results folder to work in: DIR/<track>/<entry>."
)
@click.option(
    "--stage",
    "stages",
    multiple=True,
    type=click.Choice(STAGES),
    help="Package and evaluate too, and compare the scores; may be given twice.",
)
@click.option("--threads", type=int, help="CPU threads; default: the track's.")
def reproduce(
    entry_dir: Path, competition: str, out: Path, stages: tuple[Stage, ...], threads: int | None
) -> None:
    """Train a finished entry again from its manifest; compare adapter and scores: the check of winners.

    Ends with 0 if both agree within the noise that docs/training.md states, else with 1.
    """
    from palio.operating.reproduction import reproduce as run
    from palio.workflow import Workflow

    workflow = Workflow(competition_content(competition), competition)
    made, folder = run(workflow, entry_dir, out, stages=stages, threads=threads)
    for line in made.lines():
        print(line)
    if not made.reproduced:
        raise PalioError(f"{entry_dir} is not reproduced: see {folder.reproduction}")
    print("reproduced")


@palio.command("model-code", cls=Verb, example="palio model-code config/entries/neurips2023/percent_bfd.yaml")
@click.argument("file", type=ExistingPath)
def model_code(file: Path) -> None:
    """Print what a rule set says to approve the code that an entry's base model brings. Read that code first.

    This runs none of it. Once approved, it runs only in the sandbox, and only with these hashes.
    """
    from palio.base_model import source_code
    from palio.config import load_entry
    from palio.model_code import approval_lines

    source = load_entry(file).base_model
    print(f"# {source.address}, in the rule set's base_models; `sources` that match it alone")
    for line in approval_lines(source_code(source)):
        print(line)


@palio.command("fetch-data", cls=Verb, example="palio fetch-data --stage open")
@competition_option
@click.option("--stage", type=click.Choice(STAGES), required=True)
@click.option("--source", type=ExistingPath, help="Folder of data that is there already, as HELM caches it.")
@click.option("--list", "dry", is_flag=True, help="Only print what would be copied or downloaded.")
def fetch_data_verb(competition: str, stage: Stage, source: Path | None, dry: bool) -> None:
    """Bring all data of a stage into its store, on a machine with a network; the rest runs without."""
    from palio.evaluation.helm import stage_runs
    from palio.evaluation.stage import fetch_data, planned_data

    runs = stage_runs(competition_of(competition), stage)
    if dry:
        for row in planned_data(runs, source):
            print(" | ".join(column for column in row if column))
        return
    digests = fetch_data(runs, source)
    for name in sorted({"/".join(path.split("/")[:2]) for path in digests}):
        files = [path for path in digests if path.startswith(f"{name}/")]
        print(f"{stage} {name}: {len(files)} files")


@palio.command(cls=Verb, example="palio prompts --stage closed --scenario MATH")
@competition_option
@click.option("--stage", type=click.Choice(STAGES), required=True)
@click.option("--scenario", help="Of one scenario; default: of all.")
@click.option("--number", default=1, show_default=True, help="Prompts of each HELM run.")
def prompts(competition: str, stage: Stage, scenario: str | None, number: int) -> None:
    """Print prompts of a prepared stage, for organizers: the closed store opens to its owner only."""
    from palio.evaluation.helm import stage_runs
    from palio.evaluation.stage import prepared_prompts

    for heading, prompt in prepared_prompts(stage_runs(competition_of(competition), stage), scenario, number):
        print(f"--- {heading}\n{prompt}\n")


@palio.command(cls=Verb, example="palio status --watch")
@competition_option
@results_option
@click.option("--watch", is_flag=True, help="Show it again every few seconds, until Ctrl-C.")
@click.option("--html", type=ExistingPath, help="Write the same as one HTML page.")
@click.option("--every", type=click.IntRange(min=1), help="With --html: write it every so many seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@click.option(
    "--failed", "states", flag_value="failed", multiple=True, help="Only entries with a failed step."
)
@click.option(
    "--running", "states", flag_value="running", multiple=True, help="Only entries of which a step runs."
)
@click.option("--track", "tracks", multiple=True, help="Only this track's.")
@click.option("--team", default="", help="Only entries of teams whose name contains this.")
@click.option(
    "--sort",
    type=click.Choice(["track", "state", "seconds"]),
    default="track",
    show_default=True,
    help="state: what runs or failed first; seconds: what runs longest first.",
)
def status(
    competition: str,
    results: Path,
    watch: bool,
    html: Path | None,
    every: int | None,
    as_json: bool,
    states: tuple[StepState, ...],
    tracks: tuple[str, ...],
    team: str,
    sort: Literal["track", "state", "seconds"],
) -> None:
    """Where every entry is: waiting, running (node, budget, end), done, or failed and why. Takes no lock."""
    from dataclasses import asdict, replace

    from palio.operating import controller, status_view
    from palio.operating.status import Selection, competition_status
    from palio.provenance import write_text
    from palio.workflow import Workflow

    def look() -> Any:
        workflow = Workflow(competition_content(competition), competition)
        if unknown := set(tracks) - set(workflow.tracks):
            fix = f"use one of {', '.join(workflow.tracks)}"
            raise BadInput("palio status", "--track", ", ".join(sorted(unknown)), fix=fix)
        running = controller.running()
        last = "" if running else controller.last_run()
        folders = results_of(workflow.competition, results)
        everything = competition_status(workflow, folders, running, last, controller.plan())
        now = replace(everything, selection=Selection(frozenset(states), frozenset(tracks), team, sort))
        if html:
            write_text(html, status_view.html_page(now))
        return now

    if every and not html:
        raise click.UsageError("--every needs --html")
    if every:
        while True:
            look()
            time.sleep(every)
    elif watch:
        status_view.watch_status(look)
    elif as_json:
        content = asdict(now := look()) | {"entries": [asdict(entry) for entry in now.shown]}
        del content["selection"]
        print(json.dumps(content, indent=2))
    else:
        status_view.print_status(look())


@palio.command(cls=Verb, example="palio cost --by team")
@competition_option
@results_option
@click.option(
    "--by",
    type=click.Choice(["step", "entry", "team", "track", "node"]),
    default="step",
    show_default=True,
    help="What a row is of.",
)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def cost(competition: str, results: Path, by: str, as_json: bool) -> None:
    """Hours that jobs took so far, with a GPU and without, and how many of them led to nothing."""
    from palio.operating.cost import cost_table, costs
    from palio.workflow import Workflow

    workflow = Workflow(competition_content(competition), competition)
    rows = costs(workflow, results_of(workflow.competition, results), by)
    print(json.dumps([vars(row) for row in rows], indent=2) if as_json else cost_table(rows, by))


@palio.command(cls=Verb, example='palio withdraw raw --why "the team asked to"')
@competition_option
@click.argument("entry")
@click.option("--why", required=True, help="Shown in the leaderboard.")
def withdraw(competition: str, entry: str, why: str) -> None:
    """Take an entry out of a running competition, on record in config/overrides/. Cancels its SLURM jobs."""
    from palio.entries import Entries
    from palio.operating import overrides

    settings = competition_of(competition)
    overrides.withdraw(settings, entry, why)
    for line in overrides.end_work(Results().entry(Entries(settings)[entry].track, entry)):
        print(line)
    print(f"{entry} is withdrawn; start the workflow again to score without it")


@palio.command(cls=Verb, example="palio retry curated --step open")
@competition_option
@click.argument("entry")
@click.option("--step", "steps", multiple=True, help="finetune, open or closed; default: what failed.")
@results_option
def retry(competition: str, entry: str, steps: tuple[str, ...], results: Path) -> None:
    """Grant steps of an entry a fresh start: new budget, nothing kept. On record in config/overrides/."""
    from palio.operating import overrides
    from palio.operating.status import competition_status
    from palio.workflow import Workflow

    workflow = Workflow(competition_content(competition), competition)
    found = workflow.competition
    if not steps:
        entries = competition_status(workflow, results_of(found, results)).entries
        mine = [one for one in entries if one.entry == entry]
        steps = tuple(step.step for one in mine for step in one.steps if step.state == "failed")
        if mine and not steps:
            raise BadInput("--step", why=f"no step of {entry} has failed", fix="name the one to run again")
    overrides.retry(found, entry, list(steps))
    print(f"{entry}: {', '.join(steps)} will start afresh with the next run of the workflow")


@palio.command(cls=Verb, example="palio doctor --slurm --competition config/neurips2023.yaml")
@competition_option
@click.option("--slurm", is_flag=True, help="Check a SLURM site; else this machine.")
@click.option("--profile", type=ExistingPath, default=SLURM_PROFILE, show_default=True)
def doctor(competition: str, slurm: bool, profile: Path) -> None:
    """Check, before the first run, that this machine can confine what teams hand in and serve packages, its
    GPU, disk, base models and the stages' data, or that a SLURM site and a profile fit the competition; print
    the lines to fix."""
    from palio.operating.doctor import engine_findings, examine
    from palio.operating.machine import machine_findings
    from palio.sandbox.doctor import examine_confinement

    wrong, given = 0, competition_of(competition)
    here = chain(examine_confinement(), engine_findings(given), machine_findings(given, competition))
    for finding in examine(given, profile) if slurm else here:
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
