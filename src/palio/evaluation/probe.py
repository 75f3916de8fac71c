"""Conformance of a running server, before HELM spends GPU hours on it.

Each check looks for one defect seen in the entries of 2023, and says what it costs the entry: its run, if it
makes scores impossible or unfair, else questions, points, time or nothing. Which of them are required is the
competition's `probe` section. Requests are short: the whole probe takes seconds of a GPU, and about half a
minute of a small model on one CPU core.
"""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import requests
from rich.table import Table

from palio.config import Probe
from palio.errors import BadInput
from palio.evaluation.helm.folder import CONTEXT_TOKENS
from palio.evaluation.reply import BUSY, BUSY_SECONDS, Unanswered, as_number, checked_reply
from palio.evaluation.window import Window
from palio.network import ANSWERED, is_slash_redirect
from palio.records import ProbeCheck, ProbeReport

PROMPT = "The following are the days of the week: Monday, Tuesday, Wednesday,"
REPLY_SECONDS = 300.0
"""Generous: a server may load its model on the first request, and its machine may be busy."""
IMPATIENT_SECONDS = 30.0
"""What each request is given once one had no reply."""
SILENT = 3
"""Requests in a row without a reply, after which nothing more is asked."""
DEATH_SECONDS = 2.0
"""From a broken connection to the end of the process that broke it."""
TYPICAL_TOKENS = 8
"""New tokens of a timed request, as most of HELM's."""
BLOCKED_TIMES = 3
"""Attempts in which a request must wait for another's completion before the server counts as blocking."""
IN_FLIGHT = 4
REPEATS = 5
"""Equal requests: a server that picks one of two templates at random gives five equal answers once in 16."""

GATEWAY = 502
"""The status by which the gateway of a confined server says that there was no reply, or none that passes."""
FULL = "a full window"
UNANSWERED = "questions asked like this stay unanswered"
NOTHING = "nothing: "


class Defect(Exception):
    """What a check saw; `fix` and `cost`, if given, are told instead of the check's own. `status` is that of
    a refusal over HTTP, 500 where there was no reply."""

    def __init__(self, why: str, fix: str = "", cost: str = "", status: int = 500) -> None:
        super().__init__(why)
        self.fix, self.cost, self.status = fix, cost, status


class CannotTell(Exception):
    """Why a check has no answer."""


def helm_body(prompt: str = PROMPT, **settings: Any) -> dict[str, Any]:
    """Return a request of the kind that HELM makes most."""
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


@dataclass(frozen=True)
class Asked:
    """How a stage asks."""

    requests: int = 1
    time_limit: float = 3600.0
    kinds: Sequence[dict[str, Any]] = ()
    """The settings of its requests that differ from each other; empty if the stage is not prepared."""
    cut_at_stop_sequences: bool = True

    @property
    def ranks(self) -> bool:
        """Whether choices are ranked by log-probabilities of an echoed prompt."""
        return any(kind.get("echo_prompt") for kind in self.kinds)


