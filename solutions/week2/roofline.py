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
    query_size, kv_size = _projected_sizes(config)
    vectors = 2 * config.hidden_size
    vectors += 2 * config.head_dim * config.qk_norm
    vectors += (query_size + 2 * kv_size) * config.qkv_bias
    vectors += config.hidden_size * config.output_bias
    layers = config.num_hidden_layers * (_layer_matrices(config) + vectors)
    tables = _table_size(config) * (1 if config.tie_word_embeddings else 2)
    return layers + config.hidden_size + tables


def kv_bytes_per_token(config: QwenConfig, itemsize: int) -> int:
    """Count the bytes of keys and values that one token leaves in the cache, over all layers.

    itemsize: bytes of one number.
    """
    _, kv_size = _projected_sizes(config)
    return 2 * config.num_hidden_layers * kv_size * itemsize


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
    _check_batch(batch)
    num_new = sum(new for _, new in batch)
    num_pairs = sum(new * computed + new * (new + 1) // 2 for computed, new in batch)
    query_size, _ = _projected_sizes(config)
    linear = num_new * config.num_hidden_layers * _layer_matrices(config)
    attention = num_pairs * config.num_hidden_layers * 2 * query_size
    head = len(batch) * _table_size(config)
    return 2 * (linear + attention + head)


def step_bytes(config: QwenConfig, batch: Batch, itemsize: int) -> int:
    """Count the bytes that a step has to move between memory and processor, as few as possible.

    itemsize: bytes of one number, in weights, keys and values alike.
    Counted are: each weight of the layers, the last norm and the head, read once; of the embedding,
    one row for each new token, also where it shares its weight with the head; keys and values of
    new tokens, written once; keys and values of all tokens that a request has when the step ends,
    read once. Activations count nothing: they stay in the processor.
    Raises ValueError as `step_flops` does.
    """
    _check_batch(batch)
    num_new = sum(new for _, new in batch)
    looked_up = 0 if config.tie_word_embeddings else _table_size(config)
    numbers = num_parameters(config) - looked_up + num_new * config.hidden_size
    num_read = sum(computed + new for computed, new in batch)
    return itemsize * numbers + (num_read + num_new) * kv_bytes_per_token(config, itemsize)


def arithmetic_intensity(config: QwenConfig, batch: Batch, itemsize: int) -> float:
    """Return how many floating-point operations a step does for each byte that it moves.

    Arguments and errors as in `step_bytes`.
    """
    return step_flops(config, batch) / step_bytes(config, batch, itemsize)


def attainable_flops(intensity: float, hardware: Hardware) -> float:
    """Return the operations a second that work of some intensity reaches at best.

    intensity: operations for each byte, above 0.
    Source: Williams et al. 2009, "Roofline: an insightful visual performance model", CACM 52(4).
    """
    return min(hardware.flops, intensity * hardware.bytes_per_second)


def step_seconds(config: QwenConfig, batch: Batch, itemsize: int, hardware: Hardware) -> float:
    """Return the shortest time that a step can take, in seconds.

    The hardware computes and moves bytes at the same time, each at its best.
    Arguments and errors as in `step_bytes`.
    """
    computing = step_flops(config, batch) / hardware.flops
    moving = step_bytes(config, batch, itemsize) / hardware.bytes_per_second
    return max(computing, moving)


def max_num_sequences(config: QwenConfig, num_tokens: int, itemsize: int, num_bytes: int) -> int:
    """Return how many sequences fit into memory together, each with all of its keys and values.

    num_tokens: of each sequence, at least 1. itemsize: as in `step_bytes`. num_bytes: of memory; it
        also holds every weight of the model, and nothing else.
    Raises ValueError, which gives the value, when num_tokens is below 1; and when the weights alone
    do not fit, with their bytes and num_bytes.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    weights = num_parameters(config) * itemsize
    if weights > num_bytes:
        raise ValueError(f"the weights take {weights} bytes, and there are only {num_bytes}")
    return (num_bytes - weights) // (num_tokens * kv_bytes_per_token(config, itemsize))


def request_metrics(events: Sequence[Event]) -> dict[str, RequestMetrics]:
    """Read from a trace what each request saw.

    events: of any number of requests, interleaved, in the order in which they happened; several may
        have the same time. A request arrives once, gets any number of tokens, and finishes once.
    Returns request_id → its metrics, in the order of arrival.
    Raises ValueError for a trace that cannot be: time runs backwards (names both times), a request
    arrives twice, gets a token or finishes before it arrived or after it finished (names its id),
    or never finishes (names the ids of all such requests).
    """
    times: dict[str, list[float]] = {}
    open_ids: set[str] = set()
    now = -math.inf
    for event in events:
        if event.time < now:
            raise ValueError(f"time runs backwards: {event.time} comes after {now}")
        now = event.time
        if event.kind == "arrived":
            if event.request_id in times:
                raise ValueError(f"request {event.request_id!r} arrives twice")
            open_ids.add(event.request_id)
        elif event.request_id not in open_ids:
            raise ValueError(
                f"request {event.request_id!r}: {event.kind!r} before it arrived or after it "
                "finished"
            )
        times.setdefault(event.request_id, []).append(event.time)
        if event.kind == "finished":
            open_ids.remove(event.request_id)
    if open_ids:
        raise ValueError(f"requests that never finish: {', '.join(sorted(open_ids))}")
    return {request_id: _metrics(*of_request) for request_id, of_request in times.items()}


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the smallest of the values that at least percent % of them do not exceed.

    This is the nearest-rank percentile. values: at least one, in any order; left as they were.
    percent: a whole number from 1 to 100.
    Raises ValueError when there are no values, and, with its value, when percent is out of range.
    """
    ordered = sorted(values)
    if not ordered:
        raise ValueError("values must hold at least 1 value, got 0")
    if not 1 <= percent <= 100:
        raise ValueError(f"percent must be from 1 to 100, got {percent}")
    # In whole numbers: 100 * (7 / 100) is a little more than 7.
    rank = -(-percent * len(ordered) // 100)
    return ordered[rank - 1]


def summarize(events: Sequence[Event], percents: Sequence[int] = (50, 99)) -> Summary:
    """Sum up a trace: its throughput, and percentiles of what the requests saw.

    events: as in `request_metrics`. percents: which percentiles, as in `percentile`.
    Raises ValueError as these two do, and when there are no events, or no time passes between the
    first and the last one.
    """
    metrics = request_metrics(events).values()
    seconds = events[-1].time - events[0].time if events else 0.0
    if seconds <= 0:
        raise ValueError(f"a trace must last longer than 0 s; this one has {len(events)} events")
    num_tokens = sum(one.num_tokens for one in metrics)

    def percentiles(values: Iterable[float | None]) -> dict[int, float]:
        known = [value for value in values if value is not None]
        return {percent: percentile(known, percent) for percent in percents if known}

    return Summary(
        num_tokens,
        seconds,
        num_tokens / seconds,
        ttft=percentiles(one.ttft for one in metrics),
        tpot=percentiles(one.tpot for one in metrics),
        latency=percentiles(one.latency for one in metrics),
    )


def _projected_sizes(config: QwenConfig) -> tuple[int, int]:
    """Return the width of all queries of a token, and of all its keys."""
    return (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )


def _layer_matrices(config: QwenConfig) -> int:
    """Count the numbers in the matrices of one layer."""
    query_size, kv_size = _projected_sizes(config)
    attention = 2 * query_size + 2 * kv_size
    return config.hidden_size * (attention + 3 * config.intermediate_size)


def _table_size(config: QwenConfig) -> int:
    return config.vocab_size * config.hidden_size


def _check_batch(batch: Batch) -> None:
    if not batch:
        raise ValueError("a step needs at least 1 request, got 0")
    for computed, new in batch:
        if computed < 0:
            raise ValueError(f"num_computed_tokens must be at least 0, got {computed}")
        if new < 1:
            raise ValueError(f"num_new_tokens must be at least 1, got {new}")


def _metrics(arrived: float, *later: float) -> RequestMetrics:
    """Put a request's times into numbers: its arrival, its tokens, its end."""
    *tokens, finished = later
    return RequestMetrics(
        num_tokens=len(tokens),
        ttft=tokens[0] - arrived if tokens else None,
        tpot=(tokens[-1] - tokens[0]) / (len(tokens) - 1) if len(tokens) > 1 else None,
        latency=finished - arrived,
    )
