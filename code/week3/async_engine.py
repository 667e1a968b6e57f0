"""An engine in a thread of its own, behind coroutines: what a server needs to never wait for it."""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence

from week3.engine import Delta, Engine, GenerationParams, StepFailed

__all__ = ["RequestHandle", "AsyncEngine"]

logger = logging.getLogger(__name__)


class EngineBusy(Exception):
    """Too many requests wait; it may be tried again later."""


class EngineClosed(Exception):
    """The engine takes no more requests."""


class EngineFailed(Exception):
    """The model raised while it computed a request."""


class RequestHandle:
    """What comes to one request: an asynchronous iterator of its deltas, up to the last one.

    Made by `AsyncEngine.submit`, in the event loop in which it is iterated, once.
    Iterating raises EngineFailed, and ends, when the model raised in one of the request's steps, or
    the id is not free yet: that of an aborted request is, after the engine's next step.
    """

    def __init__(self, abort: Callable[[], None]):
        raise NotImplementedError(
            "week3/async_engine.py: RequestHandle.__init__ is not written yet "
            "→ sessions/week3/async_engine.md"
        )

    def abort(self) -> None:
        """End the request, from its event loop; its blocks are free soon, iterating ends at once.

        Nothing happens when it has ended already.
        """
        raise NotImplementedError(
            "week3/async_engine.py: RequestHandle.abort is not written yet "
            "→ sessions/week3/async_engine.md"
        )

    def __aiter__(self) -> "RequestHandle":
        raise NotImplementedError(
            "week3/async_engine.py: RequestHandle.__aiter__ is not written yet "
            "→ sessions/week3/async_engine.md"
        )

    async def __anext__(self) -> Delta:
        raise NotImplementedError(
            "week3/async_engine.py: RequestHandle.__anext__ is not written yet "
            "→ sessions/week3/async_engine.md"
        )


class AsyncEngine:
    """An engine for coroutines of any event loops: they submit and listen, a thread steps.

    engine: nobody else calls it from now on, apart from `check`. max_waiting: how many requests may
        wait beside those that run; more are refused. It runs from `start` to `close`.
    engine is kept under its name.
    """

    def __init__(self, engine: Engine, max_waiting: int = 256):
        raise NotImplementedError(
            "week3/async_engine.py: AsyncEngine.__init__ is not written yet "
            "→ sessions/week3/async_engine.md"
        )

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        raise NotImplementedError(
            "week3/async_engine.py: AsyncEngine.is_alive is not written yet "
            "→ sessions/week3/async_engine.md"
        )

    def start(self) -> None:
        """Start the thread."""
        raise NotImplementedError(
            "week3/async_engine.py: AsyncEngine.start is not written yet "
            "→ sessions/week3/async_engine.md"
        )

    def close(self, drain_seconds: float) -> None:
        """Refuse new requests, let the others run for so long, abort the rest, end the thread.

        The last delta of an aborted one has the finish_reason "abort". Blocks until all is done;
        called again, it does nothing.
        """
        raise NotImplementedError(
            "week3/async_engine.py: AsyncEngine.close is not written yet "
            "→ sessions/week3/async_engine.md"
        )

    def submit(
        self, request_id: str, prompt_ids: Sequence[int], params: GenerationParams
    ) -> RequestHandle:
        """Let a request join; returns its handle, without waiting for anything.

        Raises ValueError for what `Engine.check` refuses and for an id that has not ended;
        EngineBusy when too many run or wait; EngineClosed when no more are taken: after `close`,
        and when the engine has failed.
        """
        raise NotImplementedError(
            "week3/async_engine.py: AsyncEngine.submit is not written yet "
            "→ sessions/week3/async_engine.md"
        )
