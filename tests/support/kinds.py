"""Kinds of servers that teams of 2023 handed in, as small servers without a model: what each does wrong, what
the probe says of it, and what it costs.

`HONEST` answer every question of a stage, whatever else is wrong with them; `UNFIT` cannot be scored, or not
fairly; `DEAD` are programs, run confined, that end.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any

from fastapi import FastAPI, Response
from pydantic import BaseModel

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
Count = Callable[[str], int]
"""Tokens of a text."""
Body = dict[str, Any]


def completion(body: Body, first: int = 0) -> Body:
    """A reply as the contract has it: so many words, counted from `first`."""
    words = [WORDS[(first + place) % 12] for place in range(body.get("max_new_tokens", 8))]
    text = " ".join(words)
    for stop in body.get("stop_sequences", ()):
        text = text.partition(stop)[0]
    tokens = [{"text": word, "logprob": -0.1 - place} for place, word in enumerate(text.split())]
    if body.get("echo_prompt"):
        echoed = enumerate(body["prompt"].split())
        tokens = [{"text": word, "logprob": -0.2 - place} for place, word in echoed] + tokens
        text = f"{body['prompt']} {text}"
    return {
        "text": text,
        "tokens": tokens,
        "logprob": sum(token["logprob"] for token in tokens),
        "request_time": 0.0,
    }


class Serving:
    """A server of one kind. `process` answers; an exception in it is FastAPI's HTTP 500."""

    def __init__(self, count: Count = lambda text: len(text.split())) -> None:
        self.count = count
        self.app = FastAPI()
        self.app.post("/process")(self.process)
        self.app.post("/tokenize")(self.tokenize)
        self.app.post("/decode")(self.decode)

    def process(self, body: Body) -> Any:
        return completion(body)

    def tokenize(self, body: Body) -> Any:
        """Spells the text in as many pieces as the base model has tokens; 201 of 202 ignored truncation."""
        self.spelled = body["text"]
        return {"tokens": list(range(self.count(body["text"]))), "request_time": 0.0}

    def decode(self, body: Body) -> Any:
        return {"text": self.spelled, "request_time": 0.0}

    def without(self, *paths: str) -> None:
        self.app.router.routes = [route for route in self.app.routes if route.path not in paths]  # type: ignore[attr-defined]


class FailsAtTemperature0(Serving):
    def process(self, body: Body) -> Any:
        if body.get("temperature", 1.0) == 0:
            raise ValueError("temperature has to be a strictly positive float")
        return completion(body)


class HasNoDecode(Serving):
    def __init__(self, count: Count) -> None:
        super().__init__(count)
        self.without("/decode")


class HasNeitherTokenizeNorDecode(Serving):
    def __init__(self, count: Count) -> None:
        super().__init__(count)
        self.without("/tokenize", "/decode")


class Request(BaseModel):
    """The official sample's, under pydantic 2."""

    prompt: str
    max_new_tokens: int = 50
    temperature: float = 0.8
    echo_prompt: bool | None


class NeedsEchoPrompt(Serving):
    def __init__(self, count: Count) -> None:
        super().__init__(count)
        self.without("/process")
        self.app.post("/process")(self.typed)

    def typed(self, request: Request) -> Any:
        return completion(request.model_dump())


class ListsThePromptsTokens(Serving):
    def process(self, body: Body) -> Any:
        reply = completion(body)
        prompt = [
            {"text": word, "logprob": -0.1 - place} for place, word in enumerate(body["prompt"].split())
        ]
        tokens = prompt + reply["tokens"]
        return reply | {"tokens": tokens, "logprob": sum(token["logprob"] for token in tokens)}


class HasOneLogProbability(Serving):
    def process(self, body: Body) -> Any:
        reply = completion(body)
        tokens = [token | {"logprob": -1.0} for token in reply["tokens"]]
        return reply | {"tokens": tokens, "logprob": -1.0 * len(tokens)}


class HasNaN(Serving):
    def process(self, body: Body) -> Any:
        content = json.dumps(completion(body) | {"logprob": math.nan})  # bare, as json.dumps writes it
        return Response(content, media_type="application/json")


class AnswersTextAlone(Serving):
    def process(self, body: Body) -> Any:
        return {"text": completion(body)["text"]}


class ListsTokensAsTexts(Serving):
    def process(self, body: Body) -> Any:
        reply = completion(body)
        return reply | {"tokens": [token["text"] for token in reply["tokens"]]}


class ListsNoTokens(Serving):
    def process(self, body: Body) -> Any:
        return completion(body) | {"tokens": []}


class WritesLogProbabilitiesAsTexts(Serving):
    def process(self, body: Body) -> Any:
        reply = completion(body)
        tokens = [token | {"logprob": str(token["logprob"])} for token in reply["tokens"]]
        return reply | {"tokens": tokens}


