"""Grades week3/async_engine: an engine in a thread of its own, behind coroutines.

Most tests drive it with a stand-in that has an engine's methods and no model. Its steps are held
back until the test lets them go, so that whatever shall happen during a step does happen then.
"""

import asyncio
import contextlib
import logging
import math
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from course.grading import GradedFailure, LabUnusable, check_equal, check_true, lab

asynchronous = lab("week3/async_engine")
engine_lab = lab("week3/engine")
qwen = lab("week1/qwen")

WAIT = 0.05
# By how often a test has waited in vain: how many waits may bring nothing before the next one gives
# up, and how many seconds it waits in all when something else comes. The lab is red after the first
# time, and a learner should not wait for three seconds fifty times.
PATIENCE = {0: (60, 9.0), 1: (4, 2.0), 10: (2, 1.0)}
MAX_LINES = 14
VOCAB_SIZE = 50
ENDLESS = 10**9


class Patience:
    """How long the tests of this process wait for what does not come."""

    num_waits, seconds = PATIENCE[0]
    num_late = 0

    @classmethod
    def lose(cls) -> None:
        """Note that a test has waited in vain."""
        cls.num_late += 1
        cls.num_waits, cls.seconds = PATIENCE.get(cls.num_late, (cls.num_waits, cls.seconds))


class ToldToFail(RuntimeError):
    """What the stand-in raises when it is told to."""


class Log:
    """What was done, in order; the latest lines open a failure message."""

    def __init__(self, start: str):
        self.start, self.lines = start, []

    def note(self, line: str) -> None:
        self.lines.append(f"  {line}")

    def __str__(self) -> str:
        lines = self.lines[:]
        before = len(lines) - MAX_LINES
        earlier = [f"  … {before} lines before"] if before > 0 else []
        return "\n".join([self.start, *earlier, *lines[-MAX_LINES:]])


def seen(name: str) -> Any:
    """Return what the graded file has imported from week3/engine under the name."""
    try:
        return getattr(asynchronous, name)
    except LabUnusable:
        return getattr(engine_lab, name)


class StandIn:
    """An engine without a model: a request gets a word in each step in which it runs.

    log, changed: where its calls are noted, and who is told of them. Steps wait until they are
    let go: step n (from 0) until `num_allowed` is more than n.
    It is as strict as `Engine` may be: who has ended keeps the id until the next step.
    """

    def __init__(self, log: Log, changed: threading.Condition, max_num_seqs: int):
        self.log, self.changed = log, changed
        self.limits = engine_lab.EngineLimits(64, 40, max_num_seqs=max_num_seqs)
        self.delta, self.step_failed = seen("Delta"), seen("StepFailed")
        self.running, self.waiting, self.kept = [], [], set()
        self.num_words: dict[str, int] = {}
        self.num_got: dict[str, int] = {}
        self.added, self.prompts = [], {}
        self.num_allowed: float = 0
        self.num_begun = self.num_done = self.num_calls = 0
        self.failures: dict[str, Exception | None] = {}
        self.others: set[int] = {threading.get_ident()}
        self.thread: int | None = None
        self.inside = ""
        self.problems: list[str] = []
        self.is_over = False

    @contextlib.contextmanager
    def call(self, what: str) -> Iterator[None]:
        """Note a call that belongs to the engine's thread."""
        me, before = threading.get_ident(), self.inside
        self.num_calls += 1
        if self.is_over:
            raise ToldToFail("the test is over")
        if me in self.others:
            self.problems.append(f"{what} is called in a thread of the callers")
        elif self.thread not in (None, me):
            self.problems.append(f"{what} is called in another thread than the calls before")
        else:
            self.thread = me
        if before:
            self.problems.append(f"{what} is called while {before} has not returned")
        self.inside = what
        try:
            yield
        finally:
            self.inside = before
            with self.changed:
                self.changed.notify_all()

    @property
    def num_unfinished(self) -> int:
        with self.call("num_unfinished"):
            return len(self.running) + len(self.waiting)

    def check(self, prompt_ids: Sequence[int], params: Any) -> None:
        if len(prompt_ids) == 0 or min(prompt_ids) < 0:
            raise ValueError(f"the prompt is refused: {list(prompt_ids)}")

    def add(self, request_id: str, prompt_ids: Sequence[int], params: Any) -> None:
        with self.call("add"):
            self.log.note(f"the engine: add {request_id!r}")
            self.fail_if_told(f"add {request_id}")
            self.check(prompt_ids, params)
            if request_id in self.kept or request_id in self.num_words:
                raise ValueError(f"there is a request {request_id!r} already")
            self.added.append(request_id)
            self.prompts[request_id] = list(prompt_ids)
            self.waiting.append(request_id)
            self.num_words[request_id], self.num_got[request_id] = params.max_tokens, 0

    def abort(self, request_id: str) -> None:
        with self.call("abort"):
            self.log.note(f"the engine: abort {request_id!r}")
            self.fail_if_told(f"abort {request_id}")
            self.end(request_id)

    def step(self) -> list:
        with self.call("step"):
            number, self.num_begun = self.num_begun, self.num_begun + 1
            self.kept.clear()
            while self.waiting and len(self.running) < self.limits.max_num_seqs:
                self.running.append(self.waiting.pop(0))
            parts = list(self.running)
            self.log.note(f"the engine: step {number} begins, for {', '.join(parts) or 'nobody'}")
            with self.changed:
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.num_allowed > number, timeout=60)
            try:
                return self.deltas(parts)
            finally:
                self.num_done += 1
                self.log.note(f"the engine: step {number} is over")

    def deltas(self, parts: Sequence[str]) -> list:
        try:
            self.fail_if_told("step")
        except ValueError as error:
            for request_id in parts:
                self.end(request_id)
            raise self.step_failed(parts) from error
        deltas = []
        for request_id in parts:
            self.num_got[request_id] += 1
            number, last = self.num_got[request_id], self.num_words[request_id]
            reason = "length" if number == last else None
            deltas.append(self.delta(request_id, f"{request_id}{number}", (), reason))
            if reason:
                self.end(request_id)
        return deltas

    def end(self, request_id: str) -> None:
        if self.num_words.pop(request_id, None) is None:
            return
        self.kept.add(request_id)
        for queue in (self.running, self.waiting):
            if request_id in queue:
                queue.remove(request_id)

    def fail_if_told(self, call: str) -> None:
        error = self.failures.pop(call, None)
        if error is not None:
            raise error

    def allow(self, count: float) -> None:
        with self.changed:
            self.num_allowed += count
            self.changed.notify_all()


class WatchedLoop(asyncio.SelectorEventLoop):
    """An event loop that counts how often a thread wakes it."""

    def __init__(self):
        super().__init__()
        self.woken_by: dict[int, int] = {}
        self.errors: list[BaseException] = []
        self.set_exception_handler(self.note_error)

    def note_error(self, _: Any, context: dict[str, Any]) -> None:
        """Keep what a callback raised; that tasks are left over at the end says nothing."""
        if "callback" in context["message"] and "exception" in context:
            self.errors.append(context["exception"])

    def call_soon_threadsafe(self, callback, *args, context=None):
        me = threading.get_ident()
        self.woken_by[me] = self.woken_by.get(me, 0) + 1
        return super().call_soon_threadsafe(callback, *args, context=context)


class Caller:
    """An event loop in a thread of its own, which sleeps unless somebody wakes it."""

    def __init__(self, name: str):
        self.name, self.loop = name, WatchedLoop()
        self.thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self.thread.start()

    def run(self, coroutine) -> Any:
        """Start a coroutine; returns a concurrent.futures.Future."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def stop(self) -> None:
        """Cancel what still runs, end the loop's thread, and close the loop."""
        if self.loop.is_closed():
            return

        async def cancel() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=WAIT)
            self.loop.call_soon(self.loop.stop)

        self.run(cancel())
        self.thread.join(3 * WAIT)
        if not self.thread.is_alive():
            self.loop.close()


