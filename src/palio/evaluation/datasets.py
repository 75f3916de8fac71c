"""The datasets of a stage: what its runs read, where that comes from, and its copy in the stage's store.

`DATASETS` is the one list of what HELM's and our scenarios download; docs/evaluation.md shows it.
"""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from palio.evaluation import scenarios
from palio.evaluation.data import copy_of, data_files, origin
from palio.text import markdown_table

PERTURBATIONS = "perturbations"
PLAIN_AUGMENTATIONS = ("robustness",)
"""`data_augmentation=` that needs no file."""
OWN = {
    "palio_ethics": scenarios.EthicsScenario,
    "palio_corr2cause": scenarios.Corr2CauseScenario,
    "palio_math": scenarios.MathScenario,
    "palio_sam_sum": scenarios.SamSumScenario,
    "palio_cnn_dailymail": scenarios.CnnDailyMailScenario,
    "palio_table": scenarios.TableScenario,
}
"""Our run specs and their scenarios."""


@dataclass(frozen=True)
class Dataset:
    """A public dataset."""

    folder: str
    """Its folder in HELM's caches."""
    address: str
    """Hub id and commit, or URL."""
    megabytes: float
    """Size of the download, about."""
    licence: str
    remark: str = ""
    """Whether it is gated, pinned, or withdrawn."""
    by_helm: bool = False
    """HELM downloads it; the others are given as data=, --source or $PALIO_HELM_DATA."""


NO_COMMIT = "no commit is known to us: pin one in data="
DATASETS = (
    Dataset(
        "mmlu", "https://people.eecs.berkeley.edu/~hendrycks/data.tar", 166, "MIT", "not versioned", True
    ),
    Dataset(
        "big_bench",
        "https://github.com/google/BIG-bench, branch main",
        60,
        "Apache-2.0",
        "HELM pins no commit",
        True,
    ),
    Dataset(
        "truthful_qa",
        "https://github.com/sylinrl/TruthfulQA at d71c110897f5d31c5d7f309e7bc316c152f6f031",
        1,
        "Apache-2.0",
        "",
        True,
    ),
    Dataset(
        "gsm",
        "https://github.com/openai/grade-school-math, branch master",
        5,
        "MIT",
        "HELM pins no commit",
        True,
    ),
    Dataset(
        "bbq",
        "https://github.com/nyu-mll/BBQ, branch main",
        90,
        "CC-BY-4.0",
        "HELM pins no commit",
        True,
    ),
    Dataset(
        "cnn_dailymail",
        "abisee/cnn_dailymail@96df5e686bee6baa90b8bee7c28b81fa3fa6223d/3.0.0",
        840,
        "none on the articles; Apache-2.0 on their collection",
        "not gated",
    ),
    Dataset(
        "sam_sum",
        "knkarthick/samsum",
        11,
        "CC BY-NC-ND 4.0: not for commercial use",
        f"not gated; {NO_COMMIT}",
    ),
    Dataset("corr2cause", "causal-nlp/corr2cause", 200, "MIT", f"not gated; {NO_COMMIT}"),
    Dataset("ethics", "hendrycks/ethics", 36, "MIT", f"not gated; {NO_COMMIT}"),
    Dataset(
        "MATH",
        "hendrycks/competition_math@71b758ecc688b2822d07ffa7f8393299f1dc7cac",
        20,
        "MIT",
        "withdrawn from the hub after a claim: bring MATH.tar",
    ),
    Dataset(
        PERTURBATIONS,
        "HELM's two word lists, for data_augmentation=fairness and canonical",
        1,
        "Apache-2.0",
        "",
        True,
    ),
)


def datasets_table() -> str:
    """Return `DATASETS` as the Markdown table of docs/evaluation.md."""
    rows = [
        (of.folder, of.address, "HELM" if of.by_helm else "you", f"{of.megabytes:g}", of.licence, of.remark)
        for of in DATASETS
    ]
    heading = ("dataset", "where it is", "brought by", "MB, about", "licence", "remark")
    return markdown_table(heading, rows)


@dataclass(frozen=True)
class Need:
    """A dataset that a stage's runs read."""

    name: str
    """Its folder below HELM's scenarios/, or `PERTURBATIONS`."""
    data: str = ""
    """The run entries' `data=`."""
    readers: list[scenarios.PalioScenario] = field(default_factory=list, compare=False)
    """Our scenarios, which know which files they read; of HELM's own, all of the folder is read."""

    def cache(self, data: Path) -> Path:
        return data / self.name if self.name == PERTURBATIONS else data / "scenarios" / self.name

    def copy(self, data: Path) -> Path:
        """Where the store `data` keeps it."""
        return copy_of(self.cache(data), self.data)

    def there(self, data: Path) -> bool:
        """Whether the store has any of it."""
        return any(path.is_file() for path in self.copy(data).rglob("*") if path.suffix != ".lock")