class ListsTopLogProbabilities(Serving):
    """As a list, where the contract has a mapping, and more that nobody asked for."""

    def process(self, body: Body) -> Any:
        reply = completion(body)
        tokens = [token | {"top_logprobs": [["one", -0.1]], "id": 7} for token in reply["tokens"]]
        return reply | {"tokens": tokens, "model": "mine", "usage": {"total_tokens": 3}}


class BeginsWithABlank(Serving):
    def process(self, body: Body) -> Any:
        reply = completion(body)
        return reply if body.get("echo_prompt") else reply | {"text": f" {reply['text']}"}


class ReturnsThePrompt(Serving):
    """Whatever echo_prompt says."""

    def process(self, body: Body) -> Any:
        reply = completion({**body, "echo_prompt": False})
        return reply | {"text": f"{body['prompt']} {reply['text']}"}


class HasNoTime(Serving):
    def process(self, body: Body) -> Any:
        return {name: value for name, value in completion(body).items() if name != "request_time"}


class TellsTheLastTokenAsTime(Serving):
    def process(self, body: Body) -> Any:
        return completion(body) | {"request_time": 50256}


class Blocks(Serving):
    def __init__(self, count: Count) -> None:
        super().__init__(count)
        self.without("/process")
        self.app.post("/process")(self.waited_for)

    async def waited_for(self, body: Body) -> Any:
        time.sleep(2.0 if body.get("max_new_tokens", 0) >= 32 else 0)
        return completion(body)


class IgnoresStops(Serving):
    def process(self, body: Body) -> Any:
        return completion({**body, "stop_sequences": []})


class AssertsOnLength(Serving):
    def process(self, body: Body) -> Any:
        assert self.count(body["prompt"]) + body.get("max_new_tokens", 8) <= 2048, "prompt too long"
        assert body["prompt"], "empty"
        return completion(body)


class SwallowsExceptions(Serving):
    def process(self, body: Body) -> Any:
        try:
            raise RuntimeError("CUDA error")
        except RuntimeError:
            return {"text": "", "tokens": [], "logprob": 0.0, "request_time": 0.0}


class HasAnotherTokenizer(Serving):
    def tokenize(self, body: Body) -> Any:
        self.spelled = body["text"]
        return {"tokens": [ord(letter) for letter in body["text"]], "request_time": 0.0}


class WritesMoreThanAskedFor(Serving):
    def process(self, body: Body) -> Any:
        asked = body.get("max_new_tokens", 8)
        return completion(body) | {"text": completion({**body, "max_new_tokens": 2 * asked + 8})["text"]}


class PicksATemplate(Serving):
    """Wraps the prompt in one of several templates, at random."""

    def process(self, body: Body) -> Any:
        return completion(body, first=random.randrange(8))


class HasNoText(Serving):
    def process(self, body: Body) -> Any:
        return {"completion": "one two", "tokens": [], "logprob": 0.0, "request_time": 0.0}


class AnswersNothing(Serving):
    def process(self, body: Body) -> Any:
        return {}


class AlwaysFails(Serving):
    def process(self, body: Body) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered")


class FailsInParallel(Serving):
    in_flight = 0

    def process(self, body: Body) -> Any:
        FailsInParallel.in_flight += 1
        try:
            time.sleep(0.2)  # long enough for requests to overlap on a busy machine
            if FailsInParallel.in_flight > 1:
                raise RuntimeError("Already borrowed")
            return completion(body)
        finally:
            FailsInParallel.in_flight -= 1


class FailsForGoodAfterALongPrompt(Serving):
    broken = False

    def process(self, body: Body) -> Any:
        self.broken = self.broken or self.count(body["prompt"]) > 1500
        if self.broken:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return completion(body)


@dataclass(frozen=True)
class Kind:
    server: Callable[[Count], Serving]
    told: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    """By the check that fails: what it saw, what it costs, what to do; parts of each."""

    @property
    def name(self) -> str:
        return str(getattr(self.server, "__name__", ""))


