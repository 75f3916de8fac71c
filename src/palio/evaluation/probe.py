"""Conformance of a running server, before HELM spends GPU hours on it.

Each check looks for one defect seen in the entries of 2023. A required check that fails would cost an
entry its run or its scores; a warning costs points or time. Requests are short: the whole probe takes
seconds of a GPU, and about half a minute of a small model on one CPU core.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import requests
from rich.table import Table

from palio.records import ProbeCheck, ProbeReport

PROMPT = "The following are the days of the week: Monday, Tuesday, Wednesday,"
REPLY_SECONDS = 300.0
"""Generous: a server may load its model on the first request, and its machine may be busy."""
TYPICAL_TOKENS = 8
"""New tokens of a timed request, as most of HELM's."""
IN_FLIGHT = 4


class Defect(Exception):
    """What a check saw; its message is the check's `why`."""


@dataclass
class Client:
    """HELM's view of a server: JSON posted to three paths."""

    base_url: str
    failures: dict[str, int] = field(default_factory=dict)
    """HTTP status of odd prompts that ended in the server's own error, by the prompt's name."""

    def post(
        self, path: str, body: dict[str, Any], *, rejectable: str | None = None
    ) -> dict[str, Any] | None:
        """The reply as a dict; None for an HTTP error where the request, named so, may be refused.

        Raises:
            Defect: no reply, another status, or not a JSON object.
        """
        try:
            reply = requests.post(
                f"{self.base_url}/{path}", json=body, timeout=REPLY_SECONDS, allow_redirects=False
            )
        except requests.Timeout:
            raise Defect(f"/{path} gave no reply in {REPLY_SECONDS:.0f} s") from None
        except requests.RequestException as error:
            raise Defect(f"/{path} broke the connection ({type(error).__name__})") from None
        if rejectable and reply.status_code >= 400:
            if reply.status_code >= 500:
                self.failures[rejectable] = reply.status_code
            return None
        if reply.status_code != 200:
            raise Defect(f"/{path} answered HTTP {reply.status_code}")
        try:
            content = reply.json()
        except (ValueError, RecursionError):
            raise Defect(f"/{path} did not answer with JSON") from None
        if not isinstance(content, dict):
            raise Defect(f"/{path} answered with a JSON {type(content).__name__}, not an object")
        return content

    def process(self, prompt: str = PROMPT, **settings: Any) -> dict[str, Any]:
        """A completion, asked for as HELM does."""
        content = self.post("process", helm_body(prompt, **settings))
        assert content is not None
        for key in ("text", "tokens", "logprob", "request_time"):
            if key not in content:
                raise Defect(f"/process answered without {key}")
        if not isinstance(content["text"], str) or not isinstance(content["tokens"], list):
            raise Defect("/process: text must be a string and tokens a list")
        return content


