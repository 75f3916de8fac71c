"""`palio <verb>`: parse, call one function, map errors to exit codes. Heavy imports stand in the verbs.

Exit codes: 0 done, 1 an error named on one line, 2 bad input, 3 rule violation, 4 time limit,
5 out of memory, 6 a program of the entry died, 7 interrupted by the machine or a signal: start again,
8 not tried again in this run, 70 a bug of ours (with its traceback).
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from palio import __version__
from palio.errors import BadInput, PalioError, RuleViolation

if TYPE_CHECKING:
    from palio.config import Competition, Entry

BUG_EXIT_CODE = 70
RULE_VIOLATION_EXIT_CODE = RuleViolation.exit_code
DEFAULT_CONFIG = "config/config.yaml"

ExistingPath = click.Path(path_type=Path)


class Verb(click.Command):
    """A command whose help ends with an example that runs on the demo."""

    def __init__(self, *args: Any, example: str, **kwargs: Any) -> None:
        super().__init__(*args, **{"epilog": f"\b\nExample:\n  {example}", **kwargs})


class Palio(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of the workflow, not of the alphabet


@click.group(cls=Palio, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="palio")
def palio() -> None:
    """Run an LLM fine-tuning competition: entries in, a leaderboard that can be trusted out.

    Snakemake calls these verbs; participants and researchers may call them by hand.
    """


def main() -> NoReturn:
    """Entry point. A user's mistake ends in one line, never in a traceback."""
    try:
        sys.exit(palio(standalone_mode=False) or 0)  # click returns an Exit's code, verbs return None
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.Abort:
        sys.exit(130)
    except PalioError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception:
        traceback.print_exc()
        print("error: this is a bug in Palio, not in your input; please report it", file=sys.stderr)
        sys.exit(BUG_EXIT_CODE)


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


@palio.command(cls=Verb, example="palio new config/entries/demo/mine.yaml --team 'Contrada del Drago'")
@click.argument("file", type=ExistingPath)
@competition_option
@click.option(
    "--kind", type=click.Choice(["recipe", "command", "server"]), default="recipe", show_default=True
)
@click.option("--team", prompt="Name of the team", help="Asked for if left out.")
@click.option("--track", help="Default: the competition's first.")
@click.option("--base-model", help="hub:org/name@<commit>, path:… or gguf:…; default: one the rules approve.")
@click.option("--data", multiple=True, help="Source file of training data; default: example data is written.")
@click.option("--licence", default="", help="SPDX id of the source files.")
@click.option("--url", default="", help="Where the public finds them.")
def new(
    file: Path,
    competition: str,
    kind: str,
    team: str,
    track: str | None,
    base_model: str | None,
    data: tuple[str, ...],
    licence: str,
    url: str,
) -> None:
    """Make an entry that works, to start from: its file, example data, a program of its kind."""
    from palio.participant.new import new_entry, suggested_base_model

    rules = competition_of(competition)
    if data and not licence:
        licence = click.prompt("Licence of the data (SPDX id)")
    new_entry(
        rules,
        path=file,
        kind=kind,
        team=team,
        track=track or next(iter(rules.tracks)),
        base_model=base_model or suggested_base_model(rules),
        data=data,
        licence=licence,
        url=url,
    )
    print(f"{file}: made; next: palio try {file}")


@palio.command("try", cls=Verb, example="palio try config/entries/demo/curated.yaml")
@click.argument("file", type=ExistingPath)
@competition_option
@click.option("--panel", type=ExistingPath, help="Reference panel; default: config/panel/…, if there is one.")
@click.option("--out", type=ExistingPath, default=Path("try"), show_default=True)
def try_entry(file: Path, competition: str, panel: Path | None, out: Path) -> None:
    """Rehearse an entry on this machine: every step in small, its place, and what the whole would take."""
    from palio.config import load_entry
    from palio.participant.rehearsal import rehearse
    from palio.participant.summary import summary
    from palio.rules.entry_file import check_file
    from palio.scoring.panel import panel_path

    rules = competition_of(competition)
    checked = check_file(file, rules.checked_against)
    for notice in checked.notices:
        print(f"notice: {notice}", file=sys.stderr)
    checked.require_clean()
    print("check: clean", flush=True)
    entry = load_entry(file)
    if panel is None and (published := panel_path(rules.competition, entry.track)).is_file():
        panel = published
    for line in summary(rehearse(file, rules, out), entry, rules, panel):
        print(line)


