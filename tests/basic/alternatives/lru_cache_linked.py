"""Nodes in a doubly linked list, in which only those without a pin stand."""

from collections.abc import Hashable, Iterator
from typing import Any

__all__ = ["LRUCache"]


class LRUCache:
    """A cache whose least recently used entry goes first, unless somebody holds it."""

    def __init__(self, capacity: int):
        if capacity <= 0:
            raise ValueError(f"a cache for {capacity} entries is none")
        self._room = capacity
        self._nodes: dict[Hashable, _Node] = {}
        self._root = _Node(None, None)
        self._root.before = self._root.behind = self._root

    def get(self, key: Hashable) -> Any:
        """Return the value of an entry."""
        node = self._nodes[key]
        self._touch(node)
        return node.value

    def put(self, key: Hashable, value: Any) -> tuple[Hashable, Any] | None:
        """Add an entry, or give the one with this key another value."""
        node, evicted = self._nodes.get(key), None
        if node is None:
            if len(self._nodes) >= self._room:
                evicted = self._evict()
            node = self._nodes[key] = _Node(key, value)
        node.value = value
        self._touch(node)
        return evicted

    def pin(self, key: Hashable) -> None:
        """Hold an entry."""
        node = self._nodes[key]
        node.pins += 1
        node.leave()

    def unpin(self, key: Hashable) -> None:
        """Let an entry go that was pinned."""
        node = self._nodes[key]
        if not node.pins:
            raise ValueError(f"nobody holds {key!r}")
        node.pins -= 1
        self._touch(node)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[Hashable]:
        node = self._root.behind
        while node is not self._root:
            yield node.key
            node = node.behind

    def _touch(self, node: "_Node") -> None:
        node.leave()
        if not node.pins:
            node.enter_before(self._root)

    def _evict(self) -> tuple[Hashable, Any]:
        node = self._root.behind
        if node is self._root:
            raise ValueError(f"each of the {self._room} entries is held")
        node.leave()
        del self._nodes[node.key]
        return node.key, node.value


class _Node:
    def __init__(self, key: Hashable, value: Any):
        self.key, self.value, self.pins = key, value, 0
        self.before = self.behind = None

    def leave(self) -> None:
        if self.before is not None:
            self.before.behind, self.behind.before = self.behind, self.before
            self.before = self.behind = None

    def enter_before(self, other: "_Node") -> None:
        self.before, self.behind = other.before, other
        other.before.behind = other.before = self
