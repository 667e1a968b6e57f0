"""Grades week3/server: refusals, the guard, prompts, choices, streams and whole answers."""

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import logging
import random
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import fastapi.exceptions
import httpx
import openai
import pydantic
import pytest
import starlette.exceptions
import torch
from jinja2 import TemplateError

from course.grading import GradedFailure, History, check_equal, check_true, lab

server = lab("week3/server")
protocol = lab("week3/protocol")
threaded = lab("week3/async_engine")
engine_lab = lab("week3/engine")
runner = lab("week3/model_runner")
qwen = lab("week1/qwen")

NAME, KEY, CONTEXT = "tiny", "the-key-of-this-test", 64
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
            raise GradedFailure(
                f"what was asked for did not end within {4 * SECONDS:g} s"
            ) from None

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


def check_same(got: Any, expected: Any, what: str, of: object) -> None:
    """Hold what JSON could hold to being the same; tells the first place that is not."""
    path, whole = "", (json.dumps(got, default=str), json.dumps(expected, default=str))
    while got != expected:
        if isinstance(got, dict) and isinstance(expected, dict):
            names = [*expected, *(name for name in got if name not in expected)]
            place = next(n for n in names if got.get(n, MISSING) != expected.get(n, MISSING))
            got, expected = got.get(place, MISSING), expected.get(place, MISSING)
        elif isinstance(got, list) and isinstance(expected, list):
            pairs = list(itertools.zip_longest(got, expected, fillvalue=MISSING))
            place = next(i for i, (a, b) in enumerate(pairs) if a != b)
            got, expected = pairs[place]
        else:
            texts = [textwrap.shorten(repr(one), 160) for one in (got, expected)]
            where = f"{what}, at {path}" if path else what
            text = f"{where}: got {texts[0]}, expected {texts[1]}"
            raise GradedFailure(f"{of}\n{text}", (what, whole[0]), whole[1])
        path += f"[{place!r}]"


