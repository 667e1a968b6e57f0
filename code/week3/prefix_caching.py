"""Keep what was computed: find the KV of a prompt's beginning that an earlier request left."""

import hashlib
from collections.abc import Sequence
from itertools import takewhile

from week3.block_manager import BlockManager

__all__ = ["extend_hashes", "CachingBlockManager"]


def extend_hashes(
    hashes: list[bytes], token_ids: Sequence[int], block_size: int, salt: str = ""
) -> None:
    """Append the hashes of a sequence's full blocks that have none yet.

    hashes: those of its first full blocks, from earlier calls with the same block_size and salt on
        a beginning of token_ids; [] at first. Their tokens are not looked at again.
    token_ids: of the whole sequence, each at least 0 and below 2**63. A block is block_size of them
        in a row; tokens behind the last full block have no hash.
    salt: sequences with other salts share no hash, so that nobody can find out by the time to the
        first token what another tenant has asked.
    Hash i is the 32 bytes of SHA-256 over: hash i - 1, or for the first block the SHA-256 of the
    salt in UTF-8; then each id of block i as 8 bytes, the least one first. So it stands for block i
    and everything before it, in every process alike.
    """
    raise NotImplementedError(
        "week3/prefix_caching.py: extend_hashes is not written yet "
        "→ sessions/week3/prefix_caching.md"
    )


class CachingBlockManager(BlockManager):
    """A block manager that remembers which tokens a block holds, also when it is free.

    num_blocks, block_size, watermark: as in `BlockManager`. enabled: False for a manager that finds
        nothing and remembers nothing. All four are kept under these names.
    A full block whose KV is computed is published under its hash from `extend_hashes`. It can be
    found until it is handed out anew. A hash has one block at most: the first one published.
    Everything that `BlockManager` promises holds.
    Source: Zheng et al. 2023, arXiv:2312.07104 (reuse of prefixes), by hashes of blocks as in vLLM.
    """

    def __init__(
        self, num_blocks: int, block_size: int = 16, watermark: int = 0, enabled: bool = True
    ):
        raise NotImplementedError(
            "week3/prefix_caching.py: CachingBlockManager.__init__ is not written yet "
            "→ sessions/week3/prefix_caching.md"
        )

    @property
    def num_cached_blocks(self) -> int:
        """How many blocks can be found, those that are free included."""
        raise NotImplementedError(
            "week3/prefix_caching.py: CachingBlockManager.num_cached_blocks is not written yet "
            "→ sessions/week3/prefix_caching.md"
        )

    def find(self, block_hash: bytes) -> int | None:
        """Give the block that is published under a hash, or None."""
        raise NotImplementedError(
            "week3/prefix_caching.py: CachingBlockManager.find is not written yet "
            "→ sessions/week3/prefix_caching.md"
        )

    def match(self, hashes: Sequence[bytes], num_tokens: int) -> list[int]:
        """Find the blocks that hold the beginning of a request. Changes nothing.

        hashes: of the request's full blocks. num_tokens: how many tokens it has.
        Returns the longest run of published blocks from its first block on, short of its last
        token: at least one token is left to compute, since a request needs the scores behind it.
        """
        raise NotImplementedError(
            "week3/prefix_caching.py: CachingBlockManager.match is not written yet "
            "→ sessions/week3/prefix_caching.md"
        )

    def allocate(self, request_id: str, num_tokens: int, prefix: Sequence[int] = ()) -> bool:
        """Let a request's table grow as `BlockManager.allocate` does.

        prefix: from `match`, with nothing changed since. A block that is taken anew is no longer
        found; one of prefix still is.
        """
        raise NotImplementedError(
            "week3/prefix_caching.py: CachingBlockManager.allocate is not written yet "
            "→ sessions/week3/prefix_caching.md"
        )

    def publish(self, request_id: str, hashes: Sequence[bytes], num_computed_tokens: int) -> None:
        """Let others find the blocks of a request that are full and computed.

        hashes: of the request's full blocks, at least of those; where enabled is False, they are
            not looked at and may be missing. num_computed_tokens: how many of its first tokens have
            their keys and values in the pool; from call to call, it never gets smaller.
        A block whose hash has a block already is not published, nor is it later: tables never
        change, so the request keeps its own. A call takes time for the blocks that became full
        since the last one, not for the others.
        """
        raise NotImplementedError(
            "week3/prefix_caching.py: CachingBlockManager.publish is not written yet "
            "→ sessions/week3/prefix_caching.md"
        )

    def free(self, request_id: str) -> None:
        """Take back the blocks of a request as `BlockManager.free` does; they are still found."""
        raise NotImplementedError(
            "week3/prefix_caching.py: CachingBlockManager.free is not written yet "
            "→ sessions/week3/prefix_caching.md"
        )
