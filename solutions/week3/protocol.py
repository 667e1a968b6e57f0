"""OpenAI's words: what a request may say, what it means to the engine, how an answer is written."""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from week3.engine import Delta, GenerationParams
from week3.model_runner import Choice

__all__ = [
    "params_of",
    "completion_logprobs",
    "chat_logprobs",
    "usage_of",
    "event",
    "error_body",
    "StreamWriter",
    "whole_answer",
]

MAX_BODY_BYTES = 4 * 2**20
MAX_CHOICES = 128
_MAX_DIGITS = 18
# JSON has no infinity: OpenAI's number for "very unlikely", and vLLM's.
MIN_LOGPROB = -9999.0

TokenIds = list[Annotated[int, Field(ge=0)]]
Text = Annotated[str, StringConstraints(max_length=MAX_BODY_BYTES)]


class Strict(BaseModel):
    """A JSON object in which unknown names, and values of other types, are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """include_usage: one more chunk, before [DONE], tells the tokens of the whole request."""

    include_usage: bool = False


class Sampling(Strict):
    """What completions and chat completions have in common; None is what was not given.

    top_k, min_p, repetition_penalty, min_tokens, ignore_eos, stop_token_ids and cache_salt are
    vLLM's additions. user: OpenAI's name for whom the answer is for; it changes nothing.
    """

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: TokenIds | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    cache_salt: str | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


class CompletionRequest(Sampling):
    """The body of POST /v1/completions."""

    prompt: Text | TokenIds | list[Text] | list[TokenIds]
    logprobs: int | None = None


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """A message of a chat. Names beside role and content go to the chat template as they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None


class ChatRequest(Sampling):
    """The body of POST /v1/chat/completions. tools: handed to the chat template."""

    messages: list[Message] = Field(min_length=1)
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None


class TokenizeRequest(Strict):
    """The body of POST /tokenize."""

    model: str | None = None
    prompt: Text
    add_special_tokens: bool = True


class DetokenizeRequest(Strict):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: TokenIds


class RequestError(Exception):
    """A request that is refused. status: of HTTP. param: the name that is wrong, or None."""

    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(message)
        self.status, self.param = status, param


def plain_message(message: Message) -> dict[str, Any]:
    """Turn a message into what chat templates take: its parts of text as one string."""
    given = message.model_dump(exclude_none=True)
    if isinstance(message.content, list):
        given["content"] = "".join(part.text for part in message.content)
    return given


@dataclass(frozen=True)
class AnswerKind:
    """One of the two endpoints.

    name, chunk_name: what a whole answer, and a chunk of a stream, have as "object". id_prefix: how
    the ids of answers begin.
    """

    name: str
    chunk_name: str
    id_prefix: str


COMPLETION = AnswerKind("text_completion", "text_completion", "cmpl-")
CHAT = AnswerKind("chat.completion", "chat.completion.chunk", "chatcmpl-")


@dataclass(frozen=True)
class AnswerHead:
    """What is known of an answer before its first token.

    kind: COMPLETION or CHAT. id, created, model: as clients read them. prompt_lengths: how many
    tokens each prompt has. n: choices of each prompt; those of the first prompt come first.
    """

    kind: AnswerKind
    id: str
    created: int
    model: str
    prompt_lengths: tuple[int, ...]
    n: int = 1

    @property
    def num_choices(self) -> int:
        """Of all prompts together."""
        return len(self.prompt_lengths) * self.n


