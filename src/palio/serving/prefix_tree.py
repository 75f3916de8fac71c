"""Prefix cache, a radix tree: prompts with a common prefix share its nodes.

A node holds a run of tokens with their keys and values, so a common prefix is computed and stored once.
Nodes that no running request uses are kept for later ones until their memory is needed, and evicted least
recently used first, children before parents.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from palio.serving.regions import Regions

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
        """Layer -> (2, heads, capacity, size) tensor of keys and values, where nodes have their own."""
        self.offset: int | None = None
        """First row of its keys and values in the pool, where there is one."""
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
    """Nodes with memory for at most `capacity` tokens in all, including running sequences' own.

    With `pool`, every node has a region of it, and a prompt waits until there is one that is long enough.
    """

    def __init__(self, capacity: int, pool: Regions | None = None) -> None:
        self.capacity = capacity
        self._pool = pool
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
        begin = node.begin + len(node.tokens)
        leaves = [Node(node, [], begin, own) for _ in range(copies)]
        if not (self._make_room(own * copies) and self._place([node, *leaves])):
            node.users -= copies
            if node.parent is not None and not (node.filled or node.users or node.children):
                self._remove(node)
            if self.root.children and not self._in_use() and len(tokens) + own * copies <= self.capacity:
                self._clear()  # nothing runs: what is kept stands in the way of a region that is long enough
                return self.acquire(tokens, own, copies)
            return None
        self.size += own * copies
        self.peak = max(self.peak, self.size)
        return leaves

    def release(self, leaf: Node) -> None:
        """Free a finished sequence's own tokens; its shared prefix stays cached."""
        self.size -= leaf.capacity
        self._free(leaf)
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
        if node.offset is not None:
            upper.offset = node.offset
            node.offset += at
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

    def _place(self, nodes: Sequence[Node]) -> bool:
        """Give a region of the pool to each node that has none, evicting for it.

        Returns False, and gives none, if one is not to be had.
        """
        if self._pool is None:
            return True
        given: list[Node] = []
        for node in nodes:
            if node is self.root or node.offset is not None:
                continue
            while (offset := self._pool.take(node.capacity)) is None:
                if not (idle := self._idle()):
                    for other in given:
                        self._free(other)
                    return False
                self.evicted += idle[0].filled
                self._remove(idle[0])
            node.offset = offset
            given.append(node)
        return True

    def _in_use(self) -> bool:
        return bool(self.root.users) or any(node.users for node in self.nodes())

    def _clear(self) -> None:
        for node in self._idle():
            self.evicted += node.filled
            self._remove(node)

    def _remove(self, node: Node) -> None:
        assert node.parent is not None
        del node.parent.children[node.tokens[0]]
        self.size -= node.capacity
        self._free(node)

    def _free(self, node: Node) -> None:
        """Give a node's memory back."""
        node.memory.clear()
        if self._pool is not None and node.offset is not None:
            self._pool.give_back(node.offset, node.capacity)
            node.offset = None


def _common_length(run: Sequence[int], tokens: Sequence[int], start: int) -> int:
    """Return how many first tokens of `run` equal those of `tokens` from `start` on."""
    rest = tokens[start : start + len(run)]
    pairs = zip(run, rest, strict=False)
    return next((i for i, (token, other) in enumerate(pairs) if token != other), len(rest))
