"""How fast the model server is: a HELM suite against a server that answers one request at a time.

    python benchmarks/serving.py PACKAGE                    # prompts that need no data
    python benchmarks/serving.py PACKAGE --data resources/stages/open/store/data/scenarios

Both servers have the same model, dtype, threads and machine, run one after the other, and get the same
requests from 8 client threads: what HELM itself asks in 5-shot scenarios, taken from its dry run. The
sequential server is the form of the competition's official sample: `model.generate` behind a lock, one
request after the other (but, unlike the sample, it stops at stop sequences).

Printed, with the goal where there is one:

    suite time            ours / sequential                                        at most 0.25
    processor time        the same of the servers' CPU seconds: what holds on a busy machine
    prompt tokens         computed / distinct prefixes, the least that can be      at most 1.2
    answers               equal texts of all requests                              all
    memory                largest use of keys and values / their bound             at most 1
    multiplication limit  CPU seconds / (FLOPs that are needed / measured FLOP/s of a large product)

`--overhead` alone counts what the engine costs beside the arithmetic (benchmarks/serving_overhead.py).

With --gpu-memory-gb both servers are on the GPU, in the package's dtype.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import requests

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # where Palio is not installed

import serving_overhead

from palio.evaluation import helm
from palio.layout import HelmFolder
from palio.serving.process import ServerProcess

CLIENTS = 8
WITHOUT_DATA = {
    "natural_reasoning": "synthetic_reasoning_natural:difficulty=easy",
    "pattern_match": "synthetic_reasoning:mode=pattern_match",
    "variable_substitution": "synthetic_reasoning:mode=variable_substitution",
    "dyck_language": "dyck_language:num_parenthesis_pairs=3",
}
WITH_DATA = {
    "mmlu": "mmlu:subject=anatomy,method=multiple_choice_joint",
    "truthful_qa": "truthful_qa:task=mc_single,method=multiple_choice_joint",
    "bbq": "bbq:subject=Age,method=multiple_choice_joint",
    "gsm": "gsm:",
}
INSTANCES = 160
"""Of all scenarios together, the same number of each."""


class Spent(NamedTuple):
    """Seconds."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Suite:
    """Requests as HELM posts them."""

    bodies: tuple[dict[str, Any], ...]

    @classmethod
    def of_helm(cls, data: Path | None) -> Suite:
        """From a dry run of HELM in a temporary folder."""
        with tempfile.TemporaryDirectory() as name:
            folder, store = Path(name) / "helm", Path(name) / "data"
            if data:
                for scenario in ("mmlu", "truthful_qa", "bbq", "gsm"):
                    shutil.copytree(data / scenario, store / "scenarios" / scenario)
            scenarios = WITHOUT_DATA | (WITH_DATA if data else {})
            entries = {
                name: [
                    f"{run}{'' if run.endswith(':') else ','}max_train_instances=5,"
                    f"max_eval_instances={INSTANCES // len(scenarios)},model={helm.MODEL}"
                ]
                for name, run in scenarios.items()
            }
            helm_folder = HelmFolder(folder)
            helm.write_helm_folder(helm_folder, entries, store)
            ended = helm.run_helm(helm_folder, threads=1, dry_run=True)
            if ended.code != 0:
                sys.exit(f"HELM's dry run failed: {helm.log_error(helm_folder)}")
            states = [
                state["request"]
                for run in helm.run_folders(helm_folder)
                for state in run.read("scenario_state.json")["request_states"]
            ]
        return cls(
            tuple(
                {
                    "prompt": state["prompt"],
                    "temperature": 1e-7,
                    "num_return_sequences": 1,
                    "max_new_tokens": state["max_tokens"],
                    "top_p": 1,
                    "echo_prompt": False,
                    "top_k_per_token": 1,
                    "stop_sequences": state["stop_sequences"],
                }
                for state in states
            )
        )

    def ask(self, base_url: str, pid: int) -> tuple[Spent, list[dict[str, Any]]]:
        """What all requests took of the server with this process id, and the replies in their order."""

        def post(body: dict[str, Any]) -> dict[str, Any]:
            reply = requests.post(f"{base_url}/process", json=body, timeout=3000)
            reply.raise_for_status()
            return dict(reply.json())

        server = psutil.Process(pid)
        started, used = time.monotonic(), sum(server.cpu_times()[:2])
        with ThreadPoolExecutor(CLIENTS) as pool:
            replies = list(pool.map(post, self.bodies))
        return Spent(time.monotonic() - started, sum(server.cpu_times()[:2]) - used), replies


