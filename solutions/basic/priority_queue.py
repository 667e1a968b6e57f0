"""Decide who is next, while people come, leave and change their minds."""

import heapq
from collections.abc import Hashable
from dataclasses import dataclass
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
        # An entry whose request has left or changed stays in the heap until it comes up, or until
        # there are more of its kind than of others.
        self._heap: list[_Entry] = []
        self._entries: dict[Hashable, _Entry] = {}
        self._numbers = count()

    def push(self, request_id: Hashable, priority: Any) -> None:
        """Let a request wait. Raises ValueError, which names the id, when it waits already."""
        if request_id in self._entries:
            raise ValueError(f"request {request_id!r} is waiting already")
        self._enter(_Entry(priority, next(self._numbers), request_id))

    def peek(self) -> Hashable:
        """Return the id of the first request, which stays. Raises IndexError when nobody waits."""
        while self._heap:
            first = self._heap[0]
            if self._entries.get(first.request_id) is first:
                return first.request_id
            heapq.heappop(self._heap)
        raise IndexError("no request is waiting")

    def pop(self) -> Hashable:
        """Take the first request; returns its id. Raises IndexError when nobody waits."""
        request_id = self.peek()
        self.remove(request_id)
        return request_id

    def remove(self, request_id: Hashable) -> None:
        """Take a request out, wherever it stands.

        Raises ValueError, which names the id, when it does not wait.
        """
        self._waiting(request_id)
        del self._entries[request_id]
        self._sweep()

    def change(self, request_id: Hashable, priority: Any) -> None:
        """Give a request another priority; among equals it still counts from its push.

        Raises ValueError, which names the id, when it does not wait.
        """
        self._enter(_Entry(priority, self._waiting(request_id).number, request_id))
        self._sweep()

    def __contains__(self, request_id: Hashable) -> bool:
        return request_id in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def _enter(self, entry: "_Entry") -> None:
        self._entries[entry.request_id] = entry
        heapq.heappush(self._heap, entry)

    def _waiting(self, request_id: Hashable) -> "_Entry":
        if request_id not in self._entries:
            raise ValueError(f"request {request_id!r} is not waiting")
        return self._entries[request_id]

    def _sweep(self) -> None:
        # As many calls have left these entries behind as it takes steps to clear them away.
        if len(self._heap) > 2 * len(self._entries):
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)


@dataclass(frozen=True, eq=False)
class _Entry:
    priority: Any
    number: int
    request_id: Hashable

    def __lt__(self, other: "_Entry") -> bool:
        if self.priority < other.priority:
            return True
        return not other.priority < self.priority and self.number < other.number
