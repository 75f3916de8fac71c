"""Twenty hostile entries beside two honest ones, through the whole workflow: each hostile one ends with its
own reason, and the honest ones have the results that they have alone. HELM and the sandbox are real; the
model is tiny."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.curation import write_jsonl
from tests.support.folder import DEMO_ENTRIES, WorkingFolder
from tests.support.programs import HANDS_IN
from tests.support.training import tiny_base_model

pytestmark = pytest.mark.slow  # tests/attacks and tests/unit try each of the twenty alone
HONEST = ("curated", "untuned")
TEAMS = "resources/teams"
ROWS = [{"prompt": f"Is {number} even?", "completion": " yes"} for number in range(40)]
RESULT = "import json, os\nfrom pathlib import Path\nresult = Path(os.environ['PALIO_OUTPUT'])\n"


@dataclass
class Hostile:
    """Makes one entry, and what its reason says."""

    folder: Path
    base: str

    def entry(self, name: str, **sections: Any) -> None:
        content = {"team": name, "track": "laptop", "base_model": {"path": self.base}} | sections
        self.text(name, yaml.safe_dump(content))

    def text(self, name: str, text: str) -> None:
        (self.folder / DEMO_ENTRIES / f"{name}.yaml").write_text(text)

    def data(self, name: str, source: dict[str, Any], *operations: dict[str, Any]) -> None:
        source = {"licence": "CC0-1.0", "url": "https://example.org", **source}
        training = {"learning_rate": 1e-3, "max_steps": 2, "batch_size": 2}
        self.entry(name, dataset={"sources": [source], "operations": list(operations)}, finetune=training)

    def rows(self, name: str, completion: str = " yes") -> str:
        path = f"{TEAMS}/{name}.jsonl"
        write_jsonl(self.folder / path, [row | {"completion": completion} for row in ROWS])
        return path

    def command(self, name: str, code: str) -> None:
        files = self.folder / TEAMS / name
        files.mkdir(parents=True)
        (files / "main.py").write_text(code)
        source = {"path": self.rows(name), "licence": "CC0-1.0", "url": "https://example.org"}
        command = {"files": f"{TEAMS}/{name}", "run": ["python", "main.py"]}
        self.entry(name, kind="command", dataset={"sources": [source]}, command=command)


def hostile(make: Hostile) -> dict[str, str]:
    """Make twenty entries. Returns what the standings say of each."""
    teams = make.folder / TEAMS
    teams.mkdir(parents=True)
    reasons: dict[str, str] = {}

    def add(name: str, reason: str, build: Callable[[str], None]) -> None:
        build(name)
        reasons[name] = reason

    for name, text, reason in (
        ("h01", "[" * 100_000, "nested more than"),
        ("h02", "team: " + "9" * 5000, "not what YAML takes it for"),
        ("h03", "team: 2023-99-99", "not what YAML takes it for"),
        ("h04", "team: !!python/object/apply:os.system ['true']", "is not YAML"),
        ("h05", "a: &a [*a]", "recursive"),
    ):
        add(name, reason, lambda name, text=text: make.text(name, text))  # type: ignore[misc]
    add("h06", "invisible character", lambda name: make.text(name, 'team: "\\e[2J"'))

    slow = {"op": "drop_matches", "patterns": ["(.*.*)*$x"]}
    add("h07", "takes too much", lambda name: make.data(name, {"path": make.rows(name, "a" * 4000)}, slow))
    template = {
        "prompt": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "completion": "x",
    }
    add(
        "h08", "takes too much", lambda name: make.data(name, {"path": make.rows(name), "template": template})
    )

    def bomb(name: str) -> None:
        with gzip.open(teams / "bomb.jsonl.gz", "wb", compresslevel=9) as stream:
            for _ in range(400):
                stream.write(b" " * (1 << 20))
        make.data(name, {"path": f"{TEAMS}/bomb.jsonl.gz"})

    add("h09", "unfolds to more than", bomb)

    def pipe(name: str) -> None:
        os.mkfifo(teams / "pipe.jsonl")
        make.data(name, {"path": f"{TEAMS}/pipe.jsonl"})

    add("h10", "neither a file nor a folder", pipe)

    def link(name: str) -> None:
        (teams / "link.jsonl").symlink_to("/etc/passwd")
        make.data(name, {"path": f"{TEAMS}/link.jsonl"})

    add("h11", "symbolic link", link)
    add("h12", "does not lie in", lambda name: make.data(name, {"path": "/etc/passwd.jsonl"}))
    add("h13", "misread", lambda name: make.data(name, {"path": "resources/teams/{entry}.jsonl"}))
    add("h14", "no such file", lambda name: make.data(name, {"path": f"{TEAMS}/nothing.jsonl"}))

    steal = RESULT + "os.rmdir(result)\nos.symlink('/output/../../../../curated/adapter', result)"
    add("h15", "symbolic link", lambda name: make.command(name, steal))
    huge = HANDS_IN + "hand_in()\n" + RESULT + (
        "config = json.loads((result / 'adapter_config.json').read_text()) | {'r': 10**9}\n"
        "(result / 'adapter_config.json').write_text(json.dumps(config))"
    )  # fmt: skip
    add("h16", "adapter_config.json: r is 1000000000", lambda name: make.command(name, huge))
    layers = RESULT + (
        "import shutil\nshutil.copytree(os.environ['PALIO_BASE_MODEL'], result, dirs_exist_ok=True)\n"
        "config = json.loads((result / 'config.json').read_text()) | {'num_hidden_layers': 10**6}\n"
        "(result / 'config.json').write_text(json.dumps(config))"
    )
    add("h17", "num_hidden_layers is 1000000", lambda name: make.command(name, layers))
    add("h18", "MemoryError", lambda name: make.command(name, "x = [bytearray(1 << 28) for _ in range(64)]"))
    fork = "import os, time\nfor _ in range(5000):\n    os.fork() or time.sleep(30)"
    add("h19", "Resource temporarily unavailable", lambda name: make.command(name, fork))

    def server(name: str) -> None:
        (teams / name).mkdir()
        (teams / name / "main.py").write_text("raise SystemExit(3)")
        run = {"files": f"{TEAMS}/{name}", "run": ["python", "main.py"]}
        make.entry(name, kind="server", server=run)

    add("h20", "ended with code 3 before it answered", server)
    return reasons


def competition(tmp: Path, base: str) -> WorkingFolder:
    """The demo with a tiny model, its two honest entries and three instances a scenario."""
    folder = WorkingFolder.create(tmp)

    def shrink(config: dict[str, Any]) -> None:
        config["tracks"]["laptop"] |= {"ram_gb": 3, "training_budget": "60s"}
        config["isolation"] = {"processes": 64, "scratch_gb": 0.05, "output_gb": 0.5}
        for stage in config["stages"].values():
            name, scenario = next(iter(stage["scenarios"].items()))
            stage["scenarios"] = {name: scenario | {"max_eval_instances": 3}}

    def approve(rules: dict[str, Any]) -> None:
        rules["base_models"][0]["sources"].append(f"path:{base}")

    folder.edit_yaml("config/config.yaml", shrink)
    folder.edit_yaml("config/rulesets/demo.yaml", approve)
    for name in ("raw", "open_only"):
        (folder.path / DEMO_ENTRIES / f"{name}.yaml").unlink()
    for name in HONEST:
        folder.edit_entry(name, lambda entry: entry.update(base_model={"path": base}))
    folder.edit_entry("curated", lambda entry: entry["finetune"].update(max_steps=2, batch_size=2))
    return folder


@dataclass
class Finished:
    beside: WorkingFolder
    alone: WorkingFolder
    reasons: dict[str, str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Iterator[Finished]:
    tmp = tmp_path_factory.mktemp("hostile")
    base = str(tiny_base_model(tmp / "base", base_model) / "model")
    beside = competition(tmp / "beside", base)
    reasons = hostile(Hostile(beside.path, base))
    assert len(reasons) == 20
    done = beside.snakemake(timeout=1800)
    assert done.returncode != 0  # the final leaderboard needs the hostile ones withdrawn
    alone = competition(tmp / "alone", base)
    done = alone.snakemake(timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    yield Finished(beside, alone, reasons)


def standings(folder: WorkingFolder) -> Any:
    done = folder.run("palio", "standings")
    assert done.returncode == 0, done.stderr
    assert all(char.isprintable() or char in "\n\t" for char in done.stdout + done.stderr)
    return json.loads((folder.path / "results/standings/laptop.json").read_text())


TABLES = ("metrics_sha256", "instances_table_sha256")
"""Of the open stage they hold log-probabilities, whose last digits depend on the requests beside."""


def test_the_honest_have_the_results_that_they_have_alone(finished: Finished) -> None:
    folders = (finished.beside, finished.alone)
    for name in HONEST:
        for stage in ("open", "closed"):
            file = f"results/laptop/{name}/{stage}.json"
            beside, alone = (json.loads((folder.path / file).read_text()) for folder in folders)
            assert beside["state"] == "finished"
            assert {key for key in beside if beside[key] != alone[key]} <= set(TABLES)
    beside, alone = (standings(folder)["entries"] for folder in folders)
    assert beside == alone  # every value, win rate and rank
    assert [row["entry"] for row in sorted(beside, key=lambda row: row["entry"])] == list(HONEST)


def test_each_hostile_entry_has_its_own_reason(finished: Finished) -> None:
    told = {row["entry"]: row for row in standings(finished.beside)["did_not_finish"]}
    assert set(told) == set(finished.reasons)
    wrong = {
        name: told[name]["reason"]
        for name, reason in finished.reasons.items()
        if reason not in told[name]["reason"] or "bug in Palio" in told[name]["reason"]
    }
    assert wrong == {}
