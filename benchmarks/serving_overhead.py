"""What the server's engine costs beside the arithmetic: tensor operations a layer and step.

    python benchmarks/serving.py --overhead

On a GPU each operation costs time in Python and for its launch, so their number bounds the steps a second of
a model whatever its size. Counted here on a CPU, with a Llama too narrow to cost arithmetic, of requests that
share a prompt and generate: the default way on a CPU (a kernel call for each node), and the way that a GPU is
served (a kernel call for each level, counted as one operation, as it is on a GPU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from palio.serving import pooled
from palio.serving.attention import Chunk
from palio.serving.model import PooledModel, TreeModel
from palio.serving.prefix_tree import Node

IN_FLIGHT = (1, 8, 32, 64)
SHARED, OWN = 200, 40
"""Tokens of the common prompt, and of each request."""


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations, views aside: they start nothing on a device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not operation.is_view
        return operation(*args, **(kwargs or {}))


@contextmanager
def one_kernel(counter: Counter) -> Iterator[None]:
    """Count a call for many sequences as one operation."""
    inner = pooled.attend_many

    def attend_many(*args: Any) -> Any:
        before = counter.count
        result = inner(*args)
        counter.count = before + 1
        return result

    with patch.object(pooled, "attend_many", attend_many):
        yield


def narrow_llama(layers: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def decoding(model: TreeModel, in_flight: int) -> Callable[[], None]:
    """Return a step of so many requests, each generating its next token."""
    leaves = model.tree(SHARED + OWN * in_flight).acquire(list(range(SHARED)), OWN, in_flight) or []
    for number, leaf in enumerate(leaves):
        leaf.tokens = [number]
    parent = leaves[0].parent
    assert parent is not None
    model.forward([Chunk(parent, 0, SHARED, 0), *(Chunk(leaf, 0, 1, 1) for leaf in leaves)])

    def step() -> None:
        for leaf in leaves:
            leaf.tokens.append(7)
        model.forward([next_token(leaf) for leaf in leaves])

    return step


def next_token(leaf: Node) -> Chunk:
    return Chunk(leaf, leaf.filled, leaf.filled + 1, 1)


def operations(kind: type[TreeModel], in_flight: int) -> float:
    """Operations a layer: what four layers need more than two."""
    counts = []
    for layers in (2, 4):
        step = decoding(kind(narrow_llama(layers)), in_flight)
        with Counter() as counter, one_kernel(counter):
            step()
        counts.append(counter.count)
    return float(counts[1] - counts[0]) / 2


def main() -> None:
    print(f"| in flight | {TreeModel.way} | {PooledModel.way} |")
    print("|---|---|---|")
    for in_flight in IN_FLIGHT:
        counts = [operations(kind, in_flight) for kind in (TreeModel, PooledModel)]
        print(f"| {in_flight} | {counts[0]:.0f} | {counts[1]:.0f} |")


if __name__ == "__main__":
    main()