MISSING = "(nothing)"


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
    "a wrong name": (lambda: server.RequestError(400, "n is odd", "n"), 400, "n is odd", "n"),
    "another model": (lambda: server.RequestError(404, "no such", "model"), 404, "no", "model"),
    "no param": (lambda: server.RequestError(503, "closing"), 503, "closing", None),
    "too many wait": (lambda: server.EngineBusy("7 wait"), 429, "7 wait", None),
    "the engine is closed": (lambda: server.EngineClosed("it ends"), 503, "it ends", None),
    "an unknown path": (lambda: http_error(404, "Not Found"), 404, "Not Found", None),
    "another method": (lambda: http_error(405, "GET only"), 405, "GET only", None),
    "too long": (lambda: http_error(413, "9 bytes"), 413, "9 bytes", None),
}
INTERNAL = {
    "the model failed": lambda: server.EngineFailed(SECRET),
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
        server.CompletionRequest.model_validate(body)
    except pydantic.ValidationError as error:
        found = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        return fastapi.exceptions.RequestValidationError(found)
    raise AssertionError(f"{body} is right")


OPTIONS = ("stream_options", "xtra")


def invalid_whole(kind: str, *path: str | int) -> Exception:
    found = {"type": kind, "loc": ("body", *path), "msg": "JSON decode error", "input": {}}
    return fastapi.exceptions.RequestValidationError([found])


FINE = {"model": NAME, "prompt": "a"}
# What is wrong in a body; the name, and a word of the reason.
INVALID = {
    "an unknown name": (lambda: invalid({**FINE, "frobnicate": 1}), "frobnicate", "xtra"),
    "a word for a number": (lambda: invalid({**FINE, "temperature": "hot"}), "temperature", "alid"),
    "a bool for a number": (lambda: invalid({**FINE, "max_tokens": True}), "max_tokens", "alid"),
    "no model": (lambda: invalid({"prompt": "a"}), "model", "equired"),
    "inside a list": (lambda: invalid({**FINE, "stop": ["a", 1]}), "stop", "alid"),
    "inside an object": (lambda: invalid({**FINE, "stream_options": {"x": 1}}), *OPTIONS),
    "broken JSON": (lambda: invalid_whole("json_invalid", 17), None, "JSON decode error"),
    "no body": (lambda: invalid_whole("missing"), None, "JSON decode error"),
}


@pytest.mark.parametrize("case", INVALID)
def test_refusal_of_a_body_that_is_wrong(case):
    make, param, reason = INVALID[case]
    refusal = server.refusal_of(make())
    of = f"refusal_of the RequestValidationError of a body: {case}"
    check_equal(getattr(refusal, "status", refusal), 400, "status", of=of)
    check_equal(refusal.param, param, "param", of=of)
    for word in (reason, param or ""):
        check_true(word in str(refusal), f"its text is {str(refusal)!r}, without {word!r}", of=of)


@pytest.mark.parametrize("case", [*REFUSALS, *INTERNAL, *INVALID])
def test_error_response(case):
    error = (REFUSALS.get(case) or INVALID.get(case) or (INTERNAL.get(case),))[0]()
    with logged():
        refusal, response = server.refusal_of(error), server.error_response(error)
    of = f"error_response({error!r})"[:200]
    check_equal(response.status_code, refusal.status, "status", of=of)
    got = {name: response.headers.get(name) for name in ("content-type", "retry-after")}
    seconds = str(server.RETRY_AFTER_SECONDS) if refusal.status == 429 else None
    check_equal(got, {"content-type": "application/json", "retry-after": seconds}, "headers", of=of)
    kind = "server_error" if refusal.status >= 500 else "invalid_request_error"
    told = {"message": str(refusal), "type": kind, "param": refusal.param, "code": refusal.status}
    check_same(json.loads(response.body), {"error": told}, "the body", of)


def test_error_response_asks_to_come_back_for_every_429():
    for error in (server.RequestError(429, "slowly"), http_error(429, "slowly")):
        header = server.error_response(error).headers.get("retry-after")
        of = f"error_response({error!r})"
        check_equal(header, str(server.RETRY_AFTER_SECONDS), "Retry-After", of=of)


@pytest.mark.parametrize("name", ["Retry-After", "retry-after"])
def test_error_response_keeps_a_time_to_come_back(name):
    response = server.error_response(http_error(429, "slowly", {name: "30", "X-A": "b"}))
    of = f"error_response(HTTPException(429, headers={{{name!r}: '30', 'X-A': 'b'}}))"
    check_equal(response.headers.getlist("retry-after"), ["30"], "Retry-After", of=of)
    check_equal(response.headers.get("x-a"), "b", "X-A", of=of)


def test_error_response_keeps_headers():
    for headers in ({"Allow": "GET"}, {"WWW-Authenticate": "Bearer", "X-A": "b"}, {}, None):
        response = server.error_response(http_error(405, "GET only", headers))
        got = {name: response.headers.get(name) for name in headers or {}}
        of = f"error_response(HTTPException(405, headers={headers}))"
        check_equal(got, headers or {}, "the headers of the HTTPException", of=of)


class Visit:
    """One HTTP request to an ASGI application; the test sees each message as it comes.

    body: in one piece or in many. spec: the version of ASGI that the server speaks. gone_after: how
    many pieces of the body come before the client leaves; None, when it stays.
    """

    def __init__(
        self,
        app: Callable,
        path: str,
        body: bytes | Iterable[bytes] = b"",
        headers: Iterable[tuple[bytes, bytes]] = (),
        method: str = "POST",
        spec: str = "2.3",
        gone_after: int | None = None,
        of: History | None = None,
    ):
        self.app, self.spec = app, spec
        self.of = History("an application") if of is None else of
        self._pieces = iter([body] if isinstance(body, bytes) else body)
        self._next = next(self._pieces, b"")
        self._gone_after = gone_after
        self.num_received, self.messages = 0, []
        self._left, self.pulse = asyncio.Event(), Pulse()
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": spec},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json"), *headers],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
            "state": {},
        }
        self.of.note(f"{method} {path}", None)

    async def receive(self) -> dict[str, Any]:
        if self._gone_after is not None and self.num_received >= self._gone_after:
            self._left.set()
        if self._next is None or self._left.is_set():
            await self._left.wait()
            return {"type": "http.disconnect"}
        piece, self._next = self._next, next(self._pieces, None)
        self.num_received += 1
        return {"type": "http.request", "body": piece, "more_body": self._next is not None}

    async def send(self, message: dict[str, Any]) -> None:
        if self._left.is_set() and self.spec >= "2.4":
            raise OSError("the client has gone")
        self.messages.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self._left.set()
        self.pulse.beat()

    def begin(self) -> "Visit":
        self.task = asyncio.create_task(self.app(self.scope, self.receive, self.send))
        self.task.add_done_callback(self._ended)
        return self

    def _ended(self, task: asyncio.Task) -> None:
        self.pulse.beat()
        if not task.cancelled():
            task.exception()  # so that asyncio does not tell it too

    def leave(self) -> None:
        """The client goes away."""
        self.of.note("the client leaves", None)
        self._left.set()

    async def leave_for_good(self) -> None:
        """The client goes away; of what goes on then, nothing waits for another thread."""
        self.leave()
        await settle()
        text = "the client has left, and the application goes on"
        check_true(self.task.done(), text, of=self.of)
        self.check_no_crash()

    async def until(self, condition: Callable[[], Any], what: str) -> None:
        await self.pulse.until(lambda: condition() or self.task.done(), what, self.of)
        if not condition():
            self.check_no_crash()
        check_true(bool(condition()), f"the answer has ended without {what}", of=self.of)

    async def end(self) -> "Visit":
        """Wait until the application has returned."""
        await self.pulse.until(self.task.done, f"the end of the answer to {self.path}", self.of)
        self.check_no_crash()
        return self

    def check_no_crash(self) -> None:
        error = self.task.exception()
        unwritten = isinstance(error, NotImplementedError) and SECRET not in str(error)
        if error is not None and (unwritten or not self.messages) and not self._is_gone(error):
            raise error

    def _is_gone(self, error: BaseException) -> bool:
        return self.spec >= "2.4" and self._left.is_set() and "NotImpl" not in repr(error)

    @property
    def path(self) -> str:
        return self.scope["path"]

    @property
    def status(self) -> int | None:
        return self.messages[0]["status"] if self.messages else None

    def header(self, name: str) -> str | None:
        headers = dict(self.messages[0]["headers"]) if self.messages else {}
        found = headers.get(name.encode())
        return None if found is None else found.decode()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    @property
    def content(self) -> Any:
        """The body, of JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            text = f"status {self.status}, and the body is no JSON: {self.body[:200]!r}"
            raise GradedFailure(f"{self.of}\n{text}") from None

    @property
    def events(self) -> list[Any]:
        """What the whole events so far say; [DONE] as a string."""
        return [said(text + "\n\n") for text in self.body.decode().split("\n\n")[:-1]]

    def check_refused(self, status: int, param: str | None = ..., text: str = "") -> None:
        """Hold the answer to being an error as OpenAI writes it."""
        check_equal(self.status, status, "status", of=self.of)
        error = self.content.get("error") if isinstance(self.content, dict) else None
        fields = sorted(error) if isinstance(error, dict) else error
        check_equal(fields, ["code", "message", "param", "type"], "fields of error", of=self.of)
        check_equal(error["code"], status, "its code", of=self.of)
        if param is not ...:
            check_equal(error["param"], param, "its param", of=self.of)
        check_true(text in error["message"], f"its message: {error['message']!r}", of=self.of)


def said(text: str) -> Any:
    """Read a server-sent event: an object, or "[DONE]"."""
    is_one = isinstance(text, str) and text.startswith("data: ") and text.endswith("\n\n")
    check_true(is_one and text.count("\n") == 2, f"no server-sent event: {text!r}")
    content = text.removeprefix("data: ").strip()
    return content if content == "[DONE]" else json.loads(content)


class Inside:
    """An ASGI application behind a guard: notes who comes in, and what is received."""

    def __init__(self):
        self.scopes, self.bodies, self.after = [], [], []

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        self.scopes.append(scope)
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})
        self.after.append((await receive())["type"])


def guarded(
    key: str | None, max_body_bytes: int, path: str = "/v1/models", **options: Any
) -> tuple[Inside, Visit]:
    """Let one request come to a guard; returns what is behind it, and the request at its end."""
    inside = Inside()
    of = History(f"Guard(api_key={key!r}, max_body_bytes={max_body_bytes})")

    async def scene() -> Visit:
        guard = server.Guard(inside, api_key=key, max_body_bytes=max_body_bytes)
        return await Visit(guard, path, of=of, **options).begin().end()

    return inside, run(scene())


BODIES = {
    "none": b"",
    "one piece": b"0123456789",
    "two pieces": [b"01234", b"56789"],
    "single bytes": [bytes([i]) for i in range(10)],
    "empty pieces": [b"", b"0123", b"", b"456789", b""],
}


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("case", BODIES)
def test_guard_hands_on_the_whole_body(case, key):
    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    inside, visit = guarded(key, 10, body=BODIES[case], headers=headers)
    expected = BODIES[case] if isinstance(BODIES[case], bytes) else b"".join(BODIES[case])
    check_equal(inside.bodies, [expected], "bodies that app received", of=visit.of)
    check_equal(visit.status, 200, "status", of=visit.of)
    check_equal(inside.after, ["http.disconnect"], "what app receives after it", of=visit.of)


# The key of the server, what a client sends, and whether that is right.
KEYS = {
    "the key": (KEY, f"Bearer {KEY}", True),
    "another case of the word": (KEY, f"bearer {KEY}", True),
    "upper case of the word": (KEY, f"BEARER {KEY}", True),
    "a key in Chinese": ("钥匙", "Bearer 钥匙", True),
    "one letter": ("k", "Bearer k", True),
    "nothing": (KEY, None, False),
    "an empty header": (KEY, "", False),
    "no word": (KEY, KEY, False),
    "the word alone": (KEY, "Bearer", False),
    "an empty key": (KEY, "Bearer ", False),
    "another word": (KEY, f"Basic {KEY}", False),
    "no space": (KEY, f"Bearer{KEY}", False),
    "another key": (KEY, "Bearer no key", False),
    "a part of the key": (KEY, f"Bearer {KEY[:-1]}", False),
    "more than the key": (KEY, f"Bearer {KEY}x", False),
    "another case of the key": (KEY, f"Bearer {KEY.upper()}", False),
    "a key in Russian": (KEY, "Bearer ключ", False),
    "no text at all": (KEY, b"Bearer \xff\xfe", False),
    "the key of another": ("钥匙", f"Bearer {KEY}", False),
}


@pytest.mark.parametrize("case", KEYS)
def test_guard_asks_for_the_key(case):
    key, header, is_right = KEYS[case]
    header = header if isinstance(header, bytes | None) else header.encode()
    headers = [] if header is None else [(b"authorization", header)]
    inside, visit = guarded(key, 10, body=b"{}", headers=headers)
    visit.of.note(f"Authorization: {header!r}", visit.status)
    check_equal(len(inside.scopes), int(is_right), "how often app was called", of=visit.of)
    if is_right:
        check_equal(visit.status, 200, "status", of=visit.of)
        return
    visit.check_refused(401, None)
    check_equal(visit.header("www-authenticate"), "Bearer", "WWW-Authenticate", of=visit.of)
    check_equal(visit.num_received, 0, "pieces of the body that were received", of=visit.of)


@pytest.mark.parametrize("path", ["/", "/health", "/healthy", "/v1/models", "/metrics", "//", ""])
def test_guard_leaves_paths_open_that_tell_nothing(path):
    inside, visit = guarded(KEY, 10, path, method="GET")
    is_open = path in server.OPEN_PATHS
    check_equal(visit.status, 200 if is_open else 401, "status without a key", of=visit.of)
    check_equal(len(inside.scopes), int(is_open), "how often app was called", of=visit.of)


def test_guard_holds_open_paths_to_the_size_too():
    inside, visit = guarded(KEY, 10, "/health", body=b"0123456789x")
    visit.check_refused(413, None)
    check_equal(inside.scopes, [], "what app saw", of=visit.of)


class Secret(bytes):
    """A header that notes when its end, the key, is compared in the way of other bytes, and counts
    how many bytes of it are looked at one by one."""

    compared: ClassVar[list[object]] = []
    num_seen: ClassVar[int] = 0

    def __eq__(self, other: object) -> bool:
        text = other.encode() if isinstance(other, str) else other
        if isinstance(text, bytes) and KEY.encode() in text:
            Secret.compared.append(other)
        return bytes.__eq__(self, other)

    __hash__ = bytes.__hash__

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __getitem__(self, index: Any) -> Any:
        got = bytes.__getitem__(self, index)
        Secret.num_seen += isinstance(got, int)
        return Secret(got) if isinstance(got, bytes) else got

    def __iter__(self) -> Iterator[int]:
        for one in bytes.__iter__(self):
            Secret.num_seen += 1
            yield one

    def partition(self, *args: Any) -> tuple:
        return tuple(map(Secret, bytes.partition(self, *args)))

    def split(self, *args: Any, **options: Any) -> list:
        return [Secret(part) for part in bytes.split(self, *args, **options)]

    def strip(self, *args: Any) -> bytes:
        return Secret(bytes.strip(self, *args))

    def removeprefix(self, *args: Any) -> bytes:
        return Secret(bytes.removeprefix(self, *args))

    def decode(self, *args: Any, **options: Any) -> str:
        return SecretText(bytes.decode(self, *args, **options))


class SecretText(str):
    """The text of a `Secret`."""

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str) and KEY in other:
            Secret.compared.append(other)
        return str.__eq__(self, other)

    __hash__ = str.__hash__

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __getitem__(self, index: Any) -> str:
        Secret.num_seen += not isinstance(index, slice)
        return SecretText(str.__getitem__(self, index))

    def __iter__(self) -> Iterator[str]:
        for one in str.__iter__(self):
            Secret.num_seen += 1
            yield one

    def encode(self, *args: Any, **options: Any) -> bytes:
        return Secret(str.encode(self, *args, **options))

    def partition(self, *args: Any) -> tuple:
        return tuple(map(SecretText, str.partition(self, *args)))

    def split(self, *args: Any, **options: Any) -> list:
        return [SecretText(part) for part in str.split(self, *args, **options)]

    def strip(self, *args: Any) -> str:
        return SecretText(str.strip(self, *args))

    def removeprefix(self, *args: Any) -> str:
        return SecretText(str.removeprefix(self, *args))


def test_guard_tells_nothing_by_its_time():
    Secret.compared.clear()
    for value in (f"Bearer {KEY}", f"Bearer {KEY[:-1]}?", f"Bearer {KEY}x", "Bearer x"):
        guarded(KEY, 10, headers=[(b"authorization", Secret(value.encode()))])
    of = "Guard, and a header whose comparisons are counted"
    count = len(Secret.compared)
    check_equal(count, 0, "comparisons with the key that end at the first difference", of=of)


def test_guard_looks_at_as_much_of_every_wrong_key():
    counts = []
    for place in range(len(KEY)):
        Secret.num_seen = 0
        value = f"Bearer {KEY[:place]}?{KEY[place + 1 :]}"
        guarded(KEY, 10, headers=[(b"authorization", Secret(value.encode()))])
        counts.append(Secret.num_seen)
    of = f"Guard, and keys of {len(KEY)} bytes, one of them wrong: the first one, the second one, …"
    what = "how many bytes of the header are looked at one by one, more than for the first"
    check_equal([count - counts[0] for count in counts], [0] * len(KEY), what, of=of)


TOO_LONG = {
    "one byte too many": b"0123456789x",
    "much too long": b"x" * 5000,
    "too long in two pieces": [b"0123456789", b"x"],
    "too long in single bytes": [b"x"] * 11,
    "too long behind an empty piece": [b"", b"0123456789x"],
    "too long in its first piece": [b"x" * 11, b"", b""],
}


@pytest.mark.parametrize("length", [None, b"1", b"5000"])
@pytest.mark.parametrize("case", TOO_LONG)
def test_guard_refuses_a_body_that_is_too_long(case, length):
    headers = [] if length is None else [(b"content-length", length)]
    inside, visit = guarded(None, 10, body=TOO_LONG[case], headers=headers)
    visit.of.note(f"Content-Length: {length}; the body: {case}", visit.status)
    visit.check_refused(413, None, "10")
    check_equal(inside.scopes, [], "what app saw", of=visit.of)


def endless() -> Iterator[bytes]:
    """A body that does not end, for whoever stops to receive it."""
    yield from itertools.repeat(b"0123456789", 5000)
    raise GradedFailure("max_body_bytes is 100, and 50,000 bytes were received without a refusal")


def test_guard_stops_an_endless_body():
    inside, visit = guarded(None, 100, body=endless())
    visit.check_refused(413, None, "100")
    check_equal(visit.num_received, 11, "pieces of 10 bytes that were received", of=visit.of)
    check_equal(inside.scopes, [], "what app saw", of=visit.of)


def test_guard_takes_a_body_of_just_that_length():
    for pieces in (b"x" * 100, [b"x" * 99, b"x"], [b"x"] * 100):
        inside, visit = guarded(None, 100, body=pieces)
        check_equal(visit.status, 200, "status of a body of 100 bytes", of=visit.of)
        check_equal(inside.bodies, [b"x" * 100], "bodies that app received", of=visit.of)


@pytest.mark.parametrize("num_pieces", [0, 1, 2])
def test_guard_forgets_who_leaves_in_the_middle(num_pieces):
    inside, visit = guarded(None, 10, body=[b"01", b"23", b"45"], gone_after=num_pieces)
    visit.of.note(f"the client leaves after {num_pieces} of 3 pieces", None)
    check_equal(visit.messages, [], "what was sent", of=visit.of)
    check_equal(inside.scopes, [], "what app saw", of=visit.of)


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
def test_guard_hands_on_what_is_no_http(kind):
    seen = []

    async def app(*args: Any) -> None:
        seen.append(args)

    scope, receive, send = {"type": kind, "path": "/v1", "headers": []}, object(), object()
    guard = server.Guard(app, api_key=KEY, max_body_bytes=1)
    run(guard(scope, receive, send))
    same = len(seen) == 1 and all(
        a is b for a, b in zip(seen[0], (scope, receive, send), strict=True)
    )
    check_true(same, f"app was called with {seen}", of=f"Guard, a scope of type {kind!r}")


def test_guard_keeps_requests_apart():
    inside, of = Inside(), History("Guard, two requests at the same time")

    async def scene() -> list[Visit]:
        guard = server.Guard(inside, api_key=None, max_body_bytes=10)
        pieces = [[b"aaaa", b"aaaa"], [b"bbbb", b"bbbb"]]
        visits = [Slow(guard, "/v1", body=one, of=of).begin() for one in pieces]
        return [await visit.end() for visit in visits]

    visits = run(scene())
    check_equal([visit.status for visit in visits], [200, 200], "status", of=of)
    check_equal(sorted(inside.bodies), [b"aaaaaaaa", b"bbbbbbbb"], "bodies", of=of)


class Slow(Visit):
    """A request whose pieces take their time."""

    async def receive(self) -> dict[str, Any]:
        await asyncio.sleep(0)
        return await super().receive()


class Tokenizer:
    """A character is an id; a text begins with <s>, which is the id 1, where special tokens are
    added. Notes who calls it from the thread of the event loop."""

    def __init__(self, vocab_size: int = 0x110000):
        self.vocab_size = vocab_size
        self.chats, self.encoded, self.on_the_loop = [], [], []
        self.loops_thread = threading.get_ident()
        self.error: Exception | None = None
        self.encode_error: Exception | None = None
        self.gate: threading.Event | None = None
        self.is_busy: Callable[[], None] | None = None

    def __len__(self) -> int:
        return self.vocab_size

    def _note(self, what: str) -> None:
        if threading.get_ident() == self.loops_thread:
            self.on_the_loop.append(what)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self._note("encode")
        self.encoded.append(text)
        if self.encode_error is not None:
            raise self.encode_error
        if self.gate is not None and "wait" in text and not self.on_the_loop:
            self.is_busy()
            self.gate.wait(SECONDS)
        return [1] * add_special_tokens + [ord(character) for character in text]

    def apply_chat_template(
        self,
        conversation: Sequence[dict],
        tools: Any = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
    ) -> Any:
        self._note("apply_chat_template")
        self.chats.append((conversation, tools))
        if self.error is not None:
            raise self.error
        text = "".join(f"<{m['role']}>{m.get('content')}" for m in conversation)
        text += "<assistant>" * add_generation_prompt
        return self.encode(text) if tokenize else text

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, ids))


def completion_of(prompt: Any = "a", **more: Any) -> Any:
    return server.CompletionRequest(model=NAME, prompt=prompt, **more)


def chat_of(*contents: Any, **more: Any) -> Any:
    messages = [{"role": "user", "content": content} for content in contents or ("Hi",)]
    return server.ChatRequest(model=NAME, messages=messages, **more)


def ids_of(text: str) -> list[int]:
    return [ord(character) for character in text]


PROMPTS = {
    "a text": ("ab", [[1, *ids_of("ab")]]),
    "an empty text": ("", [[1]]),
    "ids": ([7, 8, 9], [[7, 8, 9]]),
    "one id": ([0], [[0]]),
    "texts": (["ab", "c", "ab"], [[1, *ids_of("ab")], [1, *ids_of("c")], [1, *ids_of("ab")]]),
    "a list of one text": (["ab"], [[1, *ids_of("ab")]]),
    "lists of ids": ([[7, 8], [9]], [[7, 8], [9]]),
    "lists of ids, some empty": ([[], [9]], [[], [9]]),
    "many texts": ([f"{i}" for i in range(20)], [[1, *ids_of(f"{i}")] for i in range(20)]),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_encode_prompts(case):
    prompt, expected = PROMPTS[case]
    tokenizer = Tokenizer()
    got = run(server.encode_prompts(completion_of(prompt), tokenizer))
    of = f"encode_prompts of {str(prompt)[:60]!r}; <s> is the id 1, a is 97"
    check_equal([list(ids) for ids in got], expected, "ids", of=of)
    found = tokenizer.on_the_loop
    check_equal(found, [], "calls of the tokenizer in the thread of the event loop", of=of)


def test_encode_prompts_refuses_no_prompt():
    check_refusal(server.encode_prompts, completion_of([]), Tokenizer(), status=400, param="prompt")


def check_refusal(
    function: Callable, *args: Any, status: int, param: str | None, text: str = "", of: Any = None
) -> None:
    """Hold a coroutine function to raising a RequestError."""
    try:
        got = run(function(*args))
    except server.RequestError as error:
        check_equal(error.status, status, "status of the RequestError", of=of)
        check_equal(error.param, param, "its param", of=of)
        check_true(text in str(error), f"its text is {str(error)!r}, without {text!r}", of=of)
    else:
        check_true(False, f"returned {got!r}, expected a RequestError {status}", of=of)


def test_encode_chat():
    tokenizer = Tokenizer()
    got = run(server.encode_chat(chat_of("Hi", "there"), tokenizer))
    text = "<user>Hi<user>there<assistant>"
    of = "encode_chat of two messages, Hi and there"
    check_equal(tokenizer.decode(got), text, "the text of its ids", of=of)
    found = tokenizer.on_the_loop
    check_equal(found, [], "calls of the tokenizer in the thread of the event loop", of=of)


def test_encode_chat_hands_plain_messages_to_the_template():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    tokenizer, body = Tokenizer(), chat_of(parts, "c")
    got = run(server.encode_chat(body, tokenizer))
    of = "encode_chat of a message with two parts of text, and another message"
    expected = [{"role": "user", "content": "ab"}, {"role": "user", "content": "c"}]
    check_equal(list(tokenizer.chats[0][0]), expected, "what the template gets", of=of)
    check_equal(tokenizer.decode(got), "<user>ab<user>c<assistant>", "the text of its ids", of=of)


TOOL = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, None),
        ({"tools": [TOOL]}, [TOOL]),
        ({"tools": [TOOL], "tool_choice": "auto"}, [TOOL]),
        ({"tools": [TOOL], "tool_choice": "none"}, None),
        ({"tool_choice": "none"}, None),
    ],
    ids=["no tools", "tools", "auto", "none", "none without tools"],
)
def test_encode_chat_hands_on_tools(more, expected):
    tokenizer = Tokenizer()
    run(server.encode_chat(chat_of(**more), tokenizer))
    of = f"encode_chat with {more}"
    check_equal(tokenizer.chats[0][1], expected, "tools that the template gets", of=of)


@pytest.mark.parametrize("kind", [TemplateError, ValueError, TypeError])
def test_encode_chat_tells_what_the_template_refuses(kind):
    tokenizer = Tokenizer()
    tokenizer.error = kind("roles must take turns")
    of = f"encode_chat, and the template raises {kind.__name__}('roles must take turns')"
    arguments = {"status": 400, "param": "messages", "text": "roles must take turns", "of": of}
    check_refusal(server.encode_chat, chat_of(), tokenizer, **arguments)


def check_not_explained(tokenizer: Tokenizer, error: Exception, of: str) -> None:
    """Hold encode_chat to raising an error of its tokenizer as it is."""
    try:
        got = run(server.encode_chat(chat_of(), tokenizer))
    except (type(error), server.RequestError) as raised:
        got = raised
    check_true(got is error, f"{got!r}, expected the {type(error).__name__} as it is", of=of)


def test_encode_chat_does_not_explain_other_errors():
    tokenizer = Tokenizer()
    tokenizer.error = ZeroDivisionError("a mistake of the server")
    of = "encode_chat, and the template raises ZeroDivisionError"
    check_not_explained(tokenizer, tokenizer.error, of)


@pytest.mark.parametrize("kind", [ValueError, TypeError])
def test_encode_chat_does_not_explain_errors_behind_the_template(kind):
    tokenizer = Tokenizer()
    tokenizer.encode_error = kind(SECRET)
    of = f"encode_chat; the template writes its text, and tokenizer.encode raises {kind.__name__}"
    check_not_explained(tokenizer, tokenizer.encode_error, of)


class Desk:
    """Stands in for the asynchronous engine: notes what is submitted, refuses when told.

    refuse: (number of the submission, what it raises). script: says what comes to a handle as soon
    as it is submitted.
    """

    def __init__(
        self,
        refuse: tuple[int, Exception] | None = None,
        script: Callable[[Handle], None] | None = None,
    ):
        self.of = History("a stand-in for the engine")
        self.handles: list[Handle] = []
        self.num_submitted, self.is_alive, self.pulse = 0, True, Pulse()
        self._refuse, self._script = refuse, script
        blocks = SimpleNamespace(num_free_blocks=3, num_blocks=4)
        counts = ("num_running", "num_waiting", "num_preemptions")
        counts += ("num_prompt_tokens", "num_cached_tokens")
        scheduler = SimpleNamespace(**{name: i + 1 for i, name in enumerate(counts)})
        limits = SimpleNamespace(max_model_len=CONTEXT, max_num_seqs=8)
        guesses = {"num_drafts": 1, "num_draft_tokens": 3, "num_accepted_tokens": 2}
        self.engine = SimpleNamespace(limits=limits, scheduler=scheduler, blocks=blocks, **guesses)
        self.calls: list[str] = []

    def submit(self, request_id: str, prompt_ids: Sequence[int], params: Any) -> Handle:
        number, self.num_submitted = self.num_submitted, self.num_submitted + 1
        if self._refuse is not None and number == self._refuse[0]:
            self.of.note(f"submission {number} is refused: {self._refuse[1]!r}", None)
            raise self._refuse[1]
        handle = Handle(self.of, f"choice {number}", prompt_ids, params)
        handle.request_id = request_id
        self.of.note(f"submission {number}: {len(prompt_ids)} ids, seed {params.seed}", None)
        self.handles.append(handle)
        if self._script is not None:
            self._script(handle)
        self.pulse.beat()
        return handle

    def start(self) -> None:
        self.calls.append("start")

    def close(self, drain_seconds: float) -> None:
        self.calls.append(f"close({drain_seconds})")

    def check_nobody_runs(self) -> None:
        left = [handle.name for handle in self.handles if not handle.has_ended]
        check_equal(left, [], "choices that still run", of=self.of)


def submitted(desk: Desk, body: Any, prompts: Sequence[list[int]] = ([7, 8],)) -> list[Handle]:
    """Call submit_all where there is an event loop."""

    async def scene() -> list[Handle]:
        return server.submit_all(desk, "cmpl-9", body, prompts)

    return run(scene())


@pytest.mark.parametrize("num_choices", [None, 1, 2, 5])
@pytest.mark.parametrize("num_prompts", [1, 2, 3])
def test_submit_all(num_prompts, num_choices):
    desk, prompts = Desk(), [[i, 9] for i in range(num_prompts)]
    got = submitted(desk, completion_of("a", n=num_choices), prompts)
    desk.of.note(f"submit_all of {num_prompts} prompts with n = {num_choices}", len(got))
    expected = [prompt for prompt in prompts for _ in range(num_choices or 1)]
    check_equal([h.prompt_ids for h in got], expected, "prompts of the handles", of=desk.of)
    check_true(got == desk.handles, "other handles than those of the engine", of=desk.of)
    ids = [handle.request_id for handle in got]
    check_equal(len(set(ids)), len(ids), "how many of the ids differ", of=desk.of)
    begins = all(name.startswith("cmpl-9") for name in ids)
    check_true(begins, f"the ids of cmpl-9 are {ids}", of=desk.of)
    check_equal([h.params.seed for h in got], [None] * len(got), "seeds", of=desk.of)
    check_true(not any(h.has_ended for h in got), "a choice has been aborted", of=desk.of)


@pytest.mark.parametrize("seed", [0, 5, 2**63 - 2, 2**63 - 1])
def test_submit_all_gives_each_choice_a_seed(seed):
    desk = Desk()
    got = submitted(desk, completion_of("a", n=3, seed=seed), [[7], [8]])
    seeds = [(seed + i) % 2**63 for i in range(3)] * 2
    of = f"{desk.of}\nsubmit_all of 2 prompts with n = 3 and seed {seed}"
    check_equal([handle.params.seed for handle in got], seeds, "seeds", of=of)


def test_submit_all_hands_on_the_params():
    desk = Desk()
    body = completion_of("a", n=2, temperature=0.5, max_tokens=3, stop="x", logprobs=2, top_k=-1)
    got = submitted(desk, body)
    expected = {"temperature": 0.5, "max_tokens": 3, "stop": ["x"], "logprobs": 2, "top_k": 0}
    for handle in got:
        params = json.loads(json.dumps(dataclasses.asdict(handle.params)))
        params = {name: params[name] for name in expected}
        check_same(params, expected, f"params of {handle.name}", desk.of)


def test_submit_all_leaves_the_rest_of_the_context_to_each_prompt():
    desk, body = Desk(), chat_of("a")
    got = submitted(desk, body, [[7] * 10, [7] * 30])
    most = [handle.params.max_tokens for handle in got]
    of = f"{desk.of}\na chat without max_tokens, prompts of 10 and 30 ids, a context of {CONTEXT}"
    check_equal(most, [CONTEXT - 10, CONTEXT - 30], "max_tokens", of=of)


def check_submit_refused(desk: Desk, body: Any, prompts: Any, kind: type, **expected: Any) -> None:
    try:
        got = submitted(desk, body, prompts)
    except server.RequestError as error:
        check_true(kind is server.RequestError, f"it raises {error!r}", of=desk.of)
        told = error.status, error.param
        pair = expected["status"], expected["param"]
        check_equal(told, pair, "(status, param) of the RequestError", of=desk.of)
        check_true(expected["text"] in str(error), f"its text is {str(error)!r}", of=desk.of)
    except (server.EngineBusy, server.EngineClosed, ValueError) as error:
        check_true(type(error) is kind, f"submit_all raises {error!r}", of=desk.of)
    else:
        check_true(False, f"submit_all returned {len(got)} handles", of=desk.of)
    desk.check_nobody_runs()


@pytest.mark.parametrize(("num_prompts", "n"), [(1, 128), (2, 64), (128, 1), (128, None)])
def test_submit_all_takes_as_many_choices_as_allowed(num_prompts, n):
    desk = Desk()
    got = submitted(desk, completion_of("a", n=n), [[7]] * num_prompts)
    check_equal(len(got), 128, f"handles of {num_prompts} prompts with n = {n}", of="submit_all")


@pytest.mark.parametrize(("num_prompts", "n"), [(129, 1), (129, None), (2, 65), (128, 2), (2, 128)])
def test_submit_all_refuses_too_many_choices(num_prompts, n):
    desk = Desk()
    error = server.RequestError
    told = {"status": 400, "param": "n", "text": ""}
    check_submit_refused(desk, completion_of("a", n=n), [[7]] * num_prompts, error, **told)
    check_equal(desk.num_submitted, 0, "submissions of a request that is too large", of=desk.of)


@pytest.mark.parametrize("number", [0, 1, 2, 5])
@pytest.mark.parametrize("kind", ["a value error", "busy", "closed"])
def test_submit_all_submits_all_or_none(kind, number):
    text = "token id 99 is outside the vocabulary"
    makes = {"a value error": ValueError, "busy": server.EngineBusy}
    error = makes.get(kind, server.EngineClosed)(text)
    desk = Desk((number, error))
    expected = server.RequestError if kind == "a value error" else type(error)
    told = {"status": 400, "param": None, "text": text}
    check_submit_refused(desk, completion_of("a", n=3), [[7], [8]], expected, **told)


def test_submit_all_refuses_params_before_it_submits():
    desk = Desk()
    told = {"status": 400, "param": "temperature", "text": "temperature"}
    body = completion_of("a", n=2, temperature=-1.0)
    check_submit_refused(desk, body, [[7], [8]], server.RequestError, **told)


# Deltas with the seconds before each, and what the metrics are told.
MEASURED = {
    "a token, then the end": (
        [(2.0, ("a", None)), (0.5, ("b", None)), (0.25, ("", "length"))],
        [("first_token", 2.0), ("next_token", 0.5), ("ended", "length", 2.75)],
    ),
    "the end beside the last token": (
        [(2.0, ("a", None)), (0.5, ("b", "stop"))],
        [("first_token", 2.0), ("next_token", 0.5), ("ended", "stop", 2.5)],
    ),
    "one token": ([(3.0, ("a", "stop"))], [("first_token", 3.0), ("ended", "stop", 3.0)]),
    "no token at all": ([(1.5, ("", "stop"))], [("ended", "stop", 1.5)]),
    "several tokens together": (
        [(1.0, ("a", None)), (3.0, ("bcd", None, 3)), (0.5, ("e", "stop"))],
        [
            ("first_token", 1.0),
            *[("next_token", 1.0)] * 3,
            ("next_token", 0.5),
            ("ended", "stop", 4.5),
        ],
    ),
    "several tokens at once": (
        [(1.0, ("abc", None, 3)), (0.5, ("d", "length"))],
        [
            ("first_token", 1.0),
            *[("next_token", 0.0)] * 2,
            ("next_token", 0.5),
            ("ended", "length", 1.5),
        ],
    ),
    "text without tokens": (
        [(1.0, ("a", None)), (0.5, ("x", None, 0)), (0.25, ("b", None)), (0.5, ("y", "stop", 0))],
        [("first_token", 1.0), ("next_token", 0.75), ("ended", "stop", 2.25)],
    ),
    "text before any token": (
        [(1.0, ("a", None, 0)), (0.5, ("b", "stop"))],
        [("first_token", 1.5), ("ended", "stop", 1.5)],
    ),
    "tokens without text": (
        [(1.0, ("", None, 1)), (0.5, ("", None, 2)), (0.5, ("a", "stop"))],
        [
            ("first_token", 1.0),
            *[("next_token", 0.25)] * 2,
            ("next_token", 0.5),
            ("ended", "stop", 2.0),
        ],
    ),
    "aborted by the engine": (
        [(1.0, ("a", None)), (0.5, ("", "abort"))],
        [("first_token", 1.0), ("ended", "abort", 1.5)],
    ),
}


class Measured:
    """A handle that is watched, by metrics whose clock began 8 seconds after the request came."""

    async def begin(self, what: str) -> "Measured":
        self.of = History(f"watched: {what}")
        self.handle, self.metrics = Handle(self.of, "the request"), Recorder()
        generator = server.watched(self.handle, self.metrics, self.metrics.seconds)
        self.listener = Listener(await generator_of(generator, "watched"))
        await settle()
        return self

    async def pass_time(self, seconds: float) -> None:
        self.metrics.seconds += seconds
        self.of.note(f"{seconds:g} s pass", None)

    async def say(self, seconds: float, said: tuple) -> None:
        """Let time pass, and a delta come; it is passed on at once."""
        await self.pass_time(seconds)
        text, reason, *count = said
        delta = self.handle.say(text, reason, num_choices=count[0] if count else None)
        got = await self.listener.news()
        check_equal(got, [delta], "what is passed on", of=self.of)

    def check_told(self, expected: list[tuple]) -> None:
        check_equal(self.metrics.told, expected, "what the metrics are told", of=self.of)


@pytest.mark.parametrize("case", MEASURED)
def test_watched_measures(case):
    script, expected = MEASURED[case]

    async def scene() -> None:
        measured = await Measured().begin(case)
        for seconds, said in script:
            await measured.say(seconds, said)
        check_true(measured.listener.has_ended, "it goes on behind the last delta", of=measured.of)
        measured.check_told(expected)

    run(scene())


@pytest.mark.parametrize("num_tokens", [0, 1, 2])
@pytest.mark.parametrize("end", ["abort", "error", "cancel"])
def test_watched_counts_each_end(end, num_tokens):
    async def scene() -> None:
        measured = await Measured().begin(f"{num_tokens} tokens, then {end}")
        handle, listener = measured.handle, measured.listener
        for _ in range(num_tokens):
            await measured.say(1.0, ("a", None))
        await measured.pass_time(0.5)
        if end == "abort":
            handle.abort()
        elif end == "error":
            handle.fail(server.EngineFailed("the model failed"))
        else:
            listener.task.cancel()
            await settle()
            await listener.generator.aclose()
        await settle()
        raised = isinstance(listener.error, server.EngineFailed)
        check_equal(raised, end == "error", "whether EngineFailed comes out", of=measured.of)
        reason = "error" if end == "error" else "abort"
        tokens = [("first_token", 1.0), ("next_token", 1.0)][:num_tokens]
        measured.check_told([*tokens, ("ended", reason, num_tokens + 0.5)])

    run(scene())


def test_watched_counts_who_is_closed_between_two_deltas():
    async def scene() -> None:
        of, metrics = History("watched: closed behind its first delta"), Recorder()
        handle = Handle(of, "the request")
        generator = server.watched(handle, metrics, metrics.seconds)
        generator = await generator_of(generator, "watched")
        handle.say("a")
        await anext(generator)
        metrics.seconds += 2.0
        await generator.aclose()
        expected = [("first_token", 0.0), ("ended", "abort", 2.0)]
        check_equal(metrics.told, expected, "what the metrics are told", of=of)

    run(scene())


def test_watched_counts_who_is_closed_behind_the_last_delta():
    async def scene() -> None:
        of, metrics = History("watched: closed behind its last delta"), Recorder()
        handle = Handle(of, "the request")
        generator = server.watched(handle, metrics, metrics.seconds)
        generator = await generator_of(generator, "watched")
        handle.say("a", "length")
        await anext(generator)
        await generator.aclose()
        expected = [("first_token", 0.0), ("ended", "length", 0.0)]
        check_equal(metrics.told, expected, "what the metrics are told", of=of)

    run(scene())


class Late(Handle):
    """A request that fails behind its last delta."""

    async def __anext__(self) -> Any:
        try:
            return await super().__anext__()
        except StopAsyncIteration:
            raise server.EngineFailed("the model failed") from None


@pytest.mark.parametrize("reason", ["stop", "length", "abort"])
def test_watched_keeps_a_reason_that_has_come(reason):
    async def scene() -> None:
        of, metrics = History("watched: the handle raises behind its last delta"), Recorder()
        handle = Late(of, "the request")
        generator = server.watched(handle, metrics, metrics.seconds)
        listener = Listener(await generator_of(generator, "watched"))
        handle.say("a", reason)
        await listener.news()
        expected = [("first_token", 0.0), ("ended", reason, 0.0)]
        check_equal(metrics.told, expected, "what the metrics are told", of=of)

    run(scene())


class Scene:
    """A submission of stand-in handles, with a client that may leave."""

    def __init__(
        self,
        num_handles: int,
        kind: Any = None,
        prompts: Sequence[list[int]] = ([7, 8, 9],),
        decode: Callable[[list[int]], str] | None = None,
    ):
        self.of = History(f"{num_handles} choices of {len(prompts)} prompts")
        self.handles = [Handle(self.of, f"choice {i}") for i in range(num_handles)]
        self.metrics, self.line = Recorder(), Line(self.of)
        # What stands in every object of the answer.
        self.common = {"id": "answer-1", "created": 5, "model": NAME}
        lengths, n = tuple(map(len, prompts)), num_handles // len(prompts)
        self.submission = server.Submission(
            head=protocol.AnswerHead(
                kind or protocol.COMPLETION, **self.common, prompt_lengths=lengths, n=n
            ),
            handles=self.handles,
            decode=decode or Tokenizer().decode,
            metrics=self.metrics,
            arrived=self.metrics.seconds,
            receive=self.line.receive,
        )

    async def listen(self, function: Callable, *args: Any) -> Listener:
        generator = await generator_of(function(self.submission, *args), "it")
        listener = Listener(generator)
        await settle()
        return listener

    async def check_over(self) -> None:
        """Hold an end to leaving nothing behind."""
        await settle()
        self.check_over_now()

    def check_over_now(self, when: str = "") -> None:
        """Hold an end to having left nothing behind already, with no turn of the loop between."""
        left = [handle.name for handle in self.handles if not handle.has_ended]
        check_equal(left, [], f"choices that still run{when}", of=self.of)
        check_equal(len(others()), 0, f"tasks that are left behind{when}", of=self.of)

    def check_ends(self, expected: Sequence[str]) -> None:
        ends = sorted(told[1] for told in self.metrics.told if told[0] == "ended")
        check_equal(ends, sorted(expected), "reasons of the ends that were counted", of=self.of)


def test_merged_passes_on_each_delta_at_once():
    async def scene() -> None:
        it = Scene(3)
        listener = await it.listen(server.merged)
        for index, text in ((2, "a"), (0, "b"), (2, "c"), (1, "d"), (0, "e"), (0, "f")):
            delta = it.handles[index].say(text)
            check_equal(await listener.news(), [(index, delta)], "what comes out", of=it.of)
        for index in (1, 2, 0):
            check_true(not listener.has_ended, "it ends before all choices have", of=it.of)
            delta = it.handles[index].say("", "stop")
            check_equal(await listener.news(), [(index, delta)], "what comes out", of=it.of)
        check_true(listener.has_ended, "it goes on when all choices have ended", of=it.of)
        await it.check_over()
        it.check_ends(["stop"] * 3)

    run(scene())


def test_merged_keeps_the_order_of_each_choice():
    async def scene() -> None:
        it, rng = Scene(4), random.Random(3)
        listener, sent = await it.listen(server.merged), [[] for _ in range(4)]
        for number in range(60):
            index = rng.randrange(4)
            sent[index].append(it.handles[index].say(f"{number}"))
            if rng.random() < 0.2:
                await settle()
        for index in range(4):
            sent[index].append(it.handles[index].say("", "length"))
        got = await listener.news()
        for index in range(4):
            own = [delta for i, delta in got if i == index]
            check_equal(own, sent[index], f"the deltas of choice {index}", of=it.of)
        await it.check_over()

    run(scene())


def test_merged_measures_each_choice():
    async def scene() -> None:
        it = Scene(2)
        listener = await it.listen(server.merged)
        it.metrics.seconds += 2.0
        it.handles[1].say("a")
        await settle()
        it.metrics.seconds += 1.0
        it.handles[0].say("b", "stop")
        it.handles[1].say("c", "length")
        await listener.news()
        tokens = [told for told in it.metrics.told if told[0] != "ended"]
        expected = [("first_token", 2.0), ("first_token", 3.0), ("next_token", 1.0)]
        check_equal(sorted(tokens), expected, "what the metrics are told of tokens", of=it.of)
        it.check_ends(["stop", "length"])

    run(scene())


@pytest.mark.parametrize("num_deltas", [0, 1, 3])
@pytest.mark.parametrize("num_handles", [1, 3])
def test_merged_ends_when_the_client_leaves(num_handles, num_deltas):
    async def scene() -> None:
        it = Scene(num_handles)
        listener = await it.listen(server.merged)
        for number in range(num_deltas):
            it.handles[number % num_handles].say("a")
            await listener.news()
        it.line.leave()
        await settle()
        check_true(listener.has_ended, "the client has left, and it goes on", of=it.of)
        check_true(listener.error is None, f"it raises {listener.error!r}", of=it.of)
        await it.check_over()
        aborted = [handle.is_aborted for handle in it.handles]
        check_equal(aborted, [True] * num_handles, "which choices are aborted", of=it.of)
        it.check_ends(["abort"] * num_handles)

    run(scene())


def test_merged_ends_when_the_client_had_left_before():
    async def scene() -> None:
        it = Scene(2)
        it.line.leave()
        listener = await it.listen(server.merged)
        check_true(listener.has_ended, "the client has left, and it goes on", of=it.of)
        await it.check_over()

    run(scene())


def test_merged_ends_when_one_choice_has_ended_and_the_client_leaves():
    async def scene() -> None:
        it = Scene(2)
        listener = await it.listen(server.merged)
        it.handles[0].say("a", "stop")
        await listener.news()
        it.line.leave()
        await settle()
        check_true(listener.has_ended, "the client has left, and it goes on", of=it.of)
        await it.check_over()
        it.check_ends(["stop", "abort"])

    run(scene())


@pytest.mark.parametrize("number", [0, 2])
def test_merged_raises_what_a_choice_raises(number):
    async def scene() -> None:
        it = Scene(3)
        listener = await it.listen(server.merged)
        it.handles[1].say("a")
        await listener.news()
        it.handles[number].fail(server.EngineFailed("the model failed"))
        await settle()
        raised = isinstance(listener.error, server.EngineFailed)
        text = f"a choice has failed; has it ended: {listener.has_ended}, with {listener.error!r}"
        check_true(raised, text, of=it.of)
        await it.check_over()
        it.check_ends(["error", "abort", "abort"])

    run(scene())


@pytest.mark.parametrize("how", ["closed", "cancelled"])
def test_merged_leaves_nothing_behind(how):
    async def scene() -> None:
        it = Scene(2)
        if how == "closed":
            generator = await generator_of(server.merged(it.submission), "merged")
            it.handles[0].say("a")
            await anext(generator)
            it.of.note("merged is closed behind its first delta", None)
            await generator.aclose()
        else:
            listener = await it.listen(server.merged)
            it.of.note("the task that asks for deltas is cancelled", None)
            listener.task.cancel()
        await it.check_over()
        it.check_ends(["abort", "abort"])

    run(scene())


def test_merged_waits_until_its_tasks_have_ended():
    async def scene() -> None:
        it = Scene(2)
        generator = await generator_of(server.merged(it.submission), "merged")
        it.handles[0].say("a")
        await anext(generator)
        it.of.note("merged is closed behind its first delta", None)
        await generator.aclose()
        count = len(others())
        check_equal(count, 0, "tasks that are left behind when aclose returns", of=it.of)

    run(scene())


KINDS = ("completions", "chat")


def kind_of(name: str) -> Any:
    return protocol.CHAT if name == "chat" else protocol.COMPLETION


def opening_of(kind: str) -> dict[str, Any] | None:
    """What the first chunk of a choice says, beside its index; None where there is none."""
    said = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}
    return said if kind == "chat" else None


def part_of(kind: str, text: str, logprobs: Any) -> dict[str, Any]:
    """What the chunk of a delta says."""
    said = {"delta": {"content": text}} if kind == "chat" else {"text": text}
    return {**said, "logprobs": logprobs}


def end_of(kind: str) -> dict[str, Any]:
    """What the chunk says that has a finish_reason."""
    said = {"delta": {}} if kind == "chat" else {"text": ""}
    return {**said, "logprobs": None}


def whole_of_choice(kind: str, text: str, logprobs: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    said = {"message": message} if kind == "chat" else {"text": text}
    return {**said, "logprobs": logprobs}


def logprobs_of(kind: str, choices: Sequence[Any], offset: int) -> dict[str, Any] | None:
    """What a client reads of choices whose tokens are characters. offset: tokens before them."""
    if not choices or choices[0].logprob is None:
        return None
    if kind != "chat":
        own = [{chr(one.token_id): one.logprob} for one in choices]
        tops = [{chr(i): logprob for i, logprob in one.top} for one in choices]
        return {
            "tokens": [chr(one.token_id) for one in choices],
            "token_logprobs": [one.logprob for one in choices],
            "top_logprobs": [{**top, **one} for top, one in zip(tops, own, strict=True)],
            "text_offset": list(range(offset, offset + len(choices))),
        }

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = chr(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    found = [
        (entry(one.token_id, one.logprob), [entry(*pair) for pair in one.top]) for one in choices
    ]
    return {"content": [{**own, "top_logprobs": tops} for own, tops in found]}


def usage(num_prompt: int, num_generated: int, num_cached: int = 0) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


class Streamed:
    """A stream beside what it should say, event by event."""

    def __init__(self, kind: str, num_handles: int, with_usage: bool = False, **options: Any):
        self.kind, self.with_usage = kind, with_usage
        self.it = Scene(num_handles, kind_of(kind), **options)
        self.of = self.it.of
        self.num_tokens = [0] * num_handles

    def chunk(self, index: int, fields: dict[str, Any], reason: str | None = None) -> dict:
        choices = [{"index": index, **fields, "finish_reason": reason}]
        return self.object(choices, None)

    def object(self, choices: list, told: Any) -> dict:
        name = kind_of(self.kind).chunk_name
        made = {**self.it.common, "object": name, "choices": choices}
        return made | {"usage": told} if self.with_usage else made

    async def begin(self) -> "Streamed":
        self.listener = await self.it.listen(server.stream, self.with_usage)
        fields, places = opening_of(self.kind), range(len(self.num_tokens))
        openings = [self.chunk(place, fields) for place in places if fields is not None]
        got = await self.events()
        got.sort(key=lambda one: one["choices"][0]["index"])
        check_same(got, openings, "events before any delta", self.of)
        return self

    async def events(self) -> list[Any]:
        return [said(text) for text in await self.listener.news()]

    async def say(self, index: int, text: str, reason: str | None = None, **options: Any) -> None:
        """Let a delta come, and hold the events that follow at once to the contract."""
        delta = self.it.handles[index].say(text, reason, **options)
        expected = []
        if delta.text or delta.choices:
            logprobs = logprobs_of(self.kind, delta.choices, self.num_tokens[index])
            expected.append(self.chunk(index, part_of(self.kind, text, logprobs)))
            self.num_tokens[index] += len(delta.choices)
        if reason is not None:
            expected.append(self.chunk(index, end_of(self.kind), reason))
        got = await self.events()
        if not self.is_over():
            check_same(got, expected, f"events for a delta of choice {index}", self.of)
        else:
            self.ends = got[len(expected) :]
            got = got[: len(expected)]
            check_same(got, expected, f"events for a delta of choice {index}", self.of)

    def is_over(self) -> bool:
        return all(handle.has_ended for handle in self.it.handles)

    async def check_ends(self, told: dict[str, Any] | None) -> None:
        """Hold the last events to the usage, where it is wanted, and [DONE]."""
        expected = [self.object([], told)] if self.with_usage else []
        check_same(self.ends, [*expected, "[DONE]"], "the last events", self.of)
        check_true(self.listener.has_ended, "the stream goes on behind [DONE]", of=self.of)
        await self.it.check_over()


@pytest.mark.parametrize("with_usage", [False, True], ids=["", "with usage"])
@pytest.mark.parametrize("kind", KINDS)
def test_stream_of_one_choice(kind, with_usage):
    async def scene() -> None:
        it = await Streamed(kind, 1, with_usage).begin()
        await it.say(0, "a")
        await it.say(0, "b\n\nc", num_choices=2)
        await it.say(0, "日😀")
        await it.say(0, "", num_choices=1)
        await it.say(0, "d", num_choices=0)
        await it.say(0, "", "stop")
        await it.check_ends(usage(3, 5))

    run(scene())


@pytest.mark.parametrize("reason", ["stop", "length", "abort"])
@pytest.mark.parametrize("text", ["", "a"])
@pytest.mark.parametrize("kind", KINDS)
def test_stream_of_one_delta(kind, text, reason):
    async def scene() -> None:
        it = await Streamed(kind, 1, True).begin()
        await it.say(0, text, reason)
        await it.check_ends(usage(3, len(text)))

    run(scene())


@pytest.mark.parametrize("with_usage", [False, True], ids=["", "with usage"])
@pytest.mark.parametrize("kind", KINDS)
def test_stream_of_several_choices(kind, with_usage):
    async def scene() -> None:
        prompts = [[7] * 5, [8] * 6]
        it = await Streamed(kind, 4, with_usage, prompts=prompts).begin()
        for index, text in ((3, "a"), (0, "bcd"), (3, "e"), (1, "f"), (2, "g")):
            await it.say(index, text, cached=[2, 0, 4, 4][index], num_choices=2)
        await it.say(1, "h", "length")
        await it.say(3, "", "stop", cached=4)
        await it.say(2, "i", "stop", cached=4, num_choices=0)
        await it.say(0, "j", "length", cached=2)
        await it.check_ends(usage(11, 12, 6))

    run(scene())


@pytest.mark.parametrize("kind", KINDS)
def test_stream_tells_logprobs(kind):
    async def scene() -> None:
        it = await Streamed(kind, 2).begin()
        for index, text in ((0, "abc"), (1, "d"), (0, "e"), (1, "fgh"), (0, ""), (0, "i")):
            await it.say(index, text, logprob=-0.5, num_choices=2)
        await it.say(1, "j", "stop", logprob=-1.5)
        await it.say(0, "", "stop")
        await it.check_ends(None)

    run(scene())


class Told:
    """The last event of a stream in which something went wrong, and what came before it."""

    def __init__(self, before: list[Any], last: Any, of: History):
        self.before, self.last, self.of = before, last, of

    def check(self, error: Exception) -> None:
        with logged():
            refusal = server.refusal_of(error)
        expected = protocol.error_body(refusal.status, str(refusal), refusal.param)
        check_same(self.last, expected, "the last event", self.of)
        check_true("[DONE]" not in self.before, "[DONE] stands in front of the error", of=self.of)


@pytest.mark.parametrize("num_deltas", [0, 2])
@pytest.mark.parametrize("error", ["the model failed", "a mistake of the server"])
@pytest.mark.parametrize("kind", KINDS)
def test_stream_tells_an_error_as_its_last_event(kind, error, num_deltas):
    async def scene() -> None:
        it = await Streamed(kind, 2, True).begin()
        for _ in range(num_deltas):
            await it.say(0, "a")
        raised = INTERNAL[error]()
        with logged():
            it.it.handles[1].fail(raised)
            *before, last = await it.events() or [None]
        Told(before, last, it.of).check(raised)
        check_equal(before, [], "events between the error and its own", of=it.of)
        check_true(it.listener.has_ended, "the stream goes on behind the error", of=it.of)
        check_true(it.listener.error is None, f"it raises {it.listener.error!r}", of=it.of)
        check_true(SECRET not in json.dumps(last), f"the client reads {last}", of=it.of)
        await it.it.check_over()

    run(scene())


@pytest.mark.parametrize("kind", KINDS)
def test_stream_ends_with_its_client(kind):
    async def scene() -> None:
        it = await Streamed(kind, 2).begin()
        await it.say(1, "a")
        it.it.line.leave()
        await settle()
        check_true(it.listener.has_ended, "the client has left, and it goes on", of=it.of)
        await it.it.check_over()
        it.it.check_ends(["abort", "abort"])

    run(scene())


def test_stream_that_is_closed_leaves_nothing_behind():
    async def scene() -> None:
        it = await Streamed("completions", 2).begin()
        await it.say(1, "a")
        it.of.note("the stream is closed", None)
        it.listener.task.cancel()
        await it.it.check_over()

    run(scene())


def test_stream_has_ended_everything_when_it_is_closed():
    async def scene() -> None:
        it = Scene(2)
        generator = await generator_of(server.stream(it.submission, False), "stream")
        it.handles[1].say("a")
        said(await anext(generator, None))
        it.of.note("the stream is closed behind its first event", None)
        await generator.aclose()
        it.check_over_now(" when aclose returns")
        it.check_ends(["abort", "abort"])

    run(scene())


@pytest.mark.parametrize("num_choices", [1, 3])
def test_stream_has_ended_everything_when_it_tells_an_error(num_choices):
    def decode(ids: list[int]) -> str:
        raise RuntimeError(SECRET)

    async def scene() -> None:
        it = Scene(num_choices, decode=decode)
        it.of.note("decode raises RuntimeError", None)
        generator = await generator_of(server.stream(it.submission, False), "stream")
        it.handles[0].say("a", logprob=-0.5)
        with logged():
            event = said(await anext(generator, None))
        check_equal(list(event), ["error"], "the names in the event", of=it.of)
        it.check_over_now(", and the error's event is there")
        rest = [text async for text in generator]
        check_equal(rest, [], "events behind the error", of=it.of)

    run(scene())


def test_two_streams_keep_to_themselves():
    async def scene() -> None:
        ones = [await Streamed(kind, 2, kind == "chat").begin() for kind in KINDS]
        for text in ("a", "bc", "d"):
            for index in (0, 1):
                for it in ones:
                    await it.say(index, text, logprob=-1.0)
        for index in (1, 0):
            for it in ones:
                await it.say(index, "", "stop")
        for it in ones:
            check_equal(it.ends[-1:], ["[DONE]"], "the last event", of=it.of)

    run(scene())


async def waiting(it: Scene) -> asyncio.Task:
    """Call `whole`, which then waits for its choices."""
    task = asyncio.create_task(server.whole(it.submission))
    await settle()
    if task.done():
        text = f"whole returns {task.result()!r} before anything has come"
        check_true(False, text[:200], of=it.of)
    return task


async def whole_of(it: Scene, play: Callable[[], None]) -> Any:
    """Let deltas come while `whole` waits; returns what it returns."""
    task = await waiting(it)
    play()
    await settle()
    if not task.done():
        task.cancel()
        await settle()
        check_true(False, "all choices have ended, and whole goes on waiting", of=it.of)
    return task.result()


# What the choices say; each is (place, text, finish_reason, options).
WHOLES = {
    "one choice": (1, [(0, "ab", None, 1), (0, "c", None, 2), (0, "", "stop", 0)]),
    "the end beside text": (1, [(0, "ab", None, 1), (0, "c", "length", 1)]),
    "no text": (1, [(0, "", "stop", 0)]),
    "text without choices": (1, [(0, "ab", None, 3), (0, "日", "length", 0)]),
    "aborted by the engine": (1, [(0, "ab", None, 1), (0, "", "abort", 0)]),
    "choices in turns": (
        3,
        [
            *[(2, "a", None, 1), (0, "b", None, 2), (2, "c", "stop", 1), (1, "d", None, 1)],
            *[(1, "e", "length", 3), (0, "f", None, 0), (0, "", "abort", 0)],
        ],
    ),
}


@pytest.mark.parametrize("logprob", [None, -0.5], ids=["", "with logprobs"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", WHOLES)
def test_whole(case, kind, logprob):
    num_handles, script = WHOLES[case]
    it, own = Scene(num_handles, kind_of(kind)), [[] for _ in range(num_handles)]

    def play() -> None:
        for index, text, reason, count in script:
            handle = it.handles[index]
            delta = handle.say(text, reason, num_choices=count, logprob=logprob, cached=2)
            own[index].append(delta)

    async def scene() -> Any:
        got = await whole_of(it, play)
        await it.check_over()
        return got

    got = run(scene())
    choices = got.get("choices") if isinstance(got, dict) else got
    check_same(choices, expected_choices(kind, own), "choices", it.of)
    num_generated = sum(count for *_, count in script)
    check_same(got.get("usage"), usage(3, num_generated, 2), "usage", it.of)
    rest = {name: value for name, value in got.items() if name not in ("choices", "usage")}
    check_same(rest, it.common | {"object": kind_of(kind).name}, "the other fields", it.of)


def expected_choices(kind: str, own: list[list[Any]]) -> list[dict[str, Any]]:
    made = []
    for index, deltas in enumerate(own):
        text = "".join(delta.text for delta in deltas)
        choices = [choice for delta in deltas for choice in delta.choices]
        fields = whole_of_choice(kind, text, logprobs_of(kind, choices, 0))
        made.append({"index": index, **fields, "finish_reason": deltas[-1].finish_reason})
    return made


# Ids of the prompts, choices of each, tokens and cached tokens of each choice; the usage.
USAGES = {
    "one choice": ([5], 1, [4], [0], usage(5, 4, 0)),
    "cached": ([5], 1, [4], [3], usage(5, 4, 3)),
    "two choices of a prompt": ([5], 2, [4, 2], [0, 4], usage(5, 6, 0)),
    "two prompts": ([5, 6], 1, [4, 2], [1, 2], usage(11, 6, 3)),
    "three choices of two prompts": (
        [5, 6],
        3,
        [1, 1, 1, 2, 2, 2],
        [1, 4, 4, 0, 5, 5],
        usage(11, 9, 1),
    ),
    "nothing generated": ([7], 1, [0], [2], usage(7, 0, 2)),
}


@pytest.mark.parametrize("case", USAGES)
@pytest.mark.parametrize("function", ["whole", "stream"])
def test_usage_counts_each_prompt_once(function, case):
    lengths, _, counts, cached, expected = USAGES[case]
    it = Scene(len(counts), prompts=[[7] * length for length in lengths])

    def play() -> None:
        for handle, count, found in zip(it.handles, counts, cached, strict=True):
            for _ in range(count):
                handle.say("a", cached=found)
            handle.say("", "stop", cached=found)

    async def scene() -> Any:
        if function == "whole":
            return (await whole_of(it, play))["usage"]
        listener = await it.listen(server.stream, True)
        play()
        *_, last, _ = map(said, await listener.news())
        return last["usage"]

    check_same(run(scene()), expected, f"usage of {function}", it.of)


def test_whole_raises_what_a_choice_raises():
    async def scene() -> None:
        it = Scene(2)
        task = await waiting(it)
        it.handles[0].say("a")
        it.handles[1].fail(server.EngineFailed("the model failed"))
        await settle()
        error = task.exception() if task.done() else None
        raised = isinstance(error, server.EngineFailed)
        check_true(raised, f"a choice has failed; whole raises {error!r}", of=it.of)
        await it.check_over()

    run(scene())


def test_whole_ends_with_its_client():
    async def scene() -> None:
        it = Scene(2)
        task = await waiting(it)
        it.handles[0].say("a")
        await settle()
        it.line.leave()
        await settle()
        check_true(task.done(), "the client has left, and whole goes on waiting", of=it.of)
        task.exception()
        await it.check_over()
        it.check_ends(["abort", "abort"])

    run(scene())


def test_whole_that_is_cancelled_leaves_nothing_behind():
    async def scene() -> None:
        it = Scene(2)
        task = await waiting(it)
        it.of.note("the task is cancelled", None)
        task.cancel()
        await it.check_over()

    run(scene())


def body_of(kind: str, content: Any = "ab", **more: Any) -> dict[str, Any]:
    """A body as a client writes it."""
    said = {"messages": [{"role": "user", "content": content}]}
    return {"model": NAME, **(said if kind == "chat" else {"prompt": content}), **more}


def request_of(kind: str, content: Any = "ab", **more: Any) -> Any:
    made = server.ChatRequest if kind == "chat" else server.CompletionRequest
    return made.model_validate(body_of(kind, content, **more))


def talk(handle: Handle) -> None:
    """What a stand-in for the model says at once: three tokens, and the end."""
    for text in ("x", "y", "z"):
        handle.say(text)
    handle.say("", "stop")


class Answered:
    """The answer to a body, from a desk whose choices end at once, unless it says otherwise."""

    def __init__(self, desk: Desk | None = None, tokenizer: Tokenizer | None = None):
        self.desk = desk or Desk(script=talk)
        self.tokenizer = tokenizer or Tokenizer()
        self.metrics, self.of = Recorder(), self.desk.of
        self.service = server.Service(self.desk, self.tokenizer, NAME, self.metrics)
        self.line = Line(self.of)

    async def get(self, kind: str, body: Any) -> Any:
        return await server.answer(self.service, kind_of(kind), body, self.line.receive)

    async def read(self, response: Any) -> list[Any]:
        """Read a stream to its end."""
        is_one = isinstance(response, server.EventStream)
        check_true(is_one, f"answer returns {type(response).__name__}", of=self.of)
        return [said(text) async for text in response.events]


@pytest.mark.parametrize("stream", [None, False])
@pytest.mark.parametrize("kind", KINDS)
def test_answer_is_whole(kind, stream):
    it = Answered()
    got = run(it.get(kind, request_of(kind, n=2, stream=stream)))
    is_one = isinstance(got, dict)
    check_true(is_one, f"answer with stream {stream} returns {type(got).__name__}", of=it.of)
    check_equal(got.get("object"), kind_of(kind).name, "object", of=it.of)
    fields = whole_of_choice(kind, "xyz", None)
    choices = [{"index": i, **fields, "finish_reason": "stop"} for i in range(2)]
    check_equal(got.get("choices"), choices, "choices", of=it.of)


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": True}])
@pytest.mark.parametrize("kind", KINDS)
def test_answer_is_a_stream(kind, options):
    it = Answered()

    async def scene() -> list[Any]:
        body = request_of(kind, stream=True, stream_options=options)
        return await it.read(await it.get(kind, body))

    *chunks, done = run(scene())
    of = f"{it.of}\nanswer with stream_options {options}"
    check_equal(done, "[DONE]", "the last event", of=of)
    names = {chunk.get("object") for chunk in chunks}
    check_equal(names, {kind_of(kind).chunk_name}, "object of the chunks", of=of)
    wanted = bool(options and options.get("include_usage"))
    told = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    check_equal(len(told), int(wanted), "how many chunks tell a usage", of=of)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_answer_has_a_head_of_its_own(kind, stream):
    it = Answered()

    async def scene() -> tuple[list[dict], int, int]:
        before, heads = int(time.time()), []
        for _ in range(3):
            got = await it.get(kind, request_of(kind, stream=stream))
            heads += [one for one in await it.read(got) if one != "[DONE]"] if stream else [got]
        return heads, before, int(time.time())

    heads, before, after = run(scene())
    ids = {head.get("id") for head in heads}
    prefix = kind_of(kind).id_prefix
    text = f"the ids of three answers are {sorted(map(str, ids))}"
    same = len(ids) == 3 and all(str(one).startswith(prefix) for one in ids)
    check_true(same, f"{text}, which should begin with {prefix}", of=it.of)
    check_equal({head.get("model") for head in heads}, {NAME}, "model", of=it.of)
    for created in {head.get("created") for head in heads}:
        text = f"created is {created!r}, and now is between {before} and {after}"
        check_true(type(created) is int and before <= created <= after, text, of=it.of)


@pytest.mark.parametrize("kind", KINDS)
def test_answer_submits_what_the_client_wrote(kind):
    it = Answered()
    body = request_of(kind, "ab", temperature=0.5, n=2, seed=4, max_tokens=9)
    run(it.get(kind, body))
    text = "<user>ab<assistant>" if kind == "chat" else "ab"
    prompt = [*([1] if kind != "chat" else []), *ids_of(text)]
    got = [(h.prompt_ids, h.params.temperature, h.params.seed) for h in it.desk.handles]
    expected = [(prompt, 0.5, 4), (prompt, 0.5, 5)]
    check_equal(got, expected, "(prompt, temperature, seed) of the choices", of=it.of)


def test_answer_keeps_prompts_in_their_order():
    def echo(handle: Handle) -> None:
        handle.say("".join(map(chr, handle.prompt_ids[1:])), "stop")

    it = Answered(Desk(script=echo))
    prompts = [f"prompt {i}" for i in range(6)]
    got = run(it.get("completions", request_of("completions", prompts, n=2)))
    texts = [(choice["index"], choice["text"]) for choice in got["choices"]]
    expected = [(2 * i + j, prompts[i]) for i in range(6) for j in range(2)]
    check_equal(texts, expected, "(index, text) of the choices", of=it.of)


# What is asked for, and what stands beside it; every choice says three tokens. The usage.
BILLS = {
    "a completion": ("completions", "ab", {}, usage(3, 3)),
    "ids": ("completions", [5, 6, 7, 8], {"n": 1}, usage(4, 3)),
    "several choices": ("completions", "ab", {"n": 3}, usage(3, 9)),
    "several prompts": ("completions", ["a", "bcd", ""], {}, usage(7, 9)),
    "several choices of several prompts": ("completions", ["a", "bcd"], {"n": 2}, usage(6, 12)),
    "a chat": ("chat", "ab", {}, usage(len("<user>ab<assistant>"), 3)),
    "several choices of a chat": ("chat", "ab", {"n": 2}, usage(len("<user>ab<assistant>"), 6)),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", BILLS)
def test_answer_tells_what_it_costs(case, stream):
    kind, content, more, expected = BILLS[case]
    it = Answered()
    if stream:
        more = {**more, "stream": True, "stream_options": {"include_usage": True}}

    async def scene() -> Any:
        got = await it.get(kind, request_of(kind, content, **more))
        if stream:
            *_, got, _ = await it.read(got)
        return got["usage"]

    check_same(run(scene()), expected, f"usage of {case}", it.of)


@pytest.mark.parametrize("stream", [False, True])
def test_answer_measures_from_the_beginning(stream):
    it = Answered()
    encode = it.tokenizer.encode

    def slow(text: str, **options: Any) -> list[int]:
        it.metrics.seconds += 4.0
        return encode(text, **options)

    it.tokenizer.encode = slow

    async def scene() -> None:
        got = await it.get("completions", request_of("completions", stream=stream))
        if stream:
            await it.read(got)

    run(scene())
    of = f"{it.of}\nanswer, whose tokenizer takes 4 s"
    check_equal(it.metrics.told[:1], [("first_token", 4.0)], "what the metrics are told", of=of)


# What is wrong with a body that is right by itself: its fields; status, param.
WRONG = {
    "another model": ({"model": "gpt-4"}, 404, "model"),
    "no model of that name": ({"model": f"{NAME} "}, 404, "model"),
    "options of a stream": ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    "empty options of a stream": ({"stream_options": {}}, 400, "stream_options"),
    "too many choices": ({"n": 128, "prompt": ["a", "b"]}, 400, "n"),
    "no prompts": ({"prompt": []}, 400, "prompt"),
    "a temperature below 0": ({"temperature": -0.5}, 400, "temperature"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "too many logprobs": ({"logprobs": 21}, 400, "logprobs"),
    "an empty stop": ({"stop": [""]}, 400, ...),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_answer_refuses_before_it_returns(case, stream):
    changes, status, param = WRONG[case]
    if "stream_options" in changes and stream:
        stream = None
    it = Answered()
    body = request_of("completions", stream=stream, **changes)
    of = f"answer, stream {stream}: {case}"
    try:
        got = run(it.get("completions", body))
    except server.RequestError as error:
        check_equal(error.status, status, "status", of=of)
        if param is not ...:
            check_equal(error.param, param, "param", of=of)
    else:
        check_true(False, f"returned {type(got).__name__}, expected a RequestError", of=of)
    it.desk.check_nobody_runs()


class Shop:
    """The whole application over a stand-in for the engine."""

    def __init__(self, desk: Desk | None = None, **params: Any):
        self.desk, self.tokenizer = desk or Desk(), Tokenizer()
        self.of, self.num_taken = self.desk.of, 0
        self.app = server.create_app(self.desk, self.tokenizer, server.ServerParams(NAME, **params))

    def visit(self, path: str, body: Any = None, **options: Any) -> Visit:
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        method = "GET" if body is None else "POST"
        return Visit(
            self.app, path, body or b"", **{"method": method, "of": self.of, **options}
        ).begin()

    def ask(self, kind: str, content: Any = "ab", **more: Any) -> Visit:
        """Ask for an answer; options of the visit are those that it knows."""
        options = {name: more.pop(name) for name in ("spec", "gone_after") if name in more}
        return self.visit(PATHS[kind], body_of(kind, content, **more), **options)

    async def handles(self, count: int, visit: Visit) -> list[Handle]:
        """Wait until so many more choices have been submitted."""
        desk, start = self.desk, self.num_taken
        self.num_taken += count
        visit.task.add_done_callback(lambda _: desk.pulse.beat())

        def are_there() -> bool:
            return len(desk.handles) >= start + count

        what = f"{count} choices in the engine"
        await desk.pulse.until(lambda: are_there() or visit.task.done(), what, self.of)
        if not are_there():
            visit.check_no_crash()
        check_true(are_there(), f"the answer has ended without {what}", of=self.of)
        return desk.handles[start : start + count]


PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


def play(scene: Callable[[Shop], Awaitable[Any]], desk: Desk | None = None, **params: Any) -> Any:
    """Open a shop, and play a scene in it."""

    async def opened() -> Any:
        return await scene(Shop(desk, **params))

    return run(opened())


@pytest.mark.parametrize("spec", ["2.3", "2.4"])
@pytest.mark.parametrize("kind", KINDS)
def test_app_streams_each_delta_at_once(kind, spec):
    async def scene(shop: Shop) -> None:
        visit = shop.ask(kind, n=2, stream=True, spec=spec)
        handles = await shop.handles(2, visit)
        got = ""
        for index, text in ((0, "a"), (1, "日"), (0, "😀")):
            handles[index].say(text)
            got += text
            await visit.until(lambda got=got: texts_of(visit.events) == got, f"an event: {text!r}")
        check_equal(visit.status, 200, "status", of=shop.of)
        kind_said = visit.header("content-type").partition(";")[0]
        check_equal(kind_said, "text/event-stream", "content-type", of=shop.of)
        for handle in handles:
            handle.say("", "stop")
        await visit.end()
        check_equal(visit.events[-1], "[DONE]", "the last event", of=shop.of)
        reasons = [reason for reason in reasons_of(visit.events) if reason]
        check_equal(reasons, ["stop", "stop"], "finish_reason of all chunks", of=shop.of)
        check_equal(len(others()), 0, "tasks that are left behind", of=shop.of)

    play(scene)


def choices_of(events: list[Any]) -> list[dict]:
    return [choice for one in events if one != "[DONE]" for choice in one.get("choices", [])]


def texts_of(events: list[Any]) -> str:
    """All text of a stream."""
    pieces = choices_of(events)
    return "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in pieces)


def reasons_of(events: list[Any]) -> list[str | None]:
    return [choice["finish_reason"] for choice in choices_of(events)]


@pytest.mark.parametrize("kind", KINDS)
def test_app_answers_as_a_whole(kind):
    async def scene(shop: Shop) -> None:
        visit = shop.ask(kind, n=2)
        first, second = await shop.handles(2, visit)
        second.say("日", "length")
        first.say("a", num_choices=3)
        await settle()
        check_equal(visit.messages, [], "what is sent before all have ended", of=shop.of)
        first.say("", "stop")
        await visit.end()
        check_equal(visit.status, 200, "status", of=shop.of)
        got = [
            (c["index"], c.get("text") or c["message"]["content"], c["finish_reason"])
            for c in visit.content["choices"]
        ]
        expected = [(0, "a", "stop"), (1, "日", "length")]
        check_equal(got, expected, "(index, text, finish_reason)", of=shop.of)
        check_equal(len(others()), 0, "tasks that are left behind", of=shop.of)

    play(scene)


# When the client leaves: after how many deltas.
@pytest.mark.parametrize("num_deltas", [0, 2])
@pytest.mark.parametrize("spec", ["2.3", "2.4"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("kind", KINDS)
def test_app_ends_what_nobody_waits_for(kind, stream, spec, num_deltas):
    async def scene(shop: Shop) -> None:
        visit = shop.ask(kind, n=2, stream=stream, spec=spec)
        handles = await shop.handles(2, visit)
        for _ in range(num_deltas):
            handles[0].say("a")
        await settle()
        await visit.leave_for_good()
        shop.desk.check_nobody_runs()
        check_equal(len(others()), 0, "tasks that are left behind", of=shop.of)

    play(scene)


@pytest.mark.parametrize("spec", ["2.3", "2.4"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_app_ends_what_nobody_has_waited_for(stream, spec):
    async def scene(shop: Shop) -> None:
        # The client has left before anything could be sent.
        visit = shop.ask("completions", stream=stream, spec=spec, gone_after=1)
        await visit.end()
        await settle()
        shop.desk.check_nobody_runs()
        check_equal(len(others()), 0, "tasks that are left behind", of=shop.of)

    play(scene)


def test_app_keeps_requests_apart():
    async def scene(shop: Shop) -> None:
        visits = []
        for text in "ab":
            visits.append(shop.ask("completions", text, stream=text == "a"))
            await shop.handles(1, visits[-1])
        one, two = shop.desk.handles
        one.say("x")
        two.say("y")
        await visits[0].until(lambda: texts_of(visits[0].events) == "x", "an event: 'x'")
        await visits[0].leave_for_good()
        check_true(not two.has_ended, "one client left, and the other's request ended", of=shop.of)
        two.say("z", "stop")
        await visits[1].end()
        got = visits[1].content["choices"][0]["text"]
        check_equal(got, "yz", "text of the other's answer", of=shop.of)

    play(scene)


@pytest.mark.parametrize("kind", KINDS)
def test_app_goes_on_while_it_tokenizes(kind):
    async def scene(shop: Shop) -> None:
        tokenizer, loop, pulse = shop.tokenizer, asyncio.get_running_loop(), Pulse()
        tokenizer.gate = threading.Event()
        tokenizer.is_busy = lambda: loop.call_soon_threadsafe(pulse.beat)
        try:
            slow = shop.ask(kind, "wait for me")
            slow.task.add_done_callback(lambda _: pulse.beat())
            await pulse.until(
                lambda: tokenizer.encoded or slow.task.done(), "a text that is encoded", shop.of
            )
            shop.of.note("the tokenizer works on a long text", None)
            other = await shop.visit("/health").end()
            check_equal(other.status, 200, "status of GET /health meanwhile", of=shop.of)
            found = tokenizer.on_the_loop
            check_equal(found, [], "calls of the tokenizer on the event loop", of=shop.of)
        finally:
            tokenizer.gate.set()
        (handle,) = await shop.handles(1, slow)
        handle.say("a", "stop")
        await slow.end()
        check_equal(slow.status, 200, "status", of=shop.of)

    play(scene)


# Bodies that are refused: changes, status, param.
BAD = {
    "an unknown name": ({"frobnicate": 1}, 400, "frobnicate"),
    "a name that is not supported": ({"best_of": 3}, 400, "best_of"),
    "a word for a number": ({"temperature": "hot"}, 400, "temperature"),
    "n 0": ({"n": 0}, 400, "n"),
    "too many choices": ({"n": 1000}, 400, "n"),
    "an empty list": ({"prompt": []}, 400, "prompt"),
    "max_tokens 0": ({"max_tokens": 0}, 400, "max_tokens"),
    "options of a stream": ({"stream_options": {}, "stream": False}, 400, "stream_options"),
    "another model": ({"model": "gpt-4"}, 404, "model"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_app_refuses_a_bad_body_before_the_first_byte(case, stream):
    changes, status, param = BAD[case]

    async def scene(shop: Shop) -> None:
        visit = await shop.ask("completions", **{"stream": stream, **changes}).end()
        visit.check_refused(status, param)
        shop.desk.check_nobody_runs()

    play(scene)


# What the engine says to a choice: status, and what the client reads of it.
ENGINE_REFUSES = {
    "a bad prompt": (ValueError, 400, "outside the vocabulary"),
    "too many wait": ("EngineBusy", 429, "outside the vocabulary"),
    "closed": ("EngineClosed", 503, "outside the vocabulary"),
}


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", ENGINE_REFUSES)
def test_app_tells_what_the_engine_refuses(case, stream, number):
    kind, status, text = ENGINE_REFUSES[case]
    kind = kind if isinstance(kind, type) else getattr(server, kind)
    desk = Desk((number, kind("token id 9 is outside the vocabulary")))

    async def scene(shop: Shop) -> None:
        visit = await shop.ask("completions", stream=stream, n=3).end()
        visit.check_refused(status, None, text)
        seconds = str(server.RETRY_AFTER_SECONDS) if status == 429 else None
        check_equal(visit.header("retry-after"), seconds, "Retry-After", of=shop.of)
        shop.desk.check_nobody_runs()

    play(scene, desk)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_app_tells_that_the_model_failed(kind, stream):
    async def scene(shop: Shop) -> None:
        visit = shop.ask(kind, stream=stream, n=2)
        handles = await shop.handles(2, visit)
        handles[0].say("a")
        with logged():
            handles[1].fail(server.EngineFailed(SECRET))
            await visit.end()
        if stream:
            check_equal(visit.status, 200, "status of a stream that has begun", of=shop.of)
            last = visit.events[-1]
            code = last.get("error", {}).get("code") if isinstance(last, dict) else last
            check_equal(code, 500, "code of the last event's error", of=shop.of)
        else:
            visit.check_refused(500, None)
        told = SECRET in visit.body.decode()
        check_true(not told, "the client reads what is inside of the server", of=shop.of)
        await settle()
        shop.desk.check_nobody_runs()

    play(scene)


def test_app_tells_nothing_of_its_mistakes():
    async def scene(shop: Shop) -> None:
        shop.tokenizer.error = RuntimeError(SECRET)
        with logged():
            visit = await shop.ask("chat").end()
        visit.check_refused(500, None)
        told = SECRET in visit.body.decode()
        check_true(not told, "the client reads what is inside of the server", of=shop.of)

    play(scene)


BROKEN = [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": "tiny"}', b'{"prompt": NaN}']


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
@pytest.mark.parametrize("path", [*PATHS.values(), "/tokenize", "/detokenize"])
def test_app_refuses_a_broken_body(path, content):
    async def scene(shop: Shop) -> None:
        visit = await shop.visit(path, content).end()
        shop.of.note(f"the body: {content!r}", visit.status)
        visit.check_refused(400)

    play(scene)


# Paths that are not there: method, path, status, a header that the answer has.
NOWHERE = {
    "an unknown path": ("GET", "/nowhere", 404, None),
    "an unknown path below v1": ("POST", "/v1/embeddings", 404, None),
    "another method": ("GET", "/v1/completions", 405, ("allow", "POST")),
    "another model": ("GET", "/v1/models/gpt-4", 404, None),
    "pages of the framework": ("GET", "/docs", 404, None),
}


@pytest.mark.parametrize("case", NOWHERE)
def test_app_refuses_like_openai_where_there_is_nothing(case):
    method, path, status, header = NOWHERE[case]

    async def scene(shop: Shop) -> None:
        visit = await shop.visit(path, b"{}", method=method).end()
        visit.check_refused(status)
        if header is not None:
            check_equal(visit.header(header[0]), header[1], f"the header {header[0]}", of=shop.of)

    play(scene)


def test_app_tells_what_it_is():
    async def scene(shop: Shop) -> None:
        answers = {}
        for path in ("/v1/models", f"/v1/models/{NAME}", "/health", "/version"):
            visit = await shop.visit(path).end()
            check_equal(visit.status, 200, f"status of {path}", of=shop.of)
            answers[path] = visit.content
        names = [model["id"] for model in answers["/v1/models"]["data"]]
        check_equal(names, [NAME], "models", of=shop.of)
        check_equal((await shop.visit("/").end()).body, b"<p>", "the page", of=shop.of)
        shop.desk.is_alive = False
        shop.of.note("the engine's thread ends", None)
        (await shop.visit("/health").end()).check_refused(503)

    play(scene, page="<p>")


def test_app_tokenizes():
    async def scene(shop: Shop) -> None:
        visit = await shop.visit("/tokenize", {"prompt": "aé"}).end()
        tokens = visit.content.get("tokens")
        check_equal(tokens, [1, 97, 233], "tokens of 'aé'", of=shop.of)
        visit = await shop.visit("/detokenize", {"tokens": [97, 233]}).end()
        check_equal(visit.content, {"prompt": "aé"}, "the text of its ids", of=shop.of)
        shop.tokenizer.vocab_size = 99
        visit = await shop.visit("/detokenize", {"tokens": [98, 99]}).end()
        visit.check_refused(400, "tokens", "99")
        for path, field in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [97]})):
            visit = await shop.visit(path, {"model": "gpt-4", **field}).end()
            visit.check_refused(404, "model")
        found = shop.tokenizer.on_the_loop
        check_equal(found, [], "calls of the tokenizer on the event loop", of=shop.of)

    play(scene)


def test_app_is_guarded():
    async def scene(shop: Shop) -> None:
        headers = [(b"authorization", f"Bearer {KEY}".encode())]
        for path in ("/v1/models", "/metrics", "/version", "/nowhere"):
            (await shop.visit(path).end()).check_refused(401)
            status = (await shop.visit(path, headers=headers).end()).status
            check_true(status != 401, f"{path} with the key: {status}", of=shop.of)
        for path in ("/", "/health"):
            status = (await shop.visit(path).end()).status
            check_equal(status, 200, f"status of {path} without a key", of=shop.of)
        (await shop.visit(PATHS["chat"], body_of("chat")).end()).check_refused(401)
        pieces = [b"x" * 10] * 11
        visit = await shop.visit(PATHS["chat"], pieces, headers=headers).end()
        visit.check_refused(413)
        visit = await shop.visit("/tokenize", b'{"prompt": "a"}', headers=headers).end()
        check_equal(visit.status, 200, "status of a short body with the key", of=shop.of)

    play(scene, api_key=KEY, max_body_bytes=100)


def test_app_starts_and_closes_its_engine():
    async def scene(shop: Shop) -> None:
        async with shop.app.router.lifespan_context(shop.app):
            check_equal(shop.desk.calls, ["start"], "calls of the engine", of=shop.of)
        check_equal(shop.desk.calls, ["start", "close(0.0)"], "calls of the engine", of=shop.of)
        (await shop.visit("/health").end())

    play(scene)


def test_app_counts_what_it_does():
    async def scene(shop: Shop) -> None:
        for reason, num_tokens in (("stop", 3), ("length", 1), ("stop", 0)):
            visit = shop.ask("completions", stream=reason == "stop")
            (handle,) = await shop.handles(1, visit)
            for _ in range(num_tokens):
                handle.say("a")
            handle.say("", reason)
            await visit.end()
        gone = shop.ask("completions")
        (handle,) = await shop.handles(1, gone)
        handle.say("ab", num_choices=2)
        await settle()
        await gone.leave_for_good()
        lines = (await shop.visit("/metrics").end()).body.decode().splitlines()
        got = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        for name, value in COUNTED.items():
            found = float(got.get(f"vllm:{name}", "nan"))
            check_equal(found, value, f"vllm:{name}", of=shop.of)

    play(scene)


COUNTED = {
    f'generation_tokens_total{{model_name="{NAME}"}}': 6.0,
    f'time_to_first_token_seconds_count{{model_name="{NAME}"}}': 3.0,
    f'inter_token_latency_seconds_count{{model_name="{NAME}"}}': 3.0,
    f'e2e_request_latency_seconds_count{{model_name="{NAME}"}}': 4.0,
    f'request_success_total{{finished_reason="stop",model_name="{NAME}"}}': 2.0,
    f'request_success_total{{finished_reason="length",model_name="{NAME}"}}': 1.0,
    f'request_success_total{{finished_reason="abort",model_name="{NAME}"}}': 1.0,
    f'num_requests_running{{model_name="{NAME}"}}': 1.0,
    f'kv_cache_usage_perc{{model_name="{NAME}"}}': 0.25,
}


@contextlib.asynccontextmanager
async def client_of(app: Any, key: str = "no key") -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's own client, in the same process."""
    unwritten: list[NotImplementedError] = []

    async def honest(*args: Any) -> None:
        try:
            await app(*args)
        except NotImplementedError as error:
            unwritten.append(error)
            raise

    transport = httpx.ASGITransport(honest, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport) as http:
        options = {"api_key": key, "max_retries": 0, "http_client": http}
        try:
            yield openai.AsyncOpenAI(base_url="http://here/v1", **options)
        finally:
            if unwritten:
                raise unwritten[0]


