"""Verbs for a team: make an entry, try every part of it, look at what came out, hand it on."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

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
from palio.cpu import CpuDtype
from palio.errors import BadInput, RuleViolation
from palio.layout import (
    CONFIG,
    REHEARSALS,
    STAGES,
    BaseModelFolder,
    DatasetFolder,
    EntryFolder,
    HelmSuite,
    Resources,
    Stage,
)

if TYPE_CHECKING:
    from palio.training.inspection import Inspection


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
@click.option("--dockerfile", metavar="DIR", help="With --kind server: the folder of your Dockerfile.")
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
    dockerfile: str | None,
) -> None:
    """Make an entry that works, to start from: its file, example data, a program of its kind."""
    from palio.config import load_rules
    from palio.participant.new import new_entry, suggested_base_model, takes_example_data

    given = competition_of(competition)
    rules = load_rules(Path(given.rules))
    if kind != "server" and not data and not takes_example_data(rules):
        data = (click.prompt("Source file of training data"),)
    if data and not licence:
        licence = click.prompt("Licence of the data", type=click.Choice(rules.data_licences))
    if data and not url and rules.require_url:
        url = click.prompt("Address where the public finds the data")
    source = base_model or suggested_base_model(given)
    options = "" if competition == str(CONFIG) else f" --competition {competition}"
    new_entry(
        given,
        path=file,
        kind=kind,
        team=team,
        track=track or next(iter(given.tracks)),
        base_model=_with_commit(source) if rules.require_revision else source,
        data=data,
        licence=licence,
        url=url,
        dockerfile=dockerfile,
        options=options,
    )
    print(f"{file}: made; next: palio try {file}{options}")


def _with_commit(base_model: str) -> str:
    """Return a model of the hub with its commit, from the hub or else from whoever asks."""
    from palio.base_model import commit_on_hub
    from palio.config import REVISION_PATTERN

    kind, _, address = base_model.partition(":")
    repo, _, revision = address.partition("@")
    if kind != "hub" or REVISION_PATTERN.fullmatch(revision):
        return base_model
    try:
        commit = commit_on_hub(address)
    except BadInput as fault:
        print(fault, file=sys.stderr)
        commit = click.prompt(f"Commit of {repo} (40 characters)", value_proc=_commit)
    return f"{kind}:{repo}@{commit}"


def _commit(text: str) -> str:
    from palio.config import REVISION_PATTERN

    if not REVISION_PATTERN.fullmatch(text):
        raise click.UsageError("write the 40 characters of a commit id")
    return text


@palio.command("try", cls=Verb, example="palio try config/entries/demo/curated.yaml")
@click.argument("file", type=ExistingPath)
@competition_option
@click.option("--panel", type=ExistingPath, help="Reference panel; default: config/panel/…, if there is one.")
@click.option("--out", type=ExistingPath, default=REHEARSALS, show_default=True)
@click.option(
    "--dry-run", is_flag=True, help="Run nothing: the rules, and the base model without its weights."
)
def try_entry(file: Path, competition: str, panel: Path | None, out: Path, dry_run: bool) -> None:
    """Rehearse an entry on this machine at reduced scale: every step, its place, and an estimate in full."""
    from palio.config import load_entry, load_rules
    from palio.eligibility.entry_file import check_file
    from palio.layout import panel as panel_file
    from palio.participant.preview import preview
    from palio.participant.rehearsal import rehearse
    from palio.participant.summary import summary
    from palio.settings import CheckedAgainst

    rules = competition_of(competition)
    checked = check_file(file, CheckedAgainst.of(rules), by_hand=True)
    for notice in checked.notices:
        print(f"notice: {notice}", file=sys.stderr)
    checked.require_clean()
    print("check: clean", flush=True)
    entry = load_entry(file)
    for line in preview(entry, rules.tracks[entry.track], load_rules(Path(rules.rules))):
        print(line, flush=True)
    if dry_run:
        return
    if panel is None and (published := panel_file(rules.competition, entry.track)).is_file():
        panel = published
    for line in summary(rehearse(file, rules, out), entry, rules, panel):
        print(line)


@palio.command(cls=Verb, example="palio check config/entries/demo")
@click.argument("files", nargs=-1, required=True, type=ExistingPath)
@competition_option
@click.option("--json", "as_json", is_flag=True, help="Print violations and notices as JSON lines.")
def check(files: tuple[Path, ...], competition: str, as_json: bool) -> None:
    """Check entry files, or folders of them, against the competition's rules, before GPU time is spent.

    A violation names rule, key, why and fix. A notice is for the organizers and stops nothing.
    """
    from palio.eligibility.entry_file import check_file
    from palio.operating.doctor import engine_findings
    from palio.settings import CheckedAgainst

    planned_competition = competition_of(competition)
    for finding in engine_findings(planned_competition):
        if not finding.ok:
            print(f"notice: {finding}", file=sys.stderr)
    against = CheckedAgainst.of(planned_competition)
    clean = True
    for file in (path for given in files for path in _entry_files(given)):
        checked = check_file(file, against, by_hand=True)
        clean = clean and checked.record is not None
        if as_json:
            for level, listed in (("violation", checked.violations), ("notice", checked.notices)):
                for violation in listed:
                    print(json.dumps({"file": str(file), "level": level, **violation.model_dump()}))
            continue
        for line in checked.lines():
            print(line, file=sys.stdout if line.endswith(": clean") else sys.stderr)
    raise click.exceptions.Exit(0 if clean else RuleViolation.exit_code)


def _entry_files(given: Path) -> list[Path]:
    if not given.is_dir():
        return [given]
    if found := sorted(given.glob("*.y*ml")):
        return found
    raise BadInput(given, why="has no entry files", fix="name a file, or a folder of <id>.yaml files")


@palio.command("demo-data", cls=Verb, example="palio demo-data --out resources/demo_sources --seed 7")
@click.option("--out", type=ExistingPath, required=True, help="Folder for the JSONL files.")
@click.option("--seed", type=int, default=0, show_default=True)
def demo_data(out: Path, seed: int) -> None:
    """Generate the demo's training sources: task families with the noise of scraped data."""
    from palio.demo.data import write_demo_sources

    write_demo_sources(out, seed=seed)