@palio.command(cls=Verb, example="palio check config/entries/demo")
@click.argument("files", nargs=-1, required=True, type=ExistingPath)
@competition_option
@click.option("--against", help="JSON slice of the competition, in place of --competition.")
@click.option("--among", help="JSON of the folders of the other entries; default: the file's own.")
@click.option("--entry-dir", type=ExistingPath, help="Write check.json here (one FILE only).")
@click.option("--json", "as_json", is_flag=True, help="Print violations and notices as JSON lines.")
def check(
    files: tuple[Path, ...],
    competition: str,
    against: str | None,
    among: str | None,
    entry_dir: Path | None,
    as_json: bool,
) -> None:
    """Check entry files, or folders of them, against the competition's rules, before GPU time is spent.

    A violation names rule, key, why and fix. A notice is for the organizers and stops nothing.
    """
    from palio.config import CheckedAgainst, EntryFolders, parse
    from palio.rules.entry_file import check_file

    rules = (
        parse(CheckedAgainst, json.loads(against), "--against")
        if against
        else competition_of(competition).checked_against
    )
    others = parse(EntryFolders, json.loads(among), "--among") if among else None
    clean = True
    for file in (
        one for given in files for one in (sorted(given.glob("*.y*ml")) if given.is_dir() else [given])
    ):
        checked = check_file(file, rules, others)
        clean = clean and checked.record is not None
        if as_json:
            for level, found in (("violation", checked.violations), ("notice", checked.notices)):
                for one in found:
                    print(json.dumps({"file": str(file), "level": level, **one.model_dump()}))
        else:
            for one in checked.notices:
                print(f"notice: {file}: {one}", file=sys.stderr)
            for one in checked.violations:
                print(f"error: {file}: {one}", file=sys.stderr)
            if checked.record:
                print(f"{file}: clean")
        if entry_dir is not None:
            with entry_step("check", entry_dir):
                checked.require_clean().write(entry_dir / "check.json")
    raise click.exceptions.Exit(0 if clean else RULE_VIOLATION_EXIT_CODE)


@palio.command(
    "fetch-base-model",
    cls=Verb,
    example='palio fetch-base-model --source \'{"hub": "org/name@<commit>"}\' --approved-as GPT2 --out DIR',
)
@click.option("--source", required=True, help="JSON with one of hub, path, gguf.")
@click.option("--approved-as", required=True, help="Approved family; empty: not approved, and refused.")
@click.option("--offline", is_flag=True, help="Use what is there; download nothing.")
@click.option("--out", type=ExistingPath, required=True, help="Folder for the model and manifest.json.")
def fetch_base_model_verb(source: str, approved_as: str, offline: bool, out: Path) -> None:
    """Bring a base model into a folder of safetensors with a manifest of hashes."""
    from palio.base_model import fetch_base_model
    from palio.config import BaseModelSource, parse

    wanted = parse(BaseModelSource, json.loads(source), "base_model")
    if not approved_as:
        raise RuleViolation(f"base_model: {wanted.address} is not approved; it is not downloaded")
    fetch_base_model(wanted, out, offline=offline)


@palio.command("fetch-data", cls=Verb, example="palio fetch-data --stage open")
@competition_option
@click.option("--stage", type=click.Choice(["open", "closed"]), required=True)
@click.option("--source", type=ExistingPath, help="Folder of data that is there already, as HELM caches it.")
def fetch_data_verb(competition: str, stage: str, source: Path | None) -> None:
    """Bring all data of a stage into its store, on a machine with a network; the rest runs without."""
    from palio.evaluation.helm import stage_runs
    from palio.evaluation.stage import fetch_data

    digests = fetch_data(stage_runs(competition_of(competition), stage), source)
    for name in sorted({"/".join(path.split("/")[:2]) for path in digests}):
        of = [digest for path, digest in digests.items() if path.startswith(f"{name}/")]
        print(f"{stage} {name}: {len(of)} files")