HONEST = (
    Kind(Serving),
    Kind(
        FailsAtTemperature0,
        {
            "temperature_0": (
                "/process answered HTTP 500",
                "nothing: HELM asks with 1e-7",
                "traceback is in the",
            )
        },
    ),
    Kind(HasNoDecode),
    Kind(HasNeitherTokenizeNorDecode),
    Kind(
        NeedsEchoPrompt,
        {
            "missing_fields": (
                "HTTP 422: echo_prompt missing",
                "nothing: HELM sends every",
                "a default to echo_prompt",
            ),
            "stop_sequences": ("went on behind", "time", "stop at"),
        },
    ),
    Kind(
        ListsThePromptsTokens,
        {"max_new_tokens": ("listed 12 tokens", "nothing: the text is as long", "list the new tokens only")},
    ),
    Kind(
        HasOneLogProbability,
        {
            "log_probabilities": (
                "every token has the log-probability -1",
                "nothing: no score",
                "each token's",
            )
        },
    ),
    Kind(
        HasNaN,
        {"log_probabilities": ("not a finite number", "nothing: no score of this stage", "their sum")},
    ),
    Kind(
        AnswersTextAlone,
        {
            "log_probabilities": ("tokens is not a list", "nothing: no score", "each token's"),
            "request_time": ("request_time says None", "nothing: Palio measures", "seconds"),
        },
    ),
    Kind(
        ListsTokensAsTexts,
        {"log_probabilities": ("tokens is not a list of objects", "nothing: no score", "each token's")},
    ),
    Kind(
        ListsNoTokens,
        {"log_probabilities": ("tokens is empty beside a text", "nothing: no score", "each token's")},
    ),
    Kind(
        WritesLogProbabilitiesAsTexts,
        {"log_probabilities": ("not a finite number", "nothing: no score", "each token's")},
    ),
    Kind(ListsTopLogProbabilities),
    Kind(BeginsWithABlank),
    Kind(
        ReturnsThePrompt,
        {
            "echo_prompt": (
                "echo_prompt=False answered with the prompt",
                "points: answers are scored with the prompt before them",
                "echo only when",
            )
        },
    ),
    Kind(
        HasNoTime,
        {"request_time": ("request_time says None", "nothing: Palio measures", "seconds")},
    ),
    Kind(
        TellsTheLastTokenAsTime,
        {"request_time": ("request_time says 50256", "nothing: Palio measures", "return the seconds")},
    ),
    Kind(Blocks, {"blocking": ("waited", "time: requests wait", "in a thread")}),
    Kind(
        IgnoresStops,
        {
            "stop_sequences": (
                "went on behind the stop sequence 'two'",
                "time: Palio cuts",
                "stop at the first",
            )
        },
    ),
    Kind(
        AssertsOnLength,
        {"odd_prompts": ("prompt of no word: /process answered HTTP 500", "stay unanswered", "traceback")},
    ),
    Kind(
        SwallowsExceptions,
        {
            "not_empty": (
                "answers are empty",
                "an empty answer counts as a wrong one",
                "must not become an empty",
            ),
            "echo_prompt": ("without the prompt", "nothing: no question", "echo only when"),
        },
    ),
    Kind(
        HasAnotherTokenizer,
        {"tokenizer": ("/tokenize counts 67 tokens", "prompts near the window", "serve neither")},
    ),
    Kind(
        WritesMoreThanAskedFor,
        {
            "max_new_tokens": (
                "max_new_tokens=1 gave a text of about",
                "time, and points",
                "at most max_new_tokens",
            )
        },
    ),
)
UNFIT = (
    Kind(
        PicksATemplate,
        {
            "same_answer": (
                "different answers to 5 equal requests",
                "two runs of this entry",
                "nothing at random",
            )
        },
    ),
    Kind(
        HasNoText,
        {
            "answers": (
                "the reply has no text",
                "questions asked like this stay unanswered",
                "answer with text",
            )
        },
    ),
    Kind(
        AnswersNothing,
        {
            "answers": (
                "/process answered {}",
                "questions asked like this stay unanswered",
                "answer with text",
            )
        },
    ),
    Kind(
        AlwaysFails,
        {"answers": ("/process answered HTTP 500", "stay unanswered", "traceback is in the server's log")},
    ),
    Kind(
        FailsInParallel,
        {"parallel_requests": ("HTTP 500", "in flight beside others stay unanswered", "traceback")},
    ),
    Kind(
        FailsForGoodAfterALongPrompt,
        {
            "any_prompt": (
                "since a prompt of a full window, /process answered HTTP 500",
                "the run ends",
                "never end",
            )
        },
    ),
)