class Served:
    """An AsyncEngine around a stand-in, event loops that submit and listen, and what they get."""

    def __init__(self, num_loops: int = 1, max_num_seqs: int = 2, max_waiting: int = 30):
        self.changed = threading.Condition()
        sizes = f"max_num_seqs={max_num_seqs}, max_waiting={max_waiting}"
        self.of = Log(f"AsyncEngine over an engine whose steps are held back, {sizes}")
        self.engine = StandIn(self.of, self.changed, max_num_seqs)
        self.asynchronous = asynchronous.AsyncEngine(self.engine, max_waiting)
        self.failed = asynchronous.EngineFailed
        self.num_loops = num_loops
        self.callers: list[Caller] = []
        self.handles: dict[str, Any] = {}
        self.got: dict[str, list[str]] = {}
        self.deltas: dict[str, list] = {}
        self.causes: dict[str, BaseException | None] = {}
        self.tasks: dict[str, Any] = {}
        self.loop_of: dict[str, int] = {}
        self.errors: list[BaseException] = []
        self.records: list[logging.LogRecord] = []

    def __enter__(self) -> "Served":
        self.handler = logging.Handler()
        self.handler.emit = self.records.append
        logging.getLogger().addHandler(self.handler)
        self.hook, threading.excepthook = threading.excepthook, self.note_error
        self.callers = [Caller(f"loop {i}") for i in range(self.num_loops)]
        self.engine.others |= {caller.thread.ident for caller in self.callers}
        try:
            self.asynchronous.start()
        except BaseException:
            self.clean_up()
            raise
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self.check_problems()
        finally:
            self.clean_up()

    def clean_up(self) -> None:
        """Let everything end, whatever the lab has made of it."""
        self.engine.allow(math.inf)
        closer = threading.Thread(target=self.close_quietly, daemon=True)
        closer.start()
        closer.join(3 * WAIT)
        self.engine.is_over = True
        for caller in self.callers:
            caller.stop()
        threading.excepthook = self.hook
        logging.getLogger().removeHandler(self.handler)

    def close_quietly(self) -> None:
        with contextlib.suppress(BaseException):
            self.asynchronous.close(0.0)

    def note_error(self, args: Any) -> None:
        with self.changed:
            self.errors.append(args.exc_value)
            self.changed.notify_all()

    # Waiting

    def until(self, condition: Callable[[], bool], what: str, value: Any = None) -> None:
        """Wait for a condition. what: what is not so if it never comes true.

        A machine that is slow gets more time, but not for ever.
        """
        num_waits, until = 0, time.monotonic() + Patience.seconds
        with self.changed:
            while num_waits < Patience.num_waits and time.monotonic() < until:
                self.check_problems()
                if condition():
                    return
                num_waits += not self.changed.wait(WAIT)
        self.late(what, value)

    def late(self, what: str, value: Any = None) -> None:
        """Fail because something has not happened."""
        seconds = Patience.num_waits * WAIT
        Patience.lose()
        self.check_problems()
        text = f"{self.of}\n{what}, after {seconds:g} s of waiting"
        died = [error for error in self.errors if isinstance(error, ToldToFail)]
        if died:
            text += f"; the engine's thread has ended with {died[0]!r}"
        raise GradedFailure(text, what if value is None else (what, value))

    def check_problems(self) -> None:
        in_loops = [error for caller in self.callers for error in caller.loop.errors]
        for error in [*self.errors, *in_loops]:
            if not isinstance(error, ToldToFail):
                raise error
        if self.engine.problems:
            check_true(False, self.engine.problems[0], of=self.of)

    def call(self, function: Callable[[], Any], what: str, loop: int = 0) -> Any:
        """Call a function in an event loop, which must not take long."""

        async def do() -> Any:
            return function()

        return self.wait(self.callers[loop].run(do()), f"{what} has not returned")

    def wait(self, future: Any, what: str) -> Any:
        """Wait for the result of a coroutine. what: what is not so if it never ends."""
        future.add_done_callback(lambda _: self.notify())
        self.until(future.done, what)
        return future.result()

    def fails(self, future: Any, what: str) -> None:
        """Hold a coroutine to raising EngineFailed."""
        try:
            got = self.wait(future, f"{what} has not ended")
        except self.failed:
            return
        check_true(False, f"{what} returned {got!r}, expected EngineFailed", of=self.of)

    def notify(self) -> None:
        with self.changed:
            self.changed.notify_all()

    # What callers do

    def submit(self, name: str, num_words: int = 3, loop: int = 0, listen: bool = True) -> Any:
        """Submit a request from an event loop; listen: and follow it there."""
        params = engine_lab.GenerationParams(max_tokens=num_words)

        def do() -> Any:
            handle = self.asynchronous.submit(name, [1, 2], params)
            if listen:
                self.got[name], self.deltas[name] = [], []
                self.tasks[name] = asyncio.ensure_future(self.follow(name, handle))
            return handle

        self.of.note(f"submit {name!r}, of {num_words} words, in loop {loop}")
        self.handles[name] = self.call(do, f"submit({name!r})", loop)
        self.loop_of[name] = loop
        return self.handles[name]

    def refused(self, error: str, name: str, mentions: str = "", prompt: Sequence[int] = (1, 2)):
        """Hold a submit to raising an error."""
        params = engine_lab.GenerationParams(max_tokens=3)
        expected = ValueError if error == "ValueError" else getattr(asynchronous, error)
        self.of.note(f"submit {name!r}, a prompt of {len(prompt)}")
        what = f"submit({name!r})"
        try:
            self.call(lambda: self.asynchronous.submit(name, prompt, params), what)
        except NotImplementedError:
            raise
        except Exception as raised:
            is_right = type(raised) is expected
            check_true(is_right, f"{what} raised {raised!r}, expected {error}", of=self.of)
            text = f"{what} raised {raised!r}, which does not name {mentions!r}"
            check_true(mentions in str(raised), text, of=self.of)
        else:
            check_true(False, f"{what} returned a handle, expected {error}", of=self.of)

    async def follow(self, name: str, handle: Any) -> None:
        """Note all that comes to a request, up to its end."""
        try:
            async for delta in handle:
                self.take(name, delta)
            self.tell(name, "the end")
        except asyncio.CancelledError:
            raise
        except self.failed as error:
            self.causes[name] = error.__cause__
            self.tell(name, "EngineFailed")
        except BaseException as error:
            with self.changed:
                self.errors.append(error)
                self.changed.notify_all()

    def take(self, name: str, delta: Any) -> None:
        self.deltas[name].append(delta)
        reason = delta.finish_reason
        self.tell(name, delta.text if reason is None else f"{delta.text}({reason})")

    def tell(self, name: str, word: str) -> None:
        self.of.note(f"{name!r} gets {word}")
        with self.changed:
            self.got[name].append(word)
            self.changed.notify_all()

    def abort(self, name: str) -> None:
        self.of.note(f"abort {name!r}")
        handle = self.handles[name]
        self.call(handle.abort, f"abort of {name!r}", self.loop_of[name])

    def start_closing(self, drain_seconds: float) -> threading.Thread:
        """Call close in a thread of its own."""
        self.of.note(f"close({drain_seconds:g}), in another thread")

        def close() -> None:
            self.engine.others.add(threading.get_ident())
            self.asynchronous.close(drain_seconds)
            self.of.note(f"close({drain_seconds:g}) has returned")
            self.notify()

        thread = threading.Thread(target=close, daemon=True)
        thread.start()
        return thread

    def closed(self, closer: threading.Thread) -> None:
        """Wait until a close has returned, and hold it to what it promises."""
        self.until(lambda: not closer.is_alive(), "close has not returned")
        check_equal(self.asynchronous.is_alive, False, "is_alive after close", of=self.of)
        engine = self.engine
        left = [*engine.running, *engine.waiting]
        check_equal(left, [], "who still runs or waits in the engine after close", of=self.of)
        self.refused("EngineClosed", "late")

    def is_closing(self) -> bool:
        """Whether new requests are refused; one that is not is aborted at once."""
        params = engine_lab.GenerationParams(max_tokens=3)
        name = f"probe {len(self.handles)}"

        def do() -> bool:
            try:
                handle = self.asynchronous.submit(name, [1], params)
            except asynchronous.EngineClosed:
                return True
            self.handles[name] = handle
            handle.abort()
            return False

        return self.wait(self.callers[0].run(as_coroutine(do)), f"submit({name!r})")

    # What the engine does

    def begun(self, number: int) -> None:
        """Wait until a step has begun, from 0."""
        what = f"step {number} has not begun"
        self.until(lambda: self.engine.num_begun > number, what)

    def step(self, count: int = 1) -> None:
        """Let steps go, and wait until they are over."""
        wanted = self.engine.num_done + count
        self.engine.allow(count)
        self.until(lambda: self.engine.num_done >= wanted, f"step {wanted - 1} is not over")

    def settle(self) -> None:
        """Wait until the next step has begun, and all that came before it has arrived."""
        self.begun(self.engine.num_done)
        self.flush()

    def flush(self) -> None:
        for i, caller in enumerate(self.callers):
            for _ in range(4):
                if not caller.loop.is_closed():
                    self.call(lambda: None, "an event loop's own call", i)

    # What must come out

    def expect(self, name: str, wanted: Sequence[str]) -> None:
        """Wait for what a request should have got; nobody else wakes its loop meanwhile."""
        what, wanted = f"what {name!r} has got", list(wanted)
        if len(self.got[name]) < len(wanted):
            try:
                self.until(lambda: len(self.got[name]) >= len(wanted), what)
            except GradedFailure as failure:
                if failure.produced == what:
                    raise self.missing(name, wanted) from None
                raise
        check_equal(list(self.got[name]), wanted, what, of=self.of)

    def missing(self, name: str, wanted: list[str]) -> GradedFailure:
        """Say what has not come, and whether it comes when something else wakes the loop."""
        got = list(self.got[name])
        text = f"{self.of}\n{name!r} has got {got}, and nothing more for seconds; expected {wanted}"
        died = [error for error in self.errors if isinstance(error, ToldToFail)]
        if died:
            text += f"\nthe engine's thread has ended with {died[0]!r}"
        else:
            with contextlib.suppress(Exception):
                self.callers[self.loop_of[name]].run(as_coroutine(int)).result(WAIT)
                time.sleep(WAIT)
            if len(self.got[name]) > len(got):
                text += "\nmore came when something else woke its event loop"
        return GradedFailure(text, (f"what {name!r} has got", got), wanted)

    def check_free(self, names: Sequence[str]) -> None:
        """Submit ids once more, when their places have to be free soon."""
        for name in names:
            num_waits = 0
            while True:
                try:
                    self.submit(name, 1)
                    break
                except ValueError:
                    num_waits += 1
                    if num_waits > 5 * Patience.num_waits:
                        self.late(f"the id {name!r} is still taken")
                    with self.changed:
                        self.changed.wait(WAIT / 5)


