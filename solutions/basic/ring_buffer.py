"""Keep the latest items of a stream in a fixed amount of memory."""

from collections.abc import Iterator
from typing import Any

__all__ = ["RingBuffer"]


class RingBuffer:
    """The latest items of a stream: index 0 is the oldest that is kept, index -1 the latest.

    capacity: how many items are kept at most; ValueError names one below 1. Storage for them is
        made once, at the start.
    Any object is an item, None too. `len` counts the kept items; iteration goes from the oldest to
    the latest, and may be repeated and nested.
    """

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self._slots: list[Any] = [None] * capacity
        self._oldest = 0
        self._size = 0

    def append(self, item: Any) -> tuple[Any, ...]:
        """Add the latest item; when the buffer is full, the oldest one has to go.

        Returns what was dropped: (), or a tuple with the one item. The buffer holds no reference to
        it any more.
        """
        capacity = len(self._slots)
        if self._size < capacity:
            self._slots[(self._oldest + self._size) % capacity] = item
            self._size += 1
            return ()
        dropped = self._slots[self._oldest]
        self._slots[self._oldest] = item
        self._oldest = (self._oldest + 1) % capacity
        return (dropped,)

    def latest(self, count: int) -> list[Any]:
        """List the latest `count` items, the oldest of them first; all where there are fewer.

        Returns a new list. Raises ValueError, which names count, when it is negative.
        """
        if count < 0:
            raise ValueError(f"count must be at least 0, got {count}")
        return [self[i] for i in range(max(0, self._size - count), self._size)]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Any:
        """Read an item by its place from the oldest, or with a negative index from the latest.

        index: from -len to len - 1; IndexError names any other one.
        """
        if not -self._size <= index < self._size:
            raise IndexError(f"index {index} is outside a buffer that holds {self._size} items")
        from_oldest = index if index >= 0 else self._size + index
        return self._slots[(self._oldest + from_oldest) % len(self._slots)]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(self._size))
