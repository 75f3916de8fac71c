"""Servers that benchmarks/serving.py compares with: what transformers itself offers.

    python benchmarks/serving_baselines.py one-at-a-time PACKAGE --port 18765 --threads 1
    python benchmarks/serving_baselines.py continuous PACKAGE --port 18765 --threads 1

`one-at-a-time` has the form of the competition's official sample: `model.generate` behind a lock (but, unlike
the sample, it stops at stop sequences). `continuous` is transformers' continuous batching, which shares whole
pages of common prefixes; it knows no stop sequences, so the server cancels a request at its first.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

PAGE_TOKENS = 32
"""As vLLM's blocks here: with 256, the default, less is shared."""


def cut(text: str, stops: Sequence[str]) -> str:
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


class Server:
    """A model and its tokenizer."""

    def __init__(self, package: Path, dtype: str) -> None:
        device = "cuda" if dtype == "auto" else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(package, dtype=dtype).eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(package)

    def text(self, tokens: Any) -> str:
        return str(
            self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


class OneAtATime(Server):
    def __init__(self, package: Path, dtype: str) -> None:
        super().__init__(package, dtype)
        self._lock = threading.Lock()

    def process(self, body: dict[str, Any]) -> dict[str, Any]:
        class Stops(StoppingCriteria):  # type: ignore[misc]
            def __call__(stopping, ids: Any, scores: Any, **settings: Any) -> Any:  # noqa: N805
                text = self.text(ids[0, begin:])
                return torch.tensor([any(stop in text for stop in body["stop_sequences"])], device=ids.device)

        with self._lock, torch.inference_mode():
            ids = self.tokenizer(body["prompt"], return_tensors="pt").input_ids.to(self.model.device)
            begin = ids.shape[1]
            output = self.model.generate(
                ids,
                do_sample=False,
                max_new_tokens=body["max_new_tokens"],
                stopping_criteria=StoppingCriteriaList([Stops()]),
                pad_token_id=0,
            )
        return {"text": cut(self.text(output[0, begin:]), body["stop_sequences"])}


class Continuous(Server):
    def __init__(self, package: Path, dtype: str, cache_gb: float) -> None:
        super().__init__(package, dtype)
        config = self.model.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token_bytes = (
            2 * config.num_hidden_layers * config.num_key_value_heads * head * self.model.dtype.itemsize
        )
        self._ends = self.model.generation_config.eos_token_id
        self._manager = self.model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=self._ends, max_new_tokens=1),
            ContinuousBatchingConfig(
                page_size=PAGE_TOKENS, num_blocks=int(cache_gb * 1e9 / token_bytes / PAGE_TOKENS)
            ),
        )
        self._manager.start()
        self._ids = map(str, itertools.count())

    async def process(self, body: dict[str, Any]) -> dict[str, Any]:
        name, outputs = next(self._ids), asyncio.Queue[Any]()
        self._manager.register_result_handler(name, outputs.put_nowait)
        self._manager.add_request(
            self.tokenizer(body["prompt"])["input_ids"],
            request_id=name,
            max_new_tokens=body["max_new_tokens"],
            streaming=True,
            eos_token_id=self._ends,
        )
        while True:
            output = await outputs.get()
            text = self.text(output.generated_tokens)
            if output.error:
                raise RuntimeError(output.error)
            if (text := cut(whole := text, body["stop_sequences"])) != whole:
                self._manager.cancel_request(name)
                return {"text": text}
            if output.is_finished():
                return {"text": text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["one-at-a-time", "continuous"])
    parser.add_argument("package", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--cache-gb", type=float, default=1.0)
    parser.add_argument("--dtype", default="float32", help="on a CPU; auto: the package's own, on a GPU")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    server: OneAtATime | Continuous
    if given.kind == "continuous":
        server = Continuous(given.package, given.dtype, given.cache_gb)
    else:
        server = OneAtATime(given.package, given.dtype)
    app = FastAPI()
    app.post("/process")(server.process)
    app.get("/health")(lambda: None)
    uvicorn.run(app, host="127.0.0.1", port=given.port, log_level="error")


if __name__ == "__main__":
    main()
