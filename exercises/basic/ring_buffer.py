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
        raise NotImplementedError(
            "basic/ring_buffer.py: RingBuffer.__init__ is not written yet "
            "→ sessions/basic/ring_buffer.md"
        )

    def append(self, item: Any) -> tuple[Any, ...]:
        """Add the latest item; when the buffer is full, the oldest one has to go.

        Returns what was dropped: (), or a tuple with the one item. The buffer holds no reference to
        it any more.
        """
        raise NotImplementedError(
            "basic/ring_buffer.py: RingBuffer.append is not written yet "
            "→ sessions/basic/ring_buffer.md"
        )

    def latest(self, count: int) -> list[Any]:
        """List the latest `count` items, the oldest of them first; all where there are fewer.

        Returns a new list. Raises ValueError, which names count, when it is negative.
        """
        raise NotImplementedError(
            "basic/ring_buffer.py: RingBuffer.latest is not written yet "
            "→ sessions/basic/ring_buffer.md"
        )

    def __len__(self) -> int:
        raise NotImplementedError(
            "basic/ring_buffer.py: RingBuffer.__len__ is not written yet "
            "→ sessions/basic/ring_buffer.md"
        )

    def __getitem__(self, index: int) -> Any:
        """Read an item by its place from the oldest, or with a negative index from the latest.

        index: from -len to len - 1; IndexError names any other one.
        """
        raise NotImplementedError(
            "basic/ring_buffer.py: RingBuffer.__getitem__ is not written yet "
            "→ sessions/basic/ring_buffer.md"
        )

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError(
            "basic/ring_buffer.py: RingBuffer.__iter__ is not written yet "
            "→ sessions/basic/ring_buffer.md"
        )