@palio.command(
    "prepare-stage", cls=Verb, example="snakemake --profile local resources/stages/open/stage.json"
)
@click.option("--runs", required=True, help="JSON slice: competition, stage, closed_store, scenarios.")
@click.option("--out", type=ExistingPath, required=True, help="The stage's record.")
def prepare_stage_verb(runs: str, out: Path) -> None:
    """Let HELM make a stage's evaluation instances once, before any entry needs them."""
    from palio.config import StageRuns, parse
    from palio.evaluation.stage import prepare_stage

    record = prepare_stage(parse(StageRuns, json.loads(runs), "--runs"), out)
    for scenario, count in record.scenarios.items():
        print(f"{record.stage} {scenario}: {count} instances")


@palio.command("demo-data", cls=Verb, example="palio demo-data --out resources/demo_sources --seed 7")
@click.option("--out", type=ExistingPath, required=True, help="Folder for the JSONL files.")
@click.option("--seed", type=int, default=0, show_default=True)
def demo_data(out: Path, seed: int) -> None:
    """Generate the demo's training sources: task families with the noise of scraped data."""
    from palio.demo.data import write_demo_sources

    write_demo_sources(out, seed=seed)


@palio.command(cls=Verb, example="palio curate config/entries/demo/curated.yaml --out preview --limit 1000")
@click.argument("entry")
@click.option("--out", type=ExistingPath, help="Folder for a dataset of your own, for a look at it.")
@click.option(
    "--entry-dir", type=ExistingPath, help="Or the entry's folder in a competition, results/<track>/<entry>."
)
@click.option("--base-model", type=ExistingPath, help="Folder of the base model; default: the workflow's.")
@click.option("--limit", type=click.IntRange(min=1), help="Read so many rows of each source.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes.")
@click.option("--competition-id", default="none", show_default=True, help="The competition's id.")
@click.option(
    "--shard", metavar="I-of-N", help="Only work ahead: on this share of the rows, while it can alone."
)
@click.option(
    "--join", type=click.IntRange(min=0), metavar="N", help="Only work ahead: join what shards noted."
)
@click.option(
    "--shards", type=click.IntRange(min=0), default=0, help="How many worked ahead, for the record."
)
def curate(
    entry: str,
    out: Path | None,
    entry_dir: Path | None,
    base_model: Path | None,
    limit: int | None,
    workers: int,
    competition_id: str,
    shard: str | None,
    join: int | None,
    shards: int,
) -> None:
    """Turn an entry's sources into its training dataset, and account for every row.

    ENTRY is an entry file, or the JSON of its dataset section, as the workflow passes it. With --shard or
    --join it is a part of that, for a run without them to find done: see docs/curation.md.
    """
    from palio.config import DatasetRecipe, load_entry, parse
    from palio.curation.curate import curate_ahead, curate_dataset
    from palio.provenance import fingerprint, timed_run

    if (out is None) == (entry_dir is None):
        raise click.UsageError("give either --out or --entry-dir")
    if entry.startswith("{"):
        recipe = parse(DatasetRecipe, json.loads(entry), "dataset")
        if entry_dir is None or base_model is None:
            raise click.UsageError("a dataset section needs --entry-dir and --base-model")
        track, name = track_and_entry(entry_dir)
    else:
        found = load_entry(Path(entry))
        if found.dataset is None:
            raise BadInput(entry, "dataset", None, "the entry has none; there is nothing to curate")
        recipe, track, name = found.dataset, found.track, Path(entry).stem
        if base_model is None and found.base_model:
            base_model = Path("resources/base_models") / found.base_model.id
    model = (base_model or Path()) / "model"
    work = (out or entry_dir or Path()) / "work" / "curate"
    if shard or join is not None:
        try:
            share = shard_of(shard) if shard else None
            curate_ahead(
                recipe, base_model=model, entry=name, work=work, shard=share, join=join or 0, workers=workers
            )
        except PalioError as fault:
            # The run that is to find this done meets the same, and its word is on record.
            print(f"left to the run without --shard and --join: {fault}")
        return
    run: dict[str, Any] = {}
    with ExitStack() as around, progress_bar() as progress:
        if entry_dir:
            around.enter_context(entry_step("curate", entry_dir))
            run = around.enter_context(timed_run(entry_dir / "curate.run.json"))
        manifest = curate_dataset(
            recipe,
            base_model=model,
            competition=competition_id,
            track=track,
            entry=name,
            out=out or entry_dir / "dataset",  # type: ignore[operator]  # one of them is given
            work=work,
            limit=limit,
            workers=workers,
            progress=progress,
        )
        run.update(recipe=fingerprint(entry), shards=shards)
    for source in manifest.sources:
        print(f"{source.name}: {source.rows} rows, {source.quarantined} malformed")
    for number, step in enumerate(manifest.operations, start=1):
        changed = f", {step.changed} rewritten" if step.changed else ""
        print(f"{number} {step.op}: {step.rows_in} → {step.rows_out}{changed}")
    print(f"{manifest.rows} rows")