@contextlib.contextmanager
def left_to_chance() -> Iterator[None]:
    """Let all failures of the block count as the same: which one comes is a matter of luck."""
    try:
        yield
    except GradedFailure as failure:
        raise GradedFailure(str(failure), "a run that is left to chance") from None


async def as_coroutine(function: Callable[[], Any]) -> Any:
    return function()


def words(name: str, count: int, up_to: int | None = None) -> list[str]:
    """What a request of so many words gets: all, or the first ones."""
    whole = [f"{name}{i}" for i in range(1, count)] + [f"{name}{count}(length)", "the end"]
    return whole[:up_to]


# One request after the other, and several at once


@pytest.mark.parametrize("num_words", [1, 2, 3, 9])
def test_deltas_come_as_they_are_made(num_words):
    with Served() as served:
        served.submit("a", num_words)
        for i in range(1, num_words):
            served.step()
            served.expect("a", words("a", num_words, i))
        served.step()
        served.expect("a", words("a", num_words))


def test_deltas_are_those_of_the_engine():
    with Served() as served:
        served.submit("a", 3)
        served.step(3)
        served.expect("a", words("a", 3))
        expected = [("a", "a1", (), None), ("a", "a2", (), None), ("a", "a3", (), "length")]
        got = [(d.request_id, d.text, d.choices, d.finish_reason) for d in served.deltas["a"]]
        check_equal(got, expected, "the deltas of 'a'", of=served.of)


@pytest.mark.parametrize("num_loops", [1, 2, 3])
def test_each_request_gets_its_own(num_loops):
    with Served(num_loops, max_num_seqs=3) as served:
        lengths = {"a": 4, "b": 1, "c": 6, "d": 3, "e": 2}
        for i, (name, length) in enumerate(lengths.items()):
            served.submit(name, length, loop=i % num_loops)
        served.engine.allow(math.inf)
        for name, length in lengths.items():
            served.expect(name, words(name, length))


def test_deltas_wait_for_a_listener():
    with Served() as served:
        handle = served.submit("a", 4, listen=False)
        served.step(2)
        served.got["a"], served.deltas["a"] = [], []
        served.callers[0].run(served.follow("a", handle))
        served.expect("a", words("a", 4, 2))
        served.step(2)
        served.expect("a", words("a", 4))


def test_who_does_not_listen_holds_nobody_up():
    with Served() as served:
        handle = served.submit("a", 300, listen=False)
        served.submit("b", 310)
        served.engine.allow(math.inf)
        served.expect("b", words("b", 310))
        got = served.wait(served.callers[0].run(collect(handle)), "iterating 'a' has not ended")
        check_equal(got, [f"a{i}" for i in range(1, 301)], "what 'a' gets later", of=served.of)


def test_a_loop_is_woken_that_has_nothing_else_to_do():
    with Served(2) as served:
        served.submit("a", 3, loop=0)
        served.submit("b", 3, loop=1)
        served.begun(0)
        served.engine.allow(math.inf)
        served.expect("b", words("b", 3))
        served.expect("a", words("a", 3))


@pytest.mark.parametrize("num_loops", [1, 2])
def test_a_step_wakes_each_loop_once(num_loops):
    with Served(num_loops, max_num_seqs=8) as served:
        names = "abcdefgh"
        served.submit("first", 1)
        served.begun(0)
        for i, name in enumerate(names):
            served.submit(name, 5, loop=i % num_loops)
        served.engine.allow(math.inf)
        for name in names:
            served.expect(name, words(name, 5))
        for caller in served.callers:
            got = caller.loop.woken_by.get(served.engine.thread, 0)
            text = f"{caller.name} was woken {got} times by the deltas of 6 steps"
            check_true(got <= 6, text, of=served.of)


def test_requests_are_added_in_their_order():
    with Served(2, max_num_seqs=3, max_waiting=9) as served:
        served.submit("first", 2)
        served.begun(0)
        names = [f"r{9 - i}" for i in range(9)]
        for i, name in enumerate(names):
            served.submit(name, 2, loop=i % 2)
        served.step()
        served.begun(1)
        check_equal(served.engine.added, ["first", *names], "the order of add", of=served.of)


def test_a_request_joins_before_the_next_step():
    with Served(max_num_seqs=4) as served:
        served.submit("a", 4)
        served.begun(0)
        served.submit("b", 2)
        served.step()
        served.begun(1)
        check_equal(served.engine.running, ["a", "b"], "who is in step 1", of=served.of)
        served.step()
        served.expect("b", ["b1"])
        served.expect("a", ["a1", "a2"])


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_nobody_waits_for_a_step(num_steps):
    with Served() as served:
        served.submit("a", 9)
        served.step(num_steps)
        served.begun(num_steps)
        served.submit("b", 2)
        served.submit("c", 2)
        served.abort("b")
        served.refused("ValueError", "a", mentions="a")
        served.refused("ValueError", "d", prompt=[])
        served.call(lambda: None, "another call in the event loop")
        check_equal(served.asynchronous.is_alive, True, "is_alive", of=served.of)
        check_equal(served.engine.num_done, num_steps, "steps that are over", of=served.of)


