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
        raise NotImplementedError(
            "basic/lru_cache.py: LRUCache.__init__ is not written yet → sessions/basic/lru_cache.md"
        )

    def get(self, key: Hashable) -> Any:
        """Return the value of an entry. Raises KeyError when there is none."""
        raise NotImplementedError(
            "basic/lru_cache.py: LRUCache.get is not written yet → sessions/basic/lru_cache.md"
        )

    def put(self, key: Hashable, value: Any) -> tuple[Hashable, Any] | None:
        """Add an entry, or give the one with this key another value; its pins stay.

        Returns the (key, value) that had to go for a new key, None where there was room. Raises
        ValueError, which names the capacity, when every entry is pinned and there is no room.
        """
        raise NotImplementedError(
            "basic/lru_cache.py: LRUCache.put is not written yet → sessions/basic/lru_cache.md"
        )

    def pin(self, key: Hashable) -> None:
        """Hold an entry; each pin needs an unpin of its own. Raises KeyError when there is none."""
        raise NotImplementedError(
            "basic/lru_cache.py: LRUCache.pin is not written yet → sessions/basic/lru_cache.md"
        )

    def unpin(self, key: Hashable) -> None:
        """Let an entry go that was pinned.

        Raises KeyError when there is no such entry, and ValueError, which names the key, when it
        has no pin.
        """
        raise NotImplementedError(
            "basic/lru_cache.py: LRUCache.unpin is not written yet → sessions/basic/lru_cache.md"
        )

    def __contains__(self, key: Hashable) -> bool:
        raise NotImplementedError(
            "basic/lru_cache.py: LRUCache.__contains__ is not written yet "
            "→ sessions/basic/lru_cache.md"
        )

    def __len__(self) -> int:
        raise NotImplementedError(
            "basic/lru_cache.py: LRUCache.__len__ is not written yet → sessions/basic/lru_cache.md"
        )

    def __iter__(self) -> Iterator[Hashable]:
        raise NotImplementedError(
            "basic/lru_cache.py: LRUCache.__iter__ is not written yet → sessions/basic/lru_cache.md"
        )
