"""What our HELM client does with a reply before HELM scores it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helm.common.request import GeneratedOutput, Request, Token

from palio.evaluation.client import EntryClient, cut_completion
from palio.evaluation.journal import Answer, Journal, JournalReader
from tests.support.toy import Toy, serving

FAR = 1e12


def completion(*tokens: str) -> GeneratedOutput:
    return GeneratedOutput("".join(tokens), -len(tokens), [Token(text, -1.0) for text in tokens])


@pytest.mark.parametrize(
    ("stops", "text", "tokens"),
    [
        ([], "The answer is 4.\nQuestion", 4),
        (["\n"], "The answer is 4.", 2),
        (["###"], "The answer is 4.\nQuestion", 4),
        (["Question", "is 4"], "The answer ", 1),  # the first in the text, not in the list
        (["The"], "", 0),
    ],
)
def test_a_completion_ends_before_the_first_stop_sequence(stops: list[str], text: str, tokens: int) -> None:
    cut = cut_completion(completion("The answer ", "is 4.", "\n", "Question"), stops)
    assert (cut.text, len(cut.tokens)) == (text, tokens)
    assert cut.logprob == -tokens


def test_a_stop_sequence_in_an_echoed_prompt_is_no_end() -> None:
    whole = GeneratedOutput("Q\nA: 4\nQ", -2, [Token(" 4", -1.0), Token("\nQ", -1.0)])
    assert cut_completion(whole, ["\n"], kept=4).text == "Q\nA: 4"


def test_an_answer_is_asked_for_once_and_a_torn_line_of_the_journal_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "answers.jsonl"
    first, second = Request(prompt="one", max_tokens=2), Request(prompt="two", max_tokens=2)
    with serving(Toy()) as toy:
        client = EntryClient(toy.base_url, str(journal), cut=True, deadline=FAR)
        given = [client.make_request(request) for request in (first, second)]
        journal.write_bytes(journal.read_bytes()[:-5])
        monkeypatch.setattr(Journal, "_opened", {})  # another process
        again = EntryClient(toy.base_url, str(journal), cut=True, deadline=FAR)
        answers = [again.make_request(request) for request in (first, second)]
    assert [one.completions for one in answers] == [one.completions for one in given]
    assert [one.cached for one in answers] == [True, False]
    assert len(Journal(journal).replies) == 2


def test_clients_that_helm_makes_in_parallel_lose_no_answer(tmp_path: Path) -> None:
    journal = tmp_path / "answers.jsonl"
    requests = [Request(prompt=f"question {number}", max_tokens=2) for number in range(64)]

    def ask(request: Request) -> str:
        client = EntryClient(toy.base_url, str(journal), cut=True, deadline=FAR)
        (answer,) = client.make_request(request).completions
        return str(answer.text)

    with serving(Toy(answer=lambda prompt: prompt.split()[1])) as toy, ThreadPoolExecutor(16) as threads:
        given = list(threads.map(ask, requests))
        again = list(threads.map(ask, requests))
    assert again == given == [str(number) for number in range(64)]
    assert toy.served == 64
    assert len(list(JournalReader(journal).answers())) == 64


@pytest.mark.parametrize(
    ("defect", "why"),
    [
        ("not JSON", "the reply is not JSON"),
        ("no tokens", "the reply lacks a field or has it wrong (KeyError)"),
    ],
)
def test_a_garbled_reply_is_an_unanswered_question(defect: str, why: str, tmp_path: Path) -> None:
    with serving(Toy(defect)) as toy:
        client = EntryClient(toy.base_url, str(tmp_path / "answers.jsonl"), cut=True, deadline=FAR)
        result = client.make_request(Request(prompt="one"))
    assert (result.success, result.error) == (False, why)


def test_nothing_is_asked_after_the_deadline(tmp_path: Path) -> None:
    with serving(Toy()) as toy:
        client = EntryClient(toy.base_url, str(tmp_path / "answers.jsonl"), cut=True, deadline=0)
        assert client.make_request(Request(prompt="one")).error == "the stage's limit ran out"
    assert toy.served == 0


def test_a_full_queue_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("palio.evaluation.client.BUSY_SECONDS", 0.05)
    with serving(Toy(refuses=lambda number: number < 3, refusal=429)) as toy:
        client = EntryClient(toy.base_url, str(tmp_path / "answers.jsonl"), cut=True, deadline=FAR)
        assert client.make_request(Request(prompt="one")).success
    assert toy.served == 3


def test_a_growing_journal_is_read_line_by_line_and_each_line_once(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    reader = JournalReader(path)
    assert list(reader.answers()) == []
    first, second = Answer("1", False, {"text": "one"}), Answer("2", True, {"text": "two"})
    Journal(path).add(first)
    with path.open("a") as torn:
        torn.write('{"key": "3", "cut"')
    assert list(reader.answers()) == [first]
    assert list(reader.answers()) == []
    Journal(path).add(second)
    assert list(reader.answers()) == [second]


def test_a_server_cannot_add_to_the_completions_that_were_cut(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    Journal(path).add(Answer("1", False, {"text": "one", "cut": True}))
    assert [answer.cut for answer in JournalReader(path).answers()] == [False]
