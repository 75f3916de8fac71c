"""Publish a package: the model folder, its cards, its scores and a container that serves it.

<entry>/work/publish/       uploaded to the hub
    …                       the package, file by file
    palio/package.json      its manifest, for `palio verify`
    palio/SCORES.md         with scores.json, if a leaderboard is given
    palio/container/        Containerfile, requirements.lock, the server's code
"""

from __future__ import annotations

import shutil
from pathlib import Path

from palio.errors import BadInput, Crashed
from palio.files import link_or_copy
from palio.layout import EntryFolder, PublishedPackage
from palio.packaging.container import write_container
from palio.packaging.verify import changed_files
from palio.provenance import write_json, write_text
from palio.records import Leaderboard, PackageManifest, ScoredEntry, read_record
from palio.text import markdown_table


def assemble(folder: EntryFolder, leaderboard: Path | None = None) -> Path:
    """Make the folder to push, and return its path.

    Raises:
        Crashed: the package differs from its manifest.
        BadInput: there is no package, or the leaderboard lacks the entry.
    """
    manifest = read_record(PackageManifest, folder.package_manifest)
    package, published = folder.package, PublishedPackage(folder.publication)
    out = published.path
    if wrong := changed_files(package, manifest):
        raise Crashed(f"{package}: {wrong[0]}; package the entry again")
    shutil.rmtree(out, ignore_errors=True)
    for name in manifest.files:
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(package / name, target)
    manifest.write(published.manifest)
    if manifest.kind == "model" and not manifest.code:  # a server entry has its own; code needs the sandbox
        write_container(published.container)
    if leaderboard is not None:
        board = read_record(Leaderboard, leaderboard)
        scored = next((entry for entry in board.entries if entry.entry == manifest.entry), None)
        if scored is None or board.track != manifest.track:
            raise BadInput(
                leaderboard, "entries", why=f"has no score of {manifest.entry}", fix="give its track's"
            )
        write_json(published.scores, scored.model_dump(mode="json"))
        write_text(published.score_card, scores_card(board, scored))
    return out


def scores_card(board: Leaderboard, scored: ScoredEntry) -> str:
    """Return SCORES.md: the entry's rank and the values of its columns, never a stage's text."""
    lines = [
        f"# Scores of {scored.entry}",
        "",
        f"Rank {scored.rank} of {len(board.entries)} in track {board.track} of {board.competition}"
        f"{'' if board.final else ' (provisional)'}: final score {scored.final_score:.4f}, convention "
        f"{board.convention} {board.convention_version}. A score is a win rate against the other entries of "
        "this leaderboard, not a property of the model alone; the values below are.",
        "",
    ]
    rows = []
    for column, cell in zip(board.columns, scored.cells, strict=True):
        value = f"{cell.value:.4f}" if cell.value is not None else cell.state.value.replace("_", " ")
        rate = f"{cell.win_rate:.3f}" if cell.win_rate is not None else ""
        rows.append([column.stage, column.scenario, column.metric, value, cell.n, rate])
    lines.append(markdown_table(("stage", "scenario", "metric", "value", "instances", "win rate"), rows))
    return "\n".join([*lines, "", *(f"- {note}" for note in scored.notes)]).rstrip() + "\n"


def push_folder(folder: Path, repo: str, *, private: bool) -> str:
    """Upload the assembled folder as one commit and return its URL; the hub client finds the credentials."""
    import huggingface_hub
    from huggingface_hub import errors

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Package by Palio"))
    except (errors.HfHubHTTPError, OSError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise Crashed(f"{repo}: the hub refused the upload or could not be reached ({cause})") from None
