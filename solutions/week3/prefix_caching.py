"""Keep what was computed: find the KV of a prompt's beginning that an earlier request left."""

import hashlib
from collections.abc import Sequence
from itertools import takewhile

from week3.block_manager import BlockManager

__all__ = ["extend_hashes", "CachingBlockManager"]

_BYTES_PER_ID = 8


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
    parent = hashes[-1] if hashes else hashlib.sha256(salt.encode()).digest()
    for start in range(len(hashes) * block_size, len(token_ids) - block_size + 1, block_size):
        ids = token_ids[start : start + block_size]
        content = b"".join(token_id.to_bytes(_BYTES_PER_ID, "little") for token_id in ids)
        parent = hashlib.sha256(parent + content).digest()
        hashes.append(parent)


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
        super().__init__(num_blocks, block_size, watermark)
        self.enabled = enabled
        # _blocks and _hashes are each other's inverse: hash → block, block → hash.
        self._blocks: dict[bytes, int] = {}
        self._hashes: dict[int, bytes] = {}
        self._num_published: dict[str, int] = {}  # of each request, the blocks looked at

    @property
    def num_cached_blocks(self) -> int:
        """How many blocks can be found, those that are free included."""
        return len(self._blocks)

    def find(self, block_hash: bytes) -> int | None:
        """Give the block that is published under a hash, or None."""
        return self._blocks.get(block_hash)

    def match(self, hashes: Sequence[bytes], num_tokens: int) -> list[int]:
        """Find the blocks that hold the beginning of a request. Changes nothing.

        hashes: of the request's full blocks. num_tokens: how many tokens it has.
        Returns the longest run of published blocks from its first block on, short of its last
        token: at least one token is left to compute, since a request needs the scores behind it.
        """
        at_most = (num_tokens - 1) // self.block_size
        found = (self._blocks.get(block_hash) for block_hash in hashes[:at_most])
        return list(takewhile(lambda block_id: block_id is not None, found))

    def allocate(self, request_id: str, num_tokens: int, prefix: Sequence[int] = ()) -> bool:
        """Let a request's table grow as `BlockManager.allocate` does.

        prefix: from `match`, with nothing changed since. A block that is taken anew is no longer
        found; one of prefix still is.
        """
        num_kept = len(self.block_table(request_id)) + len(prefix)
        if not super().allocate(request_id, num_tokens, prefix):
            return False
        for block_id in self.block_table(request_id)[num_kept:]:
            block_hash = self._hashes.pop(block_id, None)
            if block_hash is not None:
                del self._blocks[block_hash]
        return True

    def publish(self, request_id: str, hashes: Sequence[bytes], num_computed_tokens: int) -> None:
        """Let others find the blocks of a request that are full and computed.

        hashes: of the request's full blocks, at least of those; where enabled is False, they are
            not looked at and may be missing. num_computed_tokens: how many of its first tokens have
            their keys and values in the pool; from call to call, it never gets smaller.
        A block whose hash has a block already is not published, nor is it later: tables never
        change, so the request keeps its own. A call takes time for the blocks that became full
        since the last one, not for the others.
        """
        if not self.enabled:
            return
        table = self.block_table(request_id)
        num_full = num_computed_tokens // self.block_size
        for i in range(self._num_published.get(request_id, 0), num_full):
            if hashes[i] not in self._blocks:
                self._blocks[hashes[i]] = table[i]
                self._hashes[table[i]] = hashes[i]
        self._num_published[request_id] = num_full

    def free(self, request_id: str) -> None:
        """Take back the blocks of a request as `BlockManager.free` does; they are still found."""
        self._num_published.pop(request_id, None)
        super().free(request_id)