def test_the_engine_is_kept():
    with Served() as served:
        kept = served.asynchronous.engine is served.engine
        check_true(kept, "engine is not what was handed in", of=served.of)


def test_prompt_and_params_are_those_of_the_call():
    with Served() as served:
        served.submit("a", 5)
        served.begun(0)
        prompt = [7, 8, 9]
        params = engine_lab.GenerationParams(max_tokens=2)

        def submit():
            handle = served.asynchronous.submit("b", prompt, params)
            prompt.clear()
            return handle

        served.of.note("submit 'b', with the prompt [7, 8, 9], which is cleared at once")
        handle = served.call(submit, "submit('b')")
        served.loop_of["b"], served.got["b"], served.deltas["b"] = 0, [], []
        served.callers[0].run(served.follow("b", handle))
        served.step(3)
        served.expect("b", words("b", 2))
        check_equal(served.engine.prompts["b"], [7, 8, 9], "the prompt of 'b'", of=served.of)


# The thread


def test_is_alive_from_start_to_close():
    with Served() as served:
        check_equal(served.asynchronous.is_alive, True, "is_alive after start", of=served.of)
        served.closed(served.start_closing(0.0))
    fresh = asynchronous.AsyncEngine(StandIn(served.of, served.changed, 2))
    check_equal(fresh.is_alive, False, "is_alive before start", of="a fresh AsyncEngine")


def test_the_thread_keeps_no_program_from_ending():
    before = set(threading.enumerate())
    with Served() as served:
        new = set(threading.enumerate()) - before - {caller.thread for caller in served.callers}
        keeps = [thread.name for thread in new if not thread.daemon]
        check_equal(keeps, [], "threads that keep a program from ending", of=served.of)


def idle_calls(served: Served) -> int:
    """Count the calls of the engine while nobody has a place, once all that is due was done."""
    with served.changed:
        served.changed.wait_for(lambda: False, timeout=WAIT)
    before = served.engine.num_calls
    with served.changed:
        served.changed.wait_for(lambda: served.engine.num_calls > before + 9, timeout=3 * WAIT)
    return served.engine.num_calls - before


@pytest.mark.parametrize("when", ["at the start", "after an end", "after an abort"])
def test_the_thread_sleeps_when_there_is_nothing_to_do(when):
    with Served() as served:
        served.engine.allow(math.inf)
        if when == "after an end":
            served.submit("a", 3)
            served.expect("a", words("a", 3))
        if when == "after an abort":
            served.submit("a", ENDLESS)
            served.until(lambda: len(served.got["a"]) > 3, "'a' has not got 3 words")
            served.abort("a")
            served.until(lambda: not served.engine.running, "'a' still runs in the engine")
        num_calls = idle_calls(served)
        text = f"{when} nobody has a place, and the engine is called all the time"
        check_true(num_calls < 3, text, of=served.of)
        served.submit("b", 3)
        served.expect("b", words("b", 3))


def test_the_thread_wakes_up_again_and_again():
    with Served() as served:
        served.engine.allow(math.inf)
        for i in range(20):
            name = f"r{i}-"
            served.submit(name, 1 + i % 3)
            served.expect(name, words(name, 1 + i % 3))


def test_nothing_is_kept_of_who_has_ended():
    with Served() as served:
        references = []

        def submit(name):
            params = engine_lab.GenerationParams(max_tokens=2)
            references.append(weakref.ref(params))
            return served.asynchronous.submit(name, [1], params)

        handles = [served.call(lambda name=name: submit(name), "submit") for name in "abc"]
        served.begun(0)
        served.call(handles[0].abort, "abort")
        served.engine.allow(math.inf)
        served.until(lambda: not served.engine.num_words, "somebody still runs in the engine")
        gone = lambda: not any(reference() for reference in references)  # noqa: E731
        served.until(gone, "the params of requests that have ended are still kept")


# Abort


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_abort_ends_who_waits_for_a_delta(num_steps):
    with Served() as served:
        served.submit("a", 9)
        served.step(num_steps)
        served.begun(num_steps)
        served.expect("a", words("a", 9, num_steps))
        served.abort("a")
        served.expect("a", [*words("a", 9, num_steps), "the end"])


@pytest.mark.parametrize("num_words", [1, 2, 3, 9])
def test_nothing_comes_after_an_abort(num_words):
    with Served() as served:
        served.submit("a", num_words)
        served.submit("b", 6)
        done = min(1, num_words - 1)
        served.step(done)
        served.begun(done)
        served.flush()
        # The step that runs brings a word to it, perhaps the last one.
        served.abort("a")
        served.step()
        served.settle()
        served.step()
        served.settle()
        served.expect("a", [*words("a", num_words, done), "the end"])
        served.engine.allow(math.inf)
        served.expect("b", words("b", 6))


def test_nothing_comes_of_what_was_there_before_an_abort():
    with Served() as served:
        handle = served.submit("a", 9, listen=False)
        served.step(3)
        served.settle()
        served.abort("a")
        served.got["a"], served.deltas["a"] = [], []
        served.callers[0].run(served.follow("a", handle))
        served.expect("a", ["the end"])


def test_nothing_comes_of_what_arrives_with_an_abort():
    with Served() as served:
        served.submit("a", 9)
        served.begun(0)
        served.flush()

        def abort_behind_a_delta() -> None:
            # The loop does nothing else until the step is over and its delta is on the way.
            served.engine.allow(1)
            served.until(lambda: served.engine.num_begun == 2, "step 1 has not begun")
            asyncio.get_running_loop().call_soon(served.handles["a"].abort)

        served.of.note("loop 0 is busy until step 0 is over, and then aborts 'a'")
        served.call(abort_behind_a_delta, "what happens in the loop")
        served.expect("a", ["the end"])


def test_abort_is_done_before_the_next_step():
    with Served(max_num_seqs=2) as served:
        served.submit("a", 9)
        served.begun(0)
        served.submit("b", 9)
        served.submit("c", 9)
        served.step()
        served.begun(1)
        served.abort("a")
        check_true("a" in served.engine.running, "'a' was aborted during a step", of=served.of)
        served.step()
        served.begun(2)
        check_equal(served.engine.running, ["b", "c"], "who is in step 2", of=served.of)


def test_abort_of_who_does_not_listen():
    with Served() as served:
        served.submit("a", 9, listen=False)
        served.begun(0)
        served.abort("a")
        served.step()
        served.begun(1)
        check_equal(served.engine.running, [], "who is in step 1", of=served.of)


@pytest.mark.parametrize("where", ["waits", "is not added yet"])
def test_abort_of_who_has_not_begun(where):
    with Served(max_num_seqs=1) as served:
        served.submit("a", 4)
        served.begun(0)
        served.submit("b", 3)
        served.submit("c", 2)
        if where == "waits":
            served.step()
            served.begun(1)
        served.abort("b")
        served.expect("b", ["the end"])
        served.engine.allow(math.inf)
        served.expect("a", words("a", 4))
        served.expect("c", words("c", 2))
        served.until(lambda: not served.engine.num_words, "'b' still is in the engine")
        served.flush()
        served.expect("b", ["the end"])


def test_abort_twice():
    with Served() as served:
        served.submit("a", 9)
        served.submit("b", 3)
        served.begun(0)
        for _ in range(3):
            served.abort("a")
        served.engine.allow(math.inf)
        served.expect("b", words("b", 3))
        served.abort("a")
        served.expect("a", ["the end"])
        served.submit("c", 2)
        served.expect("c", words("c", 2))


def test_abort_after_the_end():
    with Served() as served:
        served.engine.allow(math.inf)
        served.submit("a", 3)
        served.expect("a", words("a", 3))
        served.abort("a")
        served.submit("b", 3)
        served.abort("a")
        served.expect("b", words("b", 3))
        served.expect("a", words("a", 3))


