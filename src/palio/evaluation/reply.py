"""What HELM's requests to /process look like, what a reply must have, and what of it is kept.

Only what a score is made of is insisted on: the text, and log-probabilities where HELM has the prompt echoed,
since there it ranks choices by them. A log-probability that is not a number is NaN, which is a missing value
everywhere; tokens that are not as the contract has them are none; how long a request took is measured by who
asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from palio.provenance import fingerprint

BUSY = (429, 503)
BUSY_SECONDS = 2.0
"""Between attempts at a server whose queue is full: back-pressure, not a failure."""
TOKEN_CHARACTERS = 256
"""Most characters of a token, on average over a reply; the longest tokens of known vocabularies are runs of
128 blanks."""


class Unanswered(Exception):
    """Why a request has no answer. Never quotes prompt or reply."""


def request_body(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return what HELM 0.5.16 posts to /process for its `Request`, given as a mapping of its fields."""
    return {
        "prompt": request["prompt"],
        "temperature": request["temperature"] or 1e-7,
        "num_return_sequences": request["num_completions"],
        "max_new_tokens": request["max_tokens"],
        "top_p": request["top_p"],
        "echo_prompt": request["echo_prompt"],
        "top_k_per_token": request["top_k_per_token"],
        "stop_sequences": list(request["stop_sequences"]),
    }


def request_key(request: Mapping[str, Any]) -> str:
    """Return the key of HELM's `Request`, given as a mapping of its fields, in the journal of answers."""
    # HELM sets `random` where equal requests are to be answered anew.
    return fingerprint([request_body(request), request.get("random")])


def checked_reply(reply: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    """Return a reply's `text`, `tokens` (of `text` and `logprob`) and `logprob`.

    Raises:
        Unanswered: there is no text, a number that is ranked by is missing, or the reply is longer than was
            asked for.
    """
    text = reply.get("text")
    if not isinstance(text, str):
        raise Unanswered("the reply has no text" if text is None else "the reply's text is not a string")
    # Many servers list the prompt's tokens too, echoed or not; a token is at least a byte.
    most = body["max_new_tokens"] + len(body["prompt"].encode("utf-8", "replace"))
    tokens = _tokens(reply.get("tokens"), most)
    characters = most * TOKEN_CHARACTERS
    if max(len(text), sum(len(token["text"]) for token in tokens)) > characters:
        raise Unanswered("the reply has more characters than the tokens that were asked for")
    kept = {"text": text, "tokens": tokens, "logprob": as_number(reply.get("logprob"))}
    if body["echo_prompt"]:
        numbers = [kept["logprob"], *(token["logprob"] for token in tokens)]
        if not tokens or not all(map(math.isfinite, numbers)):
            raise Unanswered("choices are ranked by log-probabilities, and the reply has none")
    return kept


def _tokens(listed: Any, most: int) -> list[dict[str, Any]]:
    if not isinstance(listed, list):
        return []
    if len(listed) > most:
        raise Unanswered("the reply has more tokens than were asked for")
    whole = all(isinstance(token, dict) and isinstance(token.get("text"), str) for token in listed)
    if not whole:
        return []
    return [{"text": token["text"], "logprob": as_number(token.get("logprob"))} for token in listed]


def as_number(value: Any) -> float:
    """Return an int or float as a float; NaN for anything else, truth values and integers that no float holds
    included."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
        return math.nan
    return float(value)
