"""A model server that counts in words, with defects to choose: what the probe and the evaluation meet.

It speaks HELM's HTTP contract in a thread of the test, without a model, so that a whole stage takes seconds.
"""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


class Toy:
    """A conforming server; `defect` breaks one thing.

    Args:
        answer: the completion of a prompt; default: the numbers from one on.
        refuses: whether the n-th request, counted from 1, gets the status `refusal`.
        seconds: what each request takes.
        hangs_after: requests that are answered; the others wait until the server ends.
    """

    def __init__(
        self,
        defect: str = "",
        *,
        answer: Callable[[str], str] | None = None,
        refuses: Callable[[int], bool] = lambda number: False,
        refusal: int = 500,
        seconds: float = 0.0,
        hangs_after: int | None = None,
    ) -> None:
        self.defect = defect
        self.answer = answer
        self.refuses = refuses
        self.refusal = refusal
        self.seconds = seconds
        self.hangs_after = hangs_after
        self.ended = threading.Event()
        self.lock = threading.Lock()
        self.served = 0
        self.in_flight = 0
        self.base_url = ""
        self.stop: Callable[[], None] = lambda: None
        self.dead = False
        self.contained: dict[str, int] = {}
        """What a confinement would have held back."""
        self.app = FastAPI()
        self.app.post("/process")(self.blocking if defect == "blocks" else self.process)
        self.app.post("/tokenize")(self.tokenize)
        if defect != "no decode":
            self.app.post("/decode")(self.decode)

    def alive(self) -> bool:
        return not self.dead

    def exit_code(self) -> int | None:
        return 1 if self.dead else None

    async def blocking(self, request: Request) -> Response:
        """As 201 of 202 entries of 2023: the event loop waits for the completion."""
        body = await request.json()
        time.sleep(2.0 if body.get("max_new_tokens", 0) >= 32 else 0)
        return self.process(body)

    def process(self, body: dict[str, Any]) -> Response:
        started = time.monotonic()
        with self.lock:
            self.served += 1
            number = self.served
            self.in_flight += 1
            crowded = self.in_flight > 1
        try:
            time.sleep(self.seconds)
            if self.hangs_after is not None and number > self.hangs_after:
                self.ended.wait(120)
            if crowded or self.defect == "fails in parallel":
                time.sleep(0.02)
            if self.refuses(number):
                return JSONResponse({}, self.refusal)
            return self.reply(body, started, self.in_flight > 1)
        finally:
            with self.lock:
                self.in_flight -= 1

    def refused(self, body: dict[str, Any], crowded: bool) -> bool:
        return {
            "needs all fields": "echo_prompt" not in body,
            "refuses null": body.get("echo_prompt", False) is None,
            "fails on long prompts": len(body["prompt"].split()) > 2040,
            "refuses temperature 1": body.get("temperature") == 1.0,
            "dies after 3 requests": self.served > 3,
            "fails in parallel": crowded,
        }.get(self.defect, False)

    def reply(self, body: dict[str, Any], started: float, crowded: bool) -> Response:
        defect, prompt = self.defect, body["prompt"]
        if defect == "not JSON":
            return Response(self.answer(prompt) if self.answer else "ok")
        long = defect == "dies on long prompts" and len(prompt.split()) > 2040
        last = {"dies at once": 0, "dies after 10 requests": 10, "dies after 20 requests": 20}.get(defect)
        if long or (last is not None and self.served > last):
            self.dead = True
            self.stop()
            time.sleep(1)  # the connection breaks first
        if defect == "refuses unknown fields" and "field_of_a_later_version" in body:
            return JSONResponse({"detail": "extra fields not permitted"}, 422)
        if self.refused(body, crowded):
            return JSONResponse({}, 500)
        n = body.get("max_new_tokens", 8) + (1 if defect == "counts wrong" else 0)
        start = random.randrange(12) if defect == "samples at 0" else 0
        text = " ".join(WORDS[(start + i) % 12] for i in range(n))
        if self.answer:
            text = self.answer(prompt)
        for stop in body.get("stop_sequences", []):
            if defect != "ignores stops":
                text = text.partition(stop)[0]
        tokens: list[dict[str, Any]] = [
            {"text": word, "logprob": -0.5 - place % 3} for place, word in enumerate(text.split())
        ]
        total = sum(token["logprob"] for token in tokens) - (3 if defect == "wrong sum" else 0)
        if body.get("echo_prompt") and defect != "never echoes":
            text = prompt + " " + text
        content = {
            "text": text,
            "tokens": tokens,
            "logprob": total,
            "request_time": 50256 if defect == "token id as time" else time.monotonic() - started,
        }
        if defect == "no tokens":
            del content["tokens"]
        if defect == "NaN":  # json.dumps writes it bare, as the servers of 2023 did
            return Response(json.dumps(content | {"logprob": math.nan}), media_type="application/json")
        return JSONResponse(content)

    def tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        tokens = [ord(letter) for letter in body["text"]]
        if body["truncation"] and self.defect != "does not truncate":
            tokens = tokens[: body["max_length"]]
        return {"tokens": tokens, "request_time": 0.0}

    def decode(self, body: dict[str, Any]) -> dict[str, Any]:
        shift = 1 if self.defect == "decodes wrong" else 0
        return {"text": "".join(chr(token + shift) for token in body["tokens"]), "request_time": 0.0}


@contextmanager
def serving(toy: Toy) -> Iterator[Toy]:
    server = uvicorn.Server(uvicorn.Config(toy.app, host="127.0.0.1", port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()

    def stop() -> None:
        toy.ended.set()
        server.should_exit = server.force_exit = True

    toy.stop = stop
    try:
        while not server.started:
            time.sleep(0.01)
        toy.base_url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        yield toy
    finally:
        stop()
        thread.join(5)
