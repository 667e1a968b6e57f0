"""Feeds the hash piece by piece, and packs whole blocks at once."""

import struct
from collections.abc import Container, Sequence
from hashlib import sha256
from itertools import takewhile

__all__ = ["block_keys", "longest_prefix"]


def block_keys(
    token_ids: Sequence[int], block_size: int, salt: bytes = b"", known: Sequence[bytes] = ()
) -> list[bytes]:
    """Compute a key for every full block of a sequence."""
    if block_size <= 0:
        raise ValueError(f"blocks of {block_size} tokens are none")
    keys = [*known]
    stop = len(token_ids) - len(token_ids) % block_size
    start = len(keys) * block_size
    if start > stop:
        raise ValueError(f"there are fewer full blocks than the {len(keys)} known keys")
    while start < stop:
        block = [token_ids[i] for i in range(start, start + block_size)]
        hasher = sha256(keys[-1] if keys else b"\0" * 32)
        if not keys:
            hasher.update(struct.pack("<q", len(salt)))
            hasher.update(salt)
        try:
            hasher.update(struct.pack(f"<{block_size}q", *block))
        except struct.error:
            worst = max(block, key=abs)
            raise ValueError(f"a token id is too large for its 8 bytes: {worst}") from None
        keys.append(hasher.digest())
        start += block_size
    return keys


def longest_prefix(keys: Sequence[bytes], cached: Container[bytes]) -> int:
    """Count the blocks at the beginning of a sequence that are in a cache."""
    return sum(1 for _ in takewhile(cached.__contains__, keys))
