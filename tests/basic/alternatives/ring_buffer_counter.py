"""A ring that counts everything it was ever given; places follow from the count."""

from collections.abc import Iterator
from typing import Any

__all__ = ["RingBuffer"]


class RingBuffer:
    """The latest items of a stream: index 0 is the oldest that is kept, index -1 the latest."""

    def __init__(self, capacity: int):
        if capacity <= 0:
            raise ValueError(f"a ring of {capacity} items is none")
        self._capacity = capacity
        self._slots = [None] * capacity
        self._num_seen = 0

    def append(self, item: Any) -> tuple[Any, ...]:
        """Add the latest item."""
        place = self._num_seen % self._capacity
        dropped = (self._slots[place],) if self._num_seen >= self._capacity else ()
        self._slots[place] = item
        self._num_seen += 1
        return dropped

    def latest(self, count: int) -> list[Any]:
        """List the latest `count` items."""
        if count < 0:
            raise ValueError(f"{count} items cannot be listed")
        every = list(self)
        return every[len(every) - min(count, len(every)) :]

    def __len__(self) -> int:
        return min(self._num_seen, self._capacity)

    def __getitem__(self, index: int) -> Any:
        """Read an item by its place."""
        place = range(len(self))
        try:
            number = place[index] + self._num_seen - len(self)
        except IndexError:
            raise IndexError(f"no item {index} among {len(self)}") from None
        return self._slots[number % self._capacity]

    def __iter__(self) -> Iterator[Any]:
        split = self._num_seen % self._capacity if len(self) == self._capacity else 0
        return iter((self._slots[split:] + self._slots[:split])[: len(self)])
