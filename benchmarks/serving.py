"""How fast the model server is: a HELM suite, against the servers that one would take instead.

    python benchmarks/serving.py PACKAGE                    # prompts that need no data
    python benchmarks/serving.py PACKAGE --data resources/stages/open/store/data/scenarios

All servers have the same model, dtype, threads and machine, run one after the other, and get the same
requests from 8 client threads: what HELM itself asks in 5-shot scenarios, taken from its dry run. They are
ours; vLLM as our engine starts it, where `vllm` is on PATH or `make vllm-env` installed it; transformers'
continuous batching; and one that answers one request at a time, as the competition's official sample does
(serving_baselines.py).

Printed, with the goal where there is one:

    prompt tokens         computed / distinct prefixes, the least that can be      at most 1.2
    memory                largest use of keys and values / their bound             at most 1
    multiplication limit  CPU seconds / (FLOPs that are needed / measured FLOP/s of a large product)
    of each other server  seconds; CPU seconds of all its processes, which a busy machine changes least;
                          ours as a share of these: at most 0.75 of vLLM's, 0.3 of continuous batching's, 0.25
                          of one at a time's; texts equal to ours: of all requests; prompt tokens computed

`--overhead` alone counts what the engine costs beside the arithmetic (benchmarks/serving_overhead.py).

`--cpu-dtype bfloat16` runs all of them in bfloat16; answers differ where two tokens are nearly as likely.
With --gpu-memory-gb all servers are on the GPU, in the package's dtype.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
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
from helm_data import helm_data

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
GOALS = {"vllm": 0.75, "continuous": 0.3, "one-at-a-time": 0.25}
"""Our CPU seconds as a share of another server's."""
VLLM = Path(__file__).parents[1] / ".vllm" / "bin"
"""Where `make vllm-env` installs vLLM."""


class Spent(NamedTuple):
    """Seconds."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Suite:
    """Requests as HELM posts them."""

    bodies: tuple[dict[str, Any], ...]

    @classmethod
    def of_helm(cls, data: Path | None, instances: int) -> Suite:
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
                    f"max_eval_instances={instances // len(scenarios)},model={helm.MODEL}"
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

        started, used = time.monotonic(), cpu_seconds(pid)
        with ThreadPoolExecutor(CLIENTS) as pool:
            replies = list(pool.map(post, self.bodies))
        return Spent(time.monotonic() - started, cpu_seconds(pid) - used), replies


def cpu_seconds(pid: int) -> float:
    """Return what a process and its descendants have used so far."""
    server = psutil.Process(pid)
    return sum(sum(process.cpu_times()[:2]) for process in [server, *server.children(recursive=True)])


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


# --- the servers to compare with ---------------------------------------------------------------------


class Other(NamedTuple):
    """What another server needed for the suite."""

    spent: Spent
    replies: list[dict[str, Any]]
    prompt_tokens_computed: float | None = None


def ask_vllm(suite: Suite, given: argparse.Namespace) -> Other:
    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "server.log"
        with ServerProcess(given.package, log=log, engine="vllm", **server_settings(given)) as server:
            spent, replies = suite.ask(server.base_url, server.pid)
            return Other(spent, replies, metrics(server.base_url)["prompt_tokens_computed_total"])


def ask_baseline(kind: str, suite: Suite, given: argparse.Namespace) -> Other:
    """Ask a server of serving_baselines.py."""
    arguments = [kind, str(given.package), "--threads", str(given.threads), "--port", str(given.port)]
    dtype = "auto" if given.gpu_memory_gb else given.cpu_dtype
    arguments += ["--cache-gb", str(given.cache_gb), "--dtype", dtype]
    environment = os.environ | {"OMP_NUM_THREADS": str(given.threads)}
    program = Path(__file__).with_name("serving_baselines.py")
    server = subprocess.Popen([sys.executable, str(program), *arguments], env=environment)
    base_url = f"http://127.0.0.1:{given.port}"
    try:
        while server.poll() is None:
            try:
                requests.get(f"{base_url}/health", timeout=5)
                return Other(*suite.ask(base_url, server.pid))
            except requests.ConnectionError:
                time.sleep(0.2)
        sys.exit(f"the server {kind} died")
    finally:
        server.kill()
        server.wait()


def compare(suite: Suite, given: argparse.Namespace, ours: Spent, expected: Sequence[dict[str, Any]]) -> None:
    for kind, goal in GOALS.items():
        if kind == "vllm" and shutil.which("vllm") is None:
            print("vllm            not on PATH, and not in .vllm: `make vllm-env` installs it for CPUs")
            continue
        other = ask_vllm(suite, given) if kind == "vllm" else ask_baseline(kind, suite, given)
        spent, computed = other.spent, other.prompt_tokens_computed
        share = f"ours is {ours.wall / spent.wall:.2f} of it, {ours.cpu / spent.cpu:.2f} in CPU s"
        print(f"{kind:<15} {spent.wall:.1f} s, {spent.cpu:.1f} CPU s: {share} (goal: at most {goal})")
        if computed is not None:
            print(f"                {computed:.0f} prompt tokens computed")
        pairs = list(zip(suite.bodies, expected, other.replies, strict=True))
        differing = [
            (body, one["text"], two["text"]) for body, one, two in pairs if one["text"] != two["text"]
        ]
        print(f"                {len(pairs) - len(differing)} of {len(pairs)} answers identical")
        for body, one, two in differing:
            print(json.dumps([body["prompt"][-60:], one, two]))


# --- the limit ---------------------------------------------------------------------------------------


def seconds_of_multiplications(package: Path, threads: int, tokens: int, rows: int, cpu_dtype: str) -> float:
    """For `tokens` through the layers' matrices and `rows` through the head, at the measured rate of a
    product of the model's own widest matrix with 512 rows."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(package, dtype=cpu_dtype)
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
    many = torch.randn(512, widest.in_features, dtype=widest.weight.dtype)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(50):
            started = time.perf_counter()
            widest(many)
            best = min(best, time.perf_counter() - started)
    rate = 2 * many.shape[0] * widest.weight.numel() / best
    print(f"a product of 512 rows runs at {rate / 1e9:.0f} GFLOP/s")
    return float(2 * (tokens * layers + rows * head) / rate)


