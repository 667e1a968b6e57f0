"""Grades week3/server: refusals, the guard, prompts, choices, streams and whole answers."""

import asyncio
import contextlib
import inspect
import itertools
import json
import logging
import math
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import fastapi.exceptions
import httpx
import openai
import pydantic
import pytest
import starlette.exceptions
import torch
from jinja2 import TemplateError

from course.grading import GradedFailure, History, check_equal, check_raises, check_true, lab

server = lab("week3/server")
protocol = lab("week3/protocol")
threaded = lab("week3/async_engine")
engine_lab = lab("week3/engine")
runner = lab("week3/model_runner")
qwen = lab("week1/qwen")

NAME, KEY, CONTEXT = "tiny", "the key of this test", 64
# How long something may take that nothing in a test holds up.
SECONDS = 3.0
SECRET = "/srv/secret/path, line 17"


def run(scene: Awaitable[Any]) -> Any:
    """Play a test's scene in an event loop of its own."""

    async def limited() -> Any:
        try:
            async with asyncio.timeout(4 * SECONDS):
                return await scene
        except TimeoutError:
            raise GradedFailure(f"what was asked for did not end within {4 * SECONDS:g} s") from None

    return asyncio.run(limited())


async def settle() -> None:
    """Let all tasks go on until they wait for something that only the test can do."""
    for _ in range(60):
        await asyncio.sleep(0)


class Pulse:
    """Wakes whoever waits until something has happened."""

    def __init__(self):
        self._beat = asyncio.Event()

    def beat(self) -> None:
        self._beat.set()
        self._beat = asyncio.Event()

    async def until(self, condition: Callable[[], Any], what: str, of: object) -> None:
        """Wait until a condition holds. what: the thing that is then there, in words."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SECONDS):
                while not condition():
                    await self._beat.wait()
        check_true(bool(condition()), f"{what}: still not there after {SECONDS:g} s", of=of)


def others() -> set[asyncio.Task]:
    """The tasks that run beside the one that asks."""
    return asyncio.all_tasks() - {asyncio.current_task()}


class Handle:
    """A request of the stand-in engine: what comes to it comes when the test says so."""

    def __init__(self, of: History, name: str, prompt_ids: Sequence[int] = (), params: Any = None):
        self.of, self.name, self.prompt_ids, self.params = of, name, list(prompt_ids), params
        self.is_aborted = self.has_ended = False
        self._news: asyncio.Queue[Any] = asyncio.Queue()
        self.pulse = Pulse()

    def say(self, text: str, finish_reason: str | None = None, **options: Any) -> Any:
        """Let a delta come; returns it. See `delta_of`."""
        delta = delta_of(text, finish_reason, **options)
        words = f"{self.name} gets {text!r}, {len(delta.choices)} choices"
        self.of.note(words + (f", finish_reason {finish_reason!r}" if finish_reason else ""), None)
        self._news.put_nowait(delta)
        return delta

    def fail(self, error: BaseException) -> None:
        """Let iterating raise."""
        self.of.note(f"{self.name} raises {type(error).__name__}", None)
        self._news.put_nowait(error)

    def finish(self) -> None:
        """Let iterating end without a last delta."""
        self.of.note(f"{self.name} ends without a last delta", None)
        self._news.put_nowait(None)

    def abort(self) -> None:
        if not self.has_ended:
            self.of.note(f"{self.name} is aborted", None)
            self.is_aborted = self.has_ended = True
            self._news.put_nowait(None)
            self.pulse.beat()

    def __aiter__(self) -> "Handle":
        return self

    async def __anext__(self) -> Any:
        if self.has_ended:
            raise StopAsyncIteration
        news = await self._news.get()
        if news is None or self.has_ended:
            self.has_ended = True
            raise StopAsyncIteration
        if isinstance(news, BaseException):
            self.has_ended = True
            raise news
        self.has_ended = news.finish_reason is not None
        return news


def delta_of(
    text: str,
    finish_reason: str | None = None,
    num_choices: int | None = None,
    logprob: float | None = None,
    cached: int = 0,
) -> Any:
    """Make a delta. num_choices: None means one where there is text, else none."""
    count = bool(text) if num_choices is None else num_choices
    ids = [ord(character) for character in (text or "?")[0] * count]
    top = () if logprob is None else tuple((i + 1, logprob - 1) for i in ids[:1])
    choices = tuple(runner.Choice(i, logprob, top) for i in ids)
    return engine_lab.Delta("a", text, choices, finish_reason, cached)


class Recorder:
    """Metrics that note what they are told, with a clock that the test sets."""

    def __init__(self):
        self.seconds, self.told = 100.0, []

    def now(self) -> float:
        return self.seconds

    def first_token(self, seconds: float) -> None:
        self.told.append(("first_token", seconds))

    def next_token(self, seconds: float) -> None:
        self.told.append(("next_token", seconds))

    def ended(self, reason: str, seconds: float) -> None:
        self.told.append(("ended", reason, seconds))


class Line:
    """The client's end of an answer: what `receive` hears is that it leaves, if it does."""

    def __init__(self, of: History):
        self.of, self._gone = of, asyncio.Event()

    def leave(self) -> None:
        self.of.note("the client leaves", None)
        self._gone.set()

    async def receive(self) -> dict[str, Any]:
        await self._gone.wait()
        return {"type": "http.disconnect"}