def params_of(
    body: CompletionRequest | ChatRequest, num_prompt_tokens: int, max_model_len: int
) -> GenerationParams:
    """Translate a request's sampling parameters.

    num_prompt_tokens: of its prompt. max_model_len: of the engine.
    What is not given has OpenAI's default: max_tokens 16 for a completion, and for a chat the rest
    of the context, at least 1 (the engine refuses a prompt that is too long); everything else is
    as in GenerationParams. max_completion_tokens is a chat's newer name for max_tokens. top_k -1 is
    off, as in vLLM. stop is one string or several. logit_bias has ids in decimal digits as its
    names. A chat's logprobs says whether there are any, and its top_logprobs how many of the most
    likely tokens, none if it is not given; a completion's logprobs is both in one.
    Raises RequestError 400, with the name that the client wrote in its message and as its param,
    for a value outside the range of GenerationParams, an empty stop string, a name in logit_bias
    that is no id, top_logprobs without logprobs true, and max_tokens beside max_completion_tokens,
    whatever their values: there the name is max_tokens, as OpenAI has it.
    Source: OpenAI API reference, "Create chat completion" and "Create completion".
    """
    given = body.model_dump(exclude_none=True, include=_PASSED_ON)
    if given.get("top_k") == -1:
        given["top_k"] = 0
    for name in ("stop", "stop_token_ids"):
        if name in given:
            given[name] = tuple([given[name]] if isinstance(given[name], str) else given[name])
    if "" in given.get("stop", ()):
        raise RequestError(400, "stop must not be an empty string, nor hold one", "stop")
    if body.logit_bias is not None:
        given["logit_bias"] = _logit_bias(body.logit_bias)
    # What clients call the engine's words.
    called = {}
    called["max_tokens"], given["max_tokens"] = _max_tokens(body, num_prompt_tokens, max_model_len)
    called["logprobs"], given["logprobs"] = _num_logprobs(body)
    try:
        return GenerationParams(**given)
    except ValueError as error:
        text = str(error)
        for ours, theirs in called.items():
            text = re.sub(rf"\b{ours}\b", theirs, text)
        raise RequestError(400, text, text.partition(" ")[0]) from None


_PASSED_ON = {
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("min_tokens", "ignore_eos", "cache_salt"),
}


def _max_tokens(
    body: CompletionRequest | ChatRequest, num_prompt_tokens: int, max_model_len: int
) -> tuple[str, int]:
    if isinstance(body, CompletionRequest):
        return "max_tokens", 16 if body.max_tokens is None else body.max_tokens
    if body.max_completion_tokens is None:
        rest = max(1, max_model_len - num_prompt_tokens)
        return "max_tokens", rest if body.max_tokens is None else body.max_tokens
    if body.max_tokens is not None:
        text = "max_tokens and max_completion_tokens are the same thing; give one of them"
        raise RequestError(400, text, "max_tokens")
    return "max_completion_tokens", body.max_completion_tokens


def _num_logprobs(body: CompletionRequest | ChatRequest) -> tuple[str, int | None]:
    if isinstance(body, CompletionRequest):
        return "logprobs", body.logprobs
    if not body.logprobs:
        if body.top_logprobs is not None:
            raise RequestError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
        return "top_logprobs", None
    return "top_logprobs", 0 if body.top_logprobs is None else body.top_logprobs


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    for name in given:
        # int() refuses very long ones, and no vocabulary has ids of so many digits.
        if not (name.isascii() and name.isdigit() and len(name) <= _MAX_DIGITS):
            text = f"logit_bias maps token ids to numbers, and {name!r} is no token id"
            raise RequestError(400, text, "logit_bias")
    return {int(name): bias for name, bias in given.items()}


def completion_logprobs(
    choices: Sequence[Choice], decode: Callable[[list[int]], str], offset: int
) -> dict[str, Any] | None:
    """Write logprobs as /v1/completions has them.

    choices: in a row; None comes back when there are none, or they tell no logprobs. decode: turns
        ids into text; the text of a token is what it makes of its id alone.
    offset: how many characters the texts of the tokens before the first choice have.
    Returns lists with an entry for each choice. "tokens": its text. "token_logprobs": its logprob.
    "text_offset": how many characters the texts of all tokens before it have. "top_logprobs": text
    → logprob of its most likely tokens, and of the chosen one; where two of them have the same
    text, that of the more likely. A logprob below MIN_LOGPROB is told as MIN_LOGPROB.
    Source: OpenAI API reference, "The completion object" and logprobs in "Create completion".
    """
    if not choices or choices[0].logprob is None:
        return None
    texts = [decode([choice.token_id]) for choice in choices]
    starts = itertools.accumulate(map(len, texts), initial=offset)
    return {
        "tokens": texts,
        "token_logprobs": [_told(choice.logprob) for choice in choices],
        "top_logprobs": [_top_by_text(choice, decode) for choice in choices],
        "text_offset": list(starts)[:-1],
    }


