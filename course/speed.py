"""How fast an answer came, from the times of its steps."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from course.engine import Engine
from course.paged import kv_bytes_per_token


def idle_expert_bytes(model: Any) -> float:
    """Return the bytes of experts that a token does not get. model: also one without experts."""
    blocks = [layer.mlp for layer in model.layers if hasattr(layer.mlp, "tokens_per_expert")]
    return sum(
        (1 - block.moe.num_experts_per_tok / block.moe.num_experts)
        * (block.gate_up_proj.nbytes + block.down_proj.nbytes)
        for block in blocks
    )


class Stopwatch:
    """An engine whose steps are timed: `engine` is the given one, to be used in its place.

    records: gets what week 3's engine says of each step, where that is the one that runs.
    """

    def __init__(self, engine: Engine, records: Sequence[dict[str, Any]] = ()):
        self._records = records
        self._next_logits = engine.next_logits
        self._start = time.perf_counter()
        # For every step: when it ended, and how many tokens it knew.
        self._steps: list[tuple[float, int]] = []
        self.engine = dataclasses.replace(engine, next_logits=self._step)

    def report(self) -> str:
        """Say when the first token came, and what each second brought after it."""
        steps = self._steps or [_moment(record) for record in self._records if _chooses(record)]
        if not steps:
            return "no token was computed"
        first, last = steps[0][0], steps[-1][0]
        text = f"first token after {first - self._start:.2f} s"
        if last > first:
            rate = (len(steps) - 1) / (last - first)
            read = rate * self._bytes_of_a_token([known for _, known in steps[1:]])
            text += f", then {rate:.1f} tokens/s, which read {read / 1e9:.1f} GB/s"
        return text

    def _step(self, token_ids: Sequence[int]) -> Any:
        logits = self._next_logits(token_ids)
        self._steps.append((time.perf_counter(), len(token_ids)))
        return logits

    def _bytes_of_a_token(self, known: Sequence[int]) -> float:
        """Bytes that a later step has to read: the weights, and the keys and values in a cache."""
        model = self.engine.model
        num_bytes = sum(parameter.nbytes for parameter in model.parameters())
        # A quantized weight is no parameter, and its module says how large it is.
        num_bytes += sum(getattr(module, "nbytes", 0) for module in model.modules())
        num_bytes -= idle_expert_bytes(model)
        if self.engine.make_attend is not None or self.engine.paged is not None:
            per_token = kv_bytes_per_token(model.config, model.embed_tokens.weight.itemsize)
            num_bytes += per_token * sum(known) / len(known)
        return num_bytes


def _chooses(record: dict[str, Any]) -> bool:
    return any(part["catches_up"] for part in record["parts"])


def _moment(record: dict[str, Any]) -> tuple[float, int]:
    """Return when a step ended, and how many tokens its only request knew in it."""
    end = record["time"] + record["schedule_s"] + record["execute_s"] + record["update_s"]
    (part,) = record["parts"]
    return end, part["num_computed_tokens"] + part["num_tokens"]
