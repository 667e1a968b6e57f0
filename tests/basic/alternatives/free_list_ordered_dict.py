"""The free blocks as the keys of an ordered dictionary, which is a linked list with an index."""

from collections import OrderedDict
from collections.abc import Iterator

__all__ = ["FreeList"]


class FreeList:
    """The free blocks of a pool, the one that has been free for the longest time first."""

    def __init__(self, num_blocks: int):
        if num_blocks <= 0:
            raise ValueError(f"a pool of {num_blocks} blocks is none")
        self._ids = range(num_blocks)
        self._free = OrderedDict.fromkeys(self._ids)

    def pop(self) -> int:
        """Take the block that has been free for the longest time."""
        if not self._free:
            raise IndexError("every block is taken")
        return self._free.popitem(last=False)[0]

    def append(self, block_id: int) -> None:
        """Give a block back."""
        if block_id in self:
            raise ValueError(f"{block_id} is given back twice")
        self._free[block_id] = None

    def remove(self, block_id: int) -> None:
        """Take one particular free block."""
        if block_id not in self:
            raise ValueError(f"{block_id} is taken already")
        del self._free[block_id]

    def __contains__(self, block_id: int) -> bool:
        """Say whether a block is free."""
        if not 0 <= block_id < len(self._ids):
            raise ValueError(f"the pool has no block {block_id}")
        return block_id in self._free

    def __len__(self) -> int:
        return len(self._free)

    def __iter__(self) -> Iterator[int]:
        return iter(self._free)
