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
        raise NotImplementedError(
            "basic/free_list.py: FreeList.__init__ is not written yet → sessions/basic/free_list.md"
        )

    def pop(self) -> int:
        """Take the block that has been free for the longest time; returns its id.

        Raises IndexError when no block is free.
        """
        raise NotImplementedError(
            "basic/free_list.py: FreeList.pop is not written yet → sessions/basic/free_list.md"
        )

    def append(self, block_id: int) -> None:
        """Give a block back: of the free ones it is the last to be taken.

        Raises ValueError, which names block_id, when it is free already or no block of the pool.
        """
        raise NotImplementedError(
            "basic/free_list.py: FreeList.append is not written yet → sessions/basic/free_list.md"
        )

    def remove(self, block_id: int) -> None:
        """Take one particular free block, wherever it stands; the others keep their order.

        Raises ValueError, which names block_id, when it is not free or no block of the pool.
        """
        raise NotImplementedError(
            "basic/free_list.py: FreeList.remove is not written yet → sessions/basic/free_list.md"
        )

    def __contains__(self, block_id: int) -> bool:
        """Say whether a block is free; ValueError names what is no block of the pool."""
        raise NotImplementedError(
            "basic/free_list.py: FreeList.__contains__ is not written yet "
            "→ sessions/basic/free_list.md"
        )

    def __len__(self) -> int:
        raise NotImplementedError(
            "basic/free_list.py: FreeList.__len__ is not written yet → sessions/basic/free_list.md"
        )

    def __iter__(self) -> Iterator[int]:
        raise NotImplementedError(
            "basic/free_list.py: FreeList.__iter__ is not written yet → sessions/basic/free_list.md"
        )
