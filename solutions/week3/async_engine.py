"""An engine in a thread of its own, behind coroutines: what a server needs to never wait for it."""

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass

from week3.engine import Delta, Engine, GenerationParams, StepFailed

__all__ = ["AsyncEngine"]

logger = logging.getLogger(__name__)


class EngineBusy(Exception):
    """Too many requests wait; it may be tried again later."""


class EngineClosed(Exception):
    """The engine takes no more requests."""


class EngineFailed(Exception):
    """The model raised while it computed a request."""


class AsyncEngine:
    """An engine in a thread of its own, for callers of one or several event loops.

    engine: nobody else calls it any more. max_waiting: how many requests may wait beside those that
        run; more are refused.
    The thread runs from `start` to `close`.
    """

    def __init__(self, engine: Engine, max_waiting: int = 256):
        self.engine = engine
        self._max_unfinished = engine.limits.max_num_seqs + max_waiting
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # Guards what follows; the engine itself belongs to the thread.
        self._changed = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._handles: dict[str, _Handle] = {}
        self._closing = False
        self._deadline = math.inf

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, drain_seconds: float) -> None:
        """Refuse new requests, let the others run for so long, abort the rest, end the thread."""
        with self._changed:
            self._closing = True
            self._deadline = time.monotonic() + drain_seconds
            self._changed.notify()
        self._thread.join()

    @property
    def num_unfinished(self) -> int:
        """How many requests are there whose last delta is not out."""
        return len(self._handles)

    async def generate(
        self, request_id: str, prompt_ids: Sequence[int], params: GenerationParams
    ) -> AsyncIterator[Delta]:
        """Yield what comes to a request, until its last delta.

        Who stops iterating, for whatever reason, ends the request.
        Raises, before the first delta: ValueError as `Engine.check` does and for an id that has not
        ended, EngineBusy when too many wait, EngineClosed when no more are taken. Raises
        EngineFailed when the model raised in one of its steps.
        """
        self.engine.check(prompt_ids, params)
        handle = _Handle(asyncio.get_running_loop(), asyncio.Queue())
        self._submit(request_id, handle, prompt_ids, params)
        ended = False
        try:
            while not ended:
                delta = await handle.deltas.get()
                if isinstance(delta, Exception):
                    ended = True
                    raise EngineFailed("the model failed; see the log of the server") from delta
                ended = delta.finish_reason is not None
                yield delta
        finally:
            if not ended:
                self._abort(request_id)

    def _submit(
        self,
        request_id: str,
        handle: "_Handle",
        prompt_ids: Sequence[int],
        params: GenerationParams,
    ) -> None:
        with self._changed:
            if self._closing:
                raise EngineClosed("the engine takes no more requests")
            if request_id in self._handles:
                raise ValueError(f"there is a request {request_id!r} already, and it has not ended")
            if len(self._handles) >= self._max_unfinished:
                raise EngineBusy(f"{len(self._handles)} requests run or wait already")
            self._handles[request_id] = handle
            self._commands.append(lambda: self.engine.add(request_id, prompt_ids, params))
            self._changed.notify()

    def _abort(self, request_id: str) -> None:
        with self._changed:
            if self._handles.pop(request_id, None) is not None:
                self._commands.append(lambda: self.engine.abort(request_id))
                self._changed.notify()

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self._deliver({delta.request_id: delta for delta in self.engine.step()})
            except StepFailed as failure:
                logger.exception("a step failed; its requests end")
                error = failure.__cause__
                self._deliver(dict.fromkeys(failure.request_ids, error))
        for request_id in list(self._handles):
            self.engine.abort(request_id)
        self._deliver({name: Delta(name, "", (), "abort") for name in list(self._handles)})

    def _wait_for_work(self) -> bool:
        """Carry out what was asked for; returns whether to do a step, False at the end."""
        with self._changed:
            while not (self._commands or self._closing or self.engine.num_unfinished):
                self._changed.wait()
            commands, self._commands = self._commands, []
        for command in commands:
            command()
        if not self._closing:
            return True
        return bool(self.engine.num_unfinished) and time.monotonic() < self._deadline

    def _deliver(self, news: Mapping[str, "Delta | BaseException"]) -> None:
        """Hand out what came, with one call into each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list] = {}
        with self._changed:
            for request_id, delta in news.items():
                handle = self._handles.get(request_id)
                if handle is None:
                    continue  # it has gone since
                by_loop.setdefault(handle.loop, []).append((handle.deltas, delta))
                if not isinstance(delta, Delta) or delta.finish_reason is not None:
                    del self._handles[request_id]
        for loop, deltas in by_loop.items():
            with contextlib.suppress(RuntimeError):  # its loop is closed: nobody listens
                loop.call_soon_threadsafe(_put_all, deltas)


@dataclass(frozen=True)
class _Handle:
    loop: asyncio.AbstractEventLoop
    deltas: asyncio.Queue


def _put_all(deltas: Sequence[tuple[asyncio.Queue, object]]) -> None:
    for waiting, delta in deltas:
        waiting.put_nowait(delta)