@dataclass
class Client:
    """HELM's view of a server: JSON posted to three paths."""

    base_url: str
    asked: Asked
    window: Window
    """The tokenizer of the declared base model."""
    alive: Callable[[], bool]
    """Whether the server's process lives."""
    refused: dict[str, Defect] = field(default_factory=dict)
    """What odd prompts came to that were not answered, by the prompt's name."""
    texts: list[str] = field(default_factory=list)
    """Completions so far."""
    patience: float = field(default_factory=lambda: REPLY_SECONDS)
    """Seconds for a reply."""
    silent: int = 0
    """Requests in a row that had no reply in time."""
    broken: bool = False
    """A connection broke: the server may have died."""

    def reply(self, path: str, body: dict[str, Any]) -> requests.Response:
        """Return any HTTP reply but that of a full queue, which is waited for. Raises Defect without one."""
        url = f"{self.base_url}/{path}"
        fix = "answer sooner, and load the model before you listen"
        if self.silent >= SILENT:
            raise Defect(f"{SILENT} requests in a row had no reply in time", fix)
        deadline = time.monotonic() + self.patience
        try:
            while True:
                reply = requests.post(url, json=body, timeout=self.patience, allow_redirects=False)
                to = reply.headers.get("Location")
                if not url.endswith("/") and is_slash_redirect(reply.status_code, to, f"/{path}"):
                    url += "/"
                    continue
                if reply.status_code not in BUSY or time.monotonic() > deadline:
                    self.silent = 0
                    return reply
                time.sleep(BUSY_SECONDS)
        except requests.Timeout:
            self.silent += 1
            waited, self.patience = self.patience, min(self.patience, IMPATIENT_SECONDS)
            raise Defect(f"/{path} gave no reply in {waited:g} s", fix) from None
        except requests.RequestException as error:
            self.broken = True
            fix = "answer every request with HTTP; the server's log says what happened"
            raise Defect(f"/{path} broke the connection ({type(error).__name__})", fix) from None

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the reply as a dict. Raises Defect: no reply, a status without an answer, no JSON object."""
        reply = self.reply(path, body)
        if reply.status_code not in ANSWERED:
            self.broken = self.broken or reply.status_code == GATEWAY
            raise _refusal(path, reply)
        if not reply.content.strip():
            raise Defect(f"/{path} answered with nothing", "return the reply from the handler")
        try:
            content = json.loads(reply.content)
        except (ValueError, RecursionError):
            raise Defect(f"/{path} did not answer with JSON", "return a JSON object in UTF-8") from None
        if not isinstance(content, dict):
            kind = type(content).__name__
            raise Defect(f"/{path} answered with a JSON {kind}, not an object", "return a JSON object")
        return content

    def raw(self, prompt: str = PROMPT, **settings: Any) -> dict[str, Any]:
        """Return the whole reply to a request like HELM's."""
        return self.post("process", helm_body(prompt, **settings))

    def complete(self, prompt: str = PROMPT, **settings: Any) -> dict[str, Any]:
        """Return what of a reply is evaluated. Raises Defect where HELM's client would have no answer."""
        body = helm_body(prompt, **settings)
        content = self.post("process", body)
        try:
            kept = checked_reply(content, body)
        except Unanswered as why:
            fix = "answer with text, tokens (of text and logprob), logprob and request_time"
            if not content:
                raise Defect("/process answered {}: the reply has no text", fix) from None
            raise Defect(f"/process: {why}", fix) from None
        if not body["echo_prompt"]:
            self.texts.append(kept["text"])
        return kept

    def lives(self) -> bool:
        """Return whether the server lives; a process takes a moment to end after its connections broke."""
        deadline = time.monotonic() + (DEATH_SECONDS if self.broken else 0.0)
        while alive := self.alive():
            if time.monotonic() >= deadline:
                self.broken = False
                break
            time.sleep(0.1)
        return alive

    def fails(self) -> Defect | None:
        """Return why HELM's usual request has no answer."""
        try:
            self.complete()
        except Defect as defect:
            return defect
        return None


def _refusal(path: str, reply: requests.Response) -> Defect:
    """Return the defect that an HTTP status stands for, each with its own fix."""
    status = reply.status_code
    why = f"/{path} answered HTTP {status}"
    fix = "answer this request"
    if status == 422:
        names = _named_fields(reply)
        given = f" to {', '.join(names)}" if names else ""
        why += f": {', '.join(names)} missing or refused" if names else ""
        fix = f"give a default{given} and accept null (field: type | None = None)"
    elif status in (404, 405):
        fix = f"serve POST /{path}"
    elif status in (GATEWAY, 504):  # with what did not pass
        reason = _gateway_reason(reply)
        why, fix = why + reason, "answer with a JSON object in UTF-8, not compressed, in time"
        if "redirect" in reason:
            fix = f"serve POST /{path} itself"
    elif status >= 500:
        fix = "the handler raised an exception, whose traceback is in the server's log: mend it"
    return Defect(why, fix, status=status)


def _named_fields(reply: requests.Response) -> list[str]:
    """Return the fields that a FastAPI server complains of; nothing of what was sent."""
    try:
        found = [str(error["loc"][-1]) for error in reply.json()["detail"]]
    except (ValueError, RecursionError, KeyError, TypeError, IndexError):
        return []
    return [name for name in dict.fromkeys(found) if name.isidentifier() and len(name) < 40][:5]


