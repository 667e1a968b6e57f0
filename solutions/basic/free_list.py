"""Keep the free blocks of a pool in the order in which they became free."""

from collections.abc import Iterator

__all__ = ["FreeList"]


class FreeList:
    """The free blocks of a pool, the one that has been free for the longest time first.

    num_blocks: the pool has the blocks 0 to num_blocks - 1, and in the beginning all of them are
        free, in the order of their ids; ValueError names a number below 1.
    `len` counts the free blocks; iteration lists them in the order in which `pop` would take them.
    Apart from that and from `__init__`, no call looks at more than a few blocks, however many there
    are: ids are compared less than 16 times.
    Source: the free queue of vLLM, `FreeKVCacheBlockQueue`.
    """

    def __init__(self, num_blocks: int):
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        # One circle through the free blocks. The place behind the last block is no block: it is
        # where the circle begins and ends, so that no block is ever without neighbours.
        self._end = num_blocks
        self._next = [*range(1, num_blocks + 1), 0]
        self._previous = [num_blocks, *range(num_blocks)]
        self._is_free = [True] * num_blocks
        self._num_free = num_blocks

    def pop(self) -> int:
        """Take the block that has been free for the longest time; returns its id.

        Raises IndexError when no block is free.
        """
        if not self._num_free:
            raise IndexError(f"none of the {self._end} blocks is free")
        block_id = self._next[self._end]
        self.remove(block_id)
        return block_id

    def append(self, block_id: int) -> None:
        """Give a block back: of the free ones it is the last to be taken.

        Raises ValueError, which names block_id, when it is free already or no block of the pool.
        """
        if block_id in self:
            raise ValueError(f"block {block_id} is free already")
        last = self._previous[self._end]
        self._next[last] = self._previous[self._end] = block_id
        self._previous[block_id], self._next[block_id] = last, self._end
        self._is_free[block_id] = True
        self._num_free += 1

    def remove(self, block_id: int) -> None:
        """Take one particular free block, wherever it stands; the others keep their order.

        Raises ValueError, which names block_id, when it is not free or no block of the pool.
        """
        if block_id not in self:
            raise ValueError(f"block {block_id} is not free")
        before, behind = self._previous[block_id], self._next[block_id]
        self._next[before], self._previous[behind] = behind, before
        self._is_free[block_id] = False
        self._num_free -= 1

    def __contains__(self, block_id: int) -> bool:
        """Say whether a block is free; ValueError names what is no block of the pool."""
        if not 0 <= block_id < self._end:
            raise ValueError(f"block {block_id} is none of the blocks 0 to {self._end - 1}")
        return self._is_free[block_id]

    def __len__(self) -> int:
        return self._num_free

    def __iter__(self) -> Iterator[int]:
        block_id = self._next[self._end]
        while block_id != self._end:
            yield block_id
            block_id = self._next[block_id]
