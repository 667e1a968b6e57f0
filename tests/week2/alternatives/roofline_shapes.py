"""Week2/roofline another way: a list of the model's weights by shape, and one record a request."""

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

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

Batch = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Hardware:
    """What a machine does at best in one second."""

    flops: float
    bytes_per_second: float


@dataclass(frozen=True)
class Event:
    """One line of a trace."""

    time: float
    request_id: str
    kind: str


@dataclass(frozen=True)
class RequestMetrics:
    """What the user of one request saw."""

    num_tokens: int
    ttft: float | None
    tpot: float | None
    latency: float


@dataclass(frozen=True)
class Summary:
    """What a whole trace shows."""

    num_tokens: int
    seconds: float
    tokens_per_second: float
    ttft: dict[int, float]
    tpot: dict[int, float]
    latency: dict[int, float]


class _Shapes:
    """The shapes of a model's weights."""

    def __init__(self, config: QwenConfig):
        width, dim = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
        layer = [(width, queries), (width, keys), (width, keys), (queries, width)]
        layer += [(width, config.intermediate_size)] * 3
        others: list[int] = [width, width]
        if config.qkv_bias:
            others += [queries, keys, keys]
        if config.output_bias:
            others += [width]
        if config.qk_norm:
            others += [dim, dim]
        self.matrices = layer * config.num_hidden_layers
        self.vectors = [*(others * config.num_hidden_layers), width]
        self.head = (config.vocab_size, width)
        self.tables = [self.head] if config.tie_word_embeddings else [self.head, self.head]

    def num_read(self) -> int:
        """Numbers that a step reads whole."""
        return sum(a * b for a, b in [*self.matrices, self.head]) + sum(self.vectors)


def num_parameters(config: QwenConfig) -> int:
    """Add up the shapes."""
    shapes = _Shapes(config)
    return shapes.num_read() + sum(a * b for a, b in shapes.tables[1:])


def kv_bytes_per_token(config: QwenConfig, itemsize: int) -> int:
    """Count keys, then values."""
    keys = config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    return (keys + keys) * itemsize


def step_flops(config: QwenConfig, batch: Batch) -> int:
    """Add up request by request."""
    _check(batch)
    shapes = _Shapes(config)
    per_token = sum(2 * a * b for a, b in shapes.matrices)
    per_pair = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    total = 0
    for computed, new in batch:
        first, last = computed + 1, computed + new
        total += per_token * new
        total += per_pair * ((first + last) * new // 2)
        total += 2 * shapes.head[0] * shapes.head[1]
    return total


def step_bytes(config: QwenConfig, batch: Batch, itemsize: int) -> int:
    """Add up what is read and what is written."""
    _check(batch)
    per_token = kv_bytes_per_token(config, itemsize)
    total = _Shapes(config).num_read() * itemsize
    for computed, new in batch:
        total += (
            config.hidden_size * itemsize * new + per_token * new + per_token * (computed + new)
        )
    return total


def arithmetic_intensity(config: QwenConfig, batch: Batch, itemsize: int) -> float:
    """Divide the one by the other."""
    return step_flops(config, batch) / step_bytes(config, batch, itemsize)


def attainable_flops(intensity: float, hardware: Hardware) -> float:
    """Look on which side of the ridge the work lies."""
    ridge = hardware.flops / hardware.bytes_per_second
    return hardware.flops if intensity >= ridge else hardware.flops * (intensity / ridge)


def step_seconds(config: QwenConfig, batch: Batch, itemsize: int, hardware: Hardware) -> float:
    """Divide the work by the rate that its intensity allows."""
    intensity = arithmetic_intensity(config, batch, itemsize)
    return step_flops(config, batch) / attainable_flops(intensity, hardware)


def max_num_sequences(config: QwenConfig, num_tokens: int, itemsize: int, num_bytes: int) -> int:
    """Take the weights away, then whole sequences."""
    if num_tokens <= 0:
        raise ValueError(f"a sequence of {num_tokens} tokens")
    left = num_bytes - itemsize * num_parameters(config)
    if left < 0:
        raise ValueError(f"{num_bytes} bytes are less than the weights' {num_bytes - left}")
    return divmod(left, kv_bytes_per_token(config, itemsize) * num_tokens)[0]


@dataclass
class _Record:
    arrived: float
    tokens: list[float]
    finished: float | None = None


def request_metrics(events: Sequence[Event]) -> dict[str, RequestMetrics]:
    """Keep one record a request, and read them at the end."""
    for before, after in itertools.pairwise(events):
        if after.time < before.time:
            raise ValueError(f"{after.time} behind {before.time}")
    records: dict[str, _Record] = {}
    for event in events:
        record = records.get(event.request_id)
        if event.kind == "arrived" and record is None:
            records[event.request_id] = _Record(event.time, [])
        elif event.kind == "arrived" or record is None or record.finished is not None:
            raise ValueError(f"{event.kind} of {event.request_id} at {event.time}")
        elif event.kind == "token":
            record.tokens.append(event.time)
        else:
            record.finished = event.time
    waiting = [name for name, record in records.items() if record.finished is None]
    if waiting:
        raise ValueError(f"not finished: {waiting}")
    return {name: _read(record) for name, record in records.items()}


def _read(record: _Record) -> RequestMetrics:
    tokens = record.tokens
    gaps = [b - a for a, b in itertools.pairwise(tokens)]
    return RequestMetrics(
        len(tokens),
        None if not tokens else tokens[0] - record.arrived,
        math.fsum(gaps) / len(gaps) if gaps else None,
        record.finished - record.arrived,
    )


def percentile(values: Sequence[float], percent: int) -> float:
    """Find the share that each place stands for, then the first one that is large enough."""
    if percent not in range(1, 101):
        raise ValueError(f"percent {percent}")
    if len(values) == 0:
        raise ValueError("no values")
    shares = [Fraction(place, len(values)) for place in range(1, len(values) + 1)]
    return sorted(values)[bisect.bisect_left(shares, Fraction(percent, 100))]


def summarize(events: Sequence[Event], percents: Sequence[int] = (50, 99)) -> Summary:
    """Sum the metrics up, column by column."""
    metrics = request_metrics(events)
    if not events or events[0].time == events[-1].time:
        raise ValueError("the trace has no length")
    columns = {}
    for field in ("ttft", "tpot", "latency"):
        column = [getattr(one, field) for one in metrics.values()]
        column = [value for value in column if value is not None]
        columns[field] = {p: percentile(column, p) for p in percents} if column else {}
    seconds = events[-1].time - events[0].time
    num_tokens = sum(event.kind == "token" for event in events)
    return Summary(num_tokens, seconds, num_tokens / seconds, **columns)


def _check(batch: Batch) -> None:
    if len(batch) == 0:
        raise ValueError("an empty batch")
    for computed, new in batch:
        if computed < 0 or new <= 0:
            raise ValueError(f"a request of {computed} computed and {new} new tokens")