def _gateway_reason(reply: requests.Response) -> str:
    try:
        reason = str(reply.json()["error"])[:80]
    except (ValueError, RecursionError, KeyError, TypeError):
        return ""
    return f" ({reason})" if reason.isprintable() else ""


# --- the checks --------------------------------------------------------------------------------------


def answers(client: Client) -> None:
    client.complete()
    for kind in client.asked.kinds:
        settings = kind | {"max_new_tokens": min(4, kind["max_new_tokens"])}
        plain = {key: value for key, value in settings.items() if helm_body().get(key) != value}
        try:
            client.complete(**settings)
        except Defect as defect:
            raise Defect(f"{defect} (with {_shown(plain)})", defect.fix, defect.cost) from None


def _shown(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r:.40}" for key, value in settings.items()) or "HELM's usual request"


def same_answer(client: Client) -> None:
    texts = {client.complete(max_new_tokens=8)["text"] for _ in range(REPEATS)}
    if len(texts) > 1:
        raise Defect(f"{len(texts)} different answers to {REPEATS} equal requests at temperature 1e-7")


def parallel_requests(client: Client) -> None:
    # Answers may differ in the noise of a batch; that each comes is what counts.
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: client.complete(), range(8)))
    client.complete()


def any_prompt(client: Client) -> None:
    odd = {
        FULL: client.window.cut("word " * CONTEXT_TOKENS, CONTEXT_TOKENS - 2),
        "10 words": "word " * 10,
        "no word": "",
        "emoji and a null character": "\U0001f40e\U0001f3fd ü \u0000 ok",
    }
    if client.fails() is not None:
        raise CannotTell("a usual request has no answer either")
    for name, prompt in odd.items():
        try:
            client.complete(prompt, max_new_tokens=2)
        except Defect as defect:
            client.refused[name] = defect
            if (afterwards := client.fails()) is not None:
                raise Defect(f"since a prompt of {name}, {afterwards}") from None


def odd_prompts(client: Client) -> None:
    for name, defect in client.refused.items():
        if defect.status >= 500 or name == FULL:
            raise Defect(f"prompt of {name}: {defect}", defect.fix)


def not_empty(client: Client) -> None:
    if not client.texts:
        raise CannotTell("there is no answer")
    if not any(text.strip() for text in client.texts):
        raise Defect(f"all {len(client.texts)} answers are empty")


def log_probabilities(client: Client) -> None:
    ranks = client.asked.ranks
    content = client.raw(max_new_tokens=1 if ranks else 8, echo_prompt=ranks)
    tokens = content.get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, dict) for token in tokens):
        raise Defect("tokens is not a list of objects with text and logprob")
    parts = [as_number(token.get("logprob")) for token in tokens]
    total = as_number(content.get("logprob"))
    if not all(map(math.isfinite, [total, *parts])):
        raise Defect("a log-probability is missing or not a finite number")
    if not parts and content.get("text"):
        raise Defect("tokens is empty beside a text")
    if len(parts) > 2 and len(set(parts)) == 1:
        raise Defect(f"every token has the log-probability {parts[0]:g}")
    if parts and abs(sum(parts) - total) > max(0.05, 0.02 * abs(total)):
        raise Defect(f"logprob is {total:.3f}, its tokens' add up to {sum(parts):.3f}")


def echo_prompt(client: Client) -> None:
    for value in (True, False, None):
        starts = client.raw(echo_prompt=value).get("text")
        starts = isinstance(starts, str) and starts.lstrip().startswith(PROMPT[:20])
        if starts != (value is True):
            raise Defect(
                f"echo_prompt={value} answered {'with' if starts else 'without'} the prompt",
                cost="points: answers are scored with the prompt before them" if value is False else "",
            )


def stop_sequences(client: Client) -> None:
    words = _new_text(client.complete(max_new_tokens=12)).split()
    if len(words) < 2:
        raise CannotTell("a free completion of 12 tokens has fewer than two words")
    stop = words[1]
    cut = _new_text(client.complete(max_new_tokens=12, stop_sequences=[stop]))
    if stop in cut.rstrip().removesuffix(stop):
        cost = (
            "time: Palio cuts answers there"
            if client.asked.cut_at_stop_sequences
            else "points: answers are scored with all that follows, such as another number"
        )
        raise Defect(f"went on behind the stop sequence {stop!r:.40}", cost=cost)


