"""Draft tokens: greedy answers come sooner and stay the same."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from palio.serving import transformers_engine
from palio.serving.drafts import draft_tokens
from palio.serving.job import Generation, Job
from palio.serving.prefix_tree import Node
from palio.serving.request import Completion, Request
from palio.serving.text import Vocabulary
from palio.serving.transformers_engine import TransformersEngine
from tests.support.serving import QUESTIONS, SHOTS, complete, engine_of
from tests.support.training import tiny_base_model


@pytest.fixture(scope="module")
def package(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows few words and so repeats itself, though not always."""
    folder = tiny_base_model(tmp_path_factory.mktemp("tiny"), base_model) / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    words = AutoTokenizer.from_pretrained(folder)(SHOTS).input_ids
    torch.manual_seed(1)
    with torch.no_grad():
        model.lm_head.weight.zero_()[words] = torch.randn(len(words), model.config.hidden_size)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def engine(package: Path) -> Iterator[TransformersEngine]:
    with engine_of(package) as engine:
        yield engine


@pytest.fixture
def undrafted(package: Path) -> Iterator[TransformersEngine]:
    with pytest.MonkeyPatch.context() as patch, engine_of(package) as engine:
        patch.setattr(engine, "_draft", lambda: None)
        yield engine


def test_a_draft_is_what_followed_the_last_tokens_earlier() -> None:
    assert draft_tokens([7, 8, 1, 2, 3, 4, 9, 1, 2], 2) == [3, 4]


def test_two_tokens_that_match_are_better_than_one_that_is_nearer() -> None:
    assert draft_tokens([1, 2, 3, 5, 2, 4, 1, 2], 1) == [3]
    assert draft_tokens([1, 2, 3, 5, 2, 4, 0, 2], 1) == [4]


def test_a_loop_is_continued() -> None:
    assert draft_tokens([5, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]


def test_a_token_never_seen_before_has_no_draft_tokens() -> None:
    assert draft_tokens([1, 2, 3], 4) == []


def answers(engine: TransformersEngine, requests: Sequence[Request]) -> list[list[Completion]]:
    futures = [engine.submit(request) for request in requests]
    return [future.result(120) for future in futures]


def any_request(source: random.Random, stops: Sequence[str]) -> Request:
    begin = source.randrange(len(SHOTS) // 2)
    return Request(
        prompt=source.choice([SHOTS[begin:], SHOTS, "one two " * source.randint(1, 20), *QUESTIONS]),
        max_new_tokens=source.randint(0, 40),
        temperature=source.choice([1e-7, 1e-7, 1e-7, 1.0]),
        top_k_per_token=source.randint(1, 3),
        num_return_sequences=source.choice([1, 1, 1, 3]),
        echo_prompt=source.random() < 0.2,
        stop_sequences=tuple(source.sample(stops, source.randint(0, 2))),
    )


def test_drafted_answers_are_the_undrafted_ones(
    engine: TransformersEngine, undrafted: TransformersEngine
) -> None:
    """Any mix of lengths, stop sequences, echoes, samples and candidates, six requests at once."""
    source = random.Random(5)
    (free,) = complete(undrafted, ["one two " * 9], max_new_tokens=40)
    stops = [free.text[at : at + size] for at, size in ((14, 1), (30, 4), (61, 2))]
    requests = [any_request(source, stops) for _ in range(60)]
    expected, drafted = (
        [answer for at in range(0, 60, 6) for answer in answers(one, requests[at : at + 6])]
        for one in (undrafted, engine)
    )
    for request, ours, theirs in zip(requests, drafted, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert [token.text for token in one.tokens] == [token.text for token in other.tokens], request
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
    counts, without = engine.metrics(), undrafted.metrics()
    assert counts["draft_tokens_accepted_total"] > 100
    assert without["draft_tokens_total"] == 0
    assert counts["steps_total"] < without["steps_total"]


def test_an_answer_may_end_at_any_token_of_a_draft(engine: TransformersEngine) -> None:
    (free,) = complete(engine, [SHOTS], max_new_tokens=40)
    for length in range(40):
        (answer,) = complete(engine, [SHOTS], max_new_tokens=length)
        assert answer.text == "".join(token.text for token in free.tokens[:length])


def read_with_draft(package: Path, draft: list[int], logits_of: list[int], end: int) -> Generation:
    """Read logits for a known token, 100, and a draft; `logits_of` are the tokens the model predicts."""
    prompt = [5, 6, 100]
    job = Job(Request("", max_new_tokens=20), prompt, context=2048, shares=True)
    leaf = Node(Node(None, prompt[:-1], 0, 2), [], 2, job.own)
    generation = Generation(job, leaf, 0, Vocabulary.load(package))
    leaf.tokens += draft
    leaf.filled = len(leaf.tokens)
    rows = torch.nn.functional.one_hot(torch.tensor(logits_of), 49152).float()
    generation.read(0, rows, frozenset([end]))
    return generation


def test_tokens_after_a_wrong_draft_token_are_rolled_back(package: Path) -> None:
    generation = read_with_draft(package, [200, 201, 202], [200, 201, 999, 203], end=2)
    assert generation.leaf.tokens == [100, 200, 201, 999]
    assert generation.leaf.filled == 3
    assert len(generation.new) == 3


def test_a_fully_accepted_draft_yields_one_more_token(package: Path) -> None:
    generation = read_with_draft(package, [200, 201], [200, 201, 202], end=2)
    assert generation.leaf.tokens == [100, 200, 201, 202]
    assert generation.leaf.filled == 3


def test_a_drafted_end_token_ends_the_answer(package: Path) -> None:
    generation = read_with_draft(package, [200, 2, 201], [200, 2, 201, 202], end=2)
    assert generation.done
    assert len(generation.new) == 1


def test_sampled_answers_are_not_drafted(engine: TransformersEngine) -> None:
    complete(engine, QUESTIONS, max_new_tokens=16, temperature=1.0)
    assert engine.metrics()["draft_tokens_total"] == 0


def test_a_model_whose_memory_cannot_be_rolled_back_is_not_drafted(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine._model, "shares", False)
    complete(engine, [SHOTS], max_new_tokens=16)
    assert engine.metrics()["draft_tokens_total"] == 0


def test_a_request_cancelled_in_a_draft_leaves_the_others_alone(engine: TransformersEngine) -> None:
    (expected,) = complete(engine, [SHOTS], max_new_tokens=60)
    held = engine.metrics()["cache_tokens"]
    cancelled = [engine.submit(Request(SHOTS, max_new_tokens=1500)) for _ in range(3)]
    kept = engine.submit(Request(SHOTS, max_new_tokens=60))
    while not engine.metrics()["sequences_running"]:
        pass
    for future in cancelled:
        future.cancel()
    assert kept.result(60)[0].text == expected.text
    complete(engine, [SHOTS], max_new_tokens=1)
    assert engine.metrics()["cache_tokens"] == held


def test_a_step_full_of_sequences_has_no_drafts(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_engine, "DRAFT_ROWS", len(QUESTIONS))
    request = Request(SHOTS, max_new_tokens=16, num_return_sequences=len(QUESTIONS))
    engine.submit(request).result(60)
    assert engine.metrics()["draft_tokens_total"] == 0
