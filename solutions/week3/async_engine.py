"""An engine in a thread of its own, behind coroutines: what a server needs to never wait for it."""

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence

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
        self._abort = abort
        self._loop = asyncio.get_running_loop()
        # None ends the iteration of somebody who waits while the request is aborted.
        self._deltas: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue()
        self._ended = False

    def abort(self) -> None:
        """End the request, from its event loop; its blocks are free soon, iterating ends at once.

        Nothing happens when it has ended already.
        """
        if not self._ended:
            self._ended = True
            self._deltas.put_nowait(None)
            self._abort()

    def __aiter__(self) -> "RequestHandle":
        return self

    async def __anext__(self) -> Delta:
        if self._ended:
            raise StopAsyncIteration
        delta = await self._deltas.get()
        if delta is None or self._ended:
            raise StopAsyncIteration
        if isinstance(delta, BaseException):
            self._ended = True
            raise EngineFailed("the model failed; the server's log says more") from delta
        self._ended = delta.finish_reason is not None
        return delta


class AsyncEngine:
    """An engine for coroutines of any event loops: they submit and listen, a thread steps.

    engine: nobody else calls it from now on, apart from `check`. max_waiting: how many requests may
        wait beside those that run; more are refused. It runs from `start` to `close`.
    engine is kept under its name.
    """

    def __init__(self, engine: Engine, max_waiting: int = 256):
        self.engine = engine
        self._max_unfinished = engine.limits.max_num_seqs + max_waiting
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # Guards all that follows; the engine itself belongs to the thread.
        self._changed = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._handles: dict[str, RequestHandle] = {}
        self._closing = False
        self._deadline = math.inf

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, drain_seconds: float) -> None:
        """Refuse new requests, let the others run for so long, abort the rest, end the thread.

        The last delta of an aborted one has the finish_reason "abort". Blocks until all is done;
        called again, it does nothing.
        """
        with self._changed:
            if not self._closing:
                self._closing = True
                self._deadline = time.monotonic() + drain_seconds
            self._changed.notify()
        self._thread.join()

    def submit(
        self, request_id: str, prompt_ids: Sequence[int], params: GenerationParams
    ) -> RequestHandle:
        """Let a request join; returns its handle, without waiting for anything.

        Raises ValueError for what `Engine.check` refuses and for an id that has not ended;
        EngineBusy when too many run or wait; EngineClosed when no more are taken: after `close`,
        and when the engine has failed.
        """
        self.engine.check(prompt_ids, params)
        with self._changed:
            if self._closing:
                raise EngineClosed("the engine takes no more requests")
            if request_id in self._handles:
                raise ValueError(f"there is a request {request_id!r} already, and it has not ended")
            if len(self._handles) >= self._max_unfinished:
                raise EngineBusy(f"{len(self._handles)} requests run or wait already")
            handle = RequestHandle(lambda: self._abort(request_id))
            self._handles[request_id] = handle
            self._commands.append(lambda: self._add(request_id, prompt_ids, params))
            self._changed.notify()
        return handle

    def _add(self, request_id: str, prompt_ids: Sequence[int], params: GenerationParams) -> None:
        try:
            self.engine.add(request_id, prompt_ids, params)
        except ValueError as error:
            # The engine still holds blocks for an id that was aborted a moment ago.
            self._deliver({request_id: error})

    def _abort(self, request_id: str) -> None:
        with self._changed:
            if self._handles.pop(request_id, None) is not None:
                self._commands.append(lambda: self.engine.abort(request_id))
                self._changed.notify()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._step()
            self._abort_all()
        except Exception as error:
            # Nobody may wait for a thread that is no more.
            logger.exception("the engine has failed, and ends")
            with self._changed:
                self._closing = True
                left = list(self._handles)
            self._deliver(dict.fromkeys(left, error))

    def _step(self) -> None:
        try:
            self._deliver({delta.request_id: delta for delta in self.engine.step()})
        except StepFailed as failure:
            logger.exception("a step failed, and its requests end")
            self._deliver(dict.fromkeys(failure.request_ids, failure.__cause__))

    def _abort_all(self) -> None:
        left = list(self._handles)
        for request_id in left:
            self.engine.abort(request_id)
        self.engine.step()  # in which blocks of the aborted become free
        self._deliver({request_id: Delta(request_id, "", (), "abort") for request_id in left})

    def _wait_for_work(self) -> bool:
        """Carry out what was asked for; returns False when there is nothing left to do, ever."""
        with self._changed:
            while not (self._commands or self._closing or self.engine.num_unfinished):
                self._changed.wait()
            commands, self._commands = self._commands, []
        for command in commands:
            command()
        if not self._closing:
            return True
        return self.engine.num_unfinished > 0 and time.monotonic() < self._deadline

    def _deliver(self, news: Mapping[str, Delta | BaseException]) -> None:
        """Hand out what came, with one call into each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list] = {}
        with self._changed:
            for request_id, delta in news.items():
                handle = self._handles.get(request_id)
                if handle is None:
                    continue  # aborted since
                by_loop.setdefault(handle._loop, []).append((handle._deltas, delta))
                if not isinstance(delta, Delta) or delta.finish_reason is not None:
                    del self._handles[request_id]
        for loop, deltas in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed, so that nobody listens
                loop.call_soon_threadsafe(_put_all, deltas)


def _put_all(deltas: Sequence[tuple[asyncio.Queue, Delta | BaseException]]) -> None:
    for waiting, delta in deltas:
        waiting.put_nowait(delta)