def _top_by_text(choice: Choice, decode: Callable[[list[int]], str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for token_id, logprob in (*choice.top, (choice.token_id, choice.logprob)):
        # The best come first.
        found.setdefault(decode([token_id]), _told(logprob))
    return found


def _told(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)


def chat_logprobs(
    choices: Sequence[Choice], decode: Callable[[list[int]], str]
) -> dict[str, Any] | None:
    """Write logprobs as /v1/chat/completions has them; arguments as in `completion_logprobs`.

    Returns {"content": a list with an entry for each choice}: its "token" (the text), "logprob",
    "bytes", and "top_logprobs", which has such entries, without their own top_logprobs, for the
    most likely tokens, the best first. bytes: the numbers of the text in UTF-8; None where the text
    holds U+FFFD, for then the bytes of the token are not those of its text. Logprobs end at
    MIN_LOGPROB as in `completion_logprobs`.
    Source: OpenAI API reference, "The chat completion object".
    """
    if not choices or choices[0].logprob is None:
        return None

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = decode([token_id])
        data = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": _told(logprob), "bytes": data}

    content = [
        {
            **entry(choice.token_id, choice.logprob),
            "top_logprobs": [entry(*pair) for pair in choice.top],
        }
        for choice in choices
    ]
    return {"content": content}


def usage_of(
    prompt_lengths: Sequence[int], num_generated: Sequence[int], num_cached: Sequence[int]
) -> dict[str, Any]:
    """Count the tokens of an answer.

    prompt_lengths: of each prompt. num_generated: of each choice, how many tokens it has.
    num_cached: of each choice, how many tokens of its prompt were found in the cache. Every prompt
        has the same number of choices; those of the first prompt come first.
    Returns "prompt_tokens", where a prompt counts once for all of its choices, and found tokens
    count as well; "completion_tokens", of all choices; "total_tokens", both together; and
    "prompt_tokens_details": {"cached_tokens": N}, what the first choice of each prompt found, for
    the others find what the first has just computed.
    Source: OpenAI API reference, usage in "The chat completion object".
    """
    num_prompt_tokens, num_completion_tokens = sum(prompt_lengths), sum(num_generated)
    n = len(num_cached) // len(prompt_lengths)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(num_cached[::n])},
    }


def event(content: dict[str, Any]) -> str:
    """Write a server-sent event.

    content: what JSON can hold. The event is one line, "data: " and the content as JSON, in which
    characters beyond ASCII stand for themselves; and an empty line, which ends it.
    Source: HTML Living Standard, section 9.2, "Server-sent events".
    """
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """Write an error as clients of OpenAI read it.

    status: of HTTP. param: the name that is wrong, or None.
    Returns {"error": {…}} with "message" and "param"; "type", which is "server_error" from status
    500 on, and "invalid_request_error" below; and "code", the status, as in vLLM.
    """
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


class StreamWriter:
    """Write the events of a streamed answer, one `event` for each chunk.

    head: of the answer. decode: as in `completion_logprobs`. include_usage: whether the client
        wants to know the tokens.
    A chunk has head's id, created and model, the kind's chunk_name as "object", and "choices" with
    one entry: its index; for a completion "text", for a chat "delta"; "logprobs", as in
    `completion_logprobs` or `chat_logprobs`; and "finish_reason", None but in the chunk that ends
    the choice. With include_usage it has "usage" as well, which is None but in the last chunk.
    All text_offset of a choice are those of the whole answer.
    Source: OpenAI API reference, "The chat completion chunk object" and stream_options.
    """

    def __init__(
        self, head: AnswerHead, decode: Callable[[list[int]], str], include_usage: bool = False
    ):
        self._head, self._decode, self._include_usage = head, decode, include_usage
        self._counts = _Counts(head)
        self._offsets = [0] * head.num_choices

    def opening(self) -> list[str]:
        """Begin: a chat has a chunk for each choice, with the delta role "assistant", content "".

        Their logprobs are None. A completion has none.
        """
        if self._head.kind != CHAT:
            return []
        fields = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}
        return [self._chunk(index, fields) for index in range(self._head.num_choices)]

    def add(self, index: int, delta: Delta) -> list[str]:
        """Pass on what came to a choice.

        A chunk with the text (a completion's "text", the "content" of a chat's delta) and the
        logprobs of delta's choices, if it has text or choices. Then, if it has a finish_reason, a
        chunk of its own for that, with the text "" or the delta {}, and logprobs None.
        """
        self._counts.add(index, delta)
        is_chat, chunks = self._head.kind == CHAT, []
        if delta.text or delta.choices:
            fields = {"delta": {"content": delta.text}} if is_chat else {"text": delta.text}
            fields["logprobs"] = self._logprobs(index, delta.choices)
            chunks.append(self._chunk(index, fields))
        if delta.finish_reason is not None:
            fields = {"delta": {}} if is_chat else {"text": ""}
            fields["logprobs"] = None
            chunks.append(self._chunk(index, fields, delta.finish_reason))
        return chunks

    def closing(self) -> list[str]:
        """End, when all choices have ended: "data: [DONE]" as an event.

        With include_usage a chunk comes before it, whose choices are [] and whose usage is as in
        `usage_of`, counted from the deltas' choices. What a choice found in the cache stands in its
        first delta; it is 0 where none came.
        """
        end = ["data: [DONE]\n\n"]
        if not self._include_usage:
            return end
        common = _common(self._head, self._head.kind.chunk_name)
        return [event({**common, "choices": [], "usage": self._counts.usage()}), *end]

    def _chunk(self, index: int, fields: dict[str, Any], finish_reason: str | None = None) -> str:
        choice = {"index": index, **fields, "finish_reason": finish_reason}
        usage = {"usage": None} if self._include_usage else {}
        common = _common(self._head, self._head.kind.chunk_name)
        return event({**common, "choices": [choice], **usage})

    def _logprobs(self, index: int, choices: Sequence[Choice]) -> dict[str, Any] | None:
        if self._head.kind == CHAT:
            return chat_logprobs(choices, self._decode)
        logprobs = completion_logprobs(choices, self._decode, self._offsets[index])
        if logprobs is not None:
            self._offsets[index] += sum(map(len, logprobs["tokens"]))
        return logprobs