def shard_of(given: str) -> tuple[int, int]:
    """(2, 8) of 2-of-8."""
    number, _, count = given.partition("-of-")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise click.UsageError(f"--shard {given}: write it as 2-of-8")
    return int(number), int(count)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int | None, int], None]]:
    """A bar for each step on a terminal, nothing in a log. A step that looks twice begins again."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def advance(step: str, total: int | None, rows: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            if bars.tasks[tasks[step]].finished:
                bars.reset(tasks[step])
            bars.advance(tasks[step], rows)

        yield advance


@palio.command(cls=Verb, example="palio inspect results/laptop/curated/dataset --dropped")
@click.argument("dataset", type=ExistingPath)
@click.option("--dropped", is_flag=True, help="The rows that operations dropped, with the reason.")
@click.option("--operation", help="Of the dropped, those of this operation: its name, or number and name.")
@click.option("--source", help="Only rows of this source.")
@click.option("--limit", type=click.IntRange(min=1), help="Stop after so many rows.")
def inspect(
    dataset: Path, dropped: bool, operation: str | None, source: str | None, limit: int | None
) -> None:
    """Page through the rows of a curated dataset, or through the dropped ones."""
    from palio.curation.inspection import lines_of

    found = lines_of(
        dataset, dropped=dropped or operation is not None, operation=operation, source=source, limit=limit
    )
    click.echo_via_pager(f"{line}\n" for line in found)


@palio.command(cls=Verb, example="palio contamination results/laptop/curated/dataset --stage open")
@click.argument("dataset", type=ExistingPath)
@click.option("--stage", type=click.Choice(["open", "closed"]), default="open", show_default=True)
@click.option("--limit", type=int, default=20, show_default=True, help="Offending pairs to show.")
@competition_option
def contamination(dataset: Path, stage: Literal["open", "closed"], limit: int, competition: str) -> None:
    """Evaluation instances that stand in a dataset: counts, and of the open stage the offending rows.

    DATASET is the folder of a curated dataset. Of the closed stage nothing but counts is shown.
    """
    from palio.curation.contamination import contaminated_pairs, contamination
    from palio.evaluation.helm import stage_runs

    instances = stage_runs(competition_of(competition), stage).store / "instances.parquet"
    record = contamination(dataset, {stage: instances}, competition="", track="", entry="")
    for scenario, total in record.instances[stage].items():
        print(f"{scenario}: {record.contaminated[stage][scenario]} of {total} instances")
    if stage == "open":
        for pair in islice(contaminated_pairs(dataset, instances), limit):
            print(f"{pair.scenario} {pair.instance} in {pair.source} {pair.row}: {pair.shown}")


@palio.command(
    "measure-contamination",
    cls=Verb,
    example="snakemake --profile local results/laptop/curated/contamination.json",
)
@competition_id_option
@entry_dir_option
@click.option("--open-store", type=ExistingPath, required=True, help="Store of the open stage.")
@click.option("--closed-store", type=ExistingPath, required=True, help="Store of the closed stage.")
def measure_contamination(competition_id: str, entry_dir: Path, open_store: Path, closed_store: Path) -> None:
    """Count the evaluation instances of both stages that stand in an entry's training data."""
    from palio.curation.contamination import contamination

    track, entry = track_and_entry(entry_dir)
    with entry_step("contamination", entry_dir):
        record = contamination(
            entry_dir / "dataset",
            {
                stage: store / "instances.parquet"
                for stage, store in (("open", open_store), ("closed", closed_store))
            },
            competition=competition_id,
            track=track,
            entry=entry,
        )
        record.write(entry_dir / "contamination.json")


