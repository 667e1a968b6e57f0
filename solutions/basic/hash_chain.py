"""Name the blocks of a token sequence so that equal names mean equal prefixes."""

import hashlib
from collections.abc import Container, Sequence

__all__ = ["block_keys", "longest_prefix"]

_NO_PARENT = bytes(32)


def block_keys(
    token_ids: Sequence[int], block_size: int, salt: bytes = b"", known: Sequence[bytes] = ()
) -> list[bytes]:
    """Compute a key for every full block of a sequence, from its own tokens and all before it.

    token_ids: any sequence that can be indexed and sliced; each id fits into a signed 64-bit
        integer. A block has block_size of them; tokens behind the last full block have no key.
    salt: what two tenants must differ in if they are not to share blocks.
    known: the keys of the first blocks, from an earlier call with the same arguments and fewer
        tokens. They are taken over as they are, and tokens of their blocks are not read.
    Key of block i: the 32 bytes of the SHA-256 of these bytes in a row: the key of block i − 1, or
    32 zero bytes for block 0; in block 0 alone, the length of the salt in bytes as a 64-bit
    integer, then the salt; the tokens of the block as 64-bit integers. Integers are signed and
    little-endian.
    Returns a new list, as long as there are full blocks. Raises ValueError: for a block_size below
    1, for more known keys than there are full blocks, for a token id out of range; it names the
    number.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    num_blocks = len(token_ids) // block_size
    if len(known) > num_blocks:
        raise ValueError(f"{len(known)} keys are known of a sequence with {num_blocks} full blocks")
    keys = list(known)
    for i in range(len(keys), num_blocks):
        parent = keys[-1] if keys else _NO_PARENT + _int64(len(salt)) + salt
        tokens = token_ids[i * block_size : (i + 1) * block_size]
        keys.append(hashlib.sha256(parent + b"".join(map(_int64, tokens))).digest())
    return keys


def longest_prefix(keys: Sequence[bytes], cached: Container[bytes]) -> int:
    """Count the blocks at the beginning of a sequence that are in a cache without a gap.

    keys: of the sequence's blocks, in order. cached: says with `in` whether it has a block; it is
        asked once for each block that counts, and once more for the one that is missing.
    Returns a number from 0 to len(keys).
    """
    for i, key in enumerate(keys):
        if key not in cached:
            return i
    return len(keys)


def _int64(number: int) -> bytes:
    try:
        return number.to_bytes(8, "little", signed=True)
    except OverflowError:
        raise ValueError(f"token id {number} does not fit into 64 bits") from None