def distinct_prefixes(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens of the tree that all prompts make: what must be computed at least."""
    root: dict[int, Any] = {}
    count = 0
    for prompt in prompts:
        at = root
        for token in prompt:
            if token not in at:
                at[token] = {}
                count += 1
            at = at[token]
    return count


def metrics(base_url: str) -> dict[str, float]:
    lines = requests.get(f"{base_url}/metrics", timeout=60).text.splitlines()
    return {name.removeprefix("palio_"): float(value) for name, value in map(str.split, lines)}


# --- the server to compare with ---------------------------------------------------------------------


def serve_sequentially(given: argparse.Namespace) -> None:
    import torch
    import uvicorn
    from fastapi import FastAPI
    from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList

    torch.set_num_threads(given.threads)
    device, dtype = ("cuda", "auto") if given.gpu_memory_gb else ("cpu", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(given.package, dtype=dtype).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(given.package)
    lock = threading.Lock()

    class Stops(StoppingCriteria):
        def __init__(self, begin: int, stops: Sequence[str]) -> None:
            self.begin, self.stops = begin, stops

        def __call__(self, ids: Any, scores: Any, **settings: Any) -> Any:
            text = tokenizer.decode(ids[0, self.begin :], skip_special_tokens=True)
            return torch.tensor([any(stop in text for stop in self.stops)], device=ids.device)

    app = FastAPI()

    @app.post("/process")
    def process(body: dict[str, Any]) -> dict[str, Any]:
        with lock, torch.inference_mode():
            ids = tokenizer(body["prompt"], return_tensors="pt").input_ids.to(model.device)
            begin = ids.shape[1]
            output = model.generate(
                ids,
                do_sample=False,
                max_new_tokens=body["max_new_tokens"],
                stopping_criteria=StoppingCriteriaList([Stops(begin, body["stop_sequences"])]),
                pad_token_id=0,
            )[0, begin:]
            text = tokenizer.decode(output, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ends = [text.index(stop) for stop in body["stop_sequences"] if stop in text]
        return {"text": text[: min(ends, default=len(text))], "new_tokens": len(output)}

    @app.get("/health")
    def health() -> None: ...

    uvicorn.run(app, host="127.0.0.1", port=given.sequential_on, log_level="error")


def run_sequentially(suite: Suite, given: argparse.Namespace) -> tuple[Spent, list[Any]]:
    arguments = [str(given.package), "--threads", str(given.threads), "--sequential-on", str(given.port)]
    arguments += ["--gpu-memory-gb", str(given.gpu_memory_gb)] if given.gpu_memory_gb else []
    environment = os.environ | {"OMP_NUM_THREADS": str(given.threads)}
    server = subprocess.Popen([sys.executable, __file__, *arguments], env=environment)
    base_url = f"http://127.0.0.1:{given.port}"
    try:
        while server.poll() is None:
            try:
                requests.get(f"{base_url}/health", timeout=5)
                return suite.ask(base_url, server.pid)
            except requests.ConnectionError:
                time.sleep(0.2)
        sys.exit("the sequential server died")
    finally:
        server.kill()
        server.wait()


# --- the limit ---------------------------------------------------------------------------------------


def seconds_of_multiplications(package: Path, threads: int, tokens: int, rows: int) -> float:
    """For `tokens` through the layers' matrices and `rows` through the head, at the measured rate of a
    product of the model's own widest matrix with 512 rows."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(package, dtype=torch.float32)
    head = model.get_output_embeddings().weight.numel()
    layers = (
        sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear)) - head
    )
    widest = max(
        (
            module
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and "head" not in name
        ),
        key=lambda module: module.weight.numel(),
    )
    many = torch.randn(512, widest.in_features)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(50):
            started = time.perf_counter()
            widest(many)
            best = min(best, time.perf_counter() - started)
    rate = 2 * many.shape[0] * widest.weight.numel() / best
    print(f"a product of 512 rows runs at {rate / 1e9:.0f} GFLOP/s")
    return 2 * (tokens * layers + rows * head) / rate


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, nargs="?")
    parser.add_argument("--overhead", action="store_true", help="count the engine's operations a layer")
    parser.add_argument("--data", type=Path, help="folder laid out as HELM's scenario cache")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cache-gb", type=float, default=1.0, help="bound of our server's memory for keys and values"
    )
    parser.add_argument("--gpu-memory-gb", type=float, help="both servers on the GPU, ours capped at this")
    parser.add_argument("--port", type=int, default=18765, help="of the sequential server")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--sequential-on", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.package is None and not given.overhead:
        parser.error("name a PACKAGE")
    return given