def _new_text(content: dict[str, Any]) -> str:
    """Return the completion, also of a server that always echoes, of which `echo_prompt` tells."""
    text: str = content["text"]
    return text.lstrip().removeprefix(PROMPT)


def max_new_tokens(client: Client) -> None:
    for wanted in (1, 5, 16):
        content = client.complete(max_new_tokens=wanted)
        listed, written = len(content["tokens"]), client.window.count(_new_text(content))
        if written > 2 * wanted + 2:  # their tokenizer may be another
            raise Defect(f"max_new_tokens={wanted} gave a text of about {written} tokens")
        if listed > wanted:
            cost = NOTHING + "the text is as long as asked for, and only it is scored"
            raise Defect(f"max_new_tokens={wanted} listed {listed} tokens", "list the new tokens only", cost)


def temperature_0(client: Client) -> None:
    client.complete(temperature=0)


def missing_fields(client: Client) -> None:
    if "text" not in client.post("process", {"prompt": PROMPT}):
        raise Defect("/process answered without text")


def unknown_fields(client: Client) -> None:
    client.complete(field_of_a_later_version=1)


def request_time(client: Client) -> None:
    started = time.monotonic()
    said = client.raw().get("request_time")
    took = time.monotonic() - started
    if not 0 <= as_number(said) <= took + 0.05:
        raise Defect(f"request_time says {said!r:.20}, the whole request took {took:.3f} s")


def tokenizer(client: Client) -> None:
    if client.window.estimated:
        raise CannotTell(f"the base model's tokenizer cannot be loaded here ({client.window.estimated})")
    reply = client.reply("tokenize", {"text": PROMPT, "truncation": False, "max_length": CONTEXT_TOKENS})
    if reply.status_code in (404, 405):
        return
    tokens = client.post("tokenize", {"text": PROMPT, "truncation": False, "max_length": CONTEXT_TOKENS})
    listed, ours = tokens.get("tokens"), client.window.count(PROMPT)
    if not isinstance(listed, list):
        raise Defect("/tokenize answered without tokens")
    if abs(len(listed) - ours) > 1:  # with or without a start token
        raise Defect(f"/tokenize counts {len(listed)} tokens, the declared base model's tokenizer {ours}")
    if client.reply("decode", {"tokens": listed}).status_code in (404, 405):
        return
    back = client.post("decode", {"tokens": listed}).get("text")
    if not isinstance(back, str) or PROMPT not in back:
        raise Defect(f"decode(tokenize(text)) is {back!r:.100}")


def blocking(client: Client) -> None:
    def listen() -> None:
        client.reply("tokenize", {"text": PROMPT, "truncation": False, "max_length": 2048})

    def generate() -> None:
        client.complete(max_new_tokens=32)

    def seconds(ask: Callable[[], None]) -> float:
        started = time.monotonic()
        ask()
        return time.monotonic() - started

    def longest_wait() -> tuple[float, float]:
        """Return the seconds of the slowest request beside a completion, and the most that are accepted."""
        alone = seconds(listen)
        waits = [0.0]
        with ThreadPoolExecutor(1) as pool:
            generating = pool.submit(seconds, generate)
            while not generating.done():  # asked again and again: the first may come before the completion
                waits.append(seconds(listen))
                time.sleep(0.02)
            generation = generating.result()
        # A request that is blocked waits for nearly the whole completion.
        return max(waits), max(0.5 * generation, 0.5 + 5 * alone)

    # On a busy machine a request is slow now and then; a server that blocks makes one wait every time.
    for _ in range(BLOCKED_TIMES):
        wait, bound = longest_wait()
        if wait <= bound:
            return
    raise Defect(f"a second request waited {wait:.1f} s for another's completion")


@dataclass(frozen=True)
class Check:
    """A check of `palio.config.Probe`, which says by `run`'s name whether it is required."""

    run: Callable[[Client], None]
    cost: str
    fix: str

    @property
    def name(self) -> str:
        return self.run.__name__