def server_settings(given: argparse.Namespace) -> dict[str, Any]:
    names = ("threads", "cache_gb", "gpu_memory_gb", "cpu_dtype")
    return {name: getattr(given, name) for name in names}


def ask_ours(suite: Suite, given: argparse.Namespace) -> tuple[Spent, list[dict[str, Any]]]:
    """Ask our server, and print what it needed."""
    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "server.log"
        with ServerProcess(given.package, log=log, **server_settings(given)) as server:
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
        limit = seconds_of_multiplications(given.package, given.threads, *size, given.cpu_dtype)
        print(f"                {ours.cpu:.1f} CPU s, {ours.cpu / limit:.1f} × the products' {limit:.1f} s")
    return ours, replies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, nargs="?")
    parser.add_argument("--overhead", action="store_true", help="count the engine's operations a layer")
    parser.add_argument("--data", type=helm_data, help="folder laid out as HELM's scenario cache")
    parser.add_argument("--instances", type=int, default=160, help="requests, of all scenarios together")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache-gb", type=float, default=1.0, help="of memory for keys and values")
    parser.add_argument("--gpu-memory-gb", type=float, help="all servers on the GPU, ours capped at this")
    parser.add_argument("--cpu-dtype", choices=("float32", "bfloat16"), default="float32", help="on a CPU")
    parser.add_argument("--port", type=int, default=18765, help="of transformers' servers")
    parser.add_argument("--ours-only", action="store_true")
    given = parser.parse_args()
    if given.overhead:
        serving_overhead.main()
        return
    if given.package is None:
        parser.error("name a PACKAGE")
    os.environ["PATH"] += f"{os.pathsep}{VLLM}"
    suite = Suite.of_helm(given.data, given.instances)
    print(f"{len(suite.bodies)} requests, {CLIENTS} clients, {given.threads} threads")
    ours, replies = ask_ours(suite, given)
    if not given.ours_only:
        compare(suite, given, ours, replies)


if __name__ == "__main__":
    main()
