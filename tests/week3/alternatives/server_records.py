"""Week3/server another way: one task that waits for whatever is next, and answers kept as rows.

The guard compares hashes and joins a body before it hands it on, all params are made before
anything is submitted, a stream is written list by list, and a whole answer has a row for each
choice.
"""

import asyncio
import contextlib
import hashlib
import hmac
import itertools
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from jinja2 import TemplateError
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from week3.async_engine import AsyncEngine, EngineBusy, EngineClosed, EngineFailed, RequestHandle
from week3.engine import Delta
from week3.protocol import (
    CHAT,
    COMPLETION,
    MAX_BODY_BYTES,
    MAX_CHOICES,
    AnswerHead,
    AnswerKind,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    RequestError,
    StreamWriter,
    TokenizeRequest,
    error_body,
    event,
    params_of,
    plain_message,
    whole_answer,
)

__all__ = [
    "refusal_of",
    "error_response",
    "Guard",
    "encode_prompts",
    "encode_chat",
    "submit_all",
    "watched",
    "merged",
    "stream",
    "whole",
    "answer",
]

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1
VERSION = "0.1.0"
# Paths that need no key: they tell nothing of anybody.
OPEN_PATHS = ("/", "/health")

# What ASGI hands to an application: its next message, and where to send one.
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class ServerParams:
    """How a server presents itself.

    model_name: what clients call the model. api_key: what they have to send as a bearer token; None
    lets everybody in. max_body_bytes: of one request. page: HTML to show at "/".
    """

    model_name: str
    api_key: str | None = None
    max_body_bytes: int = MAX_BODY_BYTES
    page: str = ""


class Metrics:
    """What the server counts, under vLLM's names where the meaning is the same.

    engine: asked for the state of its scheduler whenever somebody looks.
    """

    def __init__(self, engine: AsyncEngine, model_name: str):
        self._engine, self._labels = engine, {"model_name": model_name}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        names, here = ("model_name",), {"registry": self._registry}
        self._ended = Counter(
            "vllm:request_success",
            "Requests by how they ended",
            (*names, "finished_reason"),
            **here,
        )
        self._generated = Counter("vllm:generation_tokens", "Tokens generated", names, **here)
        self._first = Histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token", names, **here
        )
        self._between = Histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens of a request", names, **here
        )
        self._lasted = Histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the end", names, **here
        )

    def now(self) -> float:
        """Read a clock, in seconds since some moment."""
        return time.perf_counter()

    def first_token(self, seconds: float) -> None:
        """Count the first token of a request, which came so long after the request."""
        self._generated.labels(**self._labels).inc()
        self._first.labels(**self._labels).observe(seconds)

    def next_token(self, seconds: float) -> None:
        """Count a token that came so long after the one before it."""
        self._generated.labels(**self._labels).inc()
        self._between.labels(**self._labels).observe(seconds)

    def ended(self, reason: str, seconds: float) -> None:
        """Count the end of a request, so long after it came."""
        self._ended.labels(**self._labels, finished_reason=reason).inc()
        self._lasted.labels(**self._labels).observe(seconds)

    def collect(self) -> Iterable[Any]:
        """Tell what the scheduler and the pool know, for prometheus_client."""
        scheduler, blocks = self._engine.engine.scheduler, self._engine.engine.blocks
        used = 1 - blocks.num_free_blocks / blocks.num_blocks
        gauges = {
            "vllm:num_requests_running": ("Requests that run", scheduler.num_running),
            "vllm:num_requests_waiting": ("Requests that wait", scheduler.num_waiting),
            "vllm:kv_cache_usage_perc": ("Share of blocks in use, from 0 to 1", used),
        }
        counters = {
            "vllm:num_preemptions": ("Requests that lost blocks", scheduler.num_preemptions),
            "vllm:prompt_tokens": ("Prompt tokens", scheduler.num_prompt_tokens),
            "vllm:prefix_cache_queries": ("Tokens looked for", scheduler.num_prompt_tokens),
            "vllm:prefix_cache_hits": ("Tokens found", scheduler.num_cached_tokens),
        }
        for kind, found in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, value) in found.items():
                family = kind(name, text, labels=list(self._labels))
                family.add_metric(list(self._labels.values()), value)
                yield family

    def text(self) -> bytes:
        """Write everything in Prometheus' text format."""
        return generate_latest(self._registry)


