"""What only a GPU can show of the model server: its kernels' answers, its memory cap."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from palio.serving.model import PooledModel, load_model
from palio.serving.pooled import Sequences, attend_many
from palio.serving.process import ServerProcess
from tests.support.serving import QUESTIONS, complete, engine_of, metric
from tests.support.training import tiny_base_model

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def package(
    base_model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """In bf16 as most models are, for the fused kernel; in fp32 for the plain arithmetic."""
    return tiny_base_model(tmp_path_factory.mktemp("tiny"), base_model, request.param) / "model"


def test_prompts_together_have_the_probabilities_that_each_has_alone(
    package: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(package).cuda().eval()
    tokenizer = AutoTokenizer.from_pretrained(package)
    with engine_of(package, device="cuda") as engine:
        answers = complete(engine, QUESTIONS, max_new_tokens=4, echo_prompt=True)
    assert "not served with shared prefixes" not in capfd.readouterr().err
    for prompt, answer in zip(QUESTIONS, answers, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids.cuda()
        with torch.inference_mode():
            all_logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
        alone = all_logprobs.gather(1, ids[0, 1:, None])[:, 0].cpu()
        together = torch.tensor([token.logprob for token in answer.tokens[1 : ids.shape[1]]])
        torch.testing.assert_close(together, alone, atol=0.05, rtol=0.01)


@pytest.mark.parametrize("causal", [True, False])
def test_one_call_for_many_sequences_computes_what_one_for_each_does(causal: bool) -> None:
    """Their regions are in no order of the rows, and behind each are rows of others."""
    torch.manual_seed(0)
    query = torch.randn(9, 6, 64, dtype=torch.bfloat16)
    keys, values = torch.randn(2, 100, 2, 64, dtype=torch.bfloat16)
    found = [(40, 7, [4, 5]), (0, 33, [6, 7, 8]), (60, 12, [0, 1, 2, 3])]
    results = [
        attend_many(
            query[[row for _, _, rows in sorted(found) for row in rows]].to(device),
            keys.to(device),
            values.to(device),
            Sequences(causal, found).call(torch.device(device)),
            0.1,
        )
        for device in ("cpu", "cuda")
    ]
    for alone, together in zip(*results, strict=True):
        torch.testing.assert_close(together.float().cpu(), alone.float(), atol=2e-2, rtol=2e-2)


def test_a_model_in_bf16_is_served_from_one_pool(package: Path) -> None:
    model = load_model(package, "cuda", None)
    bf16 = AutoModelForCausalLM.from_pretrained(package).dtype == torch.bfloat16
    assert isinstance(model, PooledModel) == bf16, model.way


def test_the_tracks_memory_is_all_that_keys_and_values_get(package: Path) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with engine_of(package, device="cuda", gpu_memory_gb=1) as engine:
        complete(engine, QUESTIONS, max_new_tokens=16)
        assert 0.1e9 < engine.metrics()["cache_bytes_capacity"] < 0.9e9
    assert torch.cuda.max_memory_allocated() < 1e9


def test_a_server_is_on_the_gpu_on_a_track_that_has_one(package: Path, tmp_path: Path) -> None:
    with ServerProcess(package, log=tmp_path / "gpu.log", threads=1, gpu_memory_gb=8) as server:
        on_gpu = metric(server, "cache_bytes_capacity")
    with ServerProcess(package, log=tmp_path / "cpu.log", threads=1) as server:
        on_cpu = metric(server, "cache_bytes_capacity")
    assert on_cpu < 3e9 < on_gpu < 8e9
