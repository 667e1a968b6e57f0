"""What a step costs at least, and what requests see of it: counts, the roofline, traces."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from week1.qwen import QwenConfig

__all__ = [
    "num_parameters",
    "kv_bytes_per_token",
    "step_flops",
    "step_bytes",
    "arithmetic_intensity",
    "attainable_flops",
    "step_seconds",
    "max_num_sequences",
    "request_metrics",
    "percentile",
    "summarize",
]

# The requests of one step, each as (num_computed_tokens, num_new_tokens): how many of its tokens
# were computed in earlier steps, and how many this step computes. A whole prompt of 9 tokens is
# (0, 9), its second part may be (4, 5), and one new token behind it is (9, 1).
Batch = Sequence[tuple[int, int]]

EVENT_KINDS = ("arrived", "token", "finished")


@dataclass(frozen=True)
class Hardware:
    """What a machine does at best in one second. Raises ValueError unless above 0 and finite.

    flops: floating-point operations. bytes_per_second: bytes to or from memory.
    """

    flops: float
    bytes_per_second: float

    def __post_init__(self):
        for name in ("flops", "bytes_per_second"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")


@dataclass(frozen=True)
class Event:
    """One line of a trace: at `time`, in seconds, something happened to a request.

    kind: "arrived", "token" (it got one more output token) or "finished". Raises ValueError for
    another kind, and for a time that is not finite.
    """

    time: float
    request_id: str
    kind: str

    def __post_init__(self):
        if self.kind not in EVENT_KINDS:
            raise ValueError(f"kind must be one of {', '.join(EVENT_KINDS)}, got {self.kind!r}")
        if not math.isfinite(self.time):
            raise ValueError(f"time must be finite, got {self.time}")


@dataclass(frozen=True)
class RequestMetrics:
    """What the user of one request saw; times in seconds.

    num_tokens: output tokens. ttft: time to first token, from the arrival; None without a token.
    tpot: time per output token, that is how long a token behind the first one came after the one
    before it, on average; None for fewer than two tokens. latency: from the arrival to "finished".
    """

    num_tokens: int
    ttft: float | None
    tpot: float | None
    latency: float


@dataclass(frozen=True)
class Summary:
    """What a whole trace shows; times in seconds.

    num_tokens: output tokens of all requests. seconds: from the first event to the last one.
    tokens_per_second: of all requests together, over the whole time. ttft, tpot, latency: percent →
    that percentile over the requests which have such a value; {} where none has.
    """

    num_tokens: int
    seconds: float
    tokens_per_second: float
    ttft: dict[int, float]
    tpot: dict[int, float]
    latency: dict[int, float]


def num_parameters(config: QwenConfig) -> int:
    """Count the numbers in the weights of a `Qwen`: matrices, biases, norms, embedding and head.

    A weight that the embedding and the head share counts once.
    """
    raise NotImplementedError(
        "week2/roofline.py: num_parameters is not written yet → sessions/week2/roofline.md"
    )


def kv_bytes_per_token(config: QwenConfig, itemsize: int) -> int:
    """Count the bytes of keys and values that one token leaves in the cache, over all layers.

    itemsize: bytes of one number.
    """
    raise NotImplementedError(
        "week2/roofline.py: kv_bytes_per_token is not written yet → sessions/week2/roofline.md"
    )


def step_flops(config: QwenConfig, batch: Batch) -> int:
    """Count the floating-point operations of a step, two for a multiplication with its addition.

    Only matrix products count: the linear layers, for each new token; the head, for one token of
    each request; scores and weighted values, for each new token with the tokens of its own request
    that it may look at, itself included, and with no others. Everything else counts nothing: norms,
    softmax, rotation, activations, biases, the look-up of embeddings.
    Raises ValueError when the batch is empty, and, with the value, when a num_computed_tokens is
    negative or a num_new_tokens is below 1.
    Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B, which does not use causality.
    """
    raise NotImplementedError(
        "week2/roofline.py: step_flops is not written yet → sessions/week2/roofline.md"
    )


def step_bytes(config: QwenConfig, batch: Batch, itemsize: int) -> int:
    """Count the bytes that a step has to move between memory and processor, as few as possible.

    itemsize: bytes of one number, in weights, keys and values alike.
    Counted are: each weight of the layers, the last norm and the head, read once; of the embedding,
    one row for each new token, also where it shares its weight with the head; keys and values of
    new tokens, written once; keys and values of all tokens that a request has when the step ends,
    read once. Activations count nothing: they stay in the processor.
    Raises ValueError as `step_flops` does.
    """
    raise NotImplementedError(
        "week2/roofline.py: step_bytes is not written yet → sessions/week2/roofline.md"
    )


def arithmetic_intensity(config: QwenConfig, batch: Batch, itemsize: int) -> float:
    """Return how many floating-point operations a step does for each byte that it moves.

    Arguments and errors as in `step_bytes`.
    """
    raise NotImplementedError(
        "week2/roofline.py: arithmetic_intensity is not written yet → sessions/week2/roofline.md"
    )


def attainable_flops(intensity: float, hardware: Hardware) -> float:
    """Return the operations a second that work of some intensity reaches at best.

    intensity: operations for each byte, above 0.
    Source: Williams et al. 2009, "Roofline: an insightful visual performance model", CACM 52(4).
    """
    raise NotImplementedError(
        "week2/roofline.py: attainable_flops is not written yet → sessions/week2/roofline.md"
    )


def step_seconds(config: QwenConfig, batch: Batch, itemsize: int, hardware: Hardware) -> float:
    """Return the shortest time that a step can take, in seconds.

    The hardware computes and moves bytes at the same time, each at its best.
    Arguments and errors as in `step_bytes`.
    """
    raise NotImplementedError(
        "week2/roofline.py: step_seconds is not written yet → sessions/week2/roofline.md"
    )


def max_num_sequences(config: QwenConfig, num_tokens: int, itemsize: int, num_bytes: int) -> int:
    """Return how many sequences fit into memory together, each with all of its keys and values.

    num_tokens: of each sequence, at least 1. itemsize: as in `step_bytes`. num_bytes: of memory; it
        also holds every weight of the model, and nothing else.
    Raises ValueError, which gives the value, when num_tokens is below 1; and when the weights alone
    do not fit, with their bytes and num_bytes.
    """
    raise NotImplementedError(
        "week2/roofline.py: max_num_sequences is not written yet → sessions/week2/roofline.md"
    )


def request_metrics(events: Sequence[Event]) -> dict[str, RequestMetrics]:
    """Read from a trace what each request saw.

    events: of any number of requests, interleaved, in the order in which they happened; several may
        have the same time. A request arrives once, gets any number of tokens, and finishes once.
    Returns request_id → its metrics, in the order of arrival.
    Raises ValueError for a trace that cannot be: time runs backwards (names both times), a request
    arrives twice, gets a token or finishes before it arrived or after it finished (names its id),
    or never finishes (names the ids of all such requests).
    """
    raise NotImplementedError(
        "week2/roofline.py: request_metrics is not written yet → sessions/week2/roofline.md"
    )


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the smallest of the values that at least percent % of them do not exceed.

    This is the nearest-rank percentile. values: at least one, in any order; left as they were.
    percent: a whole number from 1 to 100.
    Raises ValueError when there are no values, and, with its value, when percent is out of range.
    """
    raise NotImplementedError(
        "week2/roofline.py: percentile is not written yet → sessions/week2/roofline.md"
    )


def summarize(events: Sequence[Event], percents: Sequence[int] = (50, 99)) -> Summary:
    """Sum up a trace: its throughput, and percentiles of what the requests saw.

    events: as in `request_metrics`. percents: which percentiles, as in `percentile`.
    Raises ValueError as these two do, and when there are no events, or no time passes between the
    first and the last one.
    """
    raise NotImplementedError(
        "week2/roofline.py: summarize is not written yet → sessions/week2/roofline.md"
    )
