"""The HELM client of an entry's server, and the tokenizer of its window: `helm-run` loads them by their names
in model_deployments.yaml and tokenizer_configs.yaml.

It speaks HELM's HTTP contract, as HELM's own client does, and mends what cost entries their scores in 2023:

- a completion is cut at the first stop sequence, also if the server went on behind it;
- an answer is kept in a journal as soon as it is there, so that a stage that was stopped or crashed asks
  only what it has not asked;
- a request that the server refuses or garbles is one unanswered question, not a lost HELM run;
- a server that cannot be reached is tried for seconds, not for minutes.

An unanswered question is an unsuccessful request in HELM's scenario_state.json, which HELM scores as an
empty completion; what that counts for is the stage's `unanswered`.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import requests
from helm.clients.client import Client
from helm.common.request import ErrorFlags, GeneratedOutput, Request, RequestResult, Token
from helm.common.tokenization_request import (
    DecodeRequest,
    DecodeRequestResult,
    TokenizationRequest,
    TokenizationRequestResult,
    TokenizationToken,
)
from helm.tokenizers.tokenizer import Tokenizer

from palio.evaluation.journal import BROKEN, LIMIT, Answer, Journal
from palio.evaluation.reply import BUSY, BUSY_SECONDS, Unanswered, checked_reply, request_body, request_key
from palio.evaluation.window import Window
from palio.network import ANSWERED

REPLY_SECONDS = 600.0
"""A reply that takes longer is not waited for."""
UNREACHABLE_WAITS = (0.5, 2.0, 8.0)
"""Seconds between attempts to reach a server that does not accept the connection or breaks it."""


class EntryClient(Client):  # type: ignore[misc]
    """Answers from the journal, else from the server, until the deadline.

    Args:
        base_url: of the server.
        journal: path of answers.jsonl.
        cut: whether completions are cut at stop sequences.
        deadline: seconds since the epoch; nothing is asked after it, and nothing waited for.
    """

    def __init__(self, base_url: str, journal: str, cut: bool, deadline: float) -> None:
        self.base_url = base_url
        self.journal = Journal.at(Path(journal))
        self.cut = cut
        self.deadline = deadline
        self.reachable = True

    def make_request(self, request: Request) -> RequestResult:
        body, key = request_body(vars(request)), request_key(vars(request))
        reply = self.journal.reply(key)
        cached = reply is not None
        try:
            if reply is None:
                started = time.monotonic()
                reply = checked_reply(self._ask(body), body)
                reply["request_time"] = time.monotonic() - started  # what servers say of it is often no time
            completion = whole = completion_of(reply)
        except Unanswered as why:
            return unanswered(str(why))
        if self.cut:
            kept = len(request.prompt) if request.echo_prompt else 0
            completion = cut_completion(whole, request.stop_sequences, kept)
        if not cached:
            self.journal.add(Answer(key, completion is not whole, reply))
        return RequestResult(
            success=True,
            cached=cached,
            completions=[completion],
            embedding=[],
            request_time=float(reply["request_time"]),
        )

    def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        answer = self._post(body)
        while answer.status_code in BUSY:
            time.sleep(BUSY_SECONDS)
            answer = self._post(body)
        if answer.status_code not in ANSWERED:
            raise Unanswered(f"HTTP {answer.status_code}")
        try:
            reply = answer.json()
        except (ValueError, RecursionError):
            raise Unanswered("the reply is not JSON") from None
        if not isinstance(reply, dict):
            raise Unanswered("the reply is not a JSON object")
        return reply

    def _post(self, body: dict[str, Any]) -> requests.Response:
        """Any reply, over at most four connections."""
        waits = UNREACHABLE_WAITS if self.reachable else ()
        for wait in (*waits, None):
            left = self.deadline - time.time()
            if left <= 0:
                raise Unanswered(LIMIT)
            try:
                answer = requests.post(
                    f"{self.base_url}/process",
                    json=body,
                    timeout=min(left, REPLY_SECONDS),
                    allow_redirects=False,
                )
            except requests.Timeout:
                late = LIMIT if left < REPLY_SECONDS else f"no reply in {REPLY_SECONDS:.0f} s"
                raise Unanswered(late) from None
            except requests.RequestException as error:
                if wait is None:
                    self.reachable = False  # the next request tries once
                    raise Unanswered(f"{BROKEN} ({type(error).__name__})") from None
                time.sleep(wait)
            else:
                self.reachable = True
                return answer
        raise AssertionError("unreachable")


def unanswered(why: str) -> RequestResult:
    flags = ErrorFlags(is_retriable=False, is_fatal=False)  # HELM goes on, with an empty completion
    return RequestResult(
        success=False, cached=False, error=why, error_flags=flags, completions=[], embedding=[]
    )


def completion_of(reply: dict[str, Any]) -> GeneratedOutput:
    """Return a checked reply as HELM takes it."""
    tokens = [Token(text=token["text"], logprob=token["logprob"]) for token in reply["tokens"]]
    return GeneratedOutput(text=reply["text"], logprob=reply["logprob"], tokens=tokens)


def cut_completion(completion: GeneratedOutput, stops: list[str], kept: int = 0) -> GeneratedOutput:
    """The completion up to its first stop sequence, looked for behind the first `kept` characters.

    Tokens are kept up to the one in which the cut falls; if they do not spell the text (a tokenizer
    without spaces, say), all of them are.
    """
    places = [place for stop in stops if stop and (place := completion.text.find(stop, kept)) >= 0]
    if not places:
        return completion
    text = completion.text[: min(places)]
    tokens, length = completion.tokens, 0
    if "".join(token.text for token in tokens) == completion.text[kept:]:
        ends = []
        for token in tokens:
            length += len(token.text)
            ends.append(length)
        tokens = [token for token, end in zip(tokens, ends, strict=True) if end <= len(text) - kept]
    logprob = math.fsum(token.logprob for token in tokens)
    return GeneratedOutput(text=text, logprob=logprob, tokens=tokens)


class EntryTokenizer(Tokenizer):  # type: ignore[misc]
    """Counts and cuts prompts by the definition in the file `path`; asks no server.

    A token is a piece of text.
    """

    def __init__(self, path: str) -> None:
        self.window = Window.read(Path(path))

    def tokenize(self, request: TokenizationRequest) -> TokenizationRequestResult:
        pieces = self.window.pieces(request.text)
        tokens = pieces[: request.max_length] if request.truncation else pieces
        return TokenizationRequestResult(
            success=True, cached=False, text=request.text, tokens=list(map(TokenizationToken, tokens))
        )

    def decode(self, request: DecodeRequest) -> DecodeRequestResult:
        return DecodeRequestResult(success=True, cached=False, text="".join(map(str, request.tokens)))
