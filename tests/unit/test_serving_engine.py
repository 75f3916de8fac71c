"""The default engine on a tiny model of random weights."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from palio.errors import BadInput, OutOfMemory
from palio.serving import model, transformers_engine
from palio.serving.job import Generation
from palio.serving.request import BadRequest, QueueFull, Request, RequestFailed, Unavailable
from palio.serving.transformers_engine import TransformersEngine
from tests.support.serving import QUESTIONS, SHOTS, complete, engine_of, generated


@pytest.fixture
def engine(package: Path) -> Iterator[TransformersEngine]:
    with engine_of(package) as engine:
        yield engine


def test_greedy_answers_are_those_of_one_request_at_a_time(package: Path, engine: TransformersEngine) -> None:
    together = [answer.text for answer in complete(engine, QUESTIONS, max_new_tokens=16)]
    assert together == generated(package, QUESTIONS, 16)


def test_a_shared_prefix_is_computed_once(package: Path, engine: TransformersEngine) -> None:
    tokenizer = AutoTokenizer.from_pretrained(package)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in QUESTIONS]
    distinct = {tuple(prompt[:end]) for prompt in prompts for end in range(1, len(prompt) + 1)}
    complete(engine, QUESTIONS, max_new_tokens=4)
    counts = engine.metrics()
    assert counts["prompt_tokens_total"] == sum(map(len, prompts))
    assert counts["prompt_tokens_computed_total"] == len(distinct)


def test_a_prompt_seen_before_costs_one_token(engine: TransformersEngine) -> None:
    first = complete(engine, [SHOTS], max_new_tokens=8)
    before = engine.metrics()["prompt_tokens_computed_total"]
    assert complete(engine, [SHOTS], max_new_tokens=8) == first
    assert engine.metrics()["prompt_tokens_computed_total"] == before + 1


def test_a_prompt_longer_than_one_step_is_read_in_several(package: Path, engine: TransformersEngine) -> None:
    long = SHOTS * 6
    assert [answer.text for answer in complete(engine, [long], max_new_tokens=8)] == generated(
        package, [long], 8
    )
    assert engine.metrics()["steps_total"] > 8 + 1


def test_the_memory_of_keys_and_values_is_bounded(package: Path) -> None:
    """Room for one full context only: requests wait for one another and old prefixes go."""
    with engine_of(package, cache_gb=2048 * 256 / 1e9) as engine:
        prompts = [f"{n} {SHOTS}" for n in range(12)]
        answers = complete(engine, prompts, max_new_tokens=16)
        counts = engine.metrics()
        assert len(answers) == 12
        assert counts["cache_tokens_capacity"] == 2048
        assert counts["cache_tokens"] <= 2048
        assert counts["cache_tokens_evicted_total"] > 0
    assert [answer.text for answer in answers] == generated(package, prompts, 16)


def test_less_memory_than_one_sequence_needs_is_refused_at_the_start(package: Path) -> None:
    with pytest.raises(OutOfMemory, match="one sequence of 2048 tokens"):
        TransformersEngine(package, device="cpu", cache_gb=1e-4)


def test_an_echoed_prompt_has_the_models_logprobs(package: Path, engine: TransformersEngine) -> None:
    prompt = SHOTS[:400]
    complete(engine, [prompt], max_new_tokens=1)  # its prefix is in memory; the logits still have to come
    (answer,) = complete(engine, [prompt], max_new_tokens=3, echo_prompt=True)
    model = AutoModelForCausalLM.from_pretrained(package, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(package)(prompt, return_tensors="pt").input_ids
    logprobs = model(ids).logits[0].detach().log_softmax(-1)
    expected = [0.0, *(float(logprobs[at, token]) for at, token in enumerate(ids[0, 1:]))]
    count = ids.shape[1]
    assert answer.text.startswith(prompt)
    assert "".join(token.text for token in answer.tokens) == answer.text
    assert len(answer.tokens) == count + 3
    assert [token.logprob for token in answer.tokens[:count]] == pytest.approx(expected, abs=1e-4)


def test_an_echo_without_new_tokens_scores_the_prompt(engine: TransformersEngine) -> None:
    (answer,) = complete(engine, ["Good morning"], max_new_tokens=0, echo_prompt=True)
    assert answer.text == "Good morning"
    assert answer.logprob < 0


def test_the_first_candidate_reported_is_the_token_taken(engine: TransformersEngine) -> None:
    (answer,) = complete(engine, [SHOTS], max_new_tokens=4, top_k_per_token=3)
    for token in answer.tokens:
        assert len(token.top_logprob) == 3
        assert token.logprob == max(token.top_logprob.values())


def test_a_completion_ends_exactly_before_its_stop_sequence(engine: TransformersEngine) -> None:
    (free,) = complete(engine, [SHOTS], max_new_tokens=24)
    stop = free.text[len(free.text) // 2 :][:3]
    (answer,) = complete(engine, [SHOTS], max_new_tokens=24, stop_sequences=(stop,))
    assert answer.text == free.text[: free.text.index(stop)]
    assert "".join(token.text for token in answer.tokens) == answer.text


def test_an_answer_ends_at_the_tokenizers_end_token_too(package: Path, tmp_path: Path) -> None:
    """It is the one that training appends; the model's own configuration may name another."""
    shutil.copytree(package, tmp_path, dirs_exist_ok=True)
    with engine_of(package) as engine:
        (free,) = complete(engine, [SHOTS], max_new_tokens=8)
    tokenizer = AutoTokenizer.from_pretrained(package)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokenizer.encode(free.tokens[3].text)[0])
    tokenizer.save_pretrained(tmp_path)
    with engine_of(tmp_path) as engine:
        (answer,) = complete(engine, [SHOTS], max_new_tokens=8)
    assert len(answer.tokens) <= 3


