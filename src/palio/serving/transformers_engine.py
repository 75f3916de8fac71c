"""The default engine: one request after the other through transformers."""

from __future__ import annotations

import queue
import random
import threading
import traceback
from concurrent.futures import Future, InvalidStateError
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils.logging import disable_progress_bar

from palio.errors import BadInput, OutOfMemory
from palio.serving.engine import Completion, QueueFull, Request, Token
from palio.serving.sampling import draw, most_likely
from palio.serving.text import TextStream, Vocabulary, cut, find_stop

QUEUE_LENGTH = 256


def load_model(package: Path, device: str, gpu_memory_gb: float | None) -> Any:
    """The model on its device, in fp32 on a CPU and in its own dtype on a GPU.

    Raises:
        BadInput: no such package or device.
        OutOfMemory: it does not fit.
    """
    if not (package / "config.json").exists():
        raise BadInput(package, "", None, "no config.json; give a folder made by palio package")
    if device not in ("auto", "cpu", "cuda"):
        raise BadInput("--device", "", device, "use auto, cpu or cuda")
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise BadInput("--device", "", device, "no CUDA GPU is visible; use cpu")
    on_gpu = cuda and device != "cpu"
    if on_gpu and gpu_memory_gb is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gpu_memory_gb * 1e9 / total))
    disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(package, dtype="auto" if on_gpu else torch.float32)
        return model.eval().to("cuda" if on_gpu else "cpu")
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(f"{package} does not fit into memory: {error}") from None


class TransformersEngine:
    """See `Engine`."""

    def __init__(
        self,
        package: Path,
        *,
        device: str = "auto",
        threads: int | None = None,
        gpu_memory_gb: float | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._model = load_model(package, device, gpu_memory_gb)
        self._vocabulary = Vocabulary(AutoTokenizer.from_pretrained(package))
        config = self._model.config
        self._context = int(getattr(config, "max_position_embeddings", None) or 2048)
        ends = self._model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self._queue: queue.Queue[tuple[Request, list[int], Future[list[Completion]]] | None] = queue.Queue(
            QUEUE_LENGTH
        )
        self._counts = {"requests_total": 0.0, "prompt_tokens_computed_total": 0.0, "new_tokens_total": 0.0}
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Future[list[Completion]]:
        prompt = self._vocabulary.prompt(request.prompt)
        room = self._context - min(request.max_new_tokens, self._context - 1)
        future: Future[list[Completion]] = Future()
        try:
            self._queue.put_nowait((request, prompt[:room], future))
        except queue.Full:
            raise QueueFull(f"{QUEUE_LENGTH} requests wait already; come back later") from None
        return future

    def tokenize(self, text: str, max_length: int | None = None) -> list[int]:
        return self._vocabulary.encode(text)[:max_length]

    def decode(self, tokens: list[int]) -> str:
        return self._vocabulary.decode(tokens)

    def metrics(self) -> dict[str, float]:
        return dict(self._counts)

    def failure(self) -> str:
        return "" if self._thread.is_alive() else "the engine stopped"

    def close(self) -> None:
        self._queue.put(None)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            request, prompt, future = item
            try:
                answers = [
                    self._complete(
                        request, prompt, random.Random(f"{request.seed} {number} {request.prompt}")
                    )
                    for number in range(request.num_return_sequences)
                    if not future.cancelled()
                ]
                future.set_result(answers)
            except InvalidStateError:
                pass  # cancelled meanwhile
            except Exception as error:
                traceback.print_exc()
                future.set_exception(error)

    @torch.inference_mode()
    def _complete(self, request: Request, prompt: list[int], random_state: random.Random) -> Completion:
        self._counts["requests_total"] += 1
        self._counts["prompt_tokens_computed_total"] += len(prompt)
        cache = DynamicCache(config=self._model.config)
        keep = 0 if request.echo_prompt else 1
        logits = self._forward(prompt, cache, keep)
        echoed: list[Token] = []
        if request.echo_prompt:
            echoed = self._echo(prompt, logits, request.top_k_per_token)
        stream = TextStream(self._vocabulary, prompt)
        tokens: list[Token] = []
        text = ""
        for number in range(min(request.max_new_tokens, self._context - len(prompt))):
            token = draw(logits[-1], request.temperature, request.top_p, random_state)
            if token in self._ends:
                break
            self._counts["new_tokens_total"] += 1
            tokens.append(self._token(logits[-1], token, stream.add(token), request.top_k_per_token))
            text += tokens[-1].text
            if (stop := find_stop(text, request.stop_sequences)) is not None:
                tokens = list(cut(tokens, stop).tokens)
                break
            if number + 1 < request.max_new_tokens:
                logits = self._forward([token], cache, 1)
        tokens = echoed + tokens
        return Completion("".join(token.text for token in tokens), tuple(tokens))

    def _forward(self, tokens: list[int], cache: Any, keep: int) -> torch.Tensor:
        ids = torch.tensor([tokens], device=self._model.device)
        output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def _echo(self, prompt: list[int], logits: torch.Tensor, count: int) -> list[Token]:
        stream = TextStream(self._vocabulary, [])
        tokens = [Token(stream.add(prompt[0]), 0.0)]  # nothing predicts the first
        for position, token in enumerate(prompt[1:]):
            tokens.append(self._token(logits[position], token, stream.add(token), count))
        return tokens

    def _token(self, logits: torch.Tensor, token: int, text: str, count: int) -> Token:
        logprobs = logits.log_softmax(-1)
        best = most_likely(logprobs, count)
        top = {self._vocabulary.visible([one]): value for one, value in best}
        return Token(text, float(logprobs[token]), top)
