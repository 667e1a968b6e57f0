"""Keep what was used lately, and never give away what is in use."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Any

__all__ = ["LRUCache"]


class LRUCache:
    """A cache whose least recently used entry goes first, unless somebody holds it.

    capacity: how many entries there are at most, pinned ones too; ValueError names one below 1.
    An entry is used by `put`, by `get` and by the `unpin` that takes its last pin away. An entry
    with a pin is not evicted. A refused call changes nothing. Any object is a value, None too.
    `len` counts all entries, `in` finds them and is no use of them. Iteration lists the keys that
    may be evicted, in the order in which they would be.
    No call's work grows with the number of entries, pinned ones or others, apart from iteration:
    keys are hashed and compared less than 32 times.
    """

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self._capacity = capacity
        self._values: dict[Hashable, Any] = {}
        # Pinned keys are in the one, all others in the other, the least recently used one first:
        # so no eviction has to look for somebody who may go.
        self._num_pins: dict[Hashable, int] = {}
        self._idle: OrderedDict[Hashable, None] = OrderedDict()

    def get(self, key: Hashable) -> Any:
        """Return the value of an entry. Raises KeyError when there is none."""
        value = self._values[key]
        self._use(key)
        return value

    def put(self, key: Hashable, value: Any) -> tuple[Hashable, Any] | None:
        """Add an entry, or give the one with this key another value; its pins stay.

        Returns the (key, value) that had to go for a new key, None where there was room. Raises
        ValueError, which names the capacity, when every entry is pinned and there is no room.
        """
        evicted = None
        if key not in self._values and len(self._values) == self._capacity:
            if not self._idle:
                raise ValueError(f"all {self._capacity} entries are pinned")
            oldest, _ = self._idle.popitem(last=False)
            evicted = oldest, self._values.pop(oldest)
        self._values[key] = value
        self._use(key)
        return evicted

    def pin(self, key: Hashable) -> None:
        """Hold an entry; each pin needs an unpin of its own. Raises KeyError when there is none."""
        if key not in self._values:
            raise KeyError(key)
        self._num_pins[key] = self._num_pins.get(key, 0) + 1
        self._idle.pop(key, None)

    def unpin(self, key: Hashable) -> None:
        """Let an entry go that was pinned.

        Raises KeyError when there is no such entry, and ValueError, which names the key, when it
        has no pin.
        """
        if key not in self._values:
            raise KeyError(key)
        if key not in self._num_pins:
            raise ValueError(f"{key!r} is not pinned")
        self._num_pins[key] -= 1
        if self._num_pins[key] == 0:
            del self._num_pins[key]
            self._use(key)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._idle)

    def _use(self, key: Hashable) -> None:
        if key not in self._num_pins:
            self._idle[key] = None
            self._idle.move_to_end(key)