def whole_answer(
    head: AnswerHead, deltas: Iterable[tuple[int, Delta]], decode: Callable[[list[int]], str]
) -> dict[str, Any]:
    """Write an answer that is not streamed.

    deltas: (index of a choice, what came to it), as they came. decode: as in `completion_logprobs`.
    Returns head's id, created and model; the kind's name as "object"; "choices", in the order of
    their index; and "usage" as in `StreamWriter`. A choice has its "index"; for a completion
    "text", for a chat "message", with the role "assistant" and the text as content; "logprobs", as
    in `completion_logprobs` or `chat_logprobs`; and "finish_reason", which is "abort" where no
    delta has told it.
    Source: OpenAI API reference, "The chat completion object", "The completion object".
    """
    counts = _Counts(head)
    texts = [""] * head.num_choices
    chosen: list[list[Choice]] = [[] for _ in texts]
    reasons = ["abort"] * len(texts)
    for index, delta in deltas:
        counts.add(index, delta)
        texts[index] += delta.text
        chosen[index] += delta.choices
        reasons[index] = delta.finish_reason or reasons[index]
    parts = []
    for index, text in enumerate(texts):
        if head.kind == CHAT:
            fields = {"message": {"role": "assistant", "content": text}}
            logprobs = chat_logprobs(chosen[index], decode)
        else:
            fields, logprobs = {"text": text}, completion_logprobs(chosen[index], decode, 0)
        end = {"logprobs": logprobs, "finish_reason": reasons[index]}
        parts.append({"index": index, **fields, **end})
    return {**_common(head, head.kind.name), "choices": parts, "usage": counts.usage()}


def _common(head: AnswerHead, name: str) -> dict[str, Any]:
    return {"id": head.id, "object": name, "created": head.created, "model": head.model}


class _Counts:
    """The tokens of an answer, from its deltas."""

    def __init__(self, head: AnswerHead):
        self._prompt_lengths = head.prompt_lengths
        self._num_generated = [0] * head.num_choices
        self._num_cached: list[int | None] = [None] * head.num_choices

    def add(self, index: int, delta: Delta) -> None:
        self._num_generated[index] += len(delta.choices)
        # The delta of an abort does not tell it.
        if self._num_cached[index] is None:
            self._num_cached[index] = delta.num_cached_tokens

    def usage(self) -> dict[str, Any]:
        found = [count or 0 for count in self._num_cached]
        return usage_of(self._prompt_lengths, self._num_generated, found)
