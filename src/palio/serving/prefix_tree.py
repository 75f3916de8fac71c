"""What the server has read so far, as a tree: prompts that begin alike share the nodes of their beginning.

A node holds a run of tokens and the keys and values the model made of them, so what two prompts share is
computed once and stored once. Nodes that no running request needs stay for later ones until their room
is wanted; the least recently used go first, leaves before what they hang on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

_serials = itertools.count()


class Node:
    """A run of tokens behind its parent's. `filled` of them are computed, in order."""

    __slots__ = (
        "begin",
        "capacity",
        "children",
        "filled",
        "memory",
        "parent",
        "serial",
        "tokens",
        "used",
        "users",
    )

    def __init__(self, parent: Node | None, tokens: list[int], begin: int, capacity: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.begin = begin
        """Position of the first token in its sequence."""
        self.capacity = capacity
        """Tokens there is room for."""
        self.filled = 0
        self.children: dict[int, Node] = {}
        """By first token."""
        self.memory: dict[int, Any] = {}
        """Layer -> (2, heads, capacity, size) tensor of keys and values."""
        self.users = 0
        """Running sequences that end here."""
        self.used = 0
        self.serial = next(_serials)

    def path(self) -> list[Node]:
        """From the first node behind the root to this one."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class PrefixTree:
    """Nodes of at most `capacity` tokens in all, running sequences' own included."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.size = 0
        """Tokens there is room for in all nodes now."""
        self.peak = 0
        """The largest `size` so far."""
        self.evicted = 0
        """Tokens forgotten so far."""
        self.root = Node(None, [], 0, 0)
        self._clock = 0

    def find(self, tokens: Sequence[int]) -> int:
        """How many of the first tokens the tree has."""
        node, at = self.root, 0
        while at < len(tokens) and (child := node.children.get(tokens[at])):
            same = _common(child.tokens, tokens, at)
            at += same
            if same < len(child.tokens):
                break
            node = child
        return at

    def acquire(self, tokens: Sequence[int], own: int, copies: int = 1) -> list[Node] | None:
        """Make the path of `tokens` and below it `copies` nodes with room for `own` tokens each.

        None if there is no room for it beside what running sequences hold.
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
        """A sequence is over: its own tokens are forgotten, its prompt's stay while there is room."""
        self.size -= leaf.capacity
        leaf.memory.clear()
        assert leaf.parent is not None
        leaf.parent.users -= 1

    def clear(self) -> None:
        """Forget what no running sequence needs."""
        for node in self._idle():
            self._remove(node)

    def nodes(self) -> Iterator[Node]:
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _insert(self, tokens: Sequence[int]) -> Node:
        """The node at whose end `tokens` end; what is missing is added, uncomputed."""
        self._clock += 1
        node, at = self.root, 0
        while at < len(tokens):
            child = node.children.get(tokens[at])
            if child is None:
                child = Node(node, list(tokens[at:]), at, len(tokens) - at)
                node.children[tokens[at]] = child
                self.size += child.capacity
                at = len(tokens)
            else:
                same = _common(child.tokens, tokens, at)
                at += same
                if same < len(child.tokens):
                    child = self._split(child, same)
            child.used = self._clock
            node = child
        return node

    def _split(self, node: Node, at: int) -> Node:
        """Put the first `at` tokens of a node into one above it, which is returned.

        The node itself stays the lower one, so sequences that end at it still do.
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
        """Nodes that no running sequence needs, the least recently used first, children before parents."""
        needed = {above for node in self.nodes() if node.users for above in node.path()}
        idle = [node for node in self.nodes() if node not in needed]
        return sorted(idle, key=lambda node: (node.used, -node.begin))

    def _make_room(self, tokens: int) -> bool:
        """Evict until `tokens` more fit; nothing if they cannot."""
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


def _common(run: Sequence[int], tokens: Sequence[int], at: int) -> int:
    """How many tokens of `run` stand in `tokens` from `at` on."""
    count = min(len(run), len(tokens) - at)
    for i in range(count):
        if run[i] != tokens[at + i]:
            return i
    return count