@dataclass(frozen=True)
class Service:
    """What all requests share. engine: started. tokenizer: of transformers."""

    engine: AsyncEngine
    tokenizer: Any
    model_name: str
    metrics: Metrics

    def check_model(self, name: str | None) -> None:
        """Raise RequestError 404, unless name is that of the model, or None."""
        if name not in (None, self.model_name):
            text = f"there is no model {name!r}; there is {self.model_name!r}"
            raise RequestError(404, text, "model")


@dataclass(frozen=True)
class Submission:
    """One HTTP request whose choices the engine has.

    head: of the answer. handles: of the choices, head.num_choices, in the order that head tells.
    decode: turns ids into text. arrived: when the request came, by metrics.now(). receive: ASGI's;
    nothing but the client's leaving, {"type": "http.disconnect"}, is still to come.
    """

    head: AnswerHead
    handles: Sequence[RequestHandle]
    decode: Callable[[list[int]], str]
    metrics: Metrics
    arrived: float
    receive: Receive


class EventStream(StreamingResponse):
    """An answer of server-sent events.

    events: a generator of their texts. handles: of whose requests it tells. However it ends, also
    when the client goes before the first event, the handles are aborted and events is closed.
    """

    def __init__(self, events: AsyncIterator[str], handles: Sequence[RequestHandle]):
        super().__init__(events, media_type="text/event-stream")
        self.events, self.handles = events, handles

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for handle in self.handles:
                handle.abort()
            await self.events.aclose()


_TOLD = {EngineBusy: 429, EngineClosed: 503}
_HIDDEN = "something went wrong inside of the server"


def refusal_of(error: Exception) -> RequestError:
    match error:
        case RequestError():
            return error
        case HTTPException():
            return RequestError(error.status_code, str(error.detail))
        case RequestValidationError():
            _, *path = error.errors()[0]["loc"]
            name = next((part for part in path[:1] if isinstance(part, str)), None)
            return RequestError(400, f"{name or 'the body'}: {error.errors()[0]['msg']}", name)
    if type(error) in _TOLD:
        return RequestError(_TOLD[type(error)], str(error))
    logging.error("%s", error, exc_info=(type(error), error, error.__traceback__))
    return RequestError(500, _HIDDEN)


def error_response(error: Exception) -> JSONResponse:
    told = refusal_of(error)
    response = JSONResponse(error_body(told.status, str(told), told.param), told.status)
    if isinstance(error, HTTPException) and error.headers:
        response.headers.update(error.headers)
    if told.status == 429:
        response.headers.setdefault("retry-after", str(RETRY_AFTER_SECONDS))
    return response


class Guard:
    def __init__(self, app: Callable, api_key: str | None, max_body_bytes: int):
        self._app, self._most = app, max_body_bytes
        self._digest = None if api_key is None else hashlib.sha256(api_key.encode()).digest()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            self._check_key(scope)
            body = await self._read(receive)
        except HTTPException as refusal:
            return await error_response(refusal)(scope, receive, send)
        except ConnectionError:
            return None
        first = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def once() -> dict[str, Any]:
            return next(first, None) or await receive()

        return await self._app(scope, once, send)

    def _check_key(self, scope: dict[str, Any]) -> None:
        if self._digest is None or scope["path"] in OPEN_PATHS:
            return
        for name, value in scope["headers"]:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                given = hashlib.sha256(value[7:]).digest()
                if hmac.compare_digest(given, self._digest):
                    return
        raise HTTPException(401, "wrong key", headers={"WWW-Authenticate": "Bearer"})

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            body += message.get("body", b"")
            if len(body) > self._most:
                raise HTTPException(413, f"at most {self._most} bytes")
            if not message.get("more_body"):
                return bytes(body)


async def encode_prompts(body: CompletionRequest, tokenizer: Any) -> list[list[int]]:
    prompts = body.prompt
    if prompts == []:
        raise RequestError(400, "there is no prompt", "prompt")
    if isinstance(prompts, str) or isinstance(prompts[0], int):
        prompts = [prompts]

    def work() -> list[list[int]]:
        return [tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]

    return await asyncio.to_thread(work)