def test_openais_client_understands_everything():
    messages = [{"role": "user", "content": "Hi"}]

    async def scene(shop: Shop) -> None:
        async with client_of(shop.app, KEY) as client:
            got = await client.completions.create(model=NAME, prompt="ab", n=2)
            texts = [(choice.index, choice.text) for choice in got.choices]
            check_equal(texts, [(0, "xyz"), (1, "xyz")], "(index, text)", of=shop.of)
            check_equal(got.usage.completion_tokens, 6, "completion_tokens", of=shop.of)
            chat = client.chat.completions
            got = await chat.create(model=NAME, messages=messages)
            check_equal(got.choices[0].message.content, "xyz", "content", of=shop.of)
            options = {"stream": True, "stream_options": {"include_usage": True}}
            chunks = [c async for c in await chat.create(model=NAME, messages=messages, **options)]
            pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
            check_equal("".join(pieces), "xyz", "text of the chunks", of=shop.of)
            check_equal(chunks[-1].usage.completion_tokens, 3, "completion_tokens", of=shop.of)
            reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
            check_equal([r for r in reasons if r], ["stop"], "finish_reasons", of=shop.of)
            check_equal([m.id async for m in client.models.list()], [NAME], "models", of=shop.of)

    play(scene, Desk(script=talk), api_key=KEY)


