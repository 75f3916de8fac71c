"""The documentation says everything the models accept."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from palio.config import load_competition
from palio.config.reading import extended
from palio.config.reference import FILES, README, json_schema, with_tables
from palio.layout import Results, schema_file
from palio.release.gather import gather
from palio.report.build import build_report
from tests.support.folder import WorkingFolder
from tests.support.proven import PAGES
from tests.support.proven import with_tables as with_proven_tables
from tests.support.report import competition_content, score_competition, write_competition

ROOT = Path(__file__).parents[2]


class Yaml12(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 and editors do and PyYAML does not."""


Yaml12.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"\d+(\.\d+)?e[+-]?\d+"), list("0123456789")
)


@pytest.mark.parametrize("kind", FILES)
def test_the_schemas_in_the_repository_are_those_of_the_models(kind: str) -> None:
    """Make them anew with `python -m palio.config.reference`."""
    assert (ROOT / schema_file(kind)).read_text() == json_schema(kind)


def test_the_tables_of_the_configs_readme_are_those_of_the_models() -> None:
    """Make them anew with `python -m palio.config.reference`."""
    readme = (ROOT / README).read_text()
    assert readme == with_tables(readme)


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_of_what_runs_again_are_those_of_the_tests(page: str) -> None:
    """Make them anew with `python -m tests.support.proven`."""
    text = (ROOT / page).read_text()
    assert text == with_proven_tables(text)
    assert text.count("<!-- proven by") == 1


@pytest.mark.parametrize("kind", FILES)
def test_every_section_has_a_table_and_every_key_a_description(kind: str) -> None:
    schema = json.loads(json_schema(kind))
    sections = {FILES[kind].__name__: schema, **schema["$defs"]}
    tables = re.findall(r"<!-- fields of (\w+) -->", (ROOT / README).read_text())
    assert sections.keys() - {"Stages", "Program"} <= set(tables)  # two stages; a server's table has both
    for name, section in sections.items():
        for key, field in section["properties"].items():
            assert field.get("description"), f"{name}.{key}"


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        *(("competition", path) for path in sorted(ROOT.glob("config/*.yaml"))),
        *(("entry", path) for path in sorted(ROOT.glob("config/entries/**/*.yaml"))),
        *(("ruleset", path) for path in sorted(ROOT.glob("config/rules/*.yaml"))),
    ],
    ids=lambda value: getattr(value, "stem", value),
)
def test_every_file_in_the_repository_is_valid_by_its_schema(kind: str, file: Path) -> None:
    content = extended(yaml.load(file.read_text(), Loader=Yaml12))  # noqa: S506 (a SafeLoader)
    jsonschema.validate(content, json.loads(json_schema(kind)))


@pytest.mark.parametrize("name", ["operation_setting_unknown", "threshold_low", "format_unknown"])
def test_a_schema_refuses_what_the_check_refuses(name: str) -> None:
    content = yaml.load((ROOT / f"tests/entries/bad/{name}.yaml").read_text(), Loader=Yaml12)  # noqa: S506
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, json.loads(json_schema("entry")))