class Listener:
    """Takes all that an asynchronous generator yields, in a task of its own."""

    def __init__(self, generator: AsyncIterator[Any]):
        self.generator, self.got, self.error, self.has_ended = generator, [], None, False
        self.task = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        try:
            async for item in self.generator:
                self.got.append(item)
        except Exception as error:
            self.error = error
        self.has_ended = True

    async def news(self) -> list[Any]:
        """Return what has come since the last time."""
        await settle()
        got, self.got = self.got, []
        return got


async def generator_of(value: Any, what: str) -> AsyncIterator[Any]:
    """Return an asynchronous generator that the lab has made, as it is."""
    if inspect.iscoroutine(value):
        value = await value  # of a stub
    is_one = hasattr(value, "__aiter__") and hasattr(value, "aclose")
    check_true(is_one, f"{what} returns {value!r}, and is no asynchronous generator")
    return value


# What clients are told of an error: status, what the text holds, param.
REFUSALS = {
    "a wrong name": (lambda: protocol.RequestError(400, "n is odd", "n"), 400, "n is odd", "n"),
    "another model": (lambda: protocol.RequestError(404, "no such", "model"), 404, "no", "model"),
    "no param": (lambda: protocol.RequestError(503, "closing"), 503, "closing", None),
    "too many wait": (lambda: threaded.EngineBusy("7 wait"), 429, "7 wait", None),
    "the engine is closed": (lambda: threaded.EngineClosed("it ends"), 503, "it ends", None),
    "an unknown path": (lambda: http_error(404, "Not Found"), 404, "Not Found", None),
    "another method": (lambda: http_error(405, "GET only"), 405, "GET only", None),
    "too long": (lambda: http_error(413, "9 bytes"), 413, "9 bytes", None),
}
INTERNAL = {
    "the model failed": lambda: threaded.EngineFailed(SECRET),
    "a mistake of the server": lambda: RuntimeError(SECRET),
    "a key that is missing": lambda: KeyError(SECRET),
    "a value error": lambda: ValueError(SECRET),
    "an operating system's error": lambda: FileNotFoundError(2, "No such file", SECRET),
    "not implemented by a library": lambda: NotImplementedError(SECRET),
}


def http_error(status: int, text: str, headers: dict[str, str] | None = None) -> Exception:
    return starlette.exceptions.HTTPException(status, text, headers)


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal_of_what_a_client_can_know(case):
    make, status, text, param = REFUSALS[case]
    error = make()
    with logged() as records:
        refusal = server.refusal_of(error)
    of = f"refusal_of({error!r})"
    check_equal(getattr(refusal, "status", refusal), status, "status", of=of)
    check_equal(refusal.param, param, "param", of=of)
    check_true(text in str(refusal), f"its text is {str(refusal)!r}", of=of)
    check_equal(len(records), 0, "how many errors went to the log", of=of)


@contextlib.contextmanager
def logged():
    """Collect what goes to the log as an ERROR."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = records.append
    logging.getLogger().addHandler(handler)
    try:
        yield records
    finally:
        logging.getLogger().removeHandler(handler)


@pytest.mark.parametrize("case", INTERNAL)
def test_refusal_of_what_no_client_should_know(case):
    error = INTERNAL[case]()
    with logged() as records:
        refusal = server.refusal_of(error)
    of = f"refusal_of({error!r})"
    check_equal(getattr(refusal, "status", refusal), 500, "status", of=of)
    check_equal(refusal.param, None, "param", of=of)
    text = str(refusal)
    check_true(bool(text.strip()), "its text is empty", of=of)
    check_true(SECRET not in text, f"its text, {text!r}, tells the error's own", of=of)
    check_true(type(error).__name__ not in text, f"its text is {text!r}", of=of)
    traced = [r for r in records if r.exc_info and r.exc_info[1] is error]
    words = f"{len(records)} errors in the log, {len(traced)} with the traceback of this one"
    check_true(len(traced) == 1, words, of=of)


def invalid(body: dict[str, Any]) -> Exception:
    """The error that fastapi makes of a body for /v1/completions."""
    try:
        protocol.CompletionRequest.model_validate(body)
    except pydantic.ValidationError as error:
        found = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        return fastapi.exceptions.RequestValidationError(found)
    raise AssertionError(f"{body} is right")


def invalid_whole(kind: str, *path: str | int) -> Exception:
    found = {"type": kind, "loc": ("body", *path), "msg": "JSON decode error", "input": {}}
    return fastapi.exceptions.RequestValidationError([found])


# What is wrong in a body; the name, and a word of the reason.
INVALID = {
    "an unknown name": (lambda: invalid({**FINE, "frobnicate": 1}), "frobnicate", "xtra"),
    "a word for a number": (lambda: invalid({**FINE, "temperature": "hot"}), "temperature", "alid"),
    "a bool for a number": (lambda: invalid({**FINE, "max_tokens": True}), "max_tokens", "alid"),
    "no model": (lambda: invalid({"prompt": "a"}), "model", "equired"),
    "inside a list": (lambda: invalid({**FINE, "stop": ["a", 1]}), "stop", "alid"),
    "inside an object": (lambda: invalid({**FINE, "stream_options": {"x": 1}}), *OPTIONS)
    if False
    else (lambda: invalid({**FINE, "stream_options": {"x": 1}}), "stream_options", "xtra"),
    "broken JSON": (lambda: invalid_whole("json_invalid", 17), None, "JSON decode error"),
    "no body": (lambda: invalid_whole("missing"), None, "JSON decode error"),
}
FINE = {"model": NAME, "prompt": "a"}