@pytest.mark.parametrize("how", ["by its last word", "by an abort"])
def test_abort_when_the_id_is_somebody_elses(how):
    with Served() as served:
        served.submit("b", 99)
        first = served.submit("a", 1 if how == "by its last word" else 99)
        served.begun(0)
        if how == "by an abort":
            served.abort("a")
        served.step(2)
        served.settle()
        served.step()
        served.check_free(["a"])
        served.settle()
        served.of.note("abort the first 'a'")
        served.call(first.abort, "abort")
        served.engine.allow(math.inf)
        served.expect("a", words("a", 1))


def test_abort_of_an_end_that_nobody_has_read():
    with Served() as served:
        first = served.submit("a", 1, listen=False)
        served.submit("b", 99)
        served.step(2)
        served.settle()
        served.step()
        served.settle()
        # Its last delta has come, and its id is free.
        served.check_free(["a"])
        served.of.note("abort the first 'a'")
        served.call(first.abort, "abort")
        served.step(3)
        served.expect("a", words("a", 1))


def test_abort_when_the_last_delta_is_on_its_way():
    with Served() as served:
        served.submit("b", 99)
        served.begun(0)
        first = served.submit("a", 1, listen=False)
        served.step(2)
        served.settle()
        # It has ended in step 1, nobody has read its last delta, and its place is still its own.
        served.of.note("abort the first 'a'")
        served.call(first.abort, "abort")
        served.step()
        served.settle()
        served.submit("a", 9)
        for _ in range(2):
            served.step()
            served.settle()
            served.refused("ValueError", "a", mentions="a")
        served.engine.allow(math.inf)
        served.expect("a", words("a", 9))


# Ids and places


def test_an_id_is_taken_until_the_step_after_an_abort():
    with Served() as served:
        served.submit("a", 9)
        served.submit("b", 9)
        served.begun(0)
        served.abort("a")
        served.refused("ValueError", "a", mentions="a")
        served.step()
        served.settle()
        # It was aborted before this step, which is not over.
        served.refused("ValueError", "a", mentions="a")
        served.step()
        served.settle()
        served.check_free(["a"])
        served.engine.allow(math.inf)
        served.expect("a", words("a", 1))


@pytest.mark.parametrize("others", [0, 1])
def test_an_id_is_taken_until_the_step_after_the_end(others):
    with Served() as served:
        served.submit("a", 2)
        if others:
            served.submit("b", 9)
        served.step(2)
        served.expect("a", words("a", 2))
        served.begun(2)
        served.refused("ValueError", "a", mentions="a")
        served.engine.allow(math.inf)
        served.check_free(["a"])
        served.expect("a", words("a", 1))


@pytest.mark.parametrize("when", ["not added", "waiting", "running"])
def test_an_id_is_refused_that_is_taken(when):
    with Served(max_num_seqs=1) as served:
        if when != "running":
            served.submit("first", 2)
            served.begun(0)
        served.submit("a", 3)
        if when == "waiting":
            served.step()
        served.begun(served.engine.num_done)
        served.refused("ValueError", "a", mentions="a")
        served.engine.allow(math.inf)
        served.expect("a", words("a", 3))


@pytest.mark.parametrize("max_num_seqs, max_waiting", [(1, 0), (1, 2), (3, 0), (3, 2)])
@pytest.mark.parametrize("when", ["not added", "added"])
def test_places_are_for_those_that_run_and_those_that_wait(when, max_num_seqs, max_waiting):
    with Served(max_num_seqs=max_num_seqs, max_waiting=max_waiting) as served:
        count = max_num_seqs + max_waiting
        names = [f"r{i}-" for i in range(count)]
        served.submit(names[0], 4)
        served.begun(0)
        for name in names[1:]:
            served.submit(name, 4)
        if when == "added":
            served.step()
            served.settle()
        served.refused("EngineBusy", "x")
        served.refused("EngineBusy", "y")
        served.engine.allow(math.inf)
        for name in names:
            served.expect(name, words(name, 4))


def test_places_are_free_again():
    with Served(max_num_seqs=1, max_waiting=2) as served:
        for name in "abc":
            served.submit(name, 2)
        served.begun(0)
        served.abort("b")
        served.refused("EngineBusy", "d")
        served.step()
        served.settle()
        served.refused("EngineBusy", "d")
        served.step()
        served.settle()
        served.submit("d", 2)
        served.refused("EngineBusy", "e")
        served.engine.allow(math.inf)
        for name in "acd":
            served.expect(name, words(name, 2))


def test_places_by_default():
    log = Log("AsyncEngine(engine), with max_num_seqs=3")
    with Served() as served:
        served.engine = StandIn(log, served.changed, 3)
        served.engine.others |= {caller.thread.ident for caller in served.callers}
        served.asynchronous.close(0.0)
        served.asynchronous, served.of = asynchronous.AsyncEngine(served.engine), log
        served.asynchronous.start()
        for i in range(259):
            served.submit(f"r{i}", 1, listen=False)
        served.refused("EngineBusy", "x")


@pytest.mark.parametrize("prompt", [[], [1, -1]], ids=str)
def test_a_bad_request_is_refused_at_once(prompt):
    with Served(max_num_seqs=1, max_waiting=1) as served:
        served.submit("a", 3)
        served.begun(0)
        for _ in range(3):
            served.refused("ValueError", "b", mentions="prompt", prompt=prompt)
        served.submit("b", 2)
        served.engine.allow(math.inf)
        served.expect("a", words("a", 3))
        served.expect("b", words("b", 2))
        check_equal(served.engine.added, ["a", "b"], "who was added", of=served.of)


# Iteration


def test_the_end_is_the_end():
    with Served() as served:
        served.engine.allow(math.inf)
        handle = served.submit("a", 2)
        served.expect("a", words("a", 2))
        for _ in range(2):
            got = served.wait(served.callers[0].run(collect(handle)), "iterating has not ended")
            check_equal(got, [], "what comes after the end", of=served.of)


async def collect(handle: Any, count: int | None = None) -> list[str]:
    """Take the texts of the next deltas, or all of them."""
    texts = []
    async for delta in handle:
        texts.append(delta.text)
        if len(texts) == count:
            break
    return texts


def test_iterating_goes_on_where_it_stopped():
    with Served() as served:
        served.engine.allow(math.inf)
        handle = served.submit("a", 6, listen=False)
        expected = ([1], [2, 3], [4], [5, 6], [])
        for numbers in expected:
            future = served.callers[0].run(collect(handle, len(numbers) or None))
            got = served.wait(future, "iterating has not come to an end")
            served.of.note(f"take {len(numbers) or 'all the rest'} → {got}")
            check_equal(got, [f"a{i}" for i in numbers], "what comes next", of=served.of)


@pytest.mark.parametrize("times", [1, 3])
def test_nothing_is_lost_when_who_waits_is_cancelled(times):
    with Served() as served:
        handle = served.submit("a", 3, listen=False)
        served.begun(0)
        for _ in range(times):
            future = served.callers[0].run(collect(handle))
            served.flush()
            served.of.note("a task waits for a delta, and is cancelled")
            future.cancel()
            served.flush()
        served.got["a"], served.deltas["a"] = [], []
        served.callers[0].run(served.follow("a", handle))
        served.engine.allow(math.inf)
        served.expect("a", words("a", 3))


def test_cancelled_while_nobody_listens_the_request_runs_on():
    with Served() as served:
        handle = served.submit("a", 4, listen=False)
        served.submit("b", 9)
        served.begun(0)
        future = served.callers[0].run(collect(handle))
        served.flush()
        served.of.note("a task waits for a delta, and is cancelled")
        future.cancel()
        served.step(2)
        served.settle()
        check_true("a" in served.engine.running, "'a' does not run any more", of=served.of)
        served.engine.allow(math.inf)
        got = served.wait(served.callers[0].run(collect(handle)), "iterating has not ended")
        check_equal(got, ["a1", "a2", "a3", "a4"], "what 'a' gets later", of=served.of)


