"""OpenAI's words: what a request may say, what it means to the engine, how an answer is written."""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from week3.engine import GenerationParams
from week3.model_runner import Choice

__all__ = ["params_of", "completion_logprobs", "chat_logprobs", "usage_of"]

MAX_BODY_BYTES = 4 * 2**20
MAX_CHOICES = 128

TokenIds = list[Annotated[int, Field(ge=0)]]
Text = Annotated[str, StringConstraints(max_length=MAX_BODY_BYTES)]


class Strict(BaseModel):
    """A JSON object in which unknown names, and values of other types, are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """include_usage: one more chunk, before [DONE], tells the tokens of the whole request."""

    include_usage: bool = False


class Sampling(Strict):
    """What completions and chat completions have in common, with OpenAI's defaults.

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


def params_of(
    body: CompletionRequest | ChatRequest, num_prompt_tokens: int, max_model_len: int
) -> GenerationParams:
    """Translate a request's sampling parameters.

    num_prompt_tokens: of its prompt. max_model_len: of the engine. What is not given has OpenAI's
    default: temperature 1, and max_tokens 16 for a completion, the rest of the context for a chat.
    top_k -1 is off, as in vLLM.
    Raises RequestError 400, which names the parameter, for a value out of its range, for one that
    is an int only in part, and for both max_tokens and max_completion_tokens.
    """
    raise NotImplementedError(
        "week3/protocol.py: params_of is not written yet → sessions/week3/protocol.md"
    )


def completion_logprobs(
    choices: Sequence[Choice], decode: Callable[[list[int]], str], offset: int
) -> dict[str, Any] | None:
    """Write logprobs as /v1/completions has them.

    choices: in a row; None comes back when there are none, or they tell no logprobs. decode: turns
    ids into text. offset: characters of the answer in front of them.
    """
    raise NotImplementedError(
        "week3/protocol.py: completion_logprobs is not written yet → sessions/week3/protocol.md"
    )


def chat_logprobs(
    choices: Sequence[Choice], decode: Callable[[list[int]], str]
) -> dict[str, Any] | None:
    """Write logprobs as /v1/chat/completions has them; arguments as in `completion_logprobs`."""
    raise NotImplementedError(
        "week3/protocol.py: chat_logprobs is not written yet → sessions/week3/protocol.md"
    )


def usage_of(num_prompt_tokens: int, num_generated: int, num_cached: int) -> dict[str, Any]:
    """Count the tokens of an answer.

    num_prompt_tokens: of its prompts, each counted once however many choices it has. num_generated:
    of all choices. num_cached: how many prompt tokens were not computed anew.
    """
    raise NotImplementedError(
        "week3/protocol.py: usage_of is not written yet → sessions/week3/protocol.md"
    )


@dataclass(frozen=True)
class AnswerKind:
    """How the answers of one endpoint look.

    name: of a whole answer; chunk_name: of a part of a stream. part: (text, logprobs) → the fields
    of a streamed choice; whole: those of a whole one. opening: those of a choice's first chunk,
    None where there is no such chunk; closing: of the last one, which has the finish_reason.
    logprobs: (choices, decode, offset) → the logprobs, as in `completion_logprobs`.
    """

    name: str
    chunk_name: str
    id_prefix: str
    part: Callable[[str, Any], dict[str, Any]]
    whole: Callable[[str, Any], dict[str, Any]]
    opening: dict[str, Any] | None
    closing: dict[str, Any]
    logprobs: Callable[[Sequence[Choice], Callable[[list[int]], str], int], Any]


COMPLETION = AnswerKind(
    "text_completion",
    "text_completion",
    "cmpl-",
    part=lambda text, logprobs: {"text": text, "logprobs": logprobs},
    whole=lambda text, logprobs: {"text": text, "logprobs": logprobs},
    opening=None,
    closing={"text": "", "logprobs": None},
    logprobs=completion_logprobs,
)
CHAT = AnswerKind(
    "chat.completion",
    "chat.completion.chunk",
    "chatcmpl-",
    part=lambda text, logprobs: {"delta": {"content": text}, "logprobs": logprobs},
    whole=lambda text, logprobs: {
        "message": {"role": "assistant", "content": text},
        "logprobs": logprobs,
    },
    opening={"delta": {"role": "assistant", "content": ""}, "logprobs": None},
    closing={"delta": {}, "logprobs": None},
    logprobs=lambda choices, decode, _: chat_logprobs(choices, decode),
)


def plain_message(message: Message) -> dict[str, Any]:
    """Turn a message into what chat templates take: its parts of text as one string."""
    given = message.model_dump(exclude_none=True)
    if isinstance(message.content, list):
        given["content"] = "".join(part.text for part in message.content)
    return given


def event(content: dict[str, Any]) -> str:
    """Write a server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """Write an error as OpenAI does. status: of HTTP. param: the name that is wrong, or None."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}
