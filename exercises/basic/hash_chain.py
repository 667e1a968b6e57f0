"""Name the blocks of a token sequence so that equal names mean equal prefixes."""

import hashlib
from collections.abc import Container, Sequence

__all__ = ["block_keys", "longest_prefix"]


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
    raise NotImplementedError(
        "basic/hash_chain.py: block_keys is not written yet → sessions/basic/hash_chain.md"
    )


def longest_prefix(keys: Sequence[bytes], cached: Container[bytes]) -> int:
    """Count the blocks at the beginning of a sequence that are in a cache without a gap.

    keys: of the sequence's blocks, in order. cached: says with `in` whether it has a block; it is
        asked once for each block that counts, and once more for the one that is missing.
    Returns a number from 0 to len(keys).
    """
    raise NotImplementedError(
        "basic/hash_chain.py: longest_prefix is not written yet → sessions/basic/hash_chain.md"
    )
