"""An engine as somebody with a mailbox: callers write letters, and the thread reads them."""

import asyncio
import collections
import logging
import queue
import threading
import time
from collections.abc import Iterable, Sequence

from week3.engine import Delta, Engine, GenerationParams, StepFailed

__all__ = ["RequestHandle", "AsyncEngine"]


class EngineBusy(Exception):
    """Every place is taken; it may be tried again later."""


class EngineClosed(Exception):
    """The engine takes no more requests."""


class EngineFailed(Exception):
    """The engine could not go on with a request; raised from the error that it met."""


class RequestHandle:
    """A list of what has arrived, and an event that says that it has changed."""

    def __init__(self, request_id: str, mailbox: queue.SimpleQueue):
        self.request_id, self.loop = request_id, asyncio.get_running_loop()
        self._mailbox = mailbox
        self._arrived: collections.deque[Delta | Exception] = collections.deque()
        self._has_changed = asyncio.Event()
        self._is_over = False

    def abort(self) -> None:
        """End the request."""
        if self._is_over:
            return
        self._is_over = True
        self._has_changed.set()
        self._mailbox.put(("abort", self))

    def receive(self, one: Delta | Exception) -> None:
        """Take what the thread sends; in the event loop."""
        self._arrived.append(one)
        self._has_changed.set()

    def __aiter__(self) -> "RequestHandle":
        return self

    async def __anext__(self) -> Delta:
        while not self._arrived and not self._is_over:
            self._has_changed.clear()
            await self._has_changed.wait()
        if self._is_over:
            raise StopAsyncIteration
        match self._arrived.popleft():
            case Delta() as delta:
                self._is_over = bool(delta.finish_reason)
                return delta
            case error:
                self._is_over = True
                raise EngineFailed("the engine failed") from error


class AsyncEngine:
    """Callers register under a lock and write letters; the thread alone knows the engine."""

    def __init__(self, engine: Engine, max_waiting: int = 256):
        self.engine = engine
        self._capacity = max_waiting + engine.limits.max_num_seqs
        self._mailbox: queue.SimpleQueue = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._registered: dict[str, RequestHandle] = {}
        self._until: float | None = None
        self._has_failed = False
        self._worker: threading.Thread | None = None

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._worker is not None and self._worker.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._worker = threading.Thread(target=self._work, daemon=True)
        self._worker.start()

    def close(self, drain_seconds: float) -> None:
        """Refuse, drain, abort, end."""
        with self._lock:
            if self._until is None:
                self._until = time.monotonic() + drain_seconds
        self._mailbox.put(("close",))
        self._worker.join()

    def submit(
        self, request_id: str, prompt_ids: Sequence[int], params: GenerationParams
    ) -> RequestHandle:
        """Let a request join."""
        self.engine.check(prompt_ids, params)
        handle = RequestHandle(request_id, self._mailbox)
        with self._lock:
            if self._until is not None or self._has_failed:
                raise EngineClosed("no more requests")
            if request_id in self._registered:
                raise ValueError(f"the id {request_id!r} is taken")
            if len(self._registered) == self._capacity:
                raise EngineBusy("all places are taken")
            self._registered[request_id] = handle
            # Inside of the lock, so that letters lie in the order of registration.
            self._mailbox.put(("add", handle, list(prompt_ids), params))
        return handle

    def _work(self) -> None:
        try:
            self._serve()
        except Exception as error:
            logging.exception("the engine has failed")
            with self._lock:
                self._has_failed = True
                everybody = [*self._registered.values()]
            self._send((handle, error) for handle in everybody)

    def _serve(self) -> None:
        # Handles of requests that are over, by when they may leave.
        over: list[RequestHandle] = []
        while True:
            over += self._read_letters()
            with self._lock:
                late = self._until is not None and time.monotonic() >= self._until
                if self._until is not None and (late or not self._registered):
                    break
            if not self._registered:
                continue
            leaving, over = over, []
            news = self._step()
            over += [handle for handle, one in news if is_last(one)]
            self._send(news)
            self._deregister(leaving)
        rest = [*self._registered.values()]
        for handle in rest:
            self.engine.abort(handle.request_id)
        self._send((handle, Delta(handle.request_id, "", (), "abort")) for handle in rest)

    def _read_letters(self) -> list[RequestHandle]:
        """Do what the letters ask for; returns the handles of requests that are over by that."""
        over = []
        may_sleep = not self._registered and self._until is None
        letters = [self._mailbox.get()] if may_sleep else []
        while not self._mailbox.empty():
            letters.append(self._mailbox.get())
        for word, *rest in letters:
            if word == "add":
                handle, prompt_ids, params = rest
                try:
                    self.engine.add(handle.request_id, prompt_ids, params)
                except ValueError as error:
                    logging.exception("a request is refused")
                    self._send([(handle, error)])
                    over.append(handle)
            elif word == "abort" and self._registered.get(rest[0].request_id) is rest[0]:
                self.engine.abort(rest[0].request_id)
                over.append(rest[0])
        return over

    def _step(self) -> list[tuple[RequestHandle, Delta | Exception]]:
        try:
            deltas = self.engine.step()
        except StepFailed as failure:
            logging.exception("a step has failed")
            return [(self._registered[name], failure.__cause__) for name in failure.request_ids]
        return [(self._registered[delta.request_id], delta) for delta in deltas]

    def _deregister(self, handles: Iterable[RequestHandle]) -> None:
        with self._lock:
            for handle in handles:
                if self._registered.get(handle.request_id) is handle:
                    self._registered.pop(handle.request_id)

    def _send(self, news: Iterable[tuple[RequestHandle, Delta | Exception]]) -> None:
        parcels = collections.defaultdict(list)
        for handle, one in news:
            parcels[handle.loop].append((handle, one))
        for loop, parcel in parcels.items():
            try:
                loop.call_soon_threadsafe(unpack, parcel)
            except RuntimeError:
                if not loop.is_closed():
                    raise


def is_last(one: Delta | Exception) -> bool:
    """Whether nothing follows."""
    return isinstance(one, Exception) or one.finish_reason is not None


def unpack(parcel: Sequence[tuple[RequestHandle, Delta | Exception]]) -> None:
    """Give each handle its own; in the event loop."""
    for handle, one in parcel:
        handle.receive(one)