@palio.command(cls=Verb, example="palio curate config/entries/demo/curated.yaml --out preview --limit 1000")
@click.argument("file", type=ExistingPath)
@click.option("--out", type=ExistingPath, required=True, help="Folder for the dataset.")
@click.option("--base-model", type=ExistingPath, help="Folder of the base model; default: the workflow's.")
@click.option("--limit", type=click.IntRange(min=1), help="Read so many rows of each source.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes.")
def curate(file: Path, out: Path, base_model: Path | None, limit: int | None, workers: int) -> None:
    """Curate an entry's sources into a dataset of your own, for a look at it; accounts for every row."""
    from palio.config import load_entry
    from palio.curation.curate import curate_dataset
    from palio.curation.inspection import account
    from palio.curation.progress import progress_bar

    entry = load_entry(file)
    if entry.dataset is None:
        raise BadInput(file, "dataset", why="the entry has none", fix="there is nothing to curate")
    model = base_model or Resources().base_model(entry.base_model.id).path
    with progress_bar() as progress:
        manifest = curate_dataset(
            entry.dataset,
            base_model=BaseModelFolder(model).model,
            competition="none",
            track=entry.track,
            entry=file.stem,
            out=out,
            work=DatasetFolder(out).work,
            limit=limit,
            workers=workers,
            progress=progress,
        )
    for line in account(manifest):
        print(line)


@palio.command(cls=Verb, example="palio inspect results/laptop/curated/dataset --dropped")
@click.argument("data", type=ExistingPath)
@click.option(
    "--raw", is_flag=True, help="DATA is a source: its first records, and what format they look like."
)
@click.option(
    "--tokens", is_flag=True, help="Rows as the trainer sees them: tokens, what is learned, what is cut."
)
@click.option("--dropped", is_flag=True, help="The rows that operations dropped, with the reason.")
@click.option("--operation", help="Of the dropped, those of this operation: its name, or number and name.")
@click.option("--source", help="Only rows of this source.")
@click.option("--limit", type=click.IntRange(min=1), help="Stop after so many rows; default with --raw: 3.")
@click.option("--entry", type=ExistingPath, help="With --tokens: the entry file; default: the dataset's own.")
@click.option("--base-model", type=ExistingPath, help="With --tokens: its folder; default: the workflow's.")
@click.option(
    "--html", type=ExistingPath, help="With --tokens: write a page instead, of 100 rows by default."
)
@competition_option
def inspect(
    data: Path,
    raw: bool,
    tokens: bool,
    dropped: bool,
    operation: str | None,
    source: str | None,
    limit: int | None,
    entry: Path | None,
    base_model: Path | None,
    html: Path | None,
    competition: str,
) -> None:
    """Page through a curated dataset, the rows that it dropped, its tokens, or a source as it is.

    DATA is the folder of a curated dataset. With --raw it is a source: a file, a saved folder, or
    hub:org/name@revision.
    """
    if raw + tokens + (dropped or operation is not None) > 1:
        raise click.UsageError("--raw, --tokens and --dropped exclude each other")
    if raw:
        from palio.curation.raw import raw_lines

        lines = raw_lines(str(data), limit or 3)
    elif tokens or html:
        from palio.provenance import write_text
        from palio.training.inspection import html_page, text_lines

        found = _tokens_of(data, competition, entry, base_model)
        if html:
            write_text(html, html_page(found, f"Tokens of {data}", source, limit or 100))
            print(f"{html}: written")
            return
        lines = text_lines(found, source, limit)
    else:
        from palio.curation.inspection import lines_of

        dropped = dropped or operation is not None
        lines = lines_of(data, dropped=dropped, operation=operation, source=source, limit=limit)
    click.echo_via_pager(f"{line}\n" for line in lines)