@palio.command(cls=Verb, example="snakemake --profile local results/laptop/curated/adapter.json")
@competition_id_option
@entry_dir_option
@click.option("--recipe", help="JSON of the entry's finetune section.")
@click.option("--program", help="JSON of the entry's command section, instead.")
@isolation_option
@click.option("--network", is_flag=True, help="Let the program reach the network.")
@click.option("--track", "track_limits", required=True, help="JSON of the track's limits.")
@click.option("--base-model", type=ExistingPath, required=True, help="Folder of the base model.")
@click.option("--threads", type=int, help="CPU threads; default: torch's choice.")
@click.option("--telemetry", default="{}", help="JSON of the competition's telemetry section.")
@click.option("--retrain", is_flag=True, help="Replace a finished adapter that was trained otherwise.")
@fresh_start_option
def finetune(
    competition_id: str,
    entry_dir: Path,
    recipe: str | None,
    program: str | None,
    isolation: str,
    network: bool,
    track_limits: str,
    base_model: Path,
    threads: int | None,
    telemetry: str,
    retrain: bool,
    fresh_start: int | None,
) -> None:
    """Fine-tune the base model on the entry's dataset inside the track's budget. Resumes where it stopped."""
    from palio.config import FinetuneRecipe, Isolation, Program, Telemetry, Track, parse
    from palio.operating.attempt import set_aside

    if (recipe is None) == (program is None):
        raise click.UsageError("give either --recipe or --program")
    track, entry = track_and_entry(entry_dir)
    with entry_step("finetune", entry_dir):
        if fresh_start:
            set_aside(entry_dir / "work" / "train", fresh_start)
        from palio.training.step import TrainingStep

        step = TrainingStep(
            competition=competition_id,
            track_id=track,
            entry=entry,
            track=parse(Track, json.loads(track_limits), "track"),
            base_model=base_model,
            dataset=entry_dir / "dataset",
            entry_dir=entry_dir,
            threads=threads,
            telemetry=parse(Telemetry, json.loads(telemetry), "--telemetry"),
            retrain=retrain,
        )
        if program is not None:
            from palio.training.command import finetune_by_command

            handed_in = parse(Program, json.loads(program), "command")
            confinement = parse(Isolation, json.loads(isolation), "isolation")
            finetune_by_command(handed_in, step, confinement, network=network)
        elif recipe is not None:
            from palio.training.finetune import finetune as run

            run(parse(FinetuneRecipe, json.loads(recipe), "finetune"), step)


@palio.command(cls=Verb, example="snakemake --profile local results/laptop/curated/package.json")
@competition_id_option
@entry_dir_option
@click.option("--base-model", type=ExistingPath, required=True, help="Folder of the base model.")
@click.option("--adapter/--no-adapter", default=True, help="Without: package the untuned base model.")
@click.option("--server", help="JSON of the entry's server section: package the team's own server.")
def package(
    competition_id: str, entry_dir: Path, base_model: Path, adapter: bool, server: str | None
) -> None:
    """Merge the adapter into the base model, verify the logits, write a folder that transformers loads."""
    track, entry = track_and_entry(entry_dir)
    with entry_step("package", entry_dir):
        if server is not None:
            from palio.config import ServerProgram, parse
            from palio.packaging.server import package_server

            package_server(
                parse(ServerProgram, json.loads(server), "server"),
                base_model=base_model,
                entry_dir=entry_dir,
                competition=competition_id,
                track_id=track,
                entry=entry,
            )
            return
        from palio.packaging.package import build_package

        build_package(
            base_model=base_model,
            entry_dir=entry_dir,
            adapter=adapter,
            competition=competition_id,
            track_id=track,
            entry=entry,
        )


