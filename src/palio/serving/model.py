"""A loaded model that computes chunks of a prefix tree, in the fastest way that gives its own logits.

PooledModel   all chunks in one pass, sequences share prefixes, one kernel call a level: on a GPU
TreeModel     all chunks in one pass, sequences share prefixes, one kernel call a node
PlainModel    one sequence after the other
WholeModel    each sequence from its beginning at every step: for a model without a key-value cache
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers.utils.logging import disable_progress_bar

from palio.cpu import CpuDtype, check_cpu_dtype
from palio.errors import BadInput, OutOfMemory
from palio.serving import attention, pooled
from palio.serving.attention import Chunk, Plan
from palio.serving.pooled import Pool, PooledPlan
from palio.serving.prefix_tree import Node, PrefixTree
from palio.serving.regions import Regions
from palio.tensors import (
    cache_bytes,
    cap_gpu_memory,
    largest_difference,
    last_bits_flipped,
    load_causal_model,
)

DEFAULT_CONTEXT = 2048
"""Tokens, for a model that states no limit."""
CPU_CACHE_GB = 2.0
GPU_SPARE = 0.1
"""Share of the GPU memory cap left for activations."""
TOLERANCE = 10.0
"""Largest difference of a logit from a whole pass, in units of rounding noise: `last_bits_flipped`."""
PROBE = list(range(5, 53))
"""Tokens of the start-up check: ids that every vocabulary has."""


class Model(Protocol):
    """What the engine needs of a model."""

    way: str
    """How it computes, in words for records."""
    context: int
    """Tokens of prompt and completion together."""
    shares: bool
    """Whether sequences can share nodes of a prefix tree."""
    token_bytes: int
    """Memory of the keys and values of one token."""

    def tree(self, capacity: int) -> PrefixTree:
        """Return an empty tree with memory for so many tokens, the only one that this model computes."""
        ...

    def forward(self, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
        """Compute chunks and mark them filled; return (keep, vocabulary) fp32 logits of each, in order.

        A `TreeModel` that raises has marked nothing; any other model is given one chunk at a time.
        """
        ...


def load_model(
    package: Path, device: str, gpu_memory_gb: float | None, cpu_dtype: CpuDtype = "float32"
) -> Model:
    """Load a package: in `cpu_dtype` on a CPU, in its own dtype on a GPU.

    Raises:
        BadInput: no such device, or a dtype that the CPU has no instructions for.
        OutOfMemory: the model does not fit.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise BadInput("--device", "", device, fix="use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device", "", device, why="no CUDA GPU is visible", fix="use cpu")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu and gpu_memory_gb is not None:
        cap_gpu_memory(gpu_memory_gb)
    if not on_gpu:
        check_cpu_dtype(cpu_dtype)
    disable_progress_bar()
    try:
        dtype = "auto" if on_gpu else getattr(torch, cpu_dtype)
        loaded = load_causal_model(package, dtype=dtype)
        loaded.eval().to("cuda" if on_gpu else "cpu")
        return choose_model(loaded)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(f"{package} does not fit in memory: {error}") from None


def choose_model(loaded: Any) -> Model:
    """Return the fastest model that computes the logits of whole passes, and say on stderr why not a faster.

    Raises BadInput if the model cannot compute a text at all.
    """
    original = loaded.config._attn_implementation
    whole = WholeModel(loaded)
    try:
        expected = _whole_pass(whole)
        with last_bits_flipped(loaded, loaded.dtype):
            flipped = largest_difference(expected, _whole_pass(whole))
        noise = max(flipped, torch.finfo(loaded.dtype).eps * float(expected.nan_to_num().abs().max()))
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # another team's model may raise anything
        why = f"it cannot compute a text of {len(PROBE)} tokens ({type(error).__name__}: {error})"
        raise BadInput("package", "model", why=why, fix="use another base model") from error
    ways: list[tuple[type[TreeModel | PlainModel], Callable[[Model], list[torch.Tensor]]]]
    ways = [(TreeModel, _probe_shared), (PlainModel, _probe)]
    if loaded.device.type == "cuda":
        ways.insert(0, (PooledModel, _probe_shared))
    for kind, probe in ways:
        try:
            model = kind(loaded)
            difference = max(largest_difference(expected, logits) for logits in probe(model))
            if difference <= TOLERANCE * noise:
                return model
            reason = f"a logit would be off by {difference:.2g}, rounding changes it by {noise:.2g}"
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        print(f"not served with {kind.way}: {reason}", file=sys.stderr)
        loaded.set_attn_implementation(original)
    return whole


