"""Decide who is next, while people come, leave and change their minds."""

import heapq
from collections.abc import Hashable
from itertools import count
from typing import Any

__all__ = ["PriorityQueue"]


class PriorityQueue:
    """Requests that wait, the one with the lowest priority number first.

    Among equal priorities the one that was pushed first is the first. A priority is anything that
    can be compared with the others, such as numbers or tuples of them; ids need not be comparable.
    A refused call changes nothing. `len` counts the requests that wait, `in` finds their ids.
    Over any row of calls that keeps at most n requests waiting, each call compares priorities less
    than 16 · (1 + log2(n)) times on average; `len` and `in` compare none. The memory that is held
    grows with n and not with the number of calls: no more than 4 · n + 16 priorities.
    """

    def __init__(self) -> None:
        raise NotImplementedError(
            "basic/priority_queue.py: PriorityQueue.__init__ is not written yet "
            "→ sessions/basic/priority_queue.md"
        )

    def push(self, request_id: Hashable, priority: Any) -> None:
        """Let a request wait. Raises ValueError, which names the id, when it waits already."""
        raise NotImplementedError(
            "basic/priority_queue.py: PriorityQueue.push is not written yet "
            "→ sessions/basic/priority_queue.md"
        )

    def peek(self) -> Hashable:
        """Return the id of the first request, which stays. Raises IndexError when nobody waits."""
        raise NotImplementedError(
            "basic/priority_queue.py: PriorityQueue.peek is not written yet "
            "→ sessions/basic/priority_queue.md"
        )

    def pop(self) -> Hashable:
        """Take the first request; returns its id. Raises IndexError when nobody waits."""
        raise NotImplementedError(
            "basic/priority_queue.py: PriorityQueue.pop is not written yet "
            "→ sessions/basic/priority_queue.md"
        )

    def remove(self, request_id: Hashable) -> None:
        """Take a request out, wherever it stands.

        Raises ValueError, which names the id, when it does not wait.
        """
        raise NotImplementedError(
            "basic/priority_queue.py: PriorityQueue.remove is not written yet "
            "→ sessions/basic/priority_queue.md"
        )

    def change(self, request_id: Hashable, priority: Any) -> None:
        """Give a request another priority; among equals it still counts from its push.

        Raises ValueError, which names the id, when it does not wait.
        """
        raise NotImplementedError(
            "basic/priority_queue.py: PriorityQueue.change is not written yet "
            "→ sessions/basic/priority_queue.md"
        )

    def __contains__(self, request_id: Hashable) -> bool:
        raise NotImplementedError(
            "basic/priority_queue.py: PriorityQueue.__contains__ is not written yet "
            "→ sessions/basic/priority_queue.md"
        )

    def __len__(self) -> int:
        raise NotImplementedError(
            "basic/priority_queue.py: PriorityQueue.__len__ is not written yet "
            "→ sessions/basic/priority_queue.md"
        )