def main() -> None:
    given = arguments()
    if given.overhead:
        serving_overhead.main()
        return
    if given.sequential_on:
        serve_sequentially(given)
        return
    suite = Suite.of_helm(given.data)
    print(f"{len(suite.bodies)} requests, {CLIENTS} clients, {given.threads} threads")
    settings = {"threads": given.threads, "cache_gb": given.cache_gb, "gpu_memory_gb": given.gpu_memory_gb}

    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "server.log"
        with ServerProcess(given.package, log=log, **settings) as server:
            ours, replies = suite.ask(server.base_url, server.pid)
            counts = metrics(server.base_url)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.package)
    prompts = [tokenizer(body["prompt"])["input_ids"] for body in suite.bodies]
    least = distinct_prefixes(prompts)
    computed = counts["prompt_tokens_computed_total"]
    written = counts["new_tokens_total"]
    print(f"prompt tokens   {sum(map(len, prompts))} asked, {least} distinct, {computed:.0f} computed")
    print(f"                {computed / least:.2f} × the least (goal: at most 1.2)")
    print(f"new tokens      {written:.0f}, {written / counts['steps_total']:.1f} a step")
    accepted, drafted = counts["draft_tokens_accepted_total"], counts["draft_tokens_total"]
    print(f"                {accepted:.0f} of them guessed, of {drafted:.0f} guesses")
    half, most = counts["request_seconds_p50"], counts["request_seconds_p95"]
    print(f"latency         p50 {half:.1f} s, p95 {most:.1f} s")
    peak, bound = counts["cache_bytes_peak"] / 1e6, counts["cache_bytes_capacity"] / 1e6
    print(f"memory          {peak:.0f} MB of keys and values, bound {bound:.0f} MB")
    print(f"ours            {ours.wall:.1f} s, {counts['step_seconds_total']:.1f} s of it in steps")
    if not given.gpu_memory_gb:
        size = (int(computed + written), int(written))
        limit = seconds_of_multiplications(given.package, given.threads, *size)
        print(f"                {ours.cpu:.1f} CPU s, {ours.cpu / limit:.1f} × the products' {limit:.1f} s")
    if given.ours_only:
        return
    sequential, expected = run_sequentially(suite, given)
    equal = sum(one["text"] == other["text"] for one, other in zip(replies, expected, strict=True))
    print(f"sequential      {sequential.wall:.1f} s, {sequential.cpu:.1f} CPU s")
    print(
        f"suite time      {ours.wall / sequential.wall:.3f} of the sequential server's (goal: at most 0.25)"
    )
    print(f"processor time  {ours.cpu / sequential.cpu:.3f}")
    print(f"answers         {equal} of {len(replies)} identical")
    for body, one, other in zip(suite.bodies, replies, expected, strict=True):
        if one["text"] != other["text"]:
            print(json.dumps([body["prompt"][-60:], one["text"], other["text"]]))


if __name__ == "__main__":
    main()
