"""A binary heap that knows where each request stands, so that nothing stale is ever in it."""

from collections.abc import Hashable
from typing import Any

__all__ = ["PriorityQueue"]


class PriorityQueue:
    """Requests that wait, the one with the lowest priority number first."""

    def __init__(self) -> None:
        self._rows: list[list] = []  # [priority, number of its push, id]
        self._places: dict[Hashable, int] = {}
        self._next_number = 0

    def push(self, request_id: Hashable, priority: Any) -> None:
        """Let a request wait."""
        if request_id in self._places:
            raise ValueError(f"{request_id} is in the queue")
        self._rows.append([priority, self._next_number, request_id])
        self._next_number += 1
        self._up(len(self._rows) - 1)

    def peek(self) -> Hashable:
        """Return the id of the first request."""
        if not self._rows:
            raise IndexError("the queue is empty")
        return self._rows[0][2]

    def pop(self) -> Hashable:
        """Take the first request."""
        request_id = self.peek()
        self.remove(request_id)
        return request_id

    def remove(self, request_id: Hashable) -> None:
        """Take a request out."""
        place = self._place(request_id)
        last = self._rows.pop()
        del self._places[request_id]
        if place < len(self._rows):
            self._put(place, last)
            self._down(self._up(place))

    def change(self, request_id: Hashable, priority: Any) -> None:
        """Give a request another priority."""
        place = self._place(request_id)
        self._rows[place][0] = priority
        self._down(self._up(place))

    def __contains__(self, request_id: Hashable) -> bool:
        return request_id in self._places

    def __len__(self) -> int:
        return len(self._rows)

    def _place(self, request_id: Hashable) -> int:
        if request_id not in self._places:
            raise ValueError(f"{request_id} is not in the queue")
        return self._places[request_id]

    def _put(self, place: int, row: list) -> None:
        self._rows[place] = row
        self._places[row[2]] = place

    def _up(self, place: int) -> int:
        row = self._rows[place]
        while place and row[:2] < self._rows[(place - 1) // 2][:2]:
            self._put(place, self._rows[(place - 1) // 2])
            place = (place - 1) // 2
        self._put(place, row)
        return place

    def _down(self, place: int) -> None:
        row = self._rows[place]
        while True:
            children = [c for c in (2 * place + 1, 2 * place + 2) if c < len(self._rows)]
            best = min(children, key=lambda c: self._rows[c][:2], default=None)
            if best is None or row[:2] < self._rows[best][:2]:
                break
            self._put(place, self._rows[best])
            place = best
        self._put(place, row)
