"""Whether two wrong results are the same mistake, and whether a result says much at all."""

import math
from typing import Any

from torch import Tensor

from course.grading import Evidence

# The same mistake made in another order of operations: how far the two wrong results may lie apart,
# as a share of how far they lie from the right one. Two roundings of one number lie farther.
SHARE_OF_ERROR = 0.05
# The same without a right one of that shape to compare with, as a share of the largest value.
SHARE_OF_VALUE = 1e-4
# Fewer wrong numbers than these may agree by chance.
MIN_NUMBERS = 4
MIN_ITEMS = 8


def is_same(found: Evidence, wanted: Evidence) -> bool:
    """Say whether two solutions were caught at the same step with the same result."""
    if (found.kind, found.line, found.num_calls) != (wanted.kind, wanted.line, wanted.num_calls):
        return False
    return _equal(found.value, wanted.value, wanted.expected)


def is_strong(evidence: Evidence) -> bool:
    """Say whether a result holds too much for another mistake to give it by chance."""
    value, expected = evidence.value, evidence.expected
    if isinstance(value, tuple) and value and isinstance(value[-1], (list, str, tuple)):
        value = value[-1]
    if isinstance(value, (list, str)) and evidence.kind == "wrong":
        return isinstance(expected, (list, str)) and len(value) >= MIN_ITEMS
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_meta:
        return False
    if not isinstance(expected, Tensor) or expected.shape != value.shape:
        return len(value.unique()) >= MIN_NUMBERS
    errors = (value.double() - expected.double()).abs()
    errors = errors[errors.isfinite()]
    return bool(len(errors)) and int((errors > 0.01 * errors.max()).sum()) >= MIN_NUMBERS


def _equal(a: Any, b: Any, expected: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return _equal_tensors(a, b, expected)
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=1e-5)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_equal(x, y, None) for x, y in zip(a, b, strict=True))
    try:
        return bool(a == b)
    except Exception:
        return False


def _equal_tensors(a: Tensor, b: Tensor, expected: Any) -> bool:
    if (a.shape, a.dtype, a.is_meta) != (b.shape, b.dtype, b.is_meta):
        return False
    if a.is_meta or not a.is_floating_point():
        return a.is_meta or bool((a == b).all())
    wide, other = a.double(), b.double()
    same = (wide == other) | (wide.isnan() & other.isnan())
    if not bool((same | (wide.isfinite() & other.isfinite())).all()):
        return False
    apart = float((wide - other)[~same].norm())
    if isinstance(expected, Tensor) and expected.shape == a.shape:
        errors = (other - expected.double())[~same]
        return apart <= SHARE_OF_ERROR * float(errors.norm())
    return apart <= SHARE_OF_VALUE * float(other[other.isfinite()].norm())
