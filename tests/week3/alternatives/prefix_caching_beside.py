"""Week3/prefix_caching another way: a block manager inside, and an entry in every block's place."""

import struct
from hashlib import sha256

from week3.block_manager import BlockManager

__all__ = ["extend_hashes", "CachingBlockManager"]


def extend_hashes(hashes, token_ids, block_size: int, salt: str = "") -> None:
    """Feed one hasher a block at a time."""
    while block_size * (len(hashes) + 1) <= len(token_ids):
        hasher = sha256(hashes[-1] if hashes else sha256(bytes(salt, "utf-8")).digest())
        first = block_size * len(hashes)
        for place in range(first, first + block_size):
            hasher.update(struct.pack("<q", token_ids[place]))
        hashes += [hasher.digest()]


class CachingBlockManager:
    """Ask an ordinary manager for blocks; keep what lies in them in a list with a place for each.

    The index may name blocks that hold something else by now: whoever looks compares.
    """

    def __init__(self, num_blocks: int, block_size=16, watermark=0, enabled=True):
        self.inner = BlockManager(num_blocks, block_size, watermark)
        self.num_blocks, self.block_size, self.watermark = num_blocks, block_size, watermark
        self.enabled = enabled
        self.holds: list[bytes | None] = [None] * num_blocks
        self.index: dict[bytes, int] = {}
        self.num_cached = 0
        self.marks: dict = {}

    num_free_blocks = property(lambda self: self.inner.num_free_blocks)
    num_cached_blocks = property(lambda self: self.num_cached)

    def ref_count(self, block_id: int) -> int:
        """Ask the inner one."""
        return self.inner.ref_count(block_id)

    def block_table(self, request_id):
        """Ask the inner one."""
        return self.inner.block_table(request_id)

    def can_admit(self, num_tokens: int, prefix=()) -> bool:
        """Ask the inner one."""
        return self.inner.can_admit(num_tokens, prefix)

    def find(self, block_hash: bytes):
        """Believe the index when the block agrees."""
        block_id = self.index.get(block_hash)
        return block_id if block_id is not None and self.holds[block_id] == block_hash else None

    def match(self, hashes, num_tokens: int) -> list[int]:
        """Go on as long as a block is found and a token is left."""
        blocks = []
        while len(blocks) < len(hashes) and (len(blocks) + 1) * self.block_size < num_tokens:
            block_id = self.find(hashes[len(blocks)])
            if block_id is None:
                break
            blocks.append(block_id)
        return blocks

    def allocate(self, request_id, num_tokens: int, prefix=()) -> bool:
        """Let the inner one decide, then wipe what is new."""
        before = len(self.block_table(request_id)) or len(prefix)
        done = self.inner.allocate(request_id, num_tokens, prefix)
        for block_id in self.block_table(request_id)[before:] if done else ():
            self.num_cached -= self.holds[block_id] is not None
            self.holds[block_id] = None
        return done

    def publish(self, request_id, hashes, num_computed_tokens: int) -> None:
        """Mark blocks from where the last call stopped."""
        mark, end = self.marks.get(request_id, 0), num_computed_tokens // self.block_size
        self.marks[request_id] = end
        for place in range(mark, end) if self.enabled else ():
            if self.find(hashes[place]) is None:
                block_id = self.block_table(request_id)[place]
                self.index[hashes[place]], self.holds[block_id] = block_id, hashes[place]
                self.num_cached += 1

    def free(self, request_id) -> None:
        """Forget the mark, keep what lies there."""
        self.marks = {name: mark for name, mark in self.marks.items() if name != request_id}
        self.inner.free(request_id)
