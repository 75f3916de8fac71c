"""The entries of a night: of every kind, on two tracks, half of them with a defect, all drawn from a seed.

What is wrong with an entry, and how often, follows 2023, where every second submission failed, mostly in its
own program or server: `BROKEN` has the kinds and their weights. The base models are four families with random
weights, made on the spot; the programs are a team's, and run confined.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from tests.slurm import competition
from tests.slurm.competition import TRACKS
from tests.support.folder import DEMO_ENTRIES, WorkingFolder
from tests.support.kinds import DEAD, HTTP, SERVE
from tests.support.programs import HANDS_IN

FAMILIES = ("llama", "qwen2", "gpt2", "phi3")
TEAMS = "resources/teams"
LEAST = 10
"""Five have a role, and others have to be there besides."""
QUESTIONS = 3
"""Of each stage."""
BUDGET = "2m"
"""Of a training: one that is too slow waits so long for its end."""
SCRIPTED_SERVER = HTTP.replace(
    'return {"text": "one two", "tokens": [], "logprob": 0.0, "request_time": 0.0}',
    "import hashlib\n"
    '    drawn = hashlib.sha256((NAME + body["prompt"]).encode()).digest()[0] % 2\n'
    '    text = ("Odd", "Even")[drawn]\n'
    '    tokens = [{"text": text, "logprob": -0.5}]\n'
    '    return {"text": text, "tokens": tokens, "logprob": -0.5, "request_time": 0.0}',
)
"""A server without a model: of two answers one, by a hash of its name and the question."""


@dataclass
class Planned:
    """One entry, and how it has to end."""

    name: str
    track: str
    kind: str
    content: dict[str, Any] | str
    """What its file says."""
    files: dict[str, str] = field(default_factory=dict)
    """What its team hands in: text by path."""
    step: str = ""
    """Of a broken one: where it ends, in which state, and a part of the reason."""
    state: str = ""
    reason: str = ""
    role: str = ""
    """What the organizer or the team does with it in the night."""

    @property
    def broken(self) -> bool:
        return bool(self.step)

    @property
    def file(self) -> str:
        return f"{DEMO_ENTRIES}/{self.name}.yaml"

    def write(self, folder: WorkingFolder) -> None:
        text = self.content if isinstance(self.content, str) else yaml.safe_dump(self.content)
        for path, content in (self.files | {self.file: text}).items():
            (folder.path / path).parent.mkdir(parents=True, exist_ok=True)
            (folder.path / path).write_text(content)


class Maker:
    """Makes entries that start from the base models in `models`."""

    def __init__(self, models: dict[str, Path], draw: random.Random) -> None:
        self.models, self.draw = models, draw

    def of(self, name: str, shown: str, **sections: Any) -> Planned:
        track = sections.pop("track", self.draw.choice(TRACKS))
        base = {"path": str(self.models[sections.pop("family", self.draw.choice(FAMILIES))])}
        content = {"team": f"Contrada {name}", "track": track, "base_model": base} | sections
        return Planned(name, track, shown, content)

    # --- that finish

    def untuned(self, name: str) -> Planned:
        return self.of(name, "base model as it is")

    def recipe(self, name: str, **recipe: Any) -> Planned:
        family = self.draw.choice(FAMILIES)
        settings = {"max_steps": 3, "batch_size": 4, "learning_rate": round(self.draw.uniform(1e-3, 5e-2), 5)}
        entry = self.of(
            name, f"recipe, {family}", family=family, dataset=self.rows(name), finetune=settings | recipe
        )
        entry.files = self.rows_file(name)
        return entry

    def command(self, name: str, code: str = "") -> Planned:
        value = round(self.draw.uniform(0.01, 0.5), 3)
        code = code or f"{HANDS_IN}\nhand_in({value})"
        run = {"files": f"{TEAMS}/{name}", "run": ["python", "main.py"]}
        # the program's adapter is for q_proj, which two of the families have
        entry = self.of(name, "command", family="llama", kind="command", dataset=self.rows(name), command=run)
        entry.files = self.rows_file(name) | {f"{TEAMS}/{name}/main.py": code}
        return entry

    def server(self, name: str, code: str = "") -> Planned:
        code = code or f"NAME = {name!r}\n{SCRIPTED_SERVER}{SERVE}"
        run = {"files": f"{TEAMS}/{name}", "run": ["python", "main.py"]}
        entry = self.of(name, "server", kind="server", server=run)
        entry.files = {f"{TEAMS}/{name}/main.py": code}
        return entry

    def rows(self, name: str, **source: Any) -> dict[str, Any]:
        known = {"path": f"{TEAMS}/{name}.jsonl", "licence": "CC0-1.0", "url": "https://example.org"}
        return {"sources": [known | source], "operations": [{"op": "drop_exact_duplicates"}]}

    def rows_file(self, name: str) -> dict[str, str]:
        numbers = [self.draw.randrange(100, 10_000) for _ in range(24)]
        rows = [
            {"prompt": f"Number: {number}\nParity:", "completion": f" {'Odd' if number % 2 else 'Even'}"}
            for number in numbers
        ]
        return {f"{TEAMS}/{name}.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}

    # --- that do not

    def changed(self, name: str, **sections: Any) -> Planned:
        entry = self.recipe(name)
        assert isinstance(entry.content, dict)
        entry.content |= sections
        return entry

    def of_data(self, name: str, **source: Any) -> Planned:
        return self.changed(name, dataset=self.rows(name, **source))

    def without_a_row(self, name: str) -> Planned:
        everything = {"operations": [{"op": "drop_matches", "patterns": ["."]}]}
        return self.changed(name, dataset=self.rows(name) | everything)

    def without_its_rows(self, name: str) -> Planned:
        entry = self.recipe(name)
        entry.files = {}
        return entry

    def in_text(self, name: str, text: str) -> Planned:
        entry = self.untuned(name)
        entry.track, entry.content = TRACKS[0], text  # a file that cannot be read is shown on the first track
        return entry


RESULT = "import json, os\nfrom pathlib import Path\nresult = Path(os.environ['PALIO_OUTPUT'])\n"
HUGE_RANK = HANDS_IN + "hand_in()\n" + RESULT + (
    "config = json.loads((result / 'adapter_config.json').read_text()) | {'r': 10**9}\n"
    "(result / 'adapter_config.json').write_text(json.dumps(config))"
)  # fmt: skip
HUGE_VALUES = HANDS_IN + "hand_in(1e30)\n"
WRONG_SHAPES = HANDS_IN.replace('config["hidden_size"]', '2 * config["hidden_size"]') + "hand_in()\n"


@dataclass(frozen=True)
class Broken:
    """A kind of defect, and how an entry that has it ends."""

    kind: str
    weight: int
    make: Callable[[Maker, str], Planned]
    step: str
    state: str
    reason: str


def _rule(kind: str, weight: int, make: Callable[[Maker, str], Planned], reason: str) -> Broken:
    return Broken(kind, weight, make, "check", "rule_violation", reason)


def _dead(number: int, weight: int) -> Broken:
    dead = DEAD[number]
    make: Callable[[Maker, str], Planned] = lambda maker, name: maker.server(name, dead.program)  # noqa: E731
    return Broken(f"server that {dead.name}", weight, make, "open", "crashed", dead.told[0])


def _program(kind: str, weight: int, code: str, state: str, reason: str, step: str = "finetune") -> Broken:
    return Broken(kind, weight, lambda maker, name: maker.command(name, code), step, state, reason)


BROKEN = (
    _rule("YAML that is none", 3, lambda m, n: m.in_text(n, "team: [a\ntrack: b"), "YAML"),
    _rule("a key that there is not", 2, lambda m, n: m.changed(n, fine_tune={}), "fine_tune"),
    Broken(
        "a missing source",
        4,
        lambda m, n: m.without_its_rows(n),
        "curate",
        "rule_violation",
        "no such file",
    ),
    _rule("a licence that is refused", 2, lambda m, n: m.of_data(n, licence="proprietary"), "licence"),
    _rule("data of GPT-4", 1, lambda m, n: m.of_data(n, generator="gpt-4"), "gpt-4"),
    _rule(
        "a model that is not approved",
        2,
        lambda m, n: m.changed(n, base_model={"gguf": "acme_secret/model.gguf"}),
        "not approved",
    ),
    Broken("no row left", 1, lambda m, n: m.without_a_row(n), "curate", "rule_violation", "row"),
    Broken(
        "training that diverges",
        1,
        lambda m, n: m.recipe(n, learning_rate=1e30, max_steps=20),
        "finetune",
        "crashed",
        "diverged",
    ),
    _program("program that fails", 4, 'print("no CUDA device")\nraise SystemExit(3)', "crashed", "no CUDA"),
    _program("program that lacks a module", 3, "import loguru_of_2023", "crashed", "loguru_of_2023"),
    _program("program that hands in nothing", 2, "print('done')", "rule_violation", "left neither"),
    _program("program over its memory", 2, "x = [bytearray(1 << 28) for _ in range(64)]", "crashed", "emory"),
    _program("program that is too slow", 2, "import time\ntime.sleep(3600)", "time_limit", "the budget of"),
    _program("adapter of another shape", 1, WRONG_SHAPES, "rule_violation", "it must fit"),
    _program("adapter too large to merge", 2, HUGE_VALUES, "crashed", "adapter is huge", step="package"),
    _program("adapter of a rank too large", 1, HUGE_RANK, "rule_violation", "r is 1000000000"),
    *(_dead(number, weight) for number, weight in ((0, 5), (1, 4), (2, 1), (3, 2), (4, 3))),
)
POISONED = Broken(
    "server that dies of one request",
    1,
    lambda maker, name: maker.server(name, DEAD[5].program.replace("5000", "1200")),
    "open",
    "crashed",
    "the model server died with exit code 9",
)
"""The request is the probe's prompt that fills the window; no question is as long."""