def test_sampled_answers_do_not_depend_on_what_is_served_beside_them(engine: TransformersEngine) -> None:
    settings = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9}
    (alone,) = complete(engine, QUESTIONS[:1], **settings)
    assert complete(engine, QUESTIONS, **settings)[0].text == alone.text


def test_several_sequences_of_a_request_differ_and_share_the_prompt(engine: TransformersEngine) -> None:
    request = Request(SHOTS, max_new_tokens=8, temperature=1.0, num_return_sequences=4)
    answers = engine.submit(request).result(60)
    counts = engine.metrics()
    assert len({answer.text for answer in answers}) > 1
    assert counts["prompt_tokens_computed_total"] == counts["prompt_tokens_total"]


def test_a_prompt_over_the_context_is_cut_from_the_right(engine: TransformersEngine) -> None:
    long = SHOTS * 20
    (answer,) = complete(engine, [long], max_new_tokens=5, echo_prompt=True)
    assert len(answer.tokens) == 2048
    assert long.startswith("".join(token.text for token in answer.tokens[:-5]))


def test_more_sequences_than_memory_holds_are_refused(package: Path) -> None:
    with (
        engine_of(package, cache_gb=2048 * 256 / 1e9) as engine,
        pytest.raises(BadRequest, match="fewer sequences"),
    ):
        engine.submit(Request("a", max_new_tokens=400, num_return_sequences=8))


def test_a_full_queue_sends_clients_away(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_engine, "QUEUE_LENGTH", 0)
    with pytest.raises(QueueFull):
        engine.submit(Request("a"))


def test_a_cancelled_request_frees_its_place(engine: TransformersEngine) -> None:
    future = engine.submit(Request(SHOTS, max_new_tokens=1500))
    while not engine.metrics()["sequences_running"]:
        time.sleep(0.001)
    future.cancel()
    complete(engine, ["a"], max_new_tokens=1)
    assert engine.metrics()["sequences_running"] == 0
    assert engine.metrics()["requests_cancelled_total"] == 1
    with pytest.raises(CancelledError):
        future.result()


class Faulty:
    """A model that fails on passes whose chunks contain a token, or on every pass."""

    def __init__(self, model: Any, poison: int | None) -> None:
        self._model = model
        self.poison = poison

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, chunks: Any) -> Any:
        if self.poison is None or any(self.poison in chunk.tokens for chunk in chunks):
            raise RuntimeError("index out of range")
        return self._model.forward(chunks)


POISON = "🐎"


@pytest.mark.parametrize("shares", [True, False], ids=["tree", "one by one"])
def test_a_request_that_breaks_its_step_fails_alone(
    package: Path, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shares:
        monkeypatch.setattr(model.TreeModel, "forward", None)
    prompts = [*QUESTIONS, *(f"{n} {question}" for n, question in enumerate(QUESTIONS))]
    with engine_of(package) as engine:
        assert engine._model.shares == shares
        engine._model = Faulty(engine._model, engine.vocabulary.encode(POISON)[-1])
        futures = [engine.submit(Request(prompt, max_new_tokens=8)) for prompt in prompts]
        poisoned = [
            engine.submit(Request(f"{SHOTS}{POISON}{n}", max_new_tokens=8, num_return_sequences=n + 1))
            for n in range(3)
        ]
        assert [future.result(60)[0].text for future in futures] == generated(package, prompts, 8)
        for future in poisoned:
            with pytest.raises(RequestFailed, match="RuntimeError"):
                future.result(60)
        assert not engine.failure()
        assert engine.metrics()["requests_failed_total"] == 3
        assert engine.metrics()["sequences_running"] == 0


def test_a_request_whose_logits_cannot_be_read_fails_alone(
    package: Path, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Generation.read

    def read_or_fail(generation: Generation, first: int, logits: torch.Tensor, ends: frozenset[int]) -> int:
        return read(generation, first, logits * math.nan if generation.job.request.seed else logits, ends)

    monkeypatch.setattr(Generation, "read", read_or_fail)
    failing = engine.submit(Request(SHOTS, max_new_tokens=4, seed=1))
    assert [answer.text for answer in complete(engine, QUESTIONS, max_new_tokens=4)] == generated(
        package, QUESTIONS, 4
    )
    with pytest.raises(RequestFailed, match="ArithmeticError"):
        failing.result(60)


def test_a_model_that_fails_on_everything_is_broken(engine: TransformersEngine) -> None:
    engine._model = Faulty(engine._model, None)
    for prompt in QUESTIONS:
        with pytest.raises(Unavailable, match="the model is broken: RuntimeError"):
            complete(engine, [prompt], max_new_tokens=2)
    assert "the model is broken" in engine.failure()


def test_no_model_to_serve_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no config\.json"):
        TransformersEngine(tmp_path)