@palio.command(cls=Verb, example="palio verify results/laptop/curated/package")
@click.argument("folder", type=ExistingPath)
@click.option("--competition", metavar="FILE", help="Its config, for the memory of a package's track.")
@click.option("--base-models", type=ExistingPath, default=Path("resources/base_models"), show_default=True)
@click.option(
    "--load/--no-load", default=True, help="Without loading a package: files, cards and limits only."
)
def verify(folder: Path, competition: str | None, base_models: Path, load: bool) -> None:
    """Check a package again (files, loads without Palio, is what was trained), or score a release again."""
    from palio.errors import Crashed
    from palio.packaging.verify import findings_lines, manifest_of, verify_package
    from palio.records import PackageManifest, read_record
    from palio.release.crate import METADATA

    if (folder / METADATA).is_file():
        _verify_release(folder)
        return
    track = None
    if competition:
        manifest = read_record(PackageManifest, manifest_of(folder))
        track = competition_of(competition).tracks.get(manifest.track)
    findings = verify_package(folder, track=track, base_models=base_models, load=load)
    for line in findings_lines(findings):
        print(line)
    if failed := [one.check for one in findings if one.state == "fail"]:
        raise Crashed(f"{folder}: {len(failed)} of {len(findings)} checks failed: {', '.join(failed)}")


def _verify_release(folder: Path) -> None:
    """Every file against its sha256, every leaderboard against what its records and tables give."""
    from contextlib import chdir

    from palio.records import Leaderboard, read_record
    from palio.release.crate import changed_files
    from palio.scoring.leaderboard import score_track
    from palio.scoring.versions import difference

    with chdir(folder):
        wrong = changed_files(Path())
        for line in wrong:
            print(f"fail     files: {line}")
        competition = competition_of(DEFAULT_CONFIG)
        for track, entries in entries_by_track(competition).items():
            shipped = read_record(Leaderboard, Path(f"results/leaderboard/{track}.json"))
            board = score_track(competition, track, Path("results"), entries, final=shipped.final)
            if board == shipped:
                print(f"pass     {track}: the identical leaderboard, {len(board.entries)} entries")
            else:
                wrong.append(track)
                print(f"fail     {track}: another leaderboard\n{difference(shipped, board)}")
    if wrong:
        raise PalioError(f"{folder} is not the release that was made: {wrong[0]}")


@palio.command(cls=Verb, example="palio publish results/laptop/curated --repo org/name")
@click.argument("entry_dir", type=ExistingPath)
@click.option("--repo", required=True, help="org/name on the Hugging Face hub.")
@click.option("--leaderboard", type=ExistingPath, help="Record whose scores go with it.")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--push", is_flag=True, help="Do it. Without this nothing leaves the machine.")
def publish(entry_dir: Path, repo: str, leaderboard: Path | None, private: bool, push: bool) -> None:
    """Push a package, its cards, scores and container file to the hub; without --push, show what would go."""
    from palio.packaging.publish import assemble, push_folder

    folder = assemble(entry_dir, leaderboard)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        print(f"{path.stat().st_size:>13,}  {path.relative_to(folder)}")
    if push:
        print(push_folder(folder, repo, private=private))
    else:
        print(f"{len(files)} files would be pushed to {repo}; add --push to do it", file=sys.stderr)


@palio.command(cls=Verb, example="palio serve results/laptop/curated/package --port 8080")
@click.argument("package", type=ExistingPath)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--threads", type=int, help="CPU threads; default: torch's choice.")
@click.option("--gpu-memory-gb", type=float, help="Cap on GPU memory.")
@click.option("--cache-gb", type=float, help="Memory for keys and values; default: 2 on a CPU, all of a GPU.")
@click.option(
    "--engine", type=click.Choice(["transformers", "vllm"]), default="transformers", show_default=True
)
def serve(
    package: Path,
    host: str,
    port: int,
    device: str,
    threads: int | None,
    gpu_memory_gb: float | None,
    cache_gb: float | None,
    engine: str,
) -> None:
    """Serve a package behind HELM's HTTP contract: /process, /tokenize, /decode, /health."""
    from palio.serving.app import serve as run

    run(
        package,
        host=host,
        port=port,
        device=device,
        threads=threads,
        gpu_memory_gb=gpu_memory_gb,
        cache_gb=cache_gb,
        engine=engine,
    )


