"""How fast an answer came, from the times of its steps."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from course.engine import Engine


def kv_bytes_per_token(config: Any, itemsize: int) -> int:
    """Return the bytes of keys and values that a token leaves in a model. config: a QwenConfig."""
    per_layer = 2 * config.num_key_value_heads * config.head_dim * itemsize
    return config.num_hidden_layers * per_layer


class Stopwatch:
    """An engine whose steps are timed: `engine` is the given one, to be used in its place."""

    def __init__(self, engine: Engine):
        self._next_logits = engine.next_logits
        self._start = time.perf_counter()
        # For every step: when it ended, and how many tokens it knew.
        self._steps: list[tuple[float, int]] = []
        self.engine = dataclasses.replace(engine, next_logits=self._step)

    def report(self) -> str:
        """Say when the first token came, and what each second brought after it."""
        if not self._steps:
            return "no token was computed"
        first, last = self._steps[0][0], self._steps[-1][0]
        text = f"first token after {first - self._start:.2f} s"
        if last > first:
            rate = (len(self._steps) - 1) / (last - first)
            read = rate * self._bytes_of_a_token()
            text += f", then {rate:.1f} tokens/s, which read {read / 1e9:.1f} GB/s"
        return text

    def _step(self, token_ids: Sequence[int]) -> Any:
        logits = self._next_logits(token_ids)
        self._steps.append((time.perf_counter(), len(token_ids)))
        return logits

    def _bytes_of_a_token(self) -> float:
        """Bytes that a later step has to read: all weights, and the keys and values in a cache."""
        model = self.engine.model
        num_bytes = sum(parameter.nbytes for parameter in model.parameters())
        # A quantized weight is no parameter, and its module says how large it is.
        num_bytes += sum(getattr(module, "nbytes", 0) for module in model.modules())
        if self.engine.make_attend is not None:
            per_token = kv_bytes_per_token(model.config, model.embed_tokens.weight.itemsize)
            later = [known for _, known in self._steps[1:]]
            num_bytes += per_token * sum(later) / len(later)
        return num_bytes
