"""Answers from before a stage got more questions: they are taken over, and only the new ones are asked.

HELM draws the questions of a run in an order that does not depend on how many it draws
(`helm.benchmark.runner.downsample_eval_instances`, release 0.5.16), so a run of more questions has those of
a run of fewer. Whether two requests are the same is for the journal to say, whose keys are the whole
request. The seconds that the earlier questions took stay used.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence

from palio.evaluation.helm import asked_of_runs
from palio.layout import HelmFolder, StageStore
from palio.provenance import atomic_path
from palio.records import AskedQuestions, read_record


def asked_questions(
    entries: Mapping[str, Sequence[str]], store: StageStore, answering: str
) -> AskedQuestions:
    """Return what a stage with these run entries asks, of the package and engine behind `answering`."""
    asked: Counter[str] = Counter()
    for descriptions in entries.values():
        for run, questions in asked_of_runs(descriptions).items():
            asked[run] = max(asked[run], questions)
    data = json.loads(store.data_digests.read_text(encoding="utf-8"))
    return AskedQuestions(answering=answering, questions=dict(sorted(asked.items())), data=data)


def take_over(folder: HelmFolder, asked: AskedQuestions) -> None:
    """Begin a folder with the journal and the used seconds of one whose questions are all among its own.

    A folder that is begun already, or that has nothing to take over, only gets the record of what it asks.
    """
    if folder.asked.exists():
        return
    earlier = [
        (sum(before.questions.values()), str(path), HelmFolder(path))
        for path in folder.path.parent.iterdir()
        if (file := HelmFolder(path).asked).exists()
        and includes(asked, before := read_record(AskedQuestions, file))
    ]
    if earlier and not folder.journal.exists():
        *_, source = max(earlier)
        for of, to in ((source.used_seconds, folder.used_seconds), (source.journal, folder.journal)):
            if of.exists():
                with atomic_path(to) as temporary:
                    shutil.copyfile(of, temporary)
    asked.write(folder.asked)


def includes(asked: AskedQuestions, before: AskedQuestions) -> bool:
    """Return whether all questions of `before` are asked again, of the same package as the same engine serves
    it, from the same data."""
    return (
        asked.answering == before.answering
        and all(asked.questions.get(run, 0) >= count for run, count in before.questions.items())
        and before.data.items() <= asked.data.items()
    )