def _tokens_of(dataset: Path, competition: str, file: Path | None, base_model: Path | None) -> Inspection:
    """Tokenize a dataset as the trainer would for the entry in `file`, or else for the dataset's own."""
    from palio.config import load_entry
    from palio.records import DatasetManifest, read_record
    from palio.training.inspection import inspection

    folder = DatasetFolder(dataset)
    if file is None:
        if not folder.manifest.is_file():
            raise BadInput(folder.manifest, why="no such file", fix="give the folder of a curated dataset")
        from palio.entries import entry_files

        entry_id = read_record(DatasetManifest, folder.manifest).entry
        files, _ = entry_files(competition_of(competition).entries, competition)
        if entry_id not in files:
            raise BadInput(dataset, "entry", entry_id, why="no entry has this id", fix="give --entry FILE")
        file = files[entry_id]
    entry = load_entry(file)
    if entry.finetune is None:
        raise BadInput(file, "finetune", why="the entry has none", fix="Palio's trainer does not train it")
    model = BaseModelFolder(base_model or Resources().base_model(entry.base_model.id).path).model
    return inspection(folder.rows, model, entry.finetune)


@palio.command(cls=Verb, example="palio contamination results/laptop/curated/dataset --stage open")
@click.argument("dataset", type=ExistingPath)
@click.option("--stage", type=click.Choice(STAGES), default="open", show_default=True)
@click.option("--limit", type=int, default=20, show_default=True, help="Offending pairs to show.")
@competition_option
def contamination(dataset: Path, stage: Stage, limit: int, competition: str) -> None:
    """Evaluation instances that stand in a dataset: counts, and of the open stage the offending rows.

    DATASET is the folder of a curated dataset. Of the closed stage nothing but counts is shown.
    """
    from palio.curation.contamination import contaminated_pairs, contamination
    from palio.evaluation.helm import stage_runs

    instances = stage_runs(competition_of(competition), stage).store.instances
    record = contamination(dataset, {stage: instances}, competition="", track="", entry="")
    for scenario, total in record.instances[stage].items():
        print(f"{scenario}: {record.contaminated[stage][scenario]} of {total} instances")
    if stage == "open":
        for pair in islice(contaminated_pairs(dataset, instances), limit):
            print(f"{pair.scenario} {pair.instance} in {pair.source} {pair.row}: {pair.shown}")


@palio.command(cls=Verb, example="palio answers curated --wrong --compare raw")
@click.argument("entry", required=False)
@competition_option
@results_option
@click.option("--stage", type=click.Choice(STAGES), default="open", show_default=True)
@click.option("--scenario", help="Only its questions.")
@click.option("--wrong", is_flag=True, help="Only answers without full marks, the worst first.")
@click.option("--compare", metavar="OTHER", help="Another entry: the questions that decide between them.")
@click.option(
    "--helm", type=ExistingPath, metavar="DIR", help="Write all entries' open runs for HELM's own viewer."
)
def answers(
    entry: str | None,
    competition: str,
    results: Path,
    stage: Stage,
    scenario: str | None,
    wrong: bool,
    compare: str | None,
    helm: Path | None,
) -> None:
    """Page through an entry's answers: prompt, answer, references, metrics, and why one is cut or missing.

    The closed stage's are shown to the organizer alone: they are read from the closed store.
    """
    from palio.answers.listing import entry_lines
    from palio.answers.viewer import write_helm_suite

    settings = competition_of(competition)
    if helm:
        for command in write_helm_suite(settings, results_of(settings, results), HelmSuite(helm)):
            print(command)
        return
    if entry is None:
        raise click.UsageError("give an entry, or --helm DIR")
    lines = entry_lines(settings, results_of(settings, results), entry, stage, scenario, wrong, compare)
    click.echo_via_pager(f"{line}\n" for line in lines)


