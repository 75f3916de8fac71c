"""Models that a stage serves in bfloat16 on a CPU: what is computed, what is on record, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from palio.config import Track
from palio.config.reading import load_competition
from palio.errors import BadInput
from palio.layout import CONFIG
from palio.operating.doctor import engine_findings
from palio.settings import EvaluateSettings, StageLimits, StageRuns
from palio.steps import _engine
from tests.support.folder import ROOT
from tests.support.serving import QUESTIONS, complete, engine_of


def settings(stage_runs: dict[str, Any], **track: Any) -> EvaluateSettings:
    return EvaluateSettings(
        competition_id="test",
        runs=StageRuns(competition="test", stage="open", closed_store="closed", scenarios=stage_runs),
        limits=StageLimits(time_limit=600, threads=8, cpu_dtype="bfloat16"),
        track=Track(title="t", ram_gb=4, training_budget="600s", **track),
    )


def test_answers_are_those_of_float32_but_for_rounding(package: Path, bf16_cpu: Path) -> None:
    asked = {"max_new_tokens": 4, "echo_prompt": True}
    with engine_of(package) as usual, engine_of(package, cpu_dtype="bfloat16") as engine:
        assert engine._model.token_bytes * 2 == usual._model.token_bytes
        assert engine._model.way == usual._model.way == "shared prefixes"
        pairs = zip(complete(engine, QUESTIONS, **asked), complete(usual, QUESTIONS, **asked), strict=True)
        for answers in pairs:
            rounded, exact = ([token.logprob for token in answer.tokens[:-4]] for answer in answers)
            assert rounded == pytest.approx(exact, abs=0.1)
            assert rounded != exact


def test_the_dtype_is_on_record_beside_the_engine(bf16_cpu: Path) -> None:
    assert _engine(settings({})).endswith(" in bfloat16")
    on_gpu = _engine(settings({}, gpu_memory_gb=24, gpu_model="rtx4090"))
    assert "bfloat16" not in on_gpu, "there the package's own dtype decides"


def test_a_cpu_without_the_instructions_is_refused_before_the_stage_begins(
    package: Path, bf16_cpu: Path
) -> None:
    bf16_cpu.write_text("flags : fpu avx512f\n")
    with pytest.raises(BadInput, match=r"open\.cpu_dtype is 'bfloat16': .* neither AVX512-BF16 nor AMX"):
        _engine(settings({}))
    with pytest.raises(BadInput, match="--cpu-dtype"), engine_of(package, cpu_dtype="bfloat16"):
        pass


def test_doctor_tells_whether_this_machine_can(bf16_cpu: Path) -> None:
    competition = load_competition(ROOT / CONFIG)
    assert list(engine_findings(competition)) == []
    stages = competition.stages
    chosen = stages.open.model_copy(update={"cpu_dtype": "bfloat16"})
    competition = competition.model_copy(update={"stages": stages.model_copy(update={"open": chosen})})
    assert [finding.ok for finding in engine_findings(competition)] == [True]
    bf16_cpu.write_text("flags : fpu avx512f\n")
    assert [finding.ok for finding in engine_findings(competition)] == [False]
