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
    raise NotImplementedError(
        "week3/protocol.py: params_of is not written yet → sessions/week3/protocol.md"
    )


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
    raise NotImplementedError(
        "week3/protocol.py: completion_logprobs is not written yet → sessions/week3/protocol.md"
    )


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
    raise NotImplementedError(
        "week3/protocol.py: chat_logprobs is not written yet → sessions/week3/protocol.md"
    )


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
    raise NotImplementedError(
        "week3/protocol.py: usage_of is not written yet → sessions/week3/protocol.md"
    )


def event(content: dict[str, Any]) -> str:
    """Write a server-sent event.

    content: what JSON can hold. The event is one line, "data: " and the content as JSON, in which
    characters beyond ASCII stand for themselves; and an empty line, which ends it.
    Source: HTML Living Standard, section 9.2, "Server-sent events".
    """
    raise NotImplementedError(
        "week3/protocol.py: event is not written yet → sessions/week3/protocol.md"
    )


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """Write an error as clients of OpenAI read it.

    status: of HTTP. param: the name that is wrong, or None.
    Returns {"error": {…}} with "message" and "param"; "type", which is "server_error" from status
    500 on, and "invalid_request_error" below; and "code", the status, as in vLLM.
    """
    raise NotImplementedError(
        "week3/protocol.py: error_body is not written yet → sessions/week3/protocol.md"
    )


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
        raise NotImplementedError(
            "week3/protocol.py: StreamWriter.__init__ is not written yet "
            "→ sessions/week3/protocol.md"
        )

    def opening(self) -> list[str]:
        """Begin: a chat has a chunk for each choice, with the delta role "assistant", content "".

        Their logprobs are None. A completion has none.
        """
        raise NotImplementedError(
            "week3/protocol.py: StreamWriter.opening is not written yet "
            "→ sessions/week3/protocol.md"
        )

    def add(self, index: int, delta: Delta) -> list[str]:
        """Pass on what came to a choice.

        A chunk with the text (a completion's "text", the "content" of a chat's delta) and the
        logprobs of delta's choices, if it has text or choices. Then, if it has a finish_reason, a
        chunk of its own for that, with the text "" or the delta {}, and logprobs None.
        """
        raise NotImplementedError(
            "week3/protocol.py: StreamWriter.add is not written yet → sessions/week3/protocol.md"
        )

    def closing(self) -> list[str]:
        """End, when all choices have ended: "data: [DONE]" as an event.

        With include_usage a chunk comes before it, whose choices are [] and whose usage is as in
        `usage_of`, counted from the deltas' choices. What a choice found in the cache stands in its
        first delta; it is 0 where none came.
        """
        raise NotImplementedError(
            "week3/protocol.py: StreamWriter.closing is not written yet "
            "→ sessions/week3/protocol.md"
        )


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
    raise NotImplementedError(
        "week3/protocol.py: whole_answer is not written yet → sessions/week3/protocol.md"
    )