# What fails


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_a_failed_step_ends_its_requests_alone(num_steps):
    with Served(max_num_seqs=2) as served:
        served.submit("first", 1)
        served.begun(0)
        for name in "abcd":
            served.submit(name, 6)
        served.step(1 + num_steps)
        served.begun(1 + num_steps)
        cause = ValueError("the model was told to fail")
        served.engine.failures["step"] = cause
        served.of.note("the step that runs will fail")
        served.step()
        for name in "ab":
            served.expect(name, [*words(name, 6, num_steps), "EngineFailed"])
            is_told = served.causes[name] is cause
            text = f"EngineFailed of {name!r} comes from {served.causes[name]!r}"
            check_true(is_told, text, of=served.of)
        served.engine.allow(math.inf)
        for name in "cd":
            served.expect(name, words(name, 6))
        check_logged(served, cause)
        served.check_free(["a"])
        served.expect("a", words("a", 1))


def check_logged(served: Served, cause: BaseException) -> None:
    def is_logged() -> bool:
        return any(tells(record, cause) for record in [*served.records])

    served.until(is_logged, f"{cause!r} is not in the log as an error with its traceback")


def tells(record: logging.LogRecord, cause: BaseException) -> bool:
    """Whether an entry is an error with the traceback of the cause, or of what came of it."""
    error = record.exc_info[1] if record.exc_info and record.levelno >= logging.ERROR else None
    while error is not None and error is not cause:
        error = error.__cause__ or error.__context__
    return error is cause


def test_after_a_failure_iterating_has_ended():
    with Served() as served:
        handle = served.submit("a", 6)
        served.begun(0)
        served.engine.failures["step"] = ValueError("the model was told to fail")
        served.engine.allow(math.inf)
        served.expect("a", ["EngineFailed"])
        got = served.wait(served.callers[0].run(collect(handle)), "iterating has not ended")
        check_equal(got, [], "what comes after the failure", of=served.of)
        served.abort("a")
        served.submit("b", 2)
        served.expect("b", words("b", 2))


def test_who_was_aborted_hears_of_no_failure():
    with Served() as served:
        served.submit("first", 1)
        served.begun(0)
        served.submit("a", 6)
        served.submit("b", 6)
        served.step(2)
        served.settle()
        served.abort("a")
        served.engine.failures["step"] = ValueError("the model was told to fail")
        served.engine.allow(math.inf)
        served.expect("b", ["b1", "EngineFailed"])
        served.flush()
        served.expect("a", ["a1", "the end"])
        served.check_free(["a"])
        served.expect("a", words("a", 1))


def test_a_request_that_is_refused_after_all_fails_alone():
    with Served() as served:
        served.submit("a", 6)
        served.begun(0)
        cause = ValueError("refused after all")
        served.engine.failures["add b"] = cause
        served.submit("b", 6)
        served.submit("c", 2)
        served.step()
        served.expect("b", ["EngineFailed"])
        text = f"EngineFailed of 'b' comes from {served.causes['b']!r}"
        check_true(served.causes["b"] is cause, text, of=served.of)
        check_logged(served, cause)
        served.engine.allow(math.inf)
        served.expect("a", words("a", 6))
        served.expect("c", words("c", 2))
        served.check_free(["b"])
        served.expect("b", words("b", 1))


@pytest.mark.parametrize("call", ["step", "add b", "abort a"])
def test_when_the_engine_fails_nobody_waits_for_ever(call):
    with Served(2, max_num_seqs=1) as served:
        served.submit("a", 6)
        served.begun(0)
        cause = ToldToFail(f"{call.split()[0]} was told to fail")
        served.engine.failures[call] = cause
        served.of.note(f"{call.split()[0]} will raise {cause!r}")
        served.submit("b", 6, loop=1)
        served.submit("c", 6)
        handle = served.submit("d", 6, listen=False)
        if call == "abort a":
            served.abort("a")
        served.step()
        expected = {"step": ["EngineFailed"], "add b": ["a1", "EngineFailed"]}
        served.expect("a", expected.get(call, ["the end"]))
        for name in "bc":
            served.expect(name, ["EngineFailed"])
            is_told = served.causes[name] is cause
            text = f"EngineFailed of {name!r} comes from {served.causes[name]!r}"
            check_true(is_told, text, of=served.of)
        served.fails(served.callers[0].run(collect(handle)), "iterating 'd'")
        served.until(lambda: not served.asynchronous.is_alive, "is_alive is still True")
        served.refused("EngineClosed", "e")
        check_logged(served, cause)
        closer = served.start_closing(9.0)
        served.until(lambda: not closer.is_alive(), "close has not returned")


# Close


@pytest.mark.parametrize("drain_seconds", [0.0, 0.01, 60.0, math.inf])
@pytest.mark.parametrize("before", ["nothing", "a request"])
def test_close_when_nobody_is_there(before, drain_seconds):
    with Served() as served:
        served.engine.allow(math.inf)
        if before == "a request":
            served.submit("a", 3)
            served.expect("a", words("a", 3))
        served.closed(served.start_closing(drain_seconds))


def test_close_twice():
    with Served() as served:
        served.submit("a", 3)
        served.begun(0)
        closer = served.start_closing(60.0)
        served.until(served.is_closing, "new requests are taken after close was called")
        served.engine.allow(math.inf)
        served.closed(closer)
        for drain_seconds in (0.0, 60.0):
            served.closed(served.start_closing(drain_seconds))
        served.expect("a", words("a", 3))


def test_close_in_an_event_loop():
    with Served(2, max_num_seqs=1) as served:
        for i, name in enumerate("abc"):
            served.submit(name, ENDLESS, loop=i % 2)
        served.engine.allow(3)
        served.until(lambda: served.engine.num_done == 3, "3 steps are not over")
        served.begun(3)
        served.flush()
        served.engine.allow(math.inf)
        got = list(served.got["b"])
        served.of.note("close(0) in loop 0")
        served.call(lambda: served.asynchronous.close(0.0), "close in an event loop")
        served.expect("b", [*got, "(abort)", "the end"])


def test_close_aborts_everybody():
    with Served(2, max_num_seqs=2) as served:
        for i, name in enumerate("abc"):
            served.submit(name, ENDLESS, loop=i % 2)
        served.step(2)
        served.settle()
        # One that is not added yet, and one that nobody listens to.
        served.submit("d", ENDLESS)
        handle = served.submit("e", ENDLESS, listen=False)
        closer = served.start_closing(0.0)
        served.until(served.is_closing, "new requests are taken after close was called")
        check_true(closer.is_alive(), "close has returned, and a step runs", of=served.of)
        served.flush()
        before = {name: list(served.got[name]) for name in "abcd"}
        served.step()
        served.closed(closer)
        for name in "cd":
            served.expect(name, ["(abort)", "the end"])
        for name in "ab":
            # The step that ran when close was called brought it a word.
            last = f"{name}{len(before[name]) + 1}"
            served.expect(name, [*before[name], last, "(abort)", "the end"])
        got = served.wait(served.callers[0].run(collect(handle)), "iterating has not ended")
        check_equal(got, [""], "the texts that 'e' gets", of=served.of)
        for name in "abcd":
            delta = served.deltas[name][-1]
            plain = delta.request_id, delta.text, delta.choices, delta.finish_reason
            check_equal(plain, (name, "", (), "abort"), "the last delta", of=served.of)


def test_close_lets_the_others_finish():
    with Served(2, max_num_seqs=1) as served:
        for i, name in enumerate("ab"):
            served.submit(name, 3, loop=i % 2)
        served.begun(0)
        served.submit("c", 2)
        closer = served.start_closing(600.0)
        served.until(served.is_closing, "new requests are taken after close was called")
        for _ in range(3):
            served.step()
        check_true(closer.is_alive(), "close has returned, and 'b' waits", of=served.of)
        served.expect("a", words("a", 3))
        served.engine.allow(math.inf)
        served.closed(closer)
        served.expect("b", words("b", 3))
        served.expect("c", words("c", 2))