def needs(descriptions: Iterable[str]) -> list[Need]:
    """Return the datasets that runs read, by their run entries, each once."""
    found: dict[tuple[str, str], Need] = {}
    for description in descriptions:
        name, args = parse_description(description)
        if own := OWN.get(name):
            scenario = own(**{key: args[key] for key in args if key in _settings_of(own)})
            need = found.setdefault((scenario.name, scenario.data), Need(scenario.name, scenario.data))
            need.readers.append(scenario)
        else:
            folder = _helm_folder(name)
            found.setdefault((folder, ""), Need(folder))
        if args.get("data_augmentation", "robustness") not in PLAIN_AUGMENTATIONS:
            found.setdefault((PERTURBATIONS, ""), Need(PERTURBATIONS))
    return list(found.values())


def parse_description(description: str) -> tuple[str, dict[str, str]]:
    """Split `name:key=value,…` as HELM does."""
    name, _, rest = description.partition(":")
    pairs = (part.partition("=") for part in rest.split(",") if part)
    return name, {key: value for key, _, value in pairs}


def _settings_of(scenario: type) -> set[str]:
    return {name for base in scenario.__mro__ for name in inspect.signature(base.__init__).parameters}  # type: ignore[misc]


def _helm_folder(name: str) -> str:
    """Return the cache folder of HELM's or a plug-in's scenario; the run spec's name if it does not say.

    The class is read from the source of the run spec's function: calling it may download data.
    """
    from helm.benchmark.run_spec import get_run_spec_function
    from helm.common.object_spec import get_class_by_name

    for plug_in in metadata.entry_points(group="helm"):
        importlib.import_module(plug_in.module)
    function = get_run_spec_function(name)
    found = re.search(r"""class_name=["']([\w.]+)["']""", inspect.getsource(function)) if function else None
    if found is None:
        return name
    try:
        return str(get_class_by_name(found[1]).name)
    except (ImportError, AttributeError, ValueError):  # HELM's dry run will say what is wrong
        return name


def bring(need: Need, data: Path, source: Path | None) -> Path | None:
    """Copy what is read of a dataset to the store `data`, and nothing else.

    `source`: a folder of downloads in the layout of HELM's caches; a need with its own `data=` does not look
    there.

    Returns:
        Where it was taken from; None: it is nowhere here, so HELM must have it or download it.

    Raises:
        DataError: the files are not as they must be.
    """
    given = source / need.name if source and not need.data else None
    data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data, prefix=".download-") as downloads:
        start = given if given and given.is_dir() else origin(need.name, need.data, Path(downloads))
        if start is None or not start.exists() or start.resolve() == need.copy(data).resolve():
            return None
        base = start if start.is_dir() else start.parent
        copy = need.copy(data)
        if need.readers:
            read = {path for reader in need.readers for of in reader.files(start).values() for path in of}
            for path in data_files(copy):  # of an earlier copy
                path.unlink()
        else:
            read = {path for path in start.rglob("*") if path.is_file() and path.suffix != ".lock"}
        for path in sorted(read):
            to = copy / path.relative_to(base)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.unlink(missing_ok=True)  # it may be a link: never write through one
            shutil.copyfile(path, to)
        return start


def listing(found: Iterable[Need], data: Path, source: Path | None) -> list[tuple[str, str, str, str, str]]:
    """Return what `palio fetch-data` would do: dataset, action, size, licence, remark of each."""
    known = {dataset.folder: dataset for dataset in DATASETS}
    rows = []
    for need in found:
        dataset = known.get(need.name)
        if need.there(data):
            action = "is in the store"
        elif source and not need.data and (source / need.name).is_dir():
            action = "copy from --source"
        elif need.data:
            action = f"copy or download data={need.data}"
        elif (here := origin(need.name, "")) is not None and here.exists():
            action = "copy from $PALIO_HELM_DATA"
        elif dataset is None or dataset.by_helm:
            action = f"HELM downloads {dataset.address if dataset else 'it'}"
        else:
            action = f"MISSING: give --source, $PALIO_HELM_DATA or data={dataset.address}"
        about = ("unknown", "unknown", "")
        if dataset:
            about = (f"{dataset.megabytes:g} MB", dataset.licence, dataset.remark)
        rows.append((need.name, action, *about))
    return rows