CLIENTS_ERRORS = {
    "another model": ({"model": "gpt-4"}, "NotFoundError"),
    "an unknown name": ({"extra_body": {"frobnicate": 1}}, "BadRequestError"),
    "a bad value": ({"temperature": -1}, "BadRequestError"),
    "a response format": ({"extra_body": {"response_format": {}}}, "BadRequestError"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", CLIENTS_ERRORS)
def test_openais_client_raises_what_it_should(case, stream):
    changes, expected = CLIENTS_ERRORS[case]

    async def scene(shop: Shop) -> None:
        async with client_of(shop.app) as client:
            arguments = {"model": NAME, "prompt": "ab", "stream": stream, **changes}
            await client_raises(client, arguments, expected, shop.of)

    play(scene)


async def client_raises(client: Any, arguments: dict, expected: str, of: object) -> None:
    try:
        await client.completions.create(**arguments)
    except openai.APIError as error:
        check_equal(type(error).__name__, expected, "what OpenAI's client raises", of=of)
    else:
        check_true(False, f"OpenAI's client raises nothing; expected {expected}", of=of)


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_is_told_to_wait(stream):
    async def scene(shop: Shop) -> None:
        async with client_of(shop.app) as client:
            arguments = {"model": NAME, "prompt": "ab", "stream": stream}
            await client_raises(client, arguments, "RateLimitError", shop.of)

    play(scene, Desk((0, server.EngineBusy("many wait"))))


def test_openais_client_is_told_of_a_wrong_key():
    async def scene(shop: Shop) -> None:
        async with client_of(shop.app, "no key") as client:
            arguments = {"model": NAME, "prompt": "ab"}
            await client_raises(client, arguments, "AuthenticationError", shop.of)

    play(scene, api_key=KEY)


def test_openais_client_is_told_of_an_error_in_a_stream():
    def fail(handle: Handle) -> None:
        handle.say("a")
        handle.fail(server.EngineFailed("the model failed"))

    async def scene(shop: Shop) -> None:
        async with client_of(shop.app) as client:
            with logged():
                stream = await client.completions.create(model=NAME, prompt="ab", stream=True)
                try:
                    texts = [chunk.choices[0].text async for chunk in stream]
                except openai.APIError:
                    return
            check_true(False, f"the model failed, and the client reads {texts}", of=shop.of)

    play(scene, Desk(script=fail))


class Letters:
    """A tokenizer whose ids are letters, for a model with few of them."""

    TEXT = "abcdefghijklmnopqrstuvwxyz .,!?é"

    def __len__(self) -> int:
        return len(self.TEXT)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [self.TEXT.index(letter) for letter in text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.TEXT[i] for i in ids)

    def apply_chat_template(self, conversation: Sequence[dict], **options: Any) -> str:
        return " ".join(message["content"] for message in conversation)


@functools.cache
def small_model() -> Any:
    """A small Qwen with random weights."""
    shape = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": len(Letters.TEXT),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "tie_word_embeddings": True,
        "max_position_embeddings": CONTEXT,
    }
    made = qwen.Qwen(qwen.QwenConfig.from_dict(shape)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for parameter in made.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return made


def serving(
    scene: Callable[[Any, Any], Awaitable[Any]], on_step: Callable[[dict], Any] | None = None
) -> None:
    """Play a scene with OpenAI's client and a real engine, whose blocks are all free at the end.

    on_step: as in `Engine`, which waits for it.
    """
    limits = engine_lab.EngineLimits(24, CONTEXT, max_num_seqs=4, token_budget=16, block_size=4)
    engine = engine_lab.Engine(small_model(), Letters(), (), limits, on_step=on_step)

    async def opened() -> None:
        app = server.create_app(threaded.AsyncEngine(engine), Letters(), server.ServerParams(NAME))
        async with app.router.lifespan_context(app), client_of(app) as client:
            await scene(client, app)

    # Where others compute too, threads of such small steps wait for each other most of the time.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(opened())
    finally:
        torch.set_num_threads(num_threads)
    free = engine.blocks.num_free_blocks
    check_equal(free, 24, "free blocks, of 24, of a server that has stopped", of="a real engine")


def test_a_real_engine_streams_what_it_answers_as_a_whole():
    async def scene(client: Any, _: Any) -> None:
        for params in ({"temperature": 0}, {"seed": 3}, {"seed": 3, "n": 3}):
            params = {"model": NAME, "prompt": ["so it is.", "é"], "max_tokens": 20, **params}
            got = await client.completions.create(**params)
            texts = {choice.index: choice.text for choice in got.choices}
            streamed = dict.fromkeys(texts, "")
            async for chunk in await client.completions.create(stream=True, **params):
                streamed[chunk.choices[0].index] += chunk.choices[0].text
            of = f"a real engine, {params}"
            check_equal(streamed, texts, "texts of the stream, by index", of=of)
            lengths = {len(text) for text in texts.values()}
            check_equal(lengths, {20}, "lengths of the texts", of=of)
            if "n" in params:
                check_true(len(set(texts.values())) == 6, f"all choices: {texts}", of=of)

    serving(scene)


def test_a_real_engine_answers_many_at_once():
    async def scene(client: Any, _: Any) -> None:
        async def one(i: int, stream: bool) -> str:
            params = {"model": NAME, "prompt": "word " * (i % 4 + 1), "seed": i, "max_tokens": 9}
            if not stream:
                return (await client.completions.create(**params)).choices[0].text
            chunks = await client.completions.create(stream=True, **params)
            return "".join([chunk.choices[0].text async for chunk in chunks])

        alone = [await one(i, False) for i in range(6)]
        got = await asyncio.gather(*(one(i % 6, i % 2 > 0) for i in range(18)))
        of = "a real engine, 18 requests of 6 seeds at the same time"
        check_equal(got, alone * 3, "texts, beside each other and alone", of=of)

    serving(scene)


def test_a_real_engine_refuses_one_request_alone():
    async def scene(client: Any, _: Any) -> None:
        of = "a real engine"
        good = {"model": NAME, "prompt": "so it is.", "seed": 2, "max_tokens": 30}
        bad = ({"prompt": "a" * CONTEXT}, {"prompt": [1, 99]}, {"prompt": ""}, {"max_tokens": -1})
        alone = (await client.completions.create(**good)).choices[0].text
        refusals = [client_raises(client, good | one, "BadRequestError", of) for one in bad]
        got, *_ = await asyncio.gather(client.completions.create(**good), *refusals)
        check_equal(got.choices[0].text, alone, "text beside requests that are refused", of=of)

    serving(scene)


def test_a_real_engine_ends_what_nobody_waits_for():
    may_go_on = threading.Event()

    async def scene(_: Any, app: Any) -> None:
        of = History("a real engine")
        for stream in (True, False):
            may_go_on.clear()
            body = body_of("completions", "so it is.", max_tokens=50, stream=stream, n=4)
            visit = Visit(app, PATHS["completions"], json.dumps(body).encode(), of=of).begin()
            if stream:
                await visit.until(lambda visit=visit: visit.messages, "a status")
            await settle()
            visit.leave()
            may_go_on.set()
            await visit.end()
        visit = await Visit(app, "/metrics", method="GET", of=of).begin().end()
        lines = visit.body.decode().splitlines()
        aborted = [line for line in lines if 'finished_reason="abort"' in line]
        got = [line.rsplit(" ", 1)[1] for line in aborted if "_total" in line]
        check_equal(got, ["8.0"], "aborted requests that were counted", of=of)

    serving(scene, lambda _: may_go_on.wait(SECONDS))