def test_close_waits_no_longer_than_it_is_told():
    with Served(max_num_seqs=1) as served:
        served.submit("a", ENDLESS)
        served.submit("b", 2)
        served.engine.allow(5)
        served.until(lambda: served.engine.num_done == 5, "5 steps are not over")
        served.begun(5)
        closer = served.start_closing(2 * WAIT)
        served.until(served.is_closing, "new requests are taken after close was called")
        # By the end of this step, the time is over.
        time.sleep(3 * WAIT)
        served.engine.allow(math.inf)
        served.closed(closer)
        served.expect("b", ["(abort)", "the end"])
        served.expect("a", [f"a{i}" for i in range(1, 7)] + ["(abort)", "the end"])


@pytest.mark.parametrize("first, second", [(600.0, 0.0), (0.0, 600.0)])
def test_the_first_close_counts(first, second):
    with Served(max_num_seqs=1) as served:
        served.submit("a", 5)
        served.step()
        served.begun(1)
        closers = [served.start_closing(first)]
        served.until(served.is_closing, "new requests are taken after close was called")
        closers.append(served.start_closing(second))
        time.sleep(WAIT)  # by now it has been called, in all likelihood
        served.step()
        if first:
            served.settle()
        served.engine.allow(math.inf)
        for closer in closers:
            served.closed(closer)
        expected = words("a", 5) if first else ["a1", "a2", "(abort)", "the end"]
        served.expect("a", expected)


@pytest.mark.parametrize("drain_seconds", [0.0, 600.0])
def test_abort_while_it_closes(drain_seconds):
    with Served(max_num_seqs=1) as served:
        served.submit("a", ENDLESS)
        served.submit("b", 2)
        served.step()
        served.settle()
        closer = served.start_closing(drain_seconds)
        served.until(served.is_closing, "new requests are taken after close was called")
        served.abort("a")
        served.engine.allow(math.inf)
        served.closed(closer)
        served.flush()
        served.expect("a", ["a1", "the end"])
        served.expect("b", words("b", 2) if drain_seconds else ["(abort)", "the end"])
        served.abort("b")


def test_close_lets_those_finish_that_come_with_it():
    for _ in range(20):
        with left_to_chance(), Served(max_num_seqs=1) as served:
            served.engine.allow(math.inf)
            served.submit("a", 1)
            served.submit("b", 2)
            served.abort("a")
            closer = served.start_closing(600.0)
            served.closed(closer)
            served.expect("b", words("b", 2))


def test_an_engine_that_fails_while_it_closes():
    with Served(max_num_seqs=1) as served:
        served.submit("a", 9)
        served.submit("b", 9)
        served.step()
        served.settle()
        closer = served.start_closing(600.0)
        served.until(served.is_closing, "new requests are taken after close was called")
        served.engine.failures["step"] = ToldToFail("step was told to fail")
        served.step()
        served.until(lambda: not closer.is_alive(), "close has not returned")
        served.expect("a", ["a1", "EngineFailed"])
        served.expect("b", ["EngineFailed"])


# Several event loops, and closed ones


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_a_closed_event_loop_harms_nobody(order):
    with Served(2, max_num_seqs=4) as served:
        for loop in order:
            served.submit(f"{'ab'[loop]}", 6, loop=loop)
            served.submit(f"{'cd'[loop]}", 6, loop=loop)
        served.begun(0)
        served.of.note("loop 0 is closed")
        served.callers[0].stop()
        served.loop_of = dict.fromkeys(served.loop_of, 1)
        served.engine.allow(math.inf)
        served.expect("b", words("b", 6))
        served.expect("d", words("d", 6))
        served.submit("e", 3, loop=1)
        served.expect("e", words("e", 3))


def test_a_closed_event_loop_and_a_failed_step():
    with Served(2, max_num_seqs=4) as served:
        served.submit("first", 1, loop=1)
        served.begun(0)
        served.submit("a", 6, loop=0)
        served.submit("b", 6, loop=1)
        served.of.note("loop 0 is closed")
        served.callers[0].stop()
        served.step(2)
        served.begun(2)
        served.engine.failures["step"] = ValueError("the model was told to fail")
        served.engine.allow(math.inf)
        served.expect("b", ["b1", "EngineFailed"])
        served.submit("c", 2, loop=1)
        served.expect("c", words("c", 2))


def test_a_closed_event_loop_and_close():
    with Served(2, max_num_seqs=1) as served:
        for loop, name in enumerate("ab"):
            served.submit(name, ENDLESS, loop=1 - loop)
        served.begun(0)
        served.of.note("loop 1 is closed")
        served.callers[1].stop()
        served.engine.allow(math.inf)
        served.closed(served.start_closing(0.0))
        served.expect("b", ["(abort)", "the end"])


# Anything


class Client:
    """A request of a random run: what it does, and what it got."""

    def __init__(self, name: str, rng: random.Random):
        self.name = name
        self.num_words = rng.randint(1, 9)
        self.takes = rng.choice([0, 1, 2, 4, None, None, None, None])
        self.is_hasty = rng.random() < 0.3
        self.got: list[str] = []
        self.end = ""

    async def run(self, engine: Any) -> None:
        """Submit, take some deltas, and perhaps leave; whatever comes afterwards is noted too."""
        params = engine_lab.GenerationParams(max_tokens=self.num_words)
        while True:
            try:
                handle = engine.submit(self.name, [1], params)
                break
            except asynchronous.EngineBusy:
                await asyncio.sleep(0.001)
            except asynchronous.EngineClosed:
                self.end = "closed"
                return
        try:
            while self.takes is None or len(self.got) < self.takes:
                if self.is_hasty:
                    await self.hurry(handle)
                delta = await anext(aiter(handle))
                self.note(delta)
            handle.abort()
            self.end = self.end or "aborted"
            async for delta in handle:
                self.got.append(f"{delta.text} after the abort")
        except StopAsyncIteration:
            self.end = self.end or "no last delta"
        except asynchronous.EngineFailed:
            self.end = f"{self.end}failed"

    async def hurry(self, handle: Any) -> None:
        """Wait for a moment only, and be cancelled."""
        task = asyncio.ensure_future(anext(aiter(handle)))
        await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            self.note(await task)

    def note(self, delta: Any) -> None:
        self.got.append(delta.text)
        if delta.finish_reason is not None:
            self.end += delta.finish_reason

    def check(self, of: Log, ends: Sequence[str]) -> None:
        text = f"{self.name!r}, of {self.num_words} words, has got {self.got} and ended: {self.end}"
        of = Log(f"{of.start}\n  {text}")
        check_true(self.end in ends, f"{self.name!r} ended as {self.end!r}", of=of)
        whole = [f"{self.name}{i}" for i in range(1, self.num_words + 1)]
        got = [text for text in self.got if text or self.end != "abort"]
        if self.end == "length":
            check_equal(got, whole, f"what {self.name!r} has got", of=of)
        check_equal(got, whole[: len(got)], f"what {self.name!r} has got", of=of)


@pytest.mark.parametrize("seed", range(6))
def test_hundreds_of_requests_end_once_each(seed):
    rng = random.Random(seed)
    max_waiting = rng.choice([2, 40, 400])
    with left_to_chance(), Served(2, 1 + 3 * seed, max_waiting) as served:
        served.of.start = f"AsyncEngine, 300 requests from 2 event loops, seed {seed}"
        clients = [Client(f"r{i}.", rng) for i in range(300)]
        served.engine.allow(math.inf)
        ends = run_clients(served, clients)
        for client in clients:
            client.check(ends, ["length", "aborted"])
        served.until(lambda: not served.engine.num_words, "somebody still is in the engine")
        served.check_free([clients[i].name for i in range(0, 300, 60)])
        served.closed(served.start_closing(0.0))


