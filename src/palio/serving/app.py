"""The HTTP API of a model server: HELM's contract over an `Engine`.

    POST /process    prompt and settings → text, tokens, logprob, request_time
    POST /tokenize   text → tokens (ids)
    POST /decode     tokens → text
    GET  /health     200 while requests are answered, else 503 with the reason
    GET  /metrics    counters in Prometheus' text format

Invalid requests get a 4xx with the reason, a full queue 429, a broken engine 503, a passed deadline 504.
No prompt is ever logged.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import uvicorn
from fastapi import FastAPI, HTTPException, Response
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, BeforeValidator, Field

from palio.errors import BadInput, ServerBroken
from palio.serving.process import READY, end_with_owner
from palio.serving.request import BadRequest, Completion, QueueFull, Request, RequestFailed, Unavailable

if TYPE_CHECKING:
    from palio.serving.text import Vocabulary

DEADLINE_SECONDS = 2700.0
"""Below the 3000 s after which HELM's client gives up on a request."""
STOP_SECONDS = 2
"""Time for running requests to finish when the server is stopped."""
BROKEN_SECONDS = 1.0
"""How long /health gives the reason before a broken server ends."""

Flag = Annotated[bool, BeforeValidator(lambda value: False if value is None else value)]
Texts = Annotated[tuple[str, ...], BeforeValidator(lambda value: () if value is None else value)]


class Engine(Protocol):
    """A loaded model. Its methods may be called from any thread."""

    vocabulary: Vocabulary

    def submit(self, request: Request) -> Future[list[Completion]]:
        """Queue a request; the future gets its `num_return_sequences` completions.

        Cancelling the future (the client left, the deadline passed) drops the request at the next step.

        Raises:
            BadRequest, QueueFull, Unavailable: see there.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Return gauges, and counters (`*_total`) since the start."""
        ...

    def failure(self) -> str:
        """Return why the engine serves no longer; empty while it does."""
        ...

    def close(self) -> None: ...