def serving_of(package: Path) -> tuple[str, int]:
    """Return how `palio serve` computes a package on this machine, and its context in tokens.

    Raises as `load_model` does.
    """
    model = load_model(package, "auto", None)
    return model.way, model.context


def check_model(model: Model) -> None:
    """Compute a known text. Raises whatever the model does if it cannot compute anything any more."""
    model.forward([Chunk(_new_leaf(PROBE), 0, len(PROBE), 1)])


def _new_leaf(tokens: list[int]) -> Node:
    return Node(Node(None, [], 0, 0), tokens, 0, len(tokens))


def _whole_pass(model: Model) -> torch.Tensor:
    """Compute the last 16 logits of a known text in one pass."""
    return model.forward([Chunk(_new_leaf(PROBE), 0, 48, 16)])[0]


def _probe(model: Model) -> list[torch.Tensor]:
    """Compute the same logits in four chunks, the last of one token."""
    leaf = _new_leaf(PROBE)
    bounds = ((0, 32, 0), (32, 40, 8), (40, 47, 7), (47, 48, 1))
    return [torch.cat([model.forward([Chunk(leaf, start, stop, keep)])[0] for start, stop, keep in bounds])]


def _probe_shared(model: Model) -> list[torch.Tensor]:
    """Compute the same logits twice, by two sequences that share half the text: a node with those below it
    in one pass, then parts of nodes, then single tokens."""
    tree = model.tree(2 * len(PROBE))
    leaves = [tree.acquire(PROBE[:shared], len(PROBE) - shared) for shared in (32, 24)]
    first, second = (leaf for one in leaves if one for leaf in one)
    first.tokens, second.tokens = PROBE[32:], PROBE[24:]
    upper, lower, _ = first.path()
    _, _, *found = model.forward(
        [Chunk(upper, 0, 24, 0), Chunk(lower, 0, 8, 0), Chunk(first, 0, 8, 8), Chunk(second, 0, 16, 8)]
    )
    for start, stop in ((8, 15), (15, 16)):
        count = stop - start
        found += model.forward([Chunk(first, start, stop, count), Chunk(second, start + 8, stop + 8, count)])
    return [torch.cat(found[::2]), torch.cat(found[1::2])]