def run_clients(served: Served, clients: Sequence[Client], meanwhile=lambda: None) -> Log:
    """Run clients in both loops, and wait for all of them."""

    async def run_all(half: Sequence[Client]) -> None:
        await asyncio.gather(*(client.run(served.asynchronous) for client in half))

    futures = [caller.run(run_all(clients[i::2])) for i, caller in enumerate(served.callers)]
    meanwhile()
    for future in futures:
        served.wait(future, "some requests have not ended")
    return served.of


@pytest.mark.parametrize("seed", range(3))
def test_hundreds_of_requests_and_steps_that_fail(seed):
    rng = random.Random(seed)
    with left_to_chance(), Served(2, max_num_seqs=4, max_waiting=60) as served:
        served.of.start = f"AsyncEngine, 200 requests, every 20th step fails, seed {seed}"
        clients = [Client(f"r{i}.", rng) for i in range(200)]
        step = served.engine.deltas

        def deltas(parts):
            if parts and served.engine.num_done % 20 == 7:
                served.engine.failures["step"] = ValueError("the model was told to fail")
            return step(parts)

        served.engine.deltas = deltas
        served.engine.allow(math.inf)
        of = run_clients(served, clients)
        for client in clients:
            client.check(of, ["length", "aborted", "failed"])


@pytest.mark.parametrize("drain_seconds", [0.0, 60.0])
@pytest.mark.parametrize("num_steps", [0, 5, 40])
def test_hundreds_of_requests_when_it_closes(num_steps, drain_seconds):
    rng = random.Random(num_steps)
    with left_to_chance(), Served(2, max_num_seqs=4, max_waiting=400) as served:
        served.of.start = (
            f"AsyncEngine, 200 requests, close({drain_seconds:g}) near step {num_steps}"
        )
        clients = [Client(f"r{i}.", rng) for i in range(200)]

        def close() -> None:
            served.engine.allow(num_steps)
            if num_steps:
                served.until(lambda: served.engine.num_done == num_steps, "steps are not over")
            closer = served.start_closing(drain_seconds)
            served.engine.allow(math.inf)
            served.closed(closer)

        of = run_clients(served, clients, close)
        expected = ["length", "aborted", "closed", *([] if drain_seconds else ["abort"])]
        for client in clients:
            client.check(of, expected)


# A real engine


class Letters:
    """A tokenizer for decoding: an id is a letter."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(ord("A") + i) for i in ids)


SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "tie_word_embeddings": True,
    "max_position_embeddings": 40,
}


def tiny_model() -> torch.nn.Module:
    model = qwen.Qwen(qwen.QwenConfig.from_dict(SHAPE)).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model.requires_grad_(False)


class Watched:
    """A real engine, whose calls are held to one thread like those of the stand-in."""

    def __init__(self, model: Any, log: Log, changed: threading.Condition):
        self.guard = StandIn(log, changed, 3)
        self.limits = engine_lab.EngineLimits(30, 40, max_num_seqs=3, block_size=4, token_budget=16)
        self.engine = seen("Engine")(model, Letters(), (0,), self.limits)
        self.check = self.engine.check

    def add(self, *args):
        with self.guard.call("add"):
            return self.engine.add(*args)

    def abort(self, request_id):
        with self.guard.call("abort"):
            return self.engine.abort(request_id)

    def step(self):
        with self.guard.call("step"):
            return self.engine.step()

    @property
    def num_unfinished(self):
        with self.guard.call("num_unfinished"):
            return self.engine.num_unfinished


def real(served: Served, model: Any) -> Watched:
    """Put a real engine in the stand-in's place."""
    served.asynchronous.close(0.0)
    served.of.start = "AsyncEngine over an Engine with a tiny model"
    watched = Watched(model, served.of, served.changed)
    watched.guard.others |= {caller.thread.ident for caller in served.callers}
    served.engine = watched.guard
    served.asynchronous = asynchronous.AsyncEngine(watched)
    served.asynchronous.start()
    return watched


PROMPTS = [[1, 2, 3], [9], [4] * 9, [7, 8], [5, 6, 7, 8, 9, 10], [11, 3], [1, 2, 3, 4], [30] * 5]


def wanted_of(i: int) -> Any:
    return engine_lab.GenerationParams(temperature=0.0, max_tokens=3 + 3 * i, ignore_eos=True)


async def answer(engine: Any, name: str, prompt: Sequence[int], params: Any) -> tuple[str, str]:
    """What a request is answered, and the reason of its end."""
    text, reason = "", "none"
    async for delta in engine.submit(name, prompt, params):
        text, reason = text + delta.text, delta.finish_reason
    return text, reason


def test_answers_are_those_of_the_engine():
    model = tiny_model()
    limits = engine_lab.EngineLimits(30, 40, max_num_seqs=3, block_size=4, token_budget=16)
    llm = engine_lab.LLM(model, Letters(), (0,), limits)
    expected = llm.generate(PROMPTS, [wanted_of(i) for i in range(len(PROMPTS))])
    with Served(2) as served:
        watched = real(served, model)
        futures = [
            served.callers[i % 2].run(answer(served.asynchronous, f"r{i}", prompt, wanted_of(i)))
            for i, prompt in enumerate(PROMPTS)
        ]
        for i, (future, completion) in enumerate(zip(futures, expected, strict=True)):
            got = served.wait(future, f"request {i} has not ended")
            right = completion.text, completion.finish_reason
            check_equal(got, right, f"the answer to prompt {i}", of=served.of)
        check_pool(served, watched)


def check_pool(served: Served, watched: Watched) -> None:
    engine = watched.engine
    served.closed(served.start_closing(0.0))
    check_equal(engine.num_unfinished, 0, "num_unfinished of the engine", of=served.of)
    free, every = engine.blocks.num_free_blocks, engine.blocks.num_blocks
    check_equal(free, every, "free blocks when nobody is there", of=served.of)


def test_a_model_that_fails_fails_one_step():
    model = tiny_model()
    with Served() as served:
        watched = real(served, model)
        told = threading.Event()

        def fail(module, args):
            if told.is_set():
                told.clear()
                raise RuntimeError("the model was told to fail")

        model.layers[0].register_forward_pre_hook(fail)
        told.set()
        first = served.callers[0].run(answer(served.asynchronous, "a", [1, 2], wanted_of(2)))
        served.fails(first, "the request of the failed step")
        second = served.callers[0].run(answer(served.asynchronous, "b", [1, 2], wanted_of(2)))
        text, reason = served.wait(second, "the request after the failed step has not ended")
        got = len(text), reason
        check_equal(got, (9, "length"), "length and reason of the next answer", of=served.of)
        check_pool(served, watched)


def test_an_engine_with_clients_that_leave():
    rng = random.Random(1)
    with left_to_chance(), Served(2) as served:
        watched = real(served, tiny_model())
        ends = []

        async def client(i: int) -> None:
            handle = served.asynchronous.submit(f"r{i}", PROMPTS[i % 8], wanted_of(i % 5))
            takes, got = rng.choice([0, 1, 3, 99]), 0
            async for delta in handle:
                got += 1
                if got > takes or delta.finish_reason is not None:
                    break
            handle.abort()
            ends.append([delta.text async for delta in handle])

        futures = [served.callers[i % 2].run(client(i)) for i in range(40)]
        for future in futures:
            served.wait(future, "a client has not left")
        check_equal(ends, [[] for _ in ends], "what came after an abort or an end", of=served.of)
        check_equal(len(ends), 40, "how many clients have left", of=served.of)
        check_pool(served, watched)


def test_a_prompt_that_the_engine_refuses():
    with Served() as served:
        watched = real(served, tiny_model())
        for prompt in ([], [99], [1] * 40):
            served.refused("ValueError", "a", prompt=prompt)
        future = served.callers[0].run(answer(served.asynchronous, "a", [1, 2], wanted_of(0)))
        text, reason = served.wait(future, "the request has not ended")
        check_equal((len(text), reason), (3, "length"), "length and reason", of=served.of)
        check_pool(served, watched)
