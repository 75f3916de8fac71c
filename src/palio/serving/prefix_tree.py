"""Prefix cache, a radix tree: prompts with a common prefix share its nodes.

A node holds a run of tokens with their keys and values, so a common prefix is computed and stored once.
Nodes that no running request uses are kept for later ones until their memory is needed, and evicted least
recently used first, children before parents.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

_serials = itertools.count()


class Node:
    """A run of tokens that follows its parent's; the first `filled` of them are computed."""

    def __init__(self, parent: Node | None, tokens: list[int], begin: int, capacity: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.begin = begin
        """Position of the first token in its sequence."""
        self.capacity = capacity
        """Tokens that memory is reserved for."""
        self.filled = 0
        self.children: dict[int, Node] = {}
        """By first token."""
        self.memory: dict[int, Any] = {}
        """Layer -> (2, heads, capacity, size) tensor of keys and values."""
        self.users = 0
        """Running sequences whose shared prefix ends here."""
        self.last_used = 0
        self.serial = next(_serials)

    def path(self) -> list[Node]:
        """Return the nodes from below the root to this one."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class PrefixTree:
    """Nodes with memory for at most `capacity` tokens in all, including running sequences' own."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.size = 0
        """Tokens that memory is reserved for now."""
        self.peak = 0
        """The largest `size` so far."""
        self.evicted = 0
        """Computed tokens evicted so far."""
        self.root = Node(None, [], 0, 0)
        self._clock = 0

    def acquire(self, tokens: Sequence[int], own: int, copies: int = 1) -> list[Node] | None:
        """Add the path of `tokens`, and below it `copies` leaves with memory for `own` tokens each.

        Returns None if running sequences leave too little memory for that.
        """
        node = self._insert(tokens)
        node.users += copies
        if not self._make_room(own * copies):
            node.users -= copies
            if node.parent is not None and not (node.filled or node.users or node.children):
                self._remove(node)
            return None
        self.size += own * copies
        self.peak = max(self.peak, self.size)
        begin = node.begin + len(node.tokens)
        return [Node(node, [], begin, own) for _ in range(copies)]

    def release(self, leaf: Node) -> None:
        """Free a finished sequence's own tokens; its shared prefix stays cached."""
        self.size -= leaf.capacity
        leaf.memory.clear()
        assert leaf.parent is not None
        leaf.parent.users -= 1

    def nodes(self) -> Iterator[Node]:
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _insert(self, tokens: Sequence[int]) -> Node:
        """Return the node that ends where `tokens` end; missing nodes are added, uncomputed."""
        self._clock += 1
        node, position = self.root, 0
        while position < len(tokens):
            child = node.children.get(tokens[position])
            if child is None:
                child = Node(node, list(tokens[position:]), position, len(tokens) - position)
                node.children[tokens[position]] = child
                self.size += child.capacity
                position = len(tokens)
            else:
                common = _common_length(child.tokens, tokens, position)
                position += common
                if common < len(child.tokens):
                    child = self._split(child, common)
            child.last_used = self._clock
            node = child
        return node

    def _split(self, node: Node, at: int) -> Node:
        """Move the first `at` tokens of a node into a new parent, and return that.

        The node itself keeps its end, so sequences that end at it still do.
        """
        assert node.parent is not None
        upper = Node(node.parent, node.tokens[:at], node.begin, at)
        upper.filled = min(node.filled, at)
        upper.memory = {layer: kv[:, :, :at].clone() for layer, kv in node.memory.items()}
        upper.children[node.tokens[at]] = node
        node.parent.children[upper.tokens[0]] = upper
        node.parent = upper
        node.tokens = node.tokens[at:]
        node.begin += at
        node.capacity -= at
        node.filled = max(0, node.filled - at)
        node.memory = {layer: kv[:, :, at:].clone() for layer, kv in node.memory.items()}
        return upper

    def _idle(self) -> list[Node]:
        """Return the nodes that no running sequence uses, in order of eviction."""
        needed = {above for node in self.nodes() if node.users for above in node.path()}
        idle = [node for node in self.nodes() if node not in needed]
        return sorted(idle, key=lambda node: (node.last_used, -node.begin))

    def _make_room(self, tokens: int) -> bool:
        """Evict until `tokens` more fit; evict nothing and return False if they cannot."""
        missing = self.size + tokens - self.capacity
        if missing <= 0:
            return True
        idle = self._idle()
        if sum(node.capacity for node in idle) < missing:
            return False
        for node in idle:
            self.evicted += node.filled
            self._remove(node)
            if self.size + tokens <= self.capacity:
                break
        return True

    def _remove(self, node: Node) -> None:
        assert node.parent is not None
        del node.parent.children[node.tokens[0]]
        self.size -= node.capacity
        node.memory.clear()


def _common_length(run: Sequence[int], tokens: Sequence[int], start: int) -> int:
    """Return how many first tokens of `run` equal those of `tokens` from `start` on."""
    rest = tokens[start : start + len(run)]
    pairs = zip(run, rest, strict=False)
    return next((i for i, (token, other) in enumerate(pairs) if token != other), len(rest))
