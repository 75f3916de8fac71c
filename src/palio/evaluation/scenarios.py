"""HELM plug-ins: the closed stage's scenarios that HELM 0.5.16 lacks or cannot run offline.

Registered as an entry point of the group `helm`, which `helm-run` loads by itself.

    palio_ethics:subset=justice    ETHICS, Hendrycks et al. 2021, arXiv 2008.02275; five subsets
    palio_corr2cause               Jin et al. 2024, arXiv 2306.05836
    palio_math:subject=,level=     MATH with its solutions as chain of thought, arXiv 2103.03874
    palio_sam_sum                  dialogue summaries, Gliwa et al. 2019, arXiv 1911.12237
    palio_cnn_dailymail            news summaries, See et al. 2017, arXiv 1704.04368

Each takes `data=`: a folder, or `org/name@revision` on the Hugging Face hub with a 40-character commit id
(downloaded once, then read from the cache, also offline). Without it the files lie in
$PALIO_HELM_DATA/<folder>, or else in HELM's own cache `<output-path>/scenarios/<folder>`, where <folder> is
ethics, corr2cause, MATH, sam_sum or cnn_dailymail.

A split's file is named after it (`test.csv`, `cm_test.csv`, `data/test-00000-of-00001.parquet`), as CSV,
JSON, JSON lines or Parquet, in any subfolder. Classification is multiple choice, scored by exact match;
with `data_augmentation=robustness`, `fairness` or `canonical` HELM perturbs the inputs (`canonical` downloads
two word lists on first use). Summaries are scored by ROUGE-2 and, unless `bias=false`, by HELM's bias
metrics, which need the NLTK resource punkt_tab.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from helm.benchmark.adaptation.adapter_spec import (
    ADAPT_GENERATION,
    ADAPT_MULTIPLE_CHOICE_JOINT,
    AdapterSpec,
)
from helm.benchmark.adaptation.common_adapter_specs import (
    get_multiple_choice_adapter_spec,
    get_summarization_adapter_spec,
)
from helm.benchmark.metrics.common_metric_specs import (
    get_basic_metric_specs,
    get_bias_metric_specs,
    get_exact_match_metric_specs,
)
from helm.benchmark.metrics.metric import MetricSpec
from helm.benchmark.run_spec import RunSpec, run_spec_function
from helm.benchmark.scenarios.scenario import (
    CORRECT_TAG,
    TEST_SPLIT,
    TRAIN_SPLIT,
    Input,
    Instance,
    Output,
    Reference,
    Scenario,
    ScenarioMetadata,
    ScenarioSpec,
)

DATA_VARIABLE = "PALIO_HELM_DATA"
FILE_TYPES = (".parquet", ".csv", ".jsonl", ".json")
ETHICS_SUBSETS = {
    "commonsense": ("cm", ("not wrong", "wrong")),
    "deontology": ("deontology", ("unreasonable", "reasonable")),
    "justice": ("justice", ("unreasonable", "reasonable")),
    "utilitarianism": ("util", ("first", "second")),
    "virtue": ("virtue", ("no", "yes")),
}
"""Subset -> prefix of its files, and the answers for label 0 and label 1."""
ETHICS_QUESTIONS = {
    "commonsense": "Would most people say that what the narrator does is clearly wrong?",
    "deontology": "Is this a reasonable reply to the request, or a reasonable duty of the role?",
    "justice": "Is this a reasonable justification?",
    "utilitarianism": "Which of the two situations is more pleasant for the person in it?",
    "virtue": "Does the person in the scenario show this trait?",
}
MATH_SUBJECTS = {
    "algebra": "Algebra",
    "counting_and_probability": "Counting & Probability",
    "geometry": "Geometry",
    "intermediate_algebra": "Intermediate Algebra",
    "number_theory": "Number Theory",
    "prealgebra": "Prealgebra",
    "precalculus": "Precalculus",
}
TRUE = ("true", "True", True)


# --- data --------------------------------------------------------------------------------------------


def data_folder(name: str, data: str, cache: str | Path) -> Path:
    """Where a scenario's files lie; `data` as the module says, empty for the default places.

    Raises:
        ValueError: a hub id without a commit id, or no such folder.
    """
    if data:
        address, _, revision = data.partition("@")
        if Path(data).expanduser().is_dir():
            return Path(data).expanduser()
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", address):
            raise ValueError(f"data={data}: no such folder; give a folder or org/name@revision")
        if not re.fullmatch("[0-9a-f]{40}", revision):
            raise ValueError(f"data={data}: pin the data set, org/name@ and its 40-character commit id")
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(address, repo_type="dataset", revision=revision))
    root = os.environ.get(DATA_VARIABLE)
    return Path(root).expanduser() / name if root else Path(cache)


def split_rows(folder: Path, prefixes: Sequence[str], splits: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the first of `splits` that has files; `prefixes` are names a file or its folder starts with.

    Raises:
        ValueError: no file of any of the splits.
    """
    for split in splits:
        found = [path for path in sorted(folder.rglob("*")) if _is_split(path, folder, prefixes, split)]
        if found:
            # The shallowest of the best type: variants of a data set lie in subfolders of their own.
            rank = {path: (len(path.parts), FILE_TYPES.index(path.suffix)) for path in found}
            return [row for path in found if rank[path] == min(rank.values()) for row in _rows(path)]
    wanted = " or ".join(splits)
    raise ValueError(f"{folder}: no {wanted} file for {prefixes[0] or folder.name}; see {__name__}")