async def encode_chat(body: ChatRequest, tokenizer: Any) -> list[int]:
    def work() -> list[int]:
        try:
            text = tokenizer.apply_chat_template(
                list(map(plain_message, body.messages)),
                tools=body.tools if body.tool_choice != "none" else None,
                add_generation_prompt=True,
                tokenize=False,
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise RequestError(400, f"template: {error}", "messages") from error
        return tokenizer.encode(text, add_special_tokens=False)

    return await asyncio.get_running_loop().run_in_executor(None, work)


def submit_all(
    engine: AsyncEngine,
    request_id: str,
    body: CompletionRequest | ChatRequest,
    prompts: Sequence[list[int]],
) -> list[RequestHandle]:
    copies = range(body.n or 1)
    if len(prompts) * len(copies) > MAX_CHOICES:
        raise RequestError(400, f"more than {MAX_CHOICES} choices", "n")
    context = engine.engine.limits.max_model_len
    wanted = []
    for prompt, i in itertools.product(prompts, copies):
        params = params_of(body, len(prompt), context)
        if params.seed is not None:
            params = replace(params, seed=(params.seed + i) % 2**63)
        wanted.append((prompt, params))
    done: list[RequestHandle] = []
    try:
        for number, (prompt, params) in enumerate(wanted):
            done.append(engine.submit(f"{request_id}.{number}", prompt, params))
    except BaseException as error:
        while done:
            done.pop().abort()
        if isinstance(error, ValueError):
            raise RequestError(400, str(error)) from error
        raise
    return done


async def watched(handle: RequestHandle, metrics: Metrics, arrived: float) -> AsyncIterator[Delta]:
    end, latest = None, None
    try:
        while True:
            try:
                delta = await anext(handle)
            except StopAsyncIteration:
                return
            except Exception:
                end = end or "error"
                raise
            if count := len(delta.choices):
                now = metrics.now()
                if latest is None:
                    metrics.first_token(now - arrived)
                    latest, count = now, count - 1
                for _ in range(count):
                    metrics.next_token((now - latest) / len(delta.choices))
                latest = now
            end = delta.finish_reason if delta.finish_reason else end
            yield delta
    finally:
        metrics.ended(end or "abort", metrics.now() - arrived)


async def merged(submission: Submission) -> AsyncIterator[tuple[int, Delta]]:
    watchers = [watched(h, submission.metrics, submission.arrived) for h in submission.handles]
    waiting = {asyncio.ensure_future(anext(w)): i for i, w in enumerate(watchers)}
    gone = asyncio.ensure_future(_left(submission.receive))
    try:
        while waiting and not gone.done():
            await asyncio.wait([*waiting, gone], return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                break
            for task in [task for task in waiting if task.done()]:
                index = waiting.pop(task)
                try:
                    delta = task.result()
                except StopAsyncIteration:
                    continue
                yield index, delta
                waiting[asyncio.ensure_future(anext(watchers[index]))] = index
    finally:
        for handle in submission.handles:
            handle.abort()
        left = [*waiting, gone]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        for watcher in watchers:
            await watcher.aclose()


async def _left(receive: Receive) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return


async def _lists(submission: Submission, writer: StreamWriter) -> AsyncIterator[list[str]]:
    yield writer.opening()
    every = merged(submission)
    try:
        async for index, delta in every:
            yield writer.add(index, delta)
    finally:
        await every.aclose()
    yield writer.closing()


async def stream(submission: Submission, include_usage: bool) -> AsyncIterator[str]:
    writer = StreamWriter(submission.head, submission.decode, include_usage=include_usage)
    lists = _lists(submission, writer)
    try:
        async for texts in lists:
            for text in texts:
                yield text
    except Exception as error:
        told = refusal_of(error)
        yield event(error_body(told.status, str(told), told.param))
    finally:
        await lists.aclose()


async def whole(submission: Submission) -> dict[str, Any]:
    rows: list[list[Delta]] = [[] for _ in submission.handles]
    async with contextlib.aclosing(merged(submission)) as every:
        async for index, delta in every:
            rows[index].append(delta)
    pairs = ((index, delta) for index, row in enumerate(rows) for delta in row)
    return whole_answer(submission.head, pairs, submission.decode)


async def answer(
    service: Service, kind: AnswerKind, body: CompletionRequest | ChatRequest, receive: Receive
) -> EventStream | dict[str, Any]:
    arrived, created = service.metrics.now(), int(time.time())
    service.check_model(body.model)
    options = body.stream_options
    if options and not body.stream:
        raise RequestError(400, "there is no stream for these options", "stream_options")
    tokenizer = service.tokenizer
    if kind is CHAT:
        prompts = [await encode_chat(body, tokenizer)]
    else:
        prompts = await encode_prompts(body, tokenizer)
    name = kind.id_prefix + uuid.uuid4().hex[:24]
    submission = Submission(
        head=AnswerHead(
            kind,
            name,
            created,
            service.model_name,
            prompt_lengths=tuple(len(prompt) for prompt in prompts),
            n=1 if body.n is None else body.n,
        ),
        handles=submit_all(service.engine, name, body, prompts),
        decode=tokenizer.decode,
        metrics=service.metrics,
        arrived=arrived,
        receive=receive,
    )
    if body.stream:
        wanted = bool(options and options.include_usage)
        return EventStream(stream(submission, wanted), submission.handles)
    return await whole(submission)


def create_app(engine: AsyncEngine, tokenizer: Any, params: ServerParams) -> FastAPI:
    """Make the application; it starts the engine with itself, and closes it.

    engine: not started. tokenizer: of transformers, with a chat template for chats.
    POST /v1/completions, /v1/chat/completions, /tokenize, /detokenize; GET /v1/models, /health,
    /version, /metrics, and params.page at /.
    """
    service = Service(engine, tokenizer, params.model_name, Metrics(engine, params.model_name))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await run_in_threadpool(engine.close, 0.0)

    async def refuse(_: Request, error: Exception) -> JSONResponse:
        return error_response(error)

    # Its pages for people load scripts from elsewhere.
    app = FastAPI(title="Socratic Serving", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, api_key=params.api_key, max_body_bytes=params.max_body_bytes)
    for kind in (RequestError, EngineBusy, EngineClosed, EngineFailed, HTTPException):
        app.add_exception_handler(kind, refuse)
    app.add_exception_handler(RequestValidationError, refuse)
    app.add_exception_handler(Exception, refuse)
    add_answers(app, service)
    add_information(app, service, params.page)
    return app


def add_answers(app: FastAPI, service: Service) -> None:
    """Add what the model and its tokenizer answer."""
    tokenizer, limits = service.tokenizer, service.engine.engine.limits

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request):
        return await answer(service, COMPLETION, body, request.receive)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request):
        return await answer(service, CHAT, body, request.receive)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest):
        service.check_model(body.model)
        options = {"add_special_tokens": body.add_special_tokens}
        ids = await run_in_threadpool(tokenizer.encode, body.prompt, **options)
        return {"tokens": ids, "count": len(ids), "max_model_len": limits.max_model_len}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest):
        service.check_model(body.model)
        vocab_size = len(tokenizer)
        wrong = next((i for i in body.tokens if i >= vocab_size), None)
        if wrong is not None:
            text = f"token id {wrong} is outside the vocabulary of {vocab_size}"
            raise RequestError(400, text, "tokens")
        return {"prompt": await run_in_threadpool(tokenizer.decode, body.tokens)}


def add_information(app: FastAPI, service: Service, page: str) -> None:
    """Add what the server tells of itself. page: HTML, shown at "/"."""
    model = {
        "id": service.model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "socratic-serving",
        "max_model_len": service.engine.engine.limits.max_model_len,
    }

    @app.get("/v1/models")
    async def list_models():
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str):
        service.check_model(name)
        return model

    @app.get("/metrics")
    async def metrics():
        return PlainTextResponse(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version")
    async def version():
        return {"version": VERSION}

    @app.get("/health")
    async def health():
        if not service.engine.is_alive:
            raise RequestError(503, "the engine has stopped")
        return {}

    @app.get("/")
    async def show_page():
        return HTMLResponse(page)