def _is_finite(value: object) -> bool:
    """Return False for truth values, and for integers that no float holds, too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300


def helm_body(prompt: str, **settings: Any) -> dict[str, Any]:
    """What HELM 0.5.16 posts to /process."""
    return {
        "prompt": prompt,
        "temperature": 1e-7,
        "num_return_sequences": 1,
        "max_new_tokens": 4,
        "top_p": 1,
        "echo_prompt": False,
        "top_k_per_token": 1,
        "stop_sequences": [],
    } | settings


# --- the checks --------------------------------------------------------------------------------------


def answers_the_prompt_alone(client: Client) -> None:
    content = client.post("process", {"prompt": PROMPT})
    if not content or "text" not in content:
        raise Defect("/process answered without text")


def answers_helms_body(client: Client) -> None:
    client.process()


def accepts_unknown_fields(client: Client) -> None:
    client.process(field_of_a_later_version=1)


def numbers_are_finite(client: Client) -> None:
    content = client.process()
    parts: list[Any] = [
        token.get("logprob") if isinstance(token, dict) else None for token in content["tokens"]
    ]
    for value in [content["logprob"], content["request_time"], *parts]:
        if not _is_finite(value):
            raise Defect(f"a log-probability or time is {value!r:.50}")
    if abs(sum(parts) - content["logprob"]) > max(0.05, 0.02 * abs(content["logprob"])):
        raise Defect(f"logprob is {content['logprob']:.3f}, its tokens' add up to {sum(parts):.3f}")


def request_time_is_seconds(client: Client) -> None:
    started = time.monotonic()
    said = client.process()["request_time"]
    took = time.monotonic() - started
    if not _is_finite(said):
        raise Defect(f"request_time is {said!r:.50}")
    if not 0 <= said <= took + 0.05:
        raise Defect(f"request_time says {said:.3f}, the whole request took {took:.3f} s")


def echo_prompt_in_all_forms(client: Client) -> None:
    for value in (True, False, None):
        content = client.process(echo_prompt=value)
        starts = content["text"].lstrip().startswith(PROMPT[:20])
        if starts != (value is True):
            raise Defect(f"echo_prompt={value} answered {'with' if starts else 'without'} the prompt")


def zero_temperature_repeats(client: Client) -> None:
    found = {client.process(temperature=t, max_new_tokens=8)["text"] for t in (0, 1e-7, 1e-7)}
    if len(found) > 1:
        raise Defect(f"{len(found)} different answers to one prompt, at temperatures 0 and 1e-7")


def accepts_temperature_one(client: Client) -> None:
    client.process(temperature=1.0)


def counts_new_tokens(client: Client) -> None:
    for wanted in (1, 5, 16):
        found = len(client.process(max_new_tokens=wanted)["tokens"])
        if found > wanted:  # fewer is the model's own end
            raise Defect(f"max_new_tokens={wanted} gave {found} tokens")


def cuts_at_stop_sequences(client: Client) -> None:
    free = client.process(max_new_tokens=12)["text"]
    words = free.split()
    if len(words) < 2:
        raise Defect(f"cannot tell: a free completion of 12 tokens was {free!r}")
    stop = words[1]
    cut = client.process(max_new_tokens=12, stop_sequences=[stop])["text"]
    if stop in cut.rstrip().removesuffix(stop):
        raise Defect(f"went on behind the stop sequence {stop!r}; Palio cuts there, but it costs time")


def survives_any_prompt(client: Client) -> None:
    prompts = {f"{n} words": "word " * n for n in (4000, 2046, 10)}
    for name, prompt in (prompts | {"no word": "", "emoji": "\U0001f40e\U0001f3fd ü \u0000 ok"}).items():
        try:
            client.post(
                "process",
                helm_body(prompt, max_new_tokens=2),
                rejectable=f"prompt of {name}",
            )
        except Defect as defect:
            raise Defect(f"prompt of {name}: {defect}") from None
    client.process()


def refuses_cleanly(client: Client) -> None:
    # Each such question stays without an answer; the server goes on.
    for name, status in client.failures.items():
        raise Defect(f"{name}: HTTP {status}")


def tokenizes_and_decodes(client: Client) -> None:
    content = client.post("tokenize", {"text": PROMPT, "truncation": False, "max_length": 2048})
    if not content or not isinstance(content.get("tokens"), list) or "request_time" not in content:
        raise Defect("/tokenize answered without tokens or request_time")
    back = client.post("decode", {"tokens": content["tokens"]})
    text = (back or {}).get("text")
    if not isinstance(text, str) or PROMPT not in text:
        raise Defect(f"decode(tokenize(text)) is {text!r}")


def truncates_when_tokenizing(client: Client) -> None:
    content = client.post("tokenize", {"text": PROMPT, "truncation": True, "max_length": 4})
    found = len((content or {}).get("tokens", []))
    if not 0 < found <= 4:
        raise Defect(f"truncation to 4 tokens gave {found}")


def serves_in_parallel(client: Client) -> None:
    # Answers may differ in the noise of a batch; that each comes is what counts.
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: client.process(), range(8)))
    client.process()


def listens_while_it_generates(client: Client) -> None:
    def tokenize() -> None:
        client.post("tokenize", {"text": PROMPT, "truncation": False, "max_length": 2048})

    def generate() -> None:
        client.process(max_new_tokens=32)

    def seconds(ask: Callable[[], None]) -> float:
        started = time.monotonic()
        ask()
        return time.monotonic() - started

    alone = seconds(tokenize)
    waits = [0.0]
    with ThreadPoolExecutor(1) as pool:
        generating = pool.submit(seconds, generate)
        while not generating.done():  # asked again and again: the first may come before the completion
            waits.append(seconds(tokenize))
            time.sleep(0.02)
        generation = generating.result()
    # One that waits sits through nearly the whole completion; a busy machine makes all of them slow.
    if max(waits) > max(0.5 * generation, 0.5 + 5 * alone):
        raise Defect(f"/tokenize waited {max(waits):.1f} s for another request's completion")


@dataclass(frozen=True)
class CheckOf:
    name: str
    required: bool
    run: Callable[[Client], None]
    fix: str


CHECKS = (
    CheckOf(
        "prompt alone", True, answers_the_prompt_alone, "give every field of the request but prompt a default"
    ),
    CheckOf("HELM's request", True, answers_helms_body, "answer text, tokens, logprob and request_time"),
    CheckOf("unknown fields", True, accepts_unknown_fields, "ignore fields that you do not know"),
    CheckOf(
        "finite numbers", True, numbers_are_finite, "replace NaN and infinities; logprob is its tokens' sum"
    ),
    CheckOf("request_time", False, request_time_is_seconds, "return the seconds the request took"),
    CheckOf(
        "echo_prompt",
        True,
        echo_prompt_in_all_forms,
        "accept true, false and null; echo only when it is true",
    ),
    CheckOf(
        "temperature 0", True, zero_temperature_repeats, "decode greedily where temperature is below 1e-5"
    ),
    CheckOf("temperature 1", True, accepts_temperature_one, "sample where temperature is above 0"),
    CheckOf(
        "max_new_tokens",
        True,
        counts_new_tokens,
        "return the new tokens only, at most max_new_tokens of them",
    ),
    CheckOf("stop sequences", False, cuts_at_stop_sequences, "cut the completion at the first stop sequence"),
    CheckOf("any prompt", True, survives_any_prompt, "never crash, whatever the prompt"),
    CheckOf(
        "long prompts",
        False,
        refuses_cleanly,
        "cut long prompts to the context, or answer 4xx; assert nothing",
    ),
    CheckOf("decode", True, tokenizes_and_decodes, "serve /tokenize and /decode, the inverse of each other"),
    CheckOf(
        "tokenize, truncated", True, truncates_when_tokenizing, "return at most max_length tokens on request"
    ),
    CheckOf(
        "parallel requests",
        True,
        serves_in_parallel,
        "queue requests; do not share state among them",
    ),
    CheckOf(
        "blocking",
        False,
        listens_while_it_generates,
        "generate outside the event loop: in a thread, or behind a queue",
    ),
)
SPEED = CheckOf("speed", False, lambda client: None, "batch requests, or use a smaller or quantised model")
"""A warning: an entry that is too slow is asked until the limit, and keeps what it answered."""


def probe(base_url: str, *, planned_requests: int, time_limit: float) -> ProbeReport:
    """Run every check against a server. `time_limit` is the stage's, in seconds.

    A server that does not answer the first two checks is asked no more: the rest are `skipped`.
    """
    client = Client(base_url.rstrip("/"))
    checks: list[ProbeCheck] = []
    projected = None
    for check in (*CHECKS, SPEED):
        if any(done.state == "fail" for done in checks[:2]) and len(checks) >= 2:
            checks.append(_outcome(check, "skipped", "the server does not answer", check.fix))
            continue
        try:
            why = "as it should be"
            if check is SPEED:
                rate, seconds = _speed(client)
                projected = planned_requests * seconds
                why = (
                    f"{rate:.0f} tokens/s: {planned_requests} requests take about {projected:.0f} s of the"
                    f" stage's {time_limit:.0f} s"
                )
                if projected > time_limit:
                    raise Defect(why)
            else:
                check.run(client)
            checks.append(_outcome(check, "pass", why, ""))
        except Defect as defect:
            checks.append(_outcome(check, "fail", str(defect), check.fix))
    return ProbeReport(
        checks=tuple(checks),
        planned_requests=planned_requests,
        time_limit=time_limit,
        projected_seconds=projected,
    )


def _outcome(check: CheckOf, state: Literal["pass", "fail", "skipped"], why: str, fix: str) -> ProbeCheck:
    return ProbeCheck(name=check.name, required=check.required, state=state, why=why, fix=fix)


def _speed(client: Client) -> tuple[float, float]:
    """Tokens, read and written, per second and seconds per request, with prompts like HELM's: examples that
    all of them share, then a question of their own, several in flight."""
    examples = "Question: what is the word? Answer: the word is word.\n" * 20
    prompts = [f"{examples}Question {i}: " + f"what is the word {i}? " * 5 for i in range(IN_FLIGHT)]
    content = client.post("tokenize", {"text": prompts[0], "truncation": False, "max_length": 2048})
    started = time.monotonic()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        replies = list(pool.map(lambda text: client.process(text, max_new_tokens=TYPICAL_TOKENS), prompts))
    seconds = time.monotonic() - started
    tokens = IN_FLIGHT * len((content or {}).get("tokens", [])) + sum(len(one["tokens"]) for one in replies)
    return tokens / seconds, seconds / IN_FLIGHT


def probe_table(report: ProbeReport) -> Table:
    """The report for a terminal."""
    table = Table("check", "", "why", "fix", title="Conformance", title_justify="left")
    styles = {"pass": "green", "fail": "red", "skipped": "yellow"}
    for check in report.checks:
        state = "warning" if check.state == "fail" and not check.required else check.state
        style = "yellow" if state == "warning" else styles[check.state]
        table.add_row(check.name, f"[{style}]{state}[/{style}]", check.why, check.fix)
    return table