CHECKS = (
    Check(answers, UNANSWERED, "answer with text, tokens, logprob and request_time"),
    Check(
        same_answer,
        "two runs of this entry would have different scores",
        "decode greedily below a temperature of 1e-5, and choose nothing at random",
    ),
    Check(
        parallel_requests,
        "questions in flight beside others stay unanswered",
        "queue requests; do not share state among them",
    ),
    Check(any_prompt, "the run ends at such a question", "never end, whatever the prompt"),
    Check(
        log_probabilities,
        NOTHING + "no score of this stage is made of them",
        "return each token's log-probability, and their sum",
    ),
    Check(
        echo_prompt,
        NOTHING + "no question of this stage asks for an echo",
        "accept true, false and null; echo only when it is true",
    ),
    Check(
        not_empty,
        "an empty answer counts as a wrong one",
        "return the completion; an exception that is caught must not become an empty text",
    ),
    Check(
        odd_prompts,
        "such questions stay unanswered",
        "shorten what does not fit in the context; assert nothing",
    ),
    Check(stop_sequences, "time", "stop at the first stop sequence"),
    Check(
        max_new_tokens,
        "time, and points where an answer is to be one token",
        "return the new tokens only, at most max_new_tokens of them",
    ),
    Check(temperature_0, NOTHING + "HELM asks with 1e-7 instead", "decode greedily below 1e-5"),
    Check(missing_fields, NOTHING + "HELM sends every field", "give every field but prompt a default"),
    Check(unknown_fields, NOTHING + "HELM sends no other field", "ignore fields that you do not know"),
    Check(request_time, NOTHING + "Palio measures the time itself", "return the seconds the request took"),
    Check(
        tokenizer,
        "prompts near the window, if the server counts them as longer and refuses them: Palio shortens them"
        " with the tokenizer of the declared base model",
        "use the base model's tokenizer, or serve neither /tokenize nor /decode",
    ),
    Check(
        blocking,
        "time: requests wait for each other",
        "generate outside the event loop: in a thread, or behind a queue",
    ),
)
RANKED = {
    log_probabilities.__name__: "choices are ranked by them, so answers would be arbitrary",
    echo_prompt.__name__: "choices are ranked by the echoed prompt, so answers would be arbitrary",
}
"""What those checks cost that a stage may need or not, where it does."""


def speed(client: Client) -> tuple[str, float]:
    """Return what was timed, and the seconds that the whole stage would take.

    Prompts are like HELM's: examples that all of them share, then a question of their own, several in flight.
    """
    examples = "Question: what is the word? Answer: the word is word.\n" * 20
    prompts = [f"{examples}Question {i}: " + f"what is the word {i}? " * 5 for i in range(IN_FLIGHT)]
    started = time.monotonic()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        replies = list(pool.map(lambda text: client.complete(text, max_new_tokens=TYPICAL_TOKENS), prompts))
    seconds = time.monotonic() - started
    tokens = sum(client.window.count(text) for text in (*prompts, *(reply["text"] for reply in replies)))
    projected = client.asked.requests * seconds / IN_FLIGHT
    return (
        f"{tokens / seconds:.0f} tokens/s: {client.asked.requests} requests take about {projected:.0f} s"
        f" of the stage's {client.asked.time_limit:.0f} s",
        projected,
    )


# --- all of them -------------------------------------------------------------------------------------


def levels(settings: Probe, asked: Asked) -> dict[str, bool]:
    """Return the checks to make, and whether each is required."""
    chosen = {name: level or ("required" if asked.ranks else "warning") for name, level in settings}
    return {name: level == "required" for name, level in chosen.items() if level != "skip"}


