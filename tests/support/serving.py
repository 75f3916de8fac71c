"""Packages served in a test, and what transformers itself makes of the same prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from palio.serving.process import ServerProcess
from palio.serving.request import Completion, Request
from palio.serving.transformers_engine import TransformersEngine

VLLM = Path(__file__).parents[2] / ".vllm" / "bin"
"""Where `make vllm-env` installs vLLM."""
SHOTS = "".join(f"Question: What is {n} plus {3 * n}?\nAnswer: {4 * n}\n\n" for n in range(12))
QUESTIONS = [f"{SHOTS}Question: What is {7 * n} plus {n + 5}?\nAnswer:" for n in range(6)]
"""Prompts as HELM makes them: the same examples, then each its own question."""

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
"""Of a config that costs no time."""
GROUPED = {**SMALL, "num_key_value_heads": 2}


@contextmanager
def engine_of(package: Path, *, device: str = "cpu", **settings: Any) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(package, device=device, threads=1, **settings)
    try:
        yield engine
    finally:
        engine.close()


def complete(engine: TransformersEngine, prompts: Sequence[str], **settings: Any) -> list[Completion]:
    """The first completion of each prompt, all of them in flight at once."""
    futures = [engine.submit(Request(prompt, **settings)) for prompt in prompts]
    return [future.result(60)[0] for future in futures]


def generated(package: Path, prompts: Sequence[str], new_tokens: int) -> list[str]:
    """Greedy completions by `model.generate`, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(package, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(package)
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        new = model.generate(ids, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)[
            0, ids.shape[1] :
        ]
        texts.append(tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return texts


def one_core(package: Path) -> Callable[[Path], ServerProcess]:
    """Starts servers of the package on one CPU core, by log file."""
    return lambda log: ServerProcess(package, log=log, threads=1)


def ask(url: str, prompt: str, *, timeout: float = 60, **settings: Any) -> requests.Response:
    """Send one request of HELM's contract to the server at `url`."""
    return requests.post(f"{url}/process", json={"prompt": prompt, **settings}, timeout=timeout)


def metric(server: ServerProcess, name: str) -> float:
    """One of its /metrics, named without `palio_`."""
    lines = requests.get(f"{server.base_url}/metrics", timeout=60).text.splitlines()
    return float(dict(line.split() for line in lines)[f"palio_{name}"])