@palio.command(cls=Verb, example="palio probe http://127.0.0.1:8080")
@click.argument("url")
@competition_option
@click.option("--stage", type=click.Choice(STAGES), default="open", show_default=True)
@click.option(
    "--base-model", type=ExistingPath, help="Model folder, to hold the server's token counts against."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def probe(url: str, competition: str, stage: Stage, base_model: Path | None, as_json: bool) -> None:
    """Check that a running server does what HELM asks of it, and how long the stage would take.

    Ends with code 3 if a required check fails: the server would not be evaluated.
    """
    from rich.console import Console

    from palio.errors import RuleViolation
    from palio.evaluation.helm import stage_runs
    from palio.evaluation.probe import probe as run
    from palio.evaluation.probe import probe_table, require_server
    from palio.evaluation.stage import asked_in
    from palio.evaluation.window import Window
    from palio.settings import StageLimits

    require_server(url)
    settings = competition_of(competition)
    window = Window.of_model(base_model) if base_model else Window.estimate("give --base-model")
    limits = StageLimits.of(settings.stage(stage))
    report = run(url, asked_in(stage_runs(settings, stage), limits), window, settings.probe)
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        Console().print(probe_table(report))
    if not report.conforms:
        raise click.exceptions.Exit(RuleViolation.exit_code)


@palio.command(cls=Verb, example="palio serve results/laptop/curated/package --port 8080")
@click.argument("package", type=ExistingPath)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--threads", type=int, help="CPU threads; default: torch's choice.")
@click.option("--gpu-memory-gb", type=float, help="Cap on GPU memory.")
@click.option("--cache-gb", type=float, help="Memory for keys and values; default: 2 on a CPU, all of a GPU.")
@click.option("--max-context", type=int, help="Tokens of prompt and completion; default: the model's limit.")
@click.option(
    "--engine", type=click.Choice(["transformers", "vllm"]), default="transformers", show_default=True
)
@click.option(
    "--cpu-dtype",
    type=click.Choice(get_args(CpuDtype)),
    default="float32",
    show_default=True,
    help="On a CPU; bfloat16 needs AVX512-BF16 or AMX.",
)
def serve(package: Path, **settings: Any) -> None:
    """Serve a package behind HELM's HTTP contract: /process, /tokenize, /decode, /health."""
    from palio.serving.app import serve as run

    config = package / "config.json"
    if config.is_file() and "auto_map" in config.read_text(encoding="utf-8"):
        why = "brings code of its model, which runs in the sandbox of an evaluation only"
        raise BadInput(package, why=why, fix="evaluate it with the workflow, or `palio verify` it")
    run(package, **settings)


@palio.command(cls=Verb, example="palio verify results/laptop/curated/package")
@click.argument("folder", type=ExistingPath)
@click.option("--competition", metavar="FILE", help="Its config, for the memory of a package's track.")
@click.option("--base-models", type=ExistingPath, default=Resources().base_models, show_default=True)
@click.option(
    "--load/--no-load", default=True, help="Without loading a package: files, cards and limits only."
)
def verify(folder: Path, competition: str | None, base_models: Path, load: bool) -> None:
    """Check a package again (files, loads without Palio, is what was trained), or score a release again."""
    from palio.errors import Crashed
    from palio.packaging.verify import findings_lines, manifest_of, verify_package
    from palio.records import PackageManifest, read_record
    from palio.release.crate import METADATA
    from palio.release.verify import verify_release

    if (folder / METADATA).is_file():
        for line in verify_release(folder):
            print(line)
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


@palio.command(cls=Verb, example="palio publish results/laptop/curated --repo org/name")
@click.argument("entry_dir", type=ExistingPath)
@click.option("--repo", required=True, help="org/name on the Hugging Face hub.")
@click.option("--leaderboard", type=ExistingPath, help="Record whose scores go with it.")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--push", is_flag=True, help="Do it. Without this nothing leaves the machine.")
def publish(entry_dir: Path, repo: str, leaderboard: Path | None, private: bool, push: bool) -> None:
    """Push a package, its cards, scores and container file to the hub; without --push, show what would go."""
    from palio.packaging.publish import assemble, push_folder

    folder = assemble(EntryFolder.at(entry_dir), leaderboard)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        print(f"{path.stat().st_size:>13,}  {path.relative_to(folder)}")
    if push:
        print(push_folder(folder, repo, private=private))
    else:
        print(f"{len(files)} files would be pushed to {repo}; add --push to do it", file=sys.stderr)