def probe(
    base_url: str,
    asked: Asked,
    window: Window,
    settings: Probe | None = None,
    alive: Callable[[], bool] | None = None,
) -> ProbeReport:
    """Run every check against a server, whatever the others found, as long as it lives.

    Args:
        window: the tokenizer of the declared base model.
        alive: whether the server's process lives; default: whether anybody listens.
    """
    client = Client(base_url.rstrip("/"), asked, window, alive or (lambda: _listens(base_url)))
    required = levels(settings or Probe(), asked)
    checks: list[ProbeCheck] = []
    died, projected = "", None
    for check in CHECKS:
        if check.name not in required:
            continue
        if died:
            checks.append(_skipped(check.name, required[check.name], died))
            continue
        client.broken = False
        checks.append(_made(check, client, required[check.name]))
        if not client.lives():
            died = check.name
    if speed.__name__ in required:
        timed, projected = _speed_check(client, required[speed.__name__], died)
        checks.append(timed)
    return ProbeReport(
        checks=tuple(checks),
        died=died,
        planned_requests=asked.requests,
        time_limit=asked.time_limit,
        projected_seconds=projected,
    )


def _made(check: Check, client: Client, required: bool) -> ProbeCheck:
    cost = RANKED.get(check.name, check.cost) if client.asked.ranks else check.cost
    try:
        check.run(client)
    except CannotTell as reason:
        return ProbeCheck(name=check.name, required=required, state="unknown", why=f"cannot tell: {reason}")
    except Defect as defect:
        # The control: where the usual request fails too, this check has found nothing of its own.
        own = check.run in (answers, any_prompt, tokenizer) or not client.lives()
        if not own and (usual := client.fails()) is not None:
            why = f"cannot tell: the usual request fails ({usual})"
            return ProbeCheck(name=check.name, required=required, state="unknown", why=why)
        return ProbeCheck(
            name=check.name,
            required=required,
            state="fail",
            why=str(defect),
            cost=defect.cost or cost,
            fix=defect.fix or check.fix,
        )
    return ProbeCheck(name=check.name, required=required, state="pass", why="as it should be")


def _skipped(name: str, required: bool, died: str) -> ProbeCheck:
    return ProbeCheck(name=name, required=required, state="skipped", why=f"nobody answers since {died}")


def _speed_check(client: Client, required: bool, died: str) -> tuple[ProbeCheck, float | None]:
    name = speed.__name__
    if died:
        return _skipped(name, required, died), None
    try:
        timed, projected = speed(client)
    except Defect as defect:
        return ProbeCheck(name=name, required=required, state="unknown", why=f"cannot tell: {defect}"), None
    if projected <= client.asked.time_limit:
        return ProbeCheck(name=name, required=required, state="pass", why=timed), projected
    cost = "questions: it is asked until the limit, and keeps what it answered"
    fix = "batch requests, or use a smaller or quantised model"
    return ProbeCheck(name=name, required=required, state="fail", why=timed, cost=cost, fix=fix), projected


def require_server(base_url: str) -> None:
    """Check an address that somebody typed.

    Raises:
        BadInput: it is not one, or nobody listens there.
    """
    if urlsplit(base_url).scheme not in ("http", "https"):
        raise BadInput("palio probe", "URL", base_url, why="is no address", fix=f"write http://{base_url}")
    if not _listens(base_url):
        fix = "start the server, wait until it has loaded its model, or correct host and port"
        raise BadInput("palio probe", "URL", base_url, why="nothing listens there", fix=fix)


def _listens(base_url: str) -> bool:
    try:
        at = urlsplit(base_url)
        socket.create_connection((at.hostname or "", at.port or 80), DEATH_SECONDS).close()
    except (OSError, ValueError):  # such as a port of more than 65535
        return False
    return True


def lines(report: ProbeReport) -> Iterator[str]:
    """Yield a line per check that did not pass, for logs."""
    for check in report.checks:
        if check.state == "fail":
            kind = "required" if check.required else "warning"
            yield f"{check.name} ({kind}): {check.why}; costs {check.cost}; {check.fix}"


def probe_table(report: ProbeReport) -> Table:
    """The report for a terminal."""
    table = Table("check", "", "why", "what it costs", "fix", title="Conformance", title_justify="left")
    styles = {"pass": "green", "fail": "red", "skipped": "yellow", "unknown": "yellow", "warning": "yellow"}
    for check in report.checks:
        state = "warning" if check.state == "fail" and not check.required else check.state
        table.add_row(check.name, f"[{styles[state]}]{state}[/]", check.why, check.cost, check.fix)
    return table