def test_the_command_prints_the_schema() -> None:
    command = [sys.executable, "-m", "palio.cli", "schema", "entry"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == json_schema("entry")


# --- links -----------------------------------------------------------------------------------------------

MARKDOWN = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/*.md")])


def outside_fences(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The ids that GitHub, and the site, give the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", outside_fences(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_to_a_heading_in_it(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)#?([^)\s]*)\)", outside_fences(page)):
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def test_every_page_has_its_place_on_the_site() -> None:
    class Any(yaml.SafeLoader):
        """Reads what is there for MkDocs alone as nothing."""

    Any.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=Any)["nav"]  # noqa: S506 (a SafeLoader)
    placed = re.findall(r"'([^']+\.md)'", str(nav))
    assert len(placed) == len(set(placed))
    outside = {"index.md", "CONTRIBUTING.md", "CHANGELOG.md", "config/README.md", "profiles/README.md"}
    assert set(placed) == {path.name for path in ROOT.glob("docs/*.md")} | outside


# --- commands --------------------------------------------------------------------------------------------


def commands_on(page: Path, language: str = r"\w*") -> list[str]:
    """The lines of a page's code blocks, without comments."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


def test_every_command_of_palio_in_the_documentation_exists_with_its_options() -> None:
    from palio.cli import palio

    seen = set()
    for page in MARKDOWN:
        for line in commands_on(page):
            for words in re.findall(r"(?:^|&& )palio ([a-z-]+[^&|#]*)", line):
                verb, *arguments = re.split(r"\s+", words.strip())
                command = palio.commands.get(verb)
                assert command is not None, f"{page.name}: {line}"
                known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
                given = {word.partition("=")[0] for word in arguments if word.startswith("--")}
                assert given <= known, f"{page.name}: {line}"
                seen.add(verb)
    assert len(seen) > 20


SHELL = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```", re.M | re.S
)
PROSE = [page for page in MARKDOWN if page.parent == ROOT / "docs" or page.name == "README.md"]
FIRST_AFTERNOON = ROOT / "docs/run_a_competition.md"


def run_blocks(page: Path) -> list[str]:
    """A page's shell code that no comment excepts, block by block, without lines with a <placeholder>."""
    blocks = [found for found in SHELL.finditer(page.read_text()) if found["language"] == "sh"]
    return [
        re.sub(r"^.*<[a-z ].*\n", "", found["code"], flags=re.M) for found in blocks if not found["reason"]
    ]


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_every_block_of_code_says_what_it_is(page: Path) -> None:
    """Commands are `sh`; they are run below, or a comment above them says why not."""
    found = list(SHELL.finditer(page.read_text()))
    assert len(found) == page.read_text().count("\n```") / 2, (
        "a fence is not closed, or not at the start of a line"
    )
    for block in found:
        assert block["language"], f"```sh, or ```text for what is no command: {block['code'][:80]}"
        assert block["language"] not in ("bash", "shell", "console"), "sh"
        assert not block["reason"] or block["language"] == "sh", block["reason"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which the competition of config/config.yaml is finished and released."""
    folder = WorkingFolder.create(tmp_path_factory.mktemp("docs") / "clone").path
    write_competition(folder)
    rules, store = "config/rulesets/demo.yaml", str(folder.parent / "closed")
    content = competition_content(folder, rules=rules, closed_store=store, entries=["entries"])
    (folder / "config/config.yaml").write_text(yaml.safe_dump(content))
    (folder / "x.conf").write_text('entries: [{description: "simple_classification"}]')
    with contextlib.chdir(folder):
        given = load_competition(Path("config/config.yaml"))
        score_competition(folder, given)
        build_report(given, results=Results(), leaderboards=Results().leaderboards, out=Results().report)
        gather(
            given,
            results=Results(store=given.store),
            leaderboards=Results().leaderboards,
            report=Results().report,
            out=Path("release/demo"),
        )
    return folder


@pytest.mark.parametrize(
    "page",
    [page for page in PROSE if page != FIRST_AFTERNOON and run_blocks(page)],
    ids=lambda page: page.name,
)
def test_the_commands_of_a_page_work(
    page: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    clone = tmp_path / "clone"
    shutil.copytree(finished, clone, symlinks=True)
    for block in run_blocks(page):
        done = subprocess.run(["bash", "-ec", block], cwd=clone, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"


def test_the_commands_of_the_first_afternoon_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = WorkingFolder.create(tmp_path / "clone")
    page = FIRST_AFTERNOON
    (folder.path / "config/mine.yaml").write_text("\n".join(commands_on(page, "yaml")) + "\n")
    lines = [line for block in run_blocks(page) for line in block.splitlines()]
    assert len(lines) == 6
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for line in lines:
        done = subprocess.run(line, shell=True, cwd=folder.path, capture_output=True, text=True, check=False)  # noqa: S602
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert all(f"entry={name}" in done.stdout + done.stderr for name in ("first", "second")), (
        "the plan has both"
    )


def test_the_public_ci_calls_targets_that_exist() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    called = [
        match[1]
        for job in jobs.values()
        for step in job["steps"]
        if (match := re.fullmatch(r"make (\w+)", step.get("run", "")))
    ]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert called == ["check", "test", "docs"]
    assert set(called) <= set(targets)


def test_every_verb_shows_an_example() -> None:
    from palio.cli import palio

    for name, command in palio.commands.items():
        if command.hidden:
            continue
        assert command.epilog is not None, name
        assert "Example" in command.epilog, name
