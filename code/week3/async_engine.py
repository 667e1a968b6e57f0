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
    """Every place is taken; it may be tried again later."""


class EngineClosed(Exception):
    """The engine takes no more requests."""


class EngineFailed(Exception):
    """The engine could not go on with a request; raised from the error that it met."""


class RequestHandle:
    """What comes to one request: an asynchronous iterator of its deltas, up to the last one.

    Made by `AsyncEngine.submit` alone, so that what it is made from is up to you. It is iterated,
    by one task at a time, and aborted in the event loop in which it was made.
    Who stops iterating, or is cancelled while it waits for a delta, ends nothing and loses nothing:
    the request runs on, and the next iteration goes on with the next delta. After the last delta
    and after `abort`, every iteration ends at once.
    Raises EngineFailed, once, from the error that is its cause, and then ends: when the model
    raised in a step of the request (the cause is what stands behind the StepFailed), when the
    engine's `add` refused it after all, and when the engine has failed.
    """

    def __init__(self, request_id: str, abort: Callable[["RequestHandle"], None]):
        raise NotImplementedError(
            "week3/async_engine.py: RequestHandle.__init__ is not written yet "
            "→ sessions/week3/async_engine.md"
        )

    def abort(self) -> None:
        """End the request: iterating ends at once, also where somebody waits for a delta.

        Returns without waiting for the engine, which aborts the request before its next step.
        Nothing happens when the request has ended already.
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

    engine: of it only `limits`, `check`, `add`, `abort`, `step` and `num_unfinished` are used; all
        but the first two in one thread, which is none of the callers'. max_waiting: how many places
        there are beside the max_num_seqs of its limits.
    engine is kept under its name.
    A request has a place, and its id, from `submit` until the engine's next step after its end is
    over; after that nothing is kept of it. The thread steps as long as somebody has a place; when
    nobody has, it makes no call. What is asked for while a step runs is done before the next one,
    in the order in which it was asked for.
    What a step brings wakes an event loop once, however many of its requests get something. A loop
    that has been closed hears nothing, and nobody else notices.
    When a step raises StepFailed, the requests that it names fail; when `add` raises ValueError,
    its request does. The others go on. When anything else is raised, all requests fail, and the
    thread ends. Each of these is logged as an error, with its traceback.
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
        """Start the thread; to be called once, before anything else is.

        A program may end without `close`: the thread does not keep it.
        """
        raise NotImplementedError(
            "week3/async_engine.py: AsyncEngine.start is not written yet "
            "→ sessions/week3/async_engine.md"
        )

    def close(self, drain_seconds: float) -> None:
        """Refuse new requests, let the others run for so long, abort the rest, end the thread.

        A step that runs when the time is over is waited for, and what it brings is handed out. The
        last delta of a request that is aborted here has no text, no choices and the finish_reason
        "abort".
        Blocks until all is done, from any thread, also that of an event loop. Called again, it only
        waits: the drain_seconds of the first call hold.
        """
        raise NotImplementedError(
            "week3/async_engine.py: AsyncEngine.close is not written yet "
            "→ sessions/week3/async_engine.md"
        )

    def submit(
        self, request_id: str, prompt_ids: Sequence[int], params: GenerationParams
    ) -> RequestHandle:
        """Let a request join; returns its handle without waiting for the engine.

        prompt_ids: as they are now; the caller may change them later. To be called in an event
            loop, which is the one of the handle.
        Raises, with nothing changed, ValueError for what `Engine.check` refuses, and one that names
        the id when it is taken; EngineBusy when no place is free; and EngineClosed when no more
        requests are taken: after `close` has been called, and after the engine has failed.
        """
        raise NotImplementedError(
            "week3/async_engine.py: AsyncEngine.submit is not written yet "
            "→ sessions/week3/async_engine.md"
        )