def cache_tokens(model: Model, cache_gb: float | None, gpu_memory_gb: float | None) -> int:
    """Return how many tokens' keys and values fit in `cache_gb`, or in the device's default.

    Raises:
        OutOfMemory: not even one full context fits.
    """
    if cache_gb is None and torch.cuda.is_available() and torch.cuda.memory_allocated():
        cap = (gpu_memory_gb or torch.cuda.get_device_properties(0).total_memory / 1e9) * (1 - GPU_SPARE)
        cache_gb = cap - torch.cuda.memory_allocated() / 1e9
    elif cache_gb is None:
        cache_gb = max(CPU_CACHE_GB, model.context * model.token_bytes / 1e9)
    tokens = int(cache_gb * 1e9 // model.token_bytes)
    if tokens < model.context:
        raise OutOfMemory(
            f"{max(0.0, cache_gb):.2f} GB are left for keys and values; one sequence of {model.context} "
            f"tokens needs {model.context * model.token_bytes / 1e9:.2f} GB"
        )
    return tokens


class TreeModel:
    """One forward pass for all chunks, with attention over the tree."""

    shares = True
    way = "shared prefixes"

    attention = attention.NAME

    def __init__(self, loaded: Any) -> None:
        loaded.set_attn_implementation(self.attention)
        if loaded.config._attn_implementation != self.attention:
            raise NotImplementedError("its attention cannot be replaced")
        self._model = loaded
        self._selects_logits = "logits_to_keep" in inspect.signature(loaded.forward).parameters
        leaf = _new_leaf(PROBE[:1])
        plan, _ = self._run([Chunk(leaf, 0, 1, 1)])
        self.context = int(min(context_of(loaded.config), plan.window))
        self.token_bytes = self._bytes(leaf)

    def tree(self, capacity: int) -> PrefixTree:
        return PrefixTree(capacity)

    def _bytes(self, leaf: Node) -> int:
        """Return the memory of the keys and values of a token, given a leaf of one that has been computed."""
        return sum(kv.nbytes for kv in leaf.memory.values())

    def _plan(self, chunks: Sequence[Chunk]) -> Plan | PooledPlan:
        return Plan(chunks)

    def forward(self, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
        plan, logits = self._run(chunks)
        for chunk in chunks:
            chunk.node.filled = chunk.stop
        parts = torch.split(logits, [chunk.keep for chunk in plan.chunks])
        by_chunk = dict(zip(plan.chunks, parts, strict=True))
        return [by_chunk[chunk] for chunk in chunks]

    @torch.inference_mode()
    def _run(self, chunks: Sequence[Chunk]) -> tuple[Plan | PooledPlan, torch.Tensor]:
        plan = self._plan(chunks)
        ids: list[int] = []
        positions: list[int] = []
        kept: list[int] = []
        for chunk, (_, last) in zip(plan.chunks, plan.rows, strict=True):
            ids += chunk.tokens
            positions += range(chunk.node.begin + chunk.start, chunk.node.begin + chunk.stop)
            kept += range(last - chunk.keep, last)
        device = self._model.device
        keep = torch.tensor(kept, dtype=torch.long, device=device)
        output = self._model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            plan=plan,
            **({"logits_to_keep": keep} if self._selects_logits else {}),
        )
        logits = output.logits[0] if self._selects_logits else output.logits[0, keep]
        return plan, logits.float()


class PooledModel(TreeModel):
    """The same with the keys and values of all nodes in one tensor a layer: on a GPU."""

    way = "shared prefixes in one pool"
    attention = pooled.NAME

    def __init__(self, loaded: Any) -> None:
        self._pool = Pool(0, len(PROBE))
        super().__init__(loaded)

    def tree(self, capacity: int) -> PrefixTree:
        self._pool = Pool(capacity, len(PROBE))
        self._run([Chunk(_new_leaf(PROBE[:1]), 0, 1, 1)])  # takes its memory
        return PrefixTree(capacity, Regions(capacity))

    def _bytes(self, leaf: Node) -> int:
        return sum(kv.nbytes for kv in self._pool.layers.values()) // self._pool.rows

    def _plan(self, chunks: Sequence[Chunk]) -> PooledPlan:
        return PooledPlan(chunks, self._pool, self._model.device)


class WholeModel:
    """Every chunk with all tokens before it, without a cache: what the others are compared with."""

    shares = False
    way = "each sequence anew at every token"
    token_bytes = 1

    def __init__(self, loaded: Any) -> None:
        self._model = loaded
        self.context = context_of(loaded.config)

    def tree(self, capacity: int) -> PrefixTree:
        return PrefixTree(capacity)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
        return [self._forward(chunk) for chunk in chunks]

    def _forward(self, chunk: Chunk) -> torch.Tensor:
        ids = torch.tensor([chunk.node.tokens[: chunk.stop]], device=self._model.device)
        output = self._model(input_ids=ids, use_cache=False)
        chunk.node.filled = chunk.stop
        logits: torch.Tensor = output.logits[0, chunk.stop - chunk.keep :].float()
        return logits


class PlainModel(WholeModel):
    """One chunk after the other, each sequence with its own transformers cache."""

    way = "one sequence at a time"

    def __init__(self, loaded: Any) -> None:
        super().__init__(loaded)
        self.token_bytes = cache_bytes(loaded.config, loaded.dtype.itemsize)

    def _forward(self, chunk: Chunk) -> torch.Tensor:
        ids = torch.tensor([chunk.tokens], device=self._model.device)
        output = self._model(input_ids=ids, past_key_values=chunk.node.memory.get(0), use_cache=True)
        chunk.node.memory[0] = output.past_key_values
        chunk.node.filled = chunk.stop
        logits: torch.Tensor = output.logits[0, len(chunk) - chunk.keep :].float()
        return logits


def context_of(config: Any) -> int:
    """Return the tokens of prompt and completion together that a transformers config allows."""
    return int(getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT)