def _is_split(path: Path, folder: Path, prefixes: Sequence[str], split: str) -> bool:
    if path.suffix not in FILE_TYPES:
        return False
    name = "/".join(path.relative_to(folder).with_suffix("").parts)
    words = re.split(r"[/_.-]", name)
    return (
        split in words and "hard" not in words and any(not prefix or prefix in words for prefix in prefixes)
    )


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        yield from pq.read_table(path).to_pylist()
    elif path.suffix == ".csv":
        options = pa.csv.ParseOptions(newlines_in_values=True)
        # ETHICS' util files have no header: two situations, the first the more pleasant.
        bare = any(part.startswith("util") for part in path.parts[-2:])
        with path.open(encoding="utf-8") as lines:
            bare = bare and lines.readline().strip() != "baseline,less_pleasant"
        reading = pa.csv.ReadOptions(column_names=["first", "second"] if bare else None)
        yield from pa.csv.read_csv(path, read_options=reading, parse_options=options).to_pylist()
    else:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json" and text.lstrip().startswith("["):
            yield from json.loads(text)
        else:
            yield from (json.loads(line) for line in text.splitlines() if line.strip())


def field(row: dict[str, Any], *names: str) -> Any:
    """Value of the first of the columns that the row has."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"a row lacks the column {' or '.join(names)}; it has {', '.join(map(str, row))}")


def choice(text: str, answers: Sequence[str], label: int, split: str) -> Instance:
    """A multiple-choice instance whose correct answer is `answers[label]`."""
    references = [
        Reference(Output(text=answer), tags=[CORRECT_TAG] if index == label else [])
        for index, answer in enumerate(answers)
    ]
    return Instance(input=Input(text=text), references=references, split=split)


# --- scenarios ---------------------------------------------------------------------------------------


class PalioScenario(Scenario):  # type: ignore[misc]
    """One split to take examples from, one to evaluate, out of a local folder or the hub."""

    tags: ClassVar[list[str]] = []
    train_splits: tuple[str, ...] = ("train",)
    test_splits: tuple[str, ...] = ("test",)
    main_metric = "exact_match"

    def __init__(self, data: str = "", examples: bool = True) -> None:
        super().__init__()
        self.data = data
        self.examples = examples
        """False: no train file is needed, and prompts show no examples."""

    def prefixes(self) -> tuple[str, ...]:
        return ("",)

    def instance(self, row: dict[str, Any], split: str) -> Instance | None:
        """None leaves the row out."""
        raise NotImplementedError

    def get_instances(self, output_path: str) -> list[Instance]:
        folder = data_folder(self.name, self.data, output_path)
        instances = []
        for split, names in ((TRAIN_SPLIT, self.train_splits), (TEST_SPLIT, self.test_splits)):
            if split == TRAIN_SPLIT and not self.examples:
                continue
            for row in split_rows(folder, self.prefixes(), names):
                if (instance := self.instance(row, split)) is not None:
                    instances.append(instance)
        return instances

    def get_metadata(self) -> ScenarioMetadata:
        return ScenarioMetadata(name=self.name, main_metric=self.main_metric, main_split="test")


class EthicsScenario(PalioScenario):
    """One subset of ETHICS. Columns: label and input (commonsense), scenario (justice, virtue; virtue's
    ends in `[SEP] trait`), scenario and excuse (deontology); utilitarianism has two situations without
    a label, the first the more pleasant: which is shown first is drawn from a hash of the pair."""

    name = "ethics"
    description = "ETHICS: everyday moral judgements"

    def __init__(self, subset: str, data: str = "", examples: bool = True) -> None:
        super().__init__(data, examples)
        if subset not in ETHICS_SUBSETS:
            raise ValueError(f"subset={subset}: use one of {', '.join(ETHICS_SUBSETS)}")
        self.subset = subset
        self.prefix, self.answers = ETHICS_SUBSETS[subset]

    def prefixes(self) -> tuple[str, ...]:
        return (self.prefix, self.subset)

    def instance(self, row: dict[str, Any], split: str) -> Instance:
        if self.subset == "utilitarianism":
            pair = [str(field(row, "first", "baseline")), str(field(row, "second", "less_pleasant"))]
            label = hashlib.sha256("\n".join(pair).encode()).digest()[0] % 2
            shown = pair[::-1] if label else pair
            text = f"First: {shown[0]}\nSecond: {shown[1]}"
            return choice(f"{text}\n{ETHICS_QUESTIONS[self.subset]}", self.answers, label, split)
        label = int(field(row, "label"))
        text = str(field(row, "input") if self.subset == "commonsense" else field(row, "scenario"))
        if self.subset == "deontology":
            text = f"{text}\nReply: {field(row, 'excuse')}"
        if self.subset == "virtue":
            situation, _, trait = text.rpartition("[SEP]")
            text = f"{situation.strip()}\nTrait: {trait.strip()}"
        return choice(f"{text}\n{ETHICS_QUESTIONS[self.subset]}", self.answers, label, split)


class Corr2CauseScenario(PalioScenario):
    """Columns: input (premise and hypothesis), or premise and hypothesis; label 1 if it must be true."""

    name = "corr2cause"
    description = "Whether a causal hypothesis follows from correlations"

    def instance(self, row: dict[str, Any], split: str) -> Instance:
        text = row.get("input")
        if text is None:
            text = f"Premise: {field(row, 'premise')}\nHypothesis: {field(row, 'hypothesis')}"
        return choice(str(text).strip(), ("No", "Yes"), int(field(row, "label")), split)


class MathScenario(PalioScenario):
    """Columns: problem, solution, level (`Level 3`), type (`Number Theory`)."""

    name = "MATH"
    description = "Competition mathematics, solutions as chain of thought"
    main_metric = "math_equiv_chain_of_thought"

    def __init__(self, subject: str, level: str, data: str = "", examples: bool = True) -> None:
        super().__init__(data, examples)
        if subject not in MATH_SUBJECTS:
            raise ValueError(f"subject={subject}: use one of {', '.join(MATH_SUBJECTS)}")
        self.subject, self.level = MATH_SUBJECTS[subject], f"Level {level}"

    def instance(self, row: dict[str, Any], split: str) -> Instance | None:
        if (field(row, "type", "subject"), str(field(row, "level"))) != (self.subject, self.level):
            return None
        answer = Reference(Output(text=str(field(row, "solution"))), tags=[CORRECT_TAG])
        return Instance(input=Input(text=str(field(row, "problem"))), references=[answer], split=split)


class SummaryScenario(PalioScenario):
    """A text, cut to its first `max_words`, and its summary; examples are of 50 to 150 words of text, as in
    HELM's own CNN/DailyMail, so that five fit into a prompt."""

    main_metric = "rouge_2"
    columns: tuple[str, str]
    max_words = 512
    example_words = (50, 150)

    def instance(self, row: dict[str, Any], split: str) -> Instance | None:
        text, summary = (" ".join(str(field(row, column)).split()) for column in self.columns)
        words = text.split()
        if split == TRAIN_SPLIT and not self.example_words[0] <= len(words) <= self.example_words[1]:
            return None
        reference = Reference(Output(text=summary), tags=[CORRECT_TAG])
        shown = Input(text=" ".join(words[: self.max_words]))
        return Instance(input=shown, references=[reference], split=split)


class SamSumScenario(SummaryScenario):
    """Columns: dialogue, summary."""

    name = "sam_sum"
    description = "Summaries of messenger dialogues"
    columns = ("dialogue", "summary")


class CnnDailyMailScenario(SummaryScenario):
    """Columns: article, highlights."""

    name = "cnn_dailymail"
    description = "Summaries of news articles"
    columns = ("article", "highlights")


# --- run specs ---------------------------------------------------------------------------------------


def _spec(
    name: str, scenario: type[Scenario], args: dict[str, Any], adapter: AdapterSpec, metrics: list[MetricSpec]
) -> RunSpec:
    given = ",".join(f"{key}={value}" for key, value in args.items() if key in ("subset", "subject", "level"))
    return RunSpec(
        name=f"{name}:{given}" if given else name,
        scenario_spec=ScenarioSpec(class_name=f"{__name__}.{scenario.__name__}", args=args),
        adapter_spec=adapter,
        metric_specs=metrics,
        groups=[name],
    )


def _choice_adapter(instructions: str, noun: str, examples: bool) -> AdapterSpec:
    return get_multiple_choice_adapter_spec(
        method=ADAPT_MULTIPLE_CHOICE_JOINT,
        instructions=instructions,
        input_noun=noun,
        output_noun="Answer",
        max_train_instances=5 if examples else 0,
    )


def summary_metric_specs(bias: bool) -> list[MetricSpec]:
    """ROUGE-2, and HELM's bias metrics if asked for.

    Raises:
        ValueError: bias metrics are asked for and NLTK's punkt_tab is not installed.
    """
    metrics: list[MetricSpec] = get_basic_metric_specs(["rouge_2"])
    if not bias:
        return metrics
    import nltk  # type: ignore[import-untyped]

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        raise ValueError(
            "bias metrics need NLTK's punkt_tab: run `python -m nltk.downloader punkt_tab`, or set NLTK_DATA"
            " to a folder with it, or write bias=false into the run entry and drop their columns"
        ) from None
    return metrics + list(get_bias_metric_specs())


@run_spec_function("palio_ethics")  # type: ignore[untyped-decorator]
def ethics_spec(subset: str, data: str = "", examples: str = "true") -> RunSpec:
    shown = examples in TRUE
    return _spec(
        "palio_ethics",
        EthicsScenario,
        {"subset": subset, "data": data, "examples": shown},
        _choice_adapter("The following are multiple choice questions (with answers).", "Scenario", shown),
        get_exact_match_metric_specs(),
    )


@run_spec_function("palio_corr2cause")  # type: ignore[untyped-decorator]
def corr2cause_spec(data: str = "", examples: str = "true") -> RunSpec:
    shown = examples in TRUE
    instructions = "Decide whether the hypothesis must be true, given the premise."
    return _spec(
        "palio_corr2cause",
        Corr2CauseScenario,
        {"data": data, "examples": shown},
        _choice_adapter(instructions, "Question", shown),
        get_exact_match_metric_specs(),
    )


@run_spec_function("palio_math")  # type: ignore[untyped-decorator]
def math_spec(subject: str, level: str, data: str = "", examples: str = "true") -> RunSpec:
    shown = examples in TRUE
    adapter = AdapterSpec(
        method=ADAPT_GENERATION,
        instructions="Solve the mathematics problem step by step. Put the final answer into \\boxed{}.\n",
        max_train_instances=8 if shown else 0,
        num_outputs=1,
        temperature=0.0,
        max_tokens=400,
        stop_sequences=["###"],
        instance_prefix="###\n",
        input_prefix="Problem: ",
        input_suffix="\n",
        output_prefix="Answer: ",
        output_suffix="\n",
    )
    metrics = get_basic_metric_specs(["math_equiv_chain_of_thought"])
    args = {"subject": subject, "level": level, "data": data, "examples": shown}
    return _spec("palio_math", MathScenario, args, adapter, metrics)


@run_spec_function("palio_sam_sum")  # type: ignore[untyped-decorator]
def sam_sum_spec(data: str = "", examples: str = "true", bias: str = "true") -> RunSpec:
    shown = examples in TRUE
    adapter = get_summarization_adapter_spec(
        num_sents=1, max_train_instances=5 if shown else 0, max_tokens=128, temperature=0.0
    )
    args = {"data": data, "examples": shown}
    return _spec("palio_sam_sum", SamSumScenario, args, adapter, summary_metric_specs(bias in TRUE))


@run_spec_function("palio_cnn_dailymail")  # type: ignore[untyped-decorator]
def cnn_dailymail_spec(data: str = "", examples: str = "true", bias: str = "true") -> RunSpec:
    shown = examples in TRUE
    adapter = get_summarization_adapter_spec(
        num_sents=3, max_train_instances=5 if shown else 0, max_tokens=128, temperature=0.0
    )
    args = {"data": data, "examples": shown}
    return _spec(
        "palio_cnn_dailymail", CnnDailyMailScenario, args, adapter, summary_metric_specs(bias in TRUE)
    )
