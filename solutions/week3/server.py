"""An OpenAI-compatible HTTP server over the asynchronous engine."""

import asyncio
import contextlib
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
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

# Index of a layer → how many tokens each of its experts has been given.
ExpertLoad = Callable[[], Mapping[int, Sequence[int]]]
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

    engine: asked for the state of its scheduler whenever somebody looks. expert_load: asked at the
    same time, and may wait for the device; None for a model without experts.
    """

    def __init__(self, engine: AsyncEngine, model_name: str, expert_load: ExpertLoad | None = None):
        self._engine, self._labels = engine, {"model_name": model_name}
        self._expert_load = expert_load
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
        engine = self._engine.engine
        scheduler, blocks = engine.scheduler, engine.blocks
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
            "vllm:spec_decode_num_drafts": ("Times somebody had guesses", engine.num_drafts),
            "vllm:spec_decode_num_draft_tokens": ("Guesses", engine.num_draft_tokens),
            "vllm:spec_decode_num_accepted_tokens": ("Accepted", engine.num_accepted_tokens),
        }
        for kind, found in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, value) in found.items():
                family = kind(name, text, labels=list(self._labels))
                family.add_metric(list(self._labels.values()), value)
                yield family
        if self._expert_load is not None:
            yield self._tokens_of_experts(self._expert_load())

    def _tokens_of_experts(self, load: Mapping[int, Sequence[int]]) -> CounterMetricFamily:
        names = [*self._labels, "layer", "expert"]
        family = CounterMetricFamily("moe:expert_tokens", "Tokens of an expert", labels=names)
        for layer, counts in load.items():
            for expert, count in enumerate(counts):
                family.add_metric([*self._labels.values(), str(layer), str(expert)], count)
        return family

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


def refusal_of(error: Exception) -> RequestError:
    """Say how an error is told to the client whose request it ends.

    A RequestError is told as it is; EngineBusy with 429 and EngineClosed with 503, in their own
    words; starlette's HTTPException with its status and detail. fastapi's RequestValidationError is
    400; param is the first name in the body that is wrong, None when it is the body itself, and the
    text holds this name and the reason. Any other error, also EngineFailed, is 500, with a text
    that has nothing of the error's own, and goes to the log with its traceback, as an ERROR.
    """
    if isinstance(error, RequestError):
        return error
    if isinstance(error, (EngineBusy, EngineClosed)):
        return RequestError(429 if isinstance(error, EngineBusy) else 503, str(error))
    if isinstance(error, HTTPException):
        return RequestError(error.status_code, str(error.detail))
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        # Of ("body", "prompt", "list[str]", 0) the second one is what the client wrote.
        path = [str(part) for part in first["loc"][1:]]
        name = path[0] if path and isinstance(first["loc"][1], str) else None
        return RequestError(400, f"{'.'.join(path) if name else 'body'}: {first['msg']}", name)
    logger.error("a request failed", exc_info=error)
    return RequestError(500, "the server failed; its log says more")


def error_response(error: Exception) -> JSONResponse:
    """Answer with an error: the status and `error_body` of its refusal.

    The headers of an HTTPException are kept. 429 has the header Retry-After: RETRY_AFTER_SECONDS,
    unless the HTTPException has brought its own, in whatever case its name is written.
    """
    refusal = refusal_of(error)
    content = error_body(refusal.status, str(refusal), refusal.param)
    response = JSONResponse(content, refusal.status, getattr(error, "headers", None))
    if refusal.status == 429:
        response.headers.setdefault("Retry-After", str(RETRY_AFTER_SECONDS))
    return response


class Guard:
    """Stands before an ASGI application: no request without the key, none with too long a body.

    app: it does not see what is refused, and of any other request it receives all, the client's
        leaving too. api_key: as in `ServerParams`; it comes in the header Authorization, as UTF-8
        after "Bearer", a word whose case does not matter, and a space. max_body_bytes: of a body,
        in one piece or many.
    Without the key, 401, with the header WWW-Authenticate: Bearer, before anything is received of
    the body. OPEN_PATHS need none. How long it takes tells nothing of how much of a key is right.
    413 as soon as more than max_body_bytes are there, whatever Content-Length says.
    Both are `error_response`s. A client who leaves in the middle of a body gets nothing, and app is
    not called. What is no HTTP request goes to app as it is.
    """

    def __init__(self, app: Callable, api_key: str | None, max_body_bytes: int):
        self._app, self._max_body_bytes = app, max_body_bytes
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Handle a request, as ASGI wants it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif not self._has_key(scope):
            text = "the key is missing or wrong: Authorization: Bearer KEY"
            refusal = HTTPException(401, text, {"WWW-Authenticate": "Bearer"})
            await error_response(refusal)(scope, receive, send)
        else:
            await self._let_in(scope, receive, send)

    def _has_key(self, scope: dict[str, Any]) -> bool:
        if self._key is None or scope["path"] in OPEN_PATHS:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        return scheme.lower() == b"bearer" and secrets.compare_digest(key, self._key)

    async def _let_in(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        messages, num_bytes = [], 0
        while not messages or messages[-1].get("more_body"):
            messages.append(await receive())
            if messages[-1]["type"] == "http.disconnect":
                return
            num_bytes += len(messages[-1].get("body", b""))
            if num_bytes > self._max_body_bytes:
                refusal = HTTPException(413, f"the body has more than {self._max_body_bytes} bytes")
                await error_response(refusal)(scope, receive, send)
                return
        messages.reverse()

        async def again() -> dict[str, Any]:
            return messages.pop() if messages else await receive()

        await self._app(scope, again, send)


async def encode_prompts(body: CompletionRequest, tokenizer: Any) -> list[list[int]]:
    """Turn the prompts of a completion into ids, in their order; one prompt is a list of one.

    Texts are encoded by tokenizer.encode, with its special tokens; ids stay as they are. While the
    tokenizer works, the event loop is free for others.
    Raises RequestError 400, which names "prompt", for an empty list.
    """
    given = body.prompt
    if isinstance(given, str):
        given = [given]
    if not given:
        raise RequestError(400, "prompt is empty", "prompt")
    if isinstance(given[0], int):
        return [given]
    return [
        await run_in_threadpool(tokenizer.encode, one) if isinstance(one, str) else one
        for one in given
    ]


async def encode_chat(body: ChatRequest, tokenizer: Any) -> list[int]:
    """Turn the messages of a chat into the ids of a prompt that asks for the next message.

    tokenizer.apply_chat_template gets each message as `plain_message` makes it, and the tools,
    unless tool_choice is "none", and writes a text; its special tokens stand in it already. While
    the tokenizer works, the event loop is free for others.
    Raises RequestError 400, which names "messages" and tells the error's text, for a TemplateError,
    ValueError or TypeError of the template; what else goes wrong is raised as it is.
    """
    messages = [plain_message(message) for message in body.messages]
    tools = None if body.tool_choice == "none" else body.tools
    try:
        text = await run_in_threadpool(
            tokenizer.apply_chat_template,
            messages,
            tools=tools,
            add_generation_prompt=True,
            tokenize=False,
        )
    except (TemplateError, ValueError, TypeError) as error:
        told = f"the model's chat template refuses these messages: {error}"
        raise RequestError(400, told, "messages") from None
    return await run_in_threadpool(tokenizer.encode, text, add_special_tokens=False)


def submit_all(
    engine: AsyncEngine,
    request_id: str,
    body: CompletionRequest | ChatRequest,
    prompts: Sequence[list[int]],
) -> list[RequestHandle]:
    """Submit every choice of a request, or none: body.n for each prompt, 1 where it is not given.

    request_id: what the ids of all choices begin with; they differ.
    Returns their handles, those of the first prompt first. The params are those of `params_of`;
    with a seed, the choices of a prompt have seed, seed + 1, seed + 2, … modulo 2**63.
    Raises RequestError 400, which names "n", for more than MAX_CHOICES in all, before anything is
    submitted; one with the text of a ValueError of the engine; and what `params_of` and the engine
    raise otherwise. Then no choice is left in the engine.
    """
    num_choices = body.n or 1
    if len(prompts) * num_choices > MAX_CHOICES:
        text = f"{len(prompts)} prompts with n = {num_choices} are more than {MAX_CHOICES}"
        raise RequestError(400, text, "n")
    limit = engine.engine.limits.max_model_len
    handles: list[RequestHandle] = []
    with contextlib.ExitStack() as submitted:
        for prompt_ids in prompts:
            params = params_of(body, len(prompt_ids), limit)
            for i in range(num_choices):
                name = f"{request_id}-{len(handles)}"
                seed = None if params.seed is None else (params.seed + i) % 2**63
                try:
                    handle = engine.submit(name, prompt_ids, replace(params, seed=seed))
                except ValueError as error:
                    raise RequestError(400, str(error)) from None
                submitted.callback(handle.abort)
                handles.append(handle)
        submitted.pop_all()  # every choice is there, so that none is taken back
    return handles


async def watched(handle: RequestHandle, metrics: Metrics, arrived: float) -> AsyncIterator[Delta]:
    """Pass on the deltas of a request, and measure them with the clock metrics.now().

    arrived: when the request came.
    `first_token` gets the time from there to the first token, `next_token` for each later one the
    time since the one before: tokens that come together share the time since the last ones evenly,
    and beside the first one they took 0. A delta without choices brings no token. `ended` gets the
    time since arrived, once, when the request ends or nobody asks for more, and as the reason: the
    finish_reason, if it has come, whatever follows; else "error" when the handle raises; else
    "abort".
    """
    last, num_tokens, reason = arrived, 0, None
    try:
        async for delta in handle:
            now = metrics.now()
            for _ in delta.choices:
                if num_tokens == 0:
                    metrics.first_token(now - arrived)
                    last = now
                else:
                    metrics.next_token((now - last) / len(delta.choices))
                num_tokens += 1
            if delta.choices:
                last = now
            reason = delta.finish_reason or reason
            yield delta
    except Exception:
        reason = reason or "error"
        raise
    finally:
        metrics.ended(reason or "abort", metrics.now() - arrived)


async def merged(submission: Submission) -> AsyncIterator[tuple[int, Delta]]:
    """Yield the deltas of all choices, each as soon as it comes, as (place of its handle, delta).

    Each handle is `watched`, from the beginning to its end.
    Ends when all have ended, and at once when the client leaves, also while nothing comes. Raises
    what a handle raises, at once. Once it has begun, however it ends, also when it is closed, all
    handles are aborted and no task is left behind.
    """
    news: asyncio.Queue[tuple[int, Delta | Exception | None]] = asyncio.Queue()

    async def follow(index: int, handle: RequestHandle) -> None:
        deltas = watched(handle, submission.metrics, submission.arrived)
        try:
            async with contextlib.aclosing(deltas):
                async for delta in deltas:
                    news.put_nowait((index, delta))
            news.put_nowait((index, None))
        except Exception as error:
            news.put_nowait((index, error))

    async def wait_for_leaving() -> None:
        while (await submission.receive())["type"] != "http.disconnect":
            pass
        news.put_nowait((-1, None))

    tasks = [asyncio.create_task(follow(*each)) for each in enumerate(submission.handles)]
    tasks.append(asyncio.create_task(wait_for_leaving()))
    try:
        num_open = len(submission.handles)
        while num_open:
            index, delta = await news.get()
            if index < 0:
                break
            if isinstance(delta, Exception):
                raise delta
            if delta is None:
                num_open -= 1
            else:
                yield index, delta
    finally:
        for handle in submission.handles:
            handle.abort()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def stream(submission: Submission, include_usage: bool) -> AsyncIterator[str]:
    """Write an answer's events, in `StreamWriter`'s format, each as soon as it can be told.

    The opening comes before any delta; what a delta brings, at once, with the place of its handle
    as the index; the closing when all choices have ended, and nothing behind it.
    When anything is raised, `merged` ends, and then the last event is instead the `error_body` of
    its refusal, with nothing else in it. However the stream ends, `merged` has ended by then, also
    when it is closed. What is written for a client who has left is nobody's concern.
    """
    writer = StreamWriter(submission.head, submission.decode, include_usage)
    try:
        for text in writer.opening():
            yield text
        async with contextlib.aclosing(merged(submission)) as deltas:
            async for index, delta in deltas:
                for text in writer.add(index, delta):
                    yield text
        for text in writer.closing():
            yield text
    except Exception as error:
        refusal = refusal_of(error)
        yield event(error_body(refusal.status, str(refusal), refusal.param))


async def whole(submission: Submission) -> dict[str, Any]:
    """Wait for all choices, and return their `whole_answer`.

    The index of a choice is the place of its handle. Raises what `merged` raises. However it ends,
    `merged` has ended by then. What comes out when the client has left is nobody's concern.
    """
    async with contextlib.aclosing(merged(submission)) as deltas:
        found = [pair async for pair in deltas]
    return whole_answer(submission.head, found, submission.decode)


async def answer(
    service: Service, kind: AnswerKind, body: CompletionRequest | ChatRequest, receive: Receive
) -> EventStream | dict[str, Any]:
    """Answer a request whose body is right by itself: as an EventStream, or as `whole`.

    receive: see `Submission`. The request came when this is called. Its head: an id of its own that
    begins with the kind's id_prefix, created in whole seconds since 1970, and the service's model
    name. A stream has usage where stream_options wants it.
    Raises, before anything is returned, RequestError 404 for another model, 400 for stream_options
    without stream, what `encode_prompts` or `encode_chat` and what `submit_all` raise.
    """
    arrived = service.metrics.now()
    service.check_model(body.model)
    if body.stream_options is not None and not body.stream:
        raise RequestError(400, "stream_options needs stream to be true", "stream_options")
    if isinstance(body, ChatRequest):
        prompts = [await encode_chat(body, service.tokenizer)]
    else:
        prompts = await encode_prompts(body, service.tokenizer)
    answer_id, lengths = f"{kind.id_prefix}{uuid.uuid4().hex}", tuple(map(len, prompts))
    created, name = int(time.time()), service.model_name
    head = AnswerHead(kind, answer_id, created, name, lengths, body.n or 1)
    handles = submit_all(service.engine, head.id, body, prompts)
    decode, metrics = service.tokenizer.decode, service.metrics
    submission = Submission(head, handles, decode, metrics, arrived, receive)
    if not body.stream:
        return await whole(submission)
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return EventStream(stream(submission, include_usage), handles)


def create_app(
    engine: AsyncEngine,
    tokenizer: Any,
    params: ServerParams,
    expert_load: ExpertLoad | None = None,
) -> FastAPI:
    """Make the application; it starts the engine with itself, and closes it.

    engine: not started. tokenizer: of transformers, with a chat template for chats. expert_load: as
        in `Metrics`.
    POST /v1/completions, /v1/chat/completions, /tokenize, /detokenize; GET /v1/models, /health,
    /version, /metrics, and params.page at /.
    """
    metrics = Metrics(engine, params.model_name, expert_load)
    service = Service(engine, tokenizer, params.model_name, metrics)

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
        # Not here: it may wait for the device.
        text = await run_in_threadpool(service.metrics.text)
        return PlainTextResponse(text, media_type=CONTENT_TYPE_LATEST)

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
