"""An OpenAI-compatible HTTP server over the asynchronous engine."""

import asyncio
import contextlib
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
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

__all__ = ["create_app"]

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1
VERSION = "0.1.0"
# Paths that need no key: they tell nothing of anybody.
OPEN_PATHS = ("/", "/health")


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
        names = ("model_name",)
        here = {"registry": self._registry}
        self._finished = Counter(
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
        self._whole = Histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the last token", names, **here
        )

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

    async def watch(self, handle: RequestHandle) -> AsyncIterator[Delta]:
        """Pass a request's deltas on, and measure them."""
        arrived = last = time.perf_counter()
        num_tokens = 0
        async for delta in handle:
            now = time.perf_counter()
            if delta.choices:
                waited = self._between if num_tokens else self._first
                waited.labels(**self._labels).observe((now - last) / len(delta.choices))
                last, num_tokens = now, num_tokens + len(delta.choices)
            if delta.finish_reason is not None:
                self._generated.labels(**self._labels).inc(num_tokens)
                self._whole.labels(**self._labels).observe(now - arrived)
                self._finished.labels(**self._labels, finished_reason=delta.finish_reason).inc()
            yield delta


def create_app(engine: AsyncEngine, tokenizer: Any, params: ServerParams) -> FastAPI:
    """Make the application; it starts the engine with itself, and closes it.

    engine: not started. tokenizer: of transformers, with a chat template for chats.
    POST /v1/completions, /v1/chat/completions, /tokenize, /detokenize; GET /v1/models, /health,
    /version, /metrics, and params.page at /.
    Errors are OpenAI's: {"error": {"message", "type", "param", "code"}}, with 400 for what is wrong
    in a request, 401 without the right key, 404 for another model, 413 for a body that is too long,
    429 with Retry-After when too many requests wait, 503 when the server is about to stop. All of
    them are found before the first byte of an answer.
    Who goes away ends their request.
    """
    state = _Server(engine, tokenizer, params)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await run_in_threadpool(engine.close, 0.0)

    # Its pages for people load scripts from elsewhere.
    app = FastAPI(title="Socratic Serving", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(_Guard, api_key=params.api_key, max_body_bytes=params.max_body_bytes)
    for kind, handler in (
        (RequestError, _refuse),
        (EngineBusy, _refuse_engine),
        (EngineClosed, _refuse_engine),
        (EngineFailed, _refuse_engine),
        (RequestValidationError, _refuse_invalid),
        (HTTPException, _refuse_http),
        (Exception, _refuse_unknown),
    ):
        app.add_exception_handler(kind, handler)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request):
        return await state.answer(COMPLETION, body, await state.prompts(body), request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request):
        return await state.answer(CHAT, body, [await state.chat_prompt(body)], request)

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [state.model]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        state.check_model(name)
        return state.model

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest):
        state.check_model(body.model)
        ids = await state.encode(body.prompt, body.add_special_tokens)
        limit = engine.engine.limits.max_model_len
        return {"tokens": ids, "count": len(ids), "max_model_len": limit}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest):
        state.check_model(body.model)
        state.check_ids(body.tokens)
        return {"prompt": await run_in_threadpool(tokenizer.decode, body.tokens)}

    @app.get("/metrics")
    async def metrics():
        return PlainTextResponse(state.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version")
    async def version():
        return {"version": VERSION}

    @app.get("/health")
    async def health():
        if not engine.is_alive:
            raise RequestError(503, "the engine has stopped")
        return {}

    @app.get("/")
    async def page():
        return HTMLResponse(params.page)

    return app


class _Server:
    """What the endpoints share."""

    def __init__(self, engine: AsyncEngine, tokenizer: Any, params: ServerParams):
        self._engine, self._tokenizer = engine, tokenizer
        self._name = params.model_name
        self.metrics = Metrics(engine, params.model_name)
        limit = engine.engine.limits.max_model_len
        self.model = {
            "id": params.model_name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "socratic-serving",
            "max_model_len": limit,
        }

    def check_model(self, name: str | None) -> None:
        if name not in (None, self._name):
            raise RequestError(404, f"there is no model {name!r}; there is {self._name!r}", "model")

    def check_ids(self, ids: Sequence[int]) -> None:
        vocab_size = len(self._tokenizer)
        wrong = next((i for i in ids if i >= vocab_size), None)
        if wrong is not None:
            raise RequestError(400, f"token id {wrong} is outside the vocabulary of {vocab_size}")

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        # Off the event loop: a long text takes its time.
        return await run_in_threadpool(
            self._tokenizer.encode, text, add_special_tokens=add_special_tokens
        )

    async def prompts(self, body: CompletionRequest) -> list[list[int]]:
        self.check_model(body.model)
        given = body.prompt
        if isinstance(given, str):
            return [await self.encode(given)]
        if not given:
            raise RequestError(400, "prompt is empty", "prompt")
        if isinstance(given[0], int):
            return [given]
        return [await self.encode(one) if isinstance(one, str) else one for one in given]

    async def chat_prompt(self, body: ChatRequest) -> list[int]:
        self.check_model(body.model)
        messages = [plain_message(message) for message in body.messages]
        tools = None if body.tool_choice == "none" else body.tools
        try:
            text = await run_in_threadpool(
                self._tokenizer.apply_chat_template,
                messages,
                tools=tools,
                add_generation_prompt=True,
                tokenize=False,
            )
        except (TemplateError, ValueError, TypeError) as error:
            text = f"the model's chat template refuses these messages: {error}"
            raise RequestError(400, text, "messages") from None
        return await self.encode(text, add_special_tokens=False)

    async def answer(
        self,
        kind: AnswerKind,
        body: CompletionRequest | ChatRequest,
        prompts: Sequence[list[int]],
        request: Request,
    ) -> StreamingResponse | dict[str, Any]:
        if body.stream_options is not None and not body.stream:
            raise RequestError(400, "stream_options needs stream to be true", "stream_options")
        answer_id = f"{kind.id_prefix}{uuid.uuid4().hex}"
        lengths = tuple(map(len, prompts))
        head = AnswerHead(kind, answer_id, int(time.time()), self._name, lengths, body.n or 1)
        handles = self._submit(head.id, body, prompts)
        answer = _Answer(head, handles, self._tokenizer.decode, self.metrics)
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            events = answer.events(with_usage, request.receive)
            return StreamingResponse(events, media_type="text/event-stream")
        return await answer.whole(request.receive)

    def _submit(
        self,
        request_id: str,
        body: CompletionRequest | ChatRequest,
        prompts: Sequence[list[int]],
    ) -> list[RequestHandle]:
        """Submit every choice, or none."""
        num_choices = body.n or 1
        if len(prompts) * num_choices > MAX_CHOICES:
            text = f"{len(prompts)} prompts with n = {num_choices} are more than {MAX_CHOICES}"
            raise RequestError(400, text, "n")
        limit = self._engine.engine.limits.max_model_len
        handles: list[RequestHandle] = []
        with contextlib.ExitStack() as submitted:
            for prompt_ids in prompts:
                params = params_of(body, len(prompt_ids), limit)
                for i in range(num_choices):
                    name = f"{request_id}-{len(handles)}"
                    seed = None if params.seed is None else (params.seed + i) % 2**63
                    try:
                        handle = self._engine.submit(name, prompt_ids, replace(params, seed=seed))
                    except ValueError as error:
                        raise RequestError(400, str(error)) from None
                    submitted.callback(handle.abort)
                    handles.append(handle)
            submitted.pop_all()  # every choice is there, so that none is taken back
        return handles


class _Answer:
    """One HTTP answer: the deltas of its choices, as a stream or as a whole."""

    def __init__(
        self,
        head: AnswerHead,
        handles: Sequence[RequestHandle],
        decode: Callable[[list[int]], str],
        metrics: Metrics,
    ):
        self._head, self._handles = head, handles
        self._decode, self._metrics = decode, metrics

    async def events(self, include_usage: bool, receive: Callable) -> AsyncIterator[str]:
        """Write server-sent events as deltas come."""
        writer = StreamWriter(self._head, self._decode, include_usage)
        try:
            for text in writer.opening():
                yield text
            async with contextlib.aclosing(self._deltas(receive)) as deltas:
                async for index, delta in deltas:
                    for text in writer.add(index, delta):
                        yield text
            for text in writer.closing():
                yield text
        except EngineFailed as error:
            yield event(error_body(500, str(error)))

    async def whole(self, receive: Callable) -> dict[str, Any]:
        """Wait for all choices, and write one object."""
        async with contextlib.aclosing(self._deltas(receive)) as deltas:
            return whole_answer(self._head, [pair async for pair in deltas], self._decode)

    async def _deltas(self, receive: Callable) -> AsyncIterator[tuple[int, Delta]]:
        """Yield (index, delta) of all choices as they come; ends early when the client goes."""
        arrived: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue()

        async def follow(index: int, handle: RequestHandle) -> None:
            try:
                async for delta in self._metrics.watch(handle):
                    arrived.put_nowait((index, delta))
                arrived.put_nowait((index, None))
            except EngineFailed as error:
                arrived.put_nowait((index, error))

        async def leave_with_client() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self._abort()

        tasks = [asyncio.create_task(follow(*each)) for each in enumerate(self._handles)]
        tasks.append(asyncio.create_task(leave_with_client()))
        num_open = len(self._handles)
        try:
            while num_open:
                index, delta = await arrived.get()
                if isinstance(delta, BaseException):
                    raise delta
                if delta is None:
                    num_open -= 1
                    continue
                yield index, delta
        finally:
            self._abort()
            for task in tasks:
                task.cancel()

    def _abort(self) -> None:
        for handle in self._handles:
            handle.abort()


class _Guard:
    """Refuse requests without the key, and bodies that are too long, before anything reads them."""

    def __init__(self, app: Callable, api_key: str | None, max_body_bytes: int):
        self._app, self._max_body_bytes = app, max_body_bytes
        self._key = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"")
        is_open = self._key is None or scope["path"] in OPEN_PATHS
        if not is_open and not secrets.compare_digest(given, self._key):
            refusal = _error_response(401, "the key is missing or wrong: Authorization: Bearer KEY")
            await refusal(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> dict:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise HTTPException(413, f"the body has more than {self._max_body_bytes} bytes")
            return message

        await self._app(scope, counted, send)


def _error_response(status: int, message: str, param: str | None = None) -> JSONResponse:
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 429 else None
    return JSONResponse(error_body(status, message, param), status, headers)


async def _refuse(_: Request, error: RequestError) -> JSONResponse:
    return _error_response(error.status, str(error), error.param)


async def _refuse_engine(_: Request, error: Exception) -> JSONResponse:
    status = {EngineBusy: 429, EngineClosed: 503, EngineFailed: 500}[type(error)]
    return _error_response(status, str(error))


async def _refuse_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    # Of ("body", "prompt", "list[str]", 0) the second one is what the client wrote.
    names = [str(part) for part in first["loc"] if part != "body"]
    name = names[0] if names else None
    return _error_response(400, f"{'.'.join(names) or 'body'}: {first['msg']}", name)


async def _refuse_http(_: Request, error: HTTPException) -> JSONResponse:
    return _error_response(error.status_code, str(error.detail))


async def _refuse_unknown(_: Request, error: Exception) -> JSONResponse:
    logger.error("a request failed", exc_info=error)
    return _error_response(500, "the server failed; its log says more")
