"""Week3/protocol another way: chunks are made by generators, answers grow token by token.

Parameters are checked before the engine's class sees them, name by name, against the limits that
its class would find; a whole answer is put together from the same state as a stream.
"""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from week3.engine import MAX_LOGIT_BIAS, MAX_LOGPROBS, GenerationParams

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
    """One of the two endpoints. name, chunk_name: the object of a whole answer, and of a chunk."""

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


DIGITS = frozenset("0123456789")
LIMITS = {
    "temperature": lambda x: 0 <= x < float("inf"),
    "top_p": lambda x: 0 < x <= 1,
    "top_k": lambda x: x >= -1,
    "min_p": lambda x: 0 <= x <= 1,
    "repetition_penalty": lambda x: 0 < x < float("inf"),
    "presence_penalty": lambda x: -2 <= x <= 2,
    "frequency_penalty": lambda x: -2 <= x <= 2,
    "seed": lambda x: 0 <= x < 2**63,
    "max_tokens": lambda x: x > 0,
    "max_completion_tokens": lambda x: x > 0,
    "top_logprobs": lambda x: 0 <= x <= MAX_LOGPROBS,
    "stop": lambda x: x != "" and "" not in ([] if isinstance(x, str) else x),
    "logit_bias": lambda x: all(
        0 < len(name) < 10 and set(name) <= DIGITS and -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS
        for name, bias in x.items()
    ),
}
PLAIN = (
    *("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "seed", "ignore_eos", "cache_salt"),
)


def params_of(body, num_prompt_tokens, max_model_len):
    """Check every name, then translate."""
    is_chat = hasattr(body, "messages")
    given = {name: getattr(body, name) for name in type(body).model_fields}
    given = {name: value for name, value in given.items() if value is not None}
    limits = LIMITS if is_chat else {**LIMITS, "logprobs": LIMITS["top_logprobs"]}
    for name, holds in limits.items():
        if name in given and not holds(given[name]):
            raise RequestError(400, f"the value of {name} is not allowed", name)
    if {"max_tokens", "max_completion_tokens"} <= given.keys():
        raise RequestError(400, "max_tokens and its newer name were both given", "max_tokens")
    wanted = {name: given[name] for name in PLAIN if name in given}
    lengths = [given[n] for n in ("max_tokens", "max_completion_tokens") if n in given]
    rest = max_model_len - num_prompt_tokens
    wanted["max_tokens"] = (lengths or [max(rest, 1) if is_chat else 16])[0]
    wanted["min_tokens"] = given.get("min_tokens", 0)
    if not 0 <= wanted["min_tokens"] <= wanted["max_tokens"]:
        raise RequestError(
            400, "min_tokens has to be at least 0, and no more than may come", "min_tokens"
        )
    wanted["top_k"] = max(given.get("top_k", 0), 0)
    stop = given.get("stop", [])
    wanted["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    wanted["stop_token_ids"] = tuple(given.get("stop_token_ids", ()))
    wanted["logit_bias"] = {int(k): v for k, v in given.get("logit_bias", {}).items()}
    wanted["logprobs"] = given.get("logprobs")
    if is_chat:
        if "top_logprobs" in given and given.get("logprobs") is not True:
            raise RequestError(400, "top_logprobs goes with logprobs: true", "top_logprobs")
        wanted["logprobs"] = given.get("top_logprobs", 0) if given.get("logprobs") else None
    return GenerationParams(**wanted)


def _finite(logprob):
    return logprob if logprob >= -9999 else -9999.0


def completion_logprobs(choices, decode, offset):
    """Let four lists grow."""
    if any(choice.logprob is None for choice in choices) or len(choices) == 0:
        return None
    tokens, logprobs, tops, offsets = [], [], [], []
    for choice in choices:
        tokens.append(decode([choice.token_id]))
        logprobs.append(_finite(choice.logprob))
        pairs = sorted([*choice.top, (choice.token_id, choice.logprob)], key=lambda p: p[1])
        tops.append({decode([i]): _finite(p) for i, p in pairs})
        offsets.append(offset)
        offset += len(tokens[-1])
    return {
        "text_offset": offsets,
        "token_logprobs": logprobs,
        "tokens": tokens,
        "top_logprobs": tops,
    }


def chat_logprobs(choices, decode):
    """Write an entry after the other."""
    entries = []
    for choice in choices:
        if choice.logprob is None:
            return None
        row = []
        for token_id, logprob in ((choice.token_id, choice.logprob), *choice.top):
            text = decode([token_id])
            data = text.encode("utf-8")
            spoiled = b"\xef\xbf\xbd" in data
            data = None if spoiled else [*data]
            row.append({"token": text, "bytes": data, "logprob": _finite(logprob)})
        entries.append({**row[0], "top_logprobs": row[1:]})
    return {"content": entries} if entries else None


def usage_of(prompt_lengths, num_generated, num_cached):
    """Go through the prompts, and through the choices of each."""
    n = len(num_generated) // len(prompt_lengths)
    counts = Counter()
    for number, length in enumerate(prompt_lengths):
        counts["prompt"] += length
        counts["found"] += num_cached[number * n]
        for generated in num_generated[number * n : (number + 1) * n]:
            counts["new"] += generated
    return {
        "completion_tokens": counts["new"],
        "prompt_tokens": counts["prompt"],
        "prompt_tokens_details": {"cached_tokens": counts["found"]},
        "total_tokens": counts["new"] + counts["prompt"],
    }


def event(content):
    """Write compact JSON between the two ends of an event."""
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return "".join(["data: ", data, "\n", "\n"])


def error_body(status, message, param=None):
    """Fill in the form."""
    error = dict.fromkeys(("message", "type", "param", "code"))
    error.update(message=message, param=param, code=status, type="invalid_request_error")
    if status // 100 == 5:
        error["type"] = "server_error"
    return {"error": error}


class Progress:
    """What has come to one choice."""

    def __init__(self):
        self.text, self.chosen, self.reason, self.found = "", [], "abort", None
        self.length_of_tokens = 0

    def take(self, delta):
        """Keep a delta."""
        self.text += delta.text
        self.chosen.extend(delta.choices)
        self.reason = delta.finish_reason if delta.finish_reason else self.reason
        # An abort's delta says 0, and the others say the same number.
        self.found = max(self.found or 0, delta.num_cached_tokens)


def _usage(head, all_progress):
    generated = [len(one.chosen) for one in all_progress]
    return usage_of(head.prompt_lengths, generated, [one.found or 0 for one in all_progress])


class StreamWriter:
    """Make chunks with generators."""

    def __init__(self, head, decode, include_usage=False):
        self.head, self.decode, self.include_usage = head, decode, include_usage
        self.is_chat = head.kind.name.startswith("chat")
        self.progress = [Progress() for _ in range(head.n) for _ in head.prompt_lengths]

    def opening(self):
        """Say who speaks."""
        if not self.is_chat:
            return []
        new = {"role": "assistant", "content": ""}
        return [self._event(index, new, None, None) for index, _ in enumerate(self.progress)]

    def add(self, index, delta):
        """Collect what the generator makes."""
        return [*self._events(index, delta)]

    def _events(self, index, delta):
        progress = self.progress[index]
        progress.take(delta)
        if delta.choices or delta.text:
            if self.is_chat:
                logprobs = chat_logprobs(delta.choices, self.decode)
                yield self._event(index, {"content": delta.text}, logprobs, None)
            else:
                start = progress.length_of_tokens
                logprobs = completion_logprobs(delta.choices, self.decode, start)
                for token in logprobs["tokens"] if logprobs else ():
                    progress.length_of_tokens += len(token)
                yield self._event(index, delta.text, logprobs, None)
        if delta.finish_reason:
            yield self._event(index, {} if self.is_chat else "", None, delta.finish_reason)

    def _event(self, index, new, logprobs, reason):
        choice = {"index": index, "finish_reason": reason, "logprobs": logprobs}
        choice["delta" if self.is_chat else "text"] = new
        return event(self._object([choice], None))

    def _object(self, choices, usage):
        head = self.head
        content = {"choices": choices, "id": head.id, "model": head.model}
        content |= {"created": head.created, "object": head.kind.chunk_name}
        return content | {"usage": usage} if self.include_usage else content

    def closing(self):
        """Count at the end."""
        events = ["data: [DONE]\n\n"]
        if self.include_usage:
            events.insert(0, event(self._object([], _usage(self.head, self.progress))))
        return events


def whole_answer(head, deltas, decode):
    """Sort the deltas by choice first."""
    progress = [Progress() for _ in range(head.num_choices)]
    for index, delta in deltas:
        progress[index].take(delta)
    choices = []
    for index, one in enumerate(progress):
        if head.kind.id_prefix == "chatcmpl-":
            said = {"message": {"content": one.text, "role": "assistant"}}
            said["logprobs"] = chat_logprobs(one.chosen, decode)
        else:
            said = {"text": one.text, "logprobs": completion_logprobs(one.chosen, decode, 0)}
        choices.append({**said, "finish_reason": one.reason, "index": index})
    whole = {"object": head.kind.name, "choices": choices, "usage": _usage(head, progress)}
    return {"id": head.id, "created": head.created, "model": head.model, **whole}