@palio.command(cls=Verb, example="palio probe http://127.0.0.1:8080")
@click.argument("url")
@competition_option
@click.option("--stage", type=click.Choice(["open", "closed"]), default="open", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def probe(url: str, competition: str, stage: str, as_json: bool) -> None:
    """Check that a running server does what HELM asks of it, and how long the stage would take.

    Ends with code 3 if a required check fails: the server would not be evaluated.
    """
    from rich.console import Console

    from palio.errors import RuleViolation
    from palio.evaluation.helm import stage_runs
    from palio.evaluation.probe import probe as run
    from palio.evaluation.probe import probe_table
    from palio.evaluation.stage import planned_requests

    settings = competition_of(competition)
    report = run(
        url,
        planned_requests=planned_requests(stage_runs(settings, stage)),
        time_limit=settings.stage(stage).time_limit,
    )
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        Console().print(probe_table(report))
    if not report.conforms:
        raise click.exceptions.Exit(RuleViolation.exit_code)


@palio.command(cls=Verb, example="snakemake --profile local results/laptop/curated/open.json")
@entry_dir_option
@click.option("--runs", required=True, help="JSON slice of the stage: what to run.")
@click.option("--limits", required=True, help="JSON slice of the stage: time limit and threads.")
@click.option("--track", "track_limits", required=True, help="JSON of the track's limits.")
@click.option("--instances", type=ExistingPath, required=True, help="The stage's record.")
@click.option("--threads", type=int, help="CPU threads of the model server.")
@click.option("--base-model", type=ExistingPath, help="Folder of the base model, for a team's own server.")
@isolation_option
@fresh_start_option
def evaluate(
    entry_dir: Path,
    runs: str,
    limits: str,
    track_limits: str,
    instances: Path,
    threads: int | None,
    base_model: Path | None,
    isolation: str,
    fresh_start: int | None,
) -> None:
    """Serve an entry's package and run HELM on it for one stage, inside the stage's time limit."""
    from palio.config import Isolation, StageLimits, StageRuns, Track, parse
    from palio.evaluation.evaluate import StartServer, work_folder
    from palio.evaluation.evaluate import evaluate as run
    from palio.operating.attempt import set_aside

    stage = parse(StageRuns, json.loads(runs), "--runs")
    track = parse(Track, json.loads(track_limits), "track")
    settings = parse(StageLimits, json.loads(limits), "--limits")

    with entry_step(stage.stage, entry_dir):
        if fresh_start:
            set_aside(work_folder(stage, entry_dir, "key").parent, fresh_start)
        from palio.records import PackageManifest, read_record
        from palio.sandbox.room import Limits
        from palio.sandbox.server import ConfinedServer
        from palio.serving.process import ServerProcess

        handed_in = read_record(PackageManifest, entry_dir / "package.json")

        def start_server(package: Path, log: Path) -> Any:
            if handed_in.kind == "server":
                if base_model is None:
                    raise click.UsageError("a team's own server needs --base-model")
                confinement = parse(Isolation, json.loads(isolation), "isolation")
                return ConfinedServer(
                    package,
                    base_model=base_model / "model",
                    limits=Limits.of(track, confinement, threads),
                    isolation=confinement,
                    log=log,
                    work=entry_dir / "work",
                )
            return ServerProcess(
                package,
                log=log,
                threads=threads,
                gpu_memory_gb=track.gpu_memory_gb,
                engine=settings.engine,
            )

        starter: StartServer = start_server
        run(stage, settings, instances, entry_dir, starter)


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


def entries_by_track(competition: Competition) -> dict[str, dict[str, Entry | None]]:
    """track -> id -> entry; None for a file that is not valid, shown in the first track."""
    from palio.config import entry_files, load_entry
    from palio.errors import BadInput

    entries: dict[str, Entry | None] = {}
    for name, path in entry_files(competition).items():
        try:
            entries[name] = load_entry(path)
        except BadInput:
            entries[name] = None
    first = next(iter(competition.tracks))
    return {
        track: {
            name: entry
            for name, entry in entries.items()
            if (entry.track if entry and entry.track in competition.tracks else first) == track
        }
        for track in competition.tracks
    }


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


if __name__ == "__main__":
    main()