class ProcessBody(BaseModel):
    """What HELM posts; every field but the prompt has a default, unknown fields are ignored."""

    prompt: str
    max_new_tokens: int = Field(default=64, ge=0)
    temperature: float = Field(default=1e-7, ge=0, le=100, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    top_k_per_token: int = Field(default=1, ge=1, le=100)
    num_return_sequences: int = Field(default=1, ge=1, le=64)
    echo_prompt: Flag = False
    stop_sequences: Texts = ()
    seed: int = 0


class TokenizeBody(BaseModel):
    text: str
    truncation: Flag = False
    max_length: int = Field(default=2048, ge=1)


class DecodeBody(BaseModel):
    tokens: list[int]


def build_app(engine: Engine, *, deadline: float = DEADLINE_SECONDS) -> FastAPI:
    """Build the HTTP API; a request that takes more than `deadline` seconds is dropped."""
    app = FastAPI(title="Palio model server")

    @app.post("/process")
    async def process(body: ProcessBody, http: HttpRequest) -> dict[str, Any]:
        started = time.monotonic()
        stops = tuple(stop for stop in body.stop_sequences if stop)
        request = Request(**body.model_dump(exclude={"stop_sequences"}), stop_sequences=stops)
        # Tokenizing a long prompt takes milliseconds, which would block the event loop.
        future = await asyncio.to_thread(engine.submit, request)
        completions = await _awaited(asyncio.wrap_future(future), http, deadline)
        return _reply(completions, time.monotonic() - started)

    @app.post("/tokenize")
    def tokenize(body: TokenizeBody) -> dict[str, Any]:
        started = time.monotonic()
        tokens = engine.vocabulary.encode(body.text)[: body.max_length if body.truncation else None]
        return {"tokens": tokens, "request_time": time.monotonic() - started}

    @app.post("/decode")
    def decode(body: DecodeBody) -> dict[str, Any]:
        started = time.monotonic()
        text = engine.vocabulary.decode(body.tokens)
        return {"text": text, "request_time": time.monotonic() - started}

    @app.get("/health")
    async def health() -> Response:
        failure = engine.failure()
        return JSONResponse({"ok": not failure, "reason": failure}, 503 if failure else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        lines = [f"palio_{name} {value:.12g}" for name, value in engine.metrics().items()]
        return PlainTextResponse("\n".join(lines) + "\n")

    for error, status in REFUSALS.items():
        app.exception_handler(error)(_refuse(status))
    return app


async def _awaited(
    answer: asyncio.Future[list[Completion]], http: HttpRequest, deadline: float
) -> list[Completion]:
    """Wait for the answer as long as the client does; then cancel it."""
    disconnected = asyncio.ensure_future(_disconnected(http))
    pending: set[asyncio.Future[Any]] = {answer, disconnected}
    try:
        await asyncio.wait(pending, timeout=deadline, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
    finally:
        disconnected.cancel()
        answer.cancel()
    raise HTTPException(504, f"not answered within {deadline:.0f} s")


REFUSALS: dict[type[Exception], int] = {
    RequestValidationError: 422,
    BadRequest: 422,
    QueueFull: 429,
    RequestFailed: 500,
    Unavailable: 503,
}


def _refuse(status: int) -> Callable[[HttpRequest, Exception], Awaitable[Response]]:
    async def reply(http: HttpRequest, error: Exception) -> Response:
        detail = str(error)
        if isinstance(error, RequestValidationError):  # its own reply repeats the prompt, and cannot say NaN
            detail = "; ".join(f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in error.errors())
        headers = {"Retry-After": "5"} if status == 429 else None
        return JSONResponse({"detail": detail}, status, headers)

    return reply


def _reply(completions: list[Completion], seconds: float) -> dict[str, Any]:
    """Return the first completion in the fields HELM reads; if there are several, all under `completions`."""
    contents = [
        {
            "text": completion.text,
            "tokens": [vars(token) for token in completion.tokens],
            "logprob": completion.logprob,
        }
        for completion in completions
    ]
    several = {"completions": contents} if len(contents) > 1 else {}
    return {**contents[0], **several, "request_time": seconds}


async def _disconnected(http: HttpRequest) -> None:
    """Return when the client closes its connection (the body has been read by then)."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


class _Server(uvicorn.Server):
    """Ends by itself once its engine is broken."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine
        self._end = float("inf")

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; returning True ends the server."""
        if self._engine.failure():
            self._end = min(self._end, time.monotonic() + BROKEN_SECONDS)
        return await super().on_tick(counter) or time.monotonic() >= self._end


def serve(package: Path, *, host: str, port: int, engine: str = "transformers", **settings: Any) -> None:
    """Load the package and serve it until SIGINT or SIGTERM. Port 0 takes any free port.

    `settings` are those of both engines: device, threads, gpu_memory_gb, cache_gb, max_context,
    cpu_dtype.

    Raises:
        BadInput: no such package or device, the port is taken, or vllm is not installed.
        OutOfMemory: the model does not fit, or no memory is left for keys and values.
        ServerBroken: the model, its device or vllm fails for good.
    """
    end_with_owner()
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # until uvicorn's, and after
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise BadInput(
            "--port", "", port, why=str(error.strerror), fix="choose another, or 0 for any"
        ) from None
    loaded: Engine
    if engine == "vllm":
        from palio.serving.vllm_engine import VllmEngine

        loaded = VllmEngine(package, **settings)
    else:
        from palio.serving.transformers_engine import TransformersEngine

        loaded = TransformersEngine(package, **settings)
    try:
        listener.listen(2048)
        print(f"{READY}http://{host}:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
        config = uvicorn.Config(
            build_app(loaded), log_level="warning", access_log=False, timeout_graceful_shutdown=STOP_SECONDS
        )
        _Server(config, loaded).run(sockets=[listener])
        if failure := loaded.failure():
            raise ServerBroken(failure)
    finally:
        loaded.close()
