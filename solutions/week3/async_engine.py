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
        self._request_id, self._abort = request_id, abort
        self._loop = asyncio.get_running_loop()
        # None wakes somebody who waits while the request is aborted.
        self._news: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()
        self._ended = False

    def abort(self) -> None:
        """End the request: iterating ends at once, also where somebody waits for a delta.

        Returns without waiting for the engine, which aborts the request before its next step.
        Nothing happens when the request has ended already.
        """
        self._ended = True
        self._news.put_nowait(None)
        self._abort(self)

    def __aiter__(self) -> "RequestHandle":
        return self

    async def __anext__(self) -> Delta:
        if self._ended:
            raise StopAsyncIteration
        news = await self._news.get()
        if self._ended:  # aborted since
            raise StopAsyncIteration
        if isinstance(news, Exception):
            self._ended = True
            raise EngineFailed("the engine failed; the server's log says more") from news
        self._ended = news.finish_reason is not None
        return news


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
        self.engine = engine
        self._num_places = engine.limits.max_num_seqs + max_waiting
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # Guards what follows; the engine itself is the thread's alone.
        self._changed = threading.Condition()
        self._places: dict[str, RequestHandle] = {}
        self._orders: list[Callable[[], None]] = []
        self._is_closing = False
        self._deadline = math.inf
        # Who has ended, and waits for a step to lose the place; the thread's alone, too.
        self._ended: list[RequestHandle] = []

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread; to be called once, before anything else is.

        A program may end without `close`: the thread does not keep it.
        """
        self._thread.start()

    def close(self, drain_seconds: float) -> None:
        """Refuse new requests, let the others run for so long, abort the rest, end the thread.

        A step that runs when the time is over is waited for, and what it brings is handed out. The
        last delta of a request that is aborted here has no text, no choices and the finish_reason
        "abort".
        Blocks until all is done, from any thread, also that of an event loop. Called again, it only
        waits: the drain_seconds of the first call hold.
        """
        with self._changed:
            if not self._is_closing:
                self._is_closing = True
                self._deadline = time.monotonic() + drain_seconds
            self._changed.notify()
        self._thread.join()

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
        prompt_ids = tuple(prompt_ids)
        self.engine.check(prompt_ids, params)
        with self._changed:
            if self._is_closing:
                raise EngineClosed("the engine takes no more requests")
            if request_id in self._places:
                raise ValueError(f"there is a request {request_id!r} already, and it has not ended")
            if len(self._places) >= self._num_places:
                raise EngineBusy(f"{len(self._places)} requests run or wait already")
            handle = RequestHandle(request_id, self._abort)
            self._places[request_id] = handle
            self._orders.append(lambda: self._add(handle, prompt_ids, params))
            self._changed.notify()
        return handle

    def _abort(self, handle: RequestHandle) -> None:
        with self._changed:
            # It may have ended unnoticed, and its id may be another request's.
            if self._places.get(handle._request_id) is handle:
                self._orders.append(lambda: self._end(handle))

    def _run(self) -> None:
        try:
            while self._obey():
                ended, self._ended = self._ended, []
                self._hand_out(self._step())
                self._vacate(ended)
            self._abort_all()
        except Exception as error:
            # Nobody may wait for a thread that is no more.
            logger.exception("the engine has failed, and ends")
            with self._changed:
                self._is_closing = True
            self._hand_out(dict.fromkeys(self._places, error))

    def _obey(self) -> bool:
        """Wait for work, and do what was asked for; returns False when all is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._places or self._is_closing)
            if self._is_closing and (not self._places or time.monotonic() >= self._deadline):
                return False
            orders, self._orders = self._orders, []
        for order in orders:
            order()
        return True

    def _add(
        self, handle: RequestHandle, prompt_ids: Sequence[int], params: GenerationParams
    ) -> None:
        try:
            self.engine.add(handle._request_id, prompt_ids, params)
        except ValueError as error:
            logger.exception("the engine refuses a request that it had checked")
            self._hand_out({handle._request_id: error})

    def _end(self, handle: RequestHandle) -> None:
        self.engine.abort(handle._request_id)
        self._ended.append(handle)

    def _step(self) -> Mapping[str, Delta | Exception]:
        try:
            return {delta.request_id: delta for delta in self.engine.step()}
        except StepFailed as failure:
            logger.exception("a step failed, and its requests end")
            return dict.fromkeys(failure.request_ids, failure.__cause__)

    def _vacate(self, ended: Sequence[RequestHandle]) -> None:
        with self._changed:
            for handle in ended:
                # Twice in the list is who ended and was aborted in the same step.
                if self._places.get(handle._request_id) is handle:
                    del self._places[handle._request_id]

    def _abort_all(self) -> None:
        for request_id in self._places:
            self.engine.abort(request_id)
        self._hand_out({name: Delta(name, "", (), "abort") for name in self._places})

    def _hand_out(self, news: Mapping[str, Delta | Exception]) -> None:
        """Tell the requests what there is for them, with one call into each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list] = {}
        with self._changed:
            for request_id, one in news.items():
                handle = self._places[request_id]
                by_loop.setdefault(handle._loop, []).append((handle._news, one))
                if isinstance(one, Exception) or one.finish_reason is not None:
                    self._ended.append(handle)
        for loop, items in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed, so that nobody listens
                loop.call_soon_threadsafe(_put_all, items)


def _put_all(items: Sequence[tuple[asyncio.Queue, Delta | Exception]]) -> None:
    for queue, news in items:
        queue.put_nowait(news)