def model_folders(folder: Path) -> dict[str, Path]:
    return {family: folder / f"tiny-{family}" for family in FAMILIES}


def make_models(made: dict[str, Path]) -> None:
    """Make a tiny model of random weights of each family, with a tokenizer of bytes and some words."""
    sys.path.append(str(Path(__file__).parents[1]))
    import families

    for family, folder in made.items():
        families.tiny_model(family, max_position_embeddings=2048, n_positions=2048).save_pretrained(folder)
        families.tokenizer().save_pretrained(folder)
        for path in folder.iterdir():
            path.chmod(0o644)  # a team's program may run as another user


def plan(count: int, seed: int, at: dict[str, Path]) -> list[Planned]:
    """The entries of a night: half of them finish. At least ten, for the five that have a role."""
    draw = random.Random(seed)
    maker = Maker(at, draw)
    honest = [maker.recipe, maker.server, maker.recipe, maker.command, maker.untuned, maker.server]
    entries = [
        _with_role(maker.recipe("edited"), "edited"),
        _with_role(maker.untuned("late"), "late"),
        _with_role(maker.recipe("withdrawn"), "withdrawn"),
        _with_role(maker.server("mended"), "mended"),
        _with_role(_broken(POISONED, maker, "poisoned"), "poisoned"),
    ]
    entries += [honest[number % len(honest)](f"h{number:03}") for number in range(max(1, count // 2 - 4))]
    kinds: list[Broken] = []
    while len(kinds) < count - len(entries):  # each kind once before any comes again, then by weight
        left = list(BROKEN) if not kinds else draw.choices(BROKEN, [kind.weight for kind in BROKEN], k=count)
        draw.shuffle(left)
        kinds += left
    numbers = range(count - len(entries))
    return entries + [_broken(kinds[number], maker, f"b{number:03}") for number in numbers]


def _with_role(entry: Planned, role: str) -> Planned:
    entry.role = role
    return entry


def _broken(kind: Broken, maker: Maker, name: str) -> Planned:
    entry = kind.make(maker, name)
    entry.kind, entry.step, entry.state, entry.reason = kind.kind, kind.step, kind.state, kind.reason
    return entry


def with_stand_ins(planned: list[Planned]) -> list[Planned]:
    """The same where steps only write records: whatever is wrong with an entry breaks a rule at the step
    where it would end."""
    return [
        replace(entry, state="rule_violation", reason="is not allowed") if entry.broken else entry
        for entry in planned
    ]


def stand_in_variables(planned: list[Planned]) -> dict[str, str]:
    """What tests/support/quick.py is told: who breaks a rule, and that every step takes a moment."""
    faulty = [f"{entry.name} {entry.step}" for entry in planned if entry.broken]
    slow = [
        f"{entry.name} {step} 3"
        for entry in planned
        for step in ("curate", "finetune", "package", "open", "closed")
    ]
    return {"PALIO_FAULTY": ",".join(faulty), "PALIO_SLOW": ",".join(slow)}


def create(path: Path, at: dict[str, Path]) -> WorkingFolder:
    """The competition without entries: two tracks, two stages of one scenario, a closed store, a site."""
    folder = competition.create(path, next(iter(at.values())))

    def settings(config: dict[str, Any]) -> None:
        del config["probe"]
        config["site"] = "public"
        config["isolation"] = {"processes": 64, "scratch_gb": 0.05, "output_gb": 0.5}
        for track in config["tracks"].values():
            track["training_budget"] = BUDGET
        for stage in config["stages"].values():
            (scenario,) = stage["scenarios"].values()
            scenario["max_eval_instances"] = QUESTIONS

    def approved(rules: dict[str, Any]) -> None:
        rules["base_models"][-1]["sources"] = [f"path:{model}" for model in at.values()]

    folder.edit_yaml("config/config.yaml", settings)
    folder.edit_yaml("config/rulesets/demo.yaml", approved)
    return folder