class Switchboard:
    """One address for servers of many kinds, so that one run of HELM asks all of them: prompts go round."""

    def __init__(self, servers: dict[str, Serving]) -> None:
        self.servers = servers
        self.turns = itertools.cycle(servers)
        self.asked: dict[str, str] = {}
        """Kind by the prompt it was asked."""
        self.paths: Counter[str] = Counter()
        self.bodies: list[Body] = []

    async def app(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        self.paths[scope["path"]] += 1
        message = await receive()
        content = message.get("body", b"")
        while message.get("more_body"):
            message = await receive()
            content += message.get("body", b"")
        body = json.loads(content)
        self.bodies.append(body)
        prompt = body.get("prompt", "")
        if prompt not in self.asked:
            self.asked[prompt] = next(self.turns)

        async def again() -> Any:
            return {"type": "http.request", "body": content, "more_body": False}

        await self.servers[self.asked[prompt]].app(scope, again, send)


# --- what goes over the wire ----------------------------------------------------------------------------

REPLY = json.dumps({"text": "naïve", "tokens": [], "logprob": 0.0, "request_time": 0.0}, ensure_ascii=False)
Speak = Callable[[str], bytes]
"""What a server writes in reply to a POST to this path, byte by byte; then it hangs up."""


def http_reply(status: str, *headers: str, body: bytes = REPLY.encode()) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode() + body


def with_a_slash(path: str) -> bytes:
    """A route of FastAPI that is declared as /process/."""
    if path.endswith("/"):
        return http_reply("200 OK")
    return http_reply("307 Temporary Redirect", f"Location: http://entry{path}/", body=b"")


def in_chunks(path: str) -> bytes:
    parts = (REPLY.encode()[:7], REPLY.encode()[7:], b"")
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return http_reply("200 OK", "Transfer-Encoding: chunked", body=chunks)


PAGE = b"<!DOCTYPE html><title>Docs</title>"
SPOKEN: dict[str, Speak] = {
    "in chunks": in_chunks,
    "without a length": lambda path: http_reply("200 OK").replace(b"HTTP/1.1", b"HTTP/1.0"),
    "as plain text": lambda path: http_reply("200 OK", "Content-Type: text/plain; charset=ascii"),
    "as created": lambda path: http_reply("201 Created"),
    "with a slash": with_a_slash,
}
GARBLED: dict[str, tuple[Speak, str, str]] = {
    "compressed": (
        lambda path: http_reply("200 OK", "Content-Encoding: gzip", body=gzip.compress(REPLY.encode())),
        "/process answered HTTP 502 (a compressed reply, which was not asked for)",
        "not compressed",
    ),
    "in Latin-1": (
        lambda path: http_reply("200 OK", body=REPLY.encode("latin-1")),
        "/process answered HTTP 502 (a reply that is not UTF-8)",
        "answer with a JSON object in UTF-8",
    ),
    "a page": (
        lambda path: http_reply("200 OK", body=PAGE),
        "/process answered HTTP 502 (a reply that is not JSON)",
        "answer with a JSON object",
    ),
    "sent elsewhere": (
        lambda path: http_reply("302 Found", "Location: /docs", body=b""),
        "/process answered HTTP 502 (HTTP 302, which is a redirect)",
        "serve POST /process itself",
    ),
    "nothing but /docs": (
        lambda path: http_reply("404 Not Found", body=PAGE),
        "/process answered HTTP 404",
        "serve POST /process",
    ),
}
"""What is seen of each, and the fix."""


@contextmanager
def speaking(speak: Speak) -> Iterator[int]:
    """Listen on a port, and say that."""

    class Handler(StreamRequestHandler):
        def handle(self) -> None:
            if not (line := self.rfile.readline()):
                return  # only looked whether anybody listens
            path, length = line.split()[1].decode(), 0
            while line := self.rfile.readline().strip():
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            self.rfile.read(length)
            self.wfile.write(speak(path))

    with ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


# --- programs that end ---------------------------------------------------------------------------------

HTTP = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404)
        self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        reply = json.dumps(answer(body)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)
    def log_message(self, *arguments):
        pass
def answer(body):
    return {"text": "one two", "tokens": [], "logprob": 0.0, "request_time": 0.0}
def serve(port):
    ThreadingHTTPServer(("0.0.0.0", int(port)), Handler).serve_forever()
"""
SERVE = '\nserve(os.environ["PORT"])\n'


@dataclass(frozen=True)
class Dead:
    name: str
    program: str
    told: tuple[str, ...]
    """Parts of the reason that is put on record."""


DEAD = (
    Dead(
        "ends at start",
        'print("loading weights", flush=True)\nraise SystemExit(3)',
        ("the server ended with code 3 before it answered", "its last lines: loading weights"),
    ),
    Dead(
        "lacks a module",
        "import loguru_of_2023",
        ("No module named 'loguru_of_2023'", "hand in loguru_of_2023 with server.files"),
    ),
    Dead("listens on port 80", HTTP + "serve(80)", ("Permission denied", "listen on $PORT")),
    Dead(
        "logs in to the hub",
        'from huggingface_hub import login\nlogin(token="hf_" + "x" * 34)',
        ("the server ended with code 1", "there is no network: drop the login"),
    ),
    Dead(
        "dies on the first prompt",
        HTTP.replace(
            'return {"text"', 'print("KeyError: prompts", flush=True); os._exit(7)\n    return {"text"'
        )
        + SERVE,
        ("the model server died with exit code 7", "KeyError: prompts", "at the probe's check answers"),
    ),
    Dead(
        "dies on a long prompt",
        HTTP.replace('return {"text"', 'len(body["prompt"]) > 5000 and os._exit(9)\n    return {"text"')
        + SERVE,
        (
            "the model server died with exit code 9",
            "at the probe's check any_prompt",
            "prompt of a full window",
        ),
    ),
)
