"""Who owns which block of the KV pool: block tables, shared blocks, and the order of the free."""

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence

__all__ = ["num_blocks_for", "slot_mapping", "BlockManager", "utilisation"]


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Count the blocks that hold num_tokens tokens; the last block may be partly empty.

    num_tokens: at least 0. block_size: tokens a block, at least 1.
    """
    raise NotImplementedError(
        "week3/block_manager.py: num_blocks_for is not written yet "
        "→ sessions/week3/block_manager.md"
    )


def slot_mapping(block_table: Sequence[int], start: int, end: int, block_size: int) -> list[int]:
    """Find where the tokens from position start up to, not including, end lie in the pool.

    block_table: the blocks of one request, in the order of its tokens.
    Slot s is place s % block_size of block s // block_size. Returns one slot for each token.
    Raises ValueError, which names end and the number of tokens that the table covers, when the
    table ends before end.
    Source: Kwon et al. 2023, arXiv:2309.06180, section 4.
    """
    raise NotImplementedError(
        "week3/block_manager.py: slot_mapping is not written yet → sessions/week3/block_manager.md"
    )


class BlockManager:
    """Hand out the blocks of a KV pool to requests, and take them back.

    num_blocks: the pool has the blocks 0 to num_blocks - 1, all free in the beginning, in the order
        of their ids. block_size: tokens a block. watermark: blocks that stay free when a request is
        admitted beside others, so that these can grow.
    All three are kept under these names. Raises ValueError, which gives the value, when num_blocks
    or block_size is below 1, or watermark negative.

    A request holds the blocks of its table, from its first `allocate` to `free`. A table only ever
    grows at its end. A block may stand in the tables of several requests, once in each: it is free
    when no table holds it. Ids of requests may be anything that can be a key of a dict.
    Apart from `__init__`, no call takes longer because the pool is larger.
    Source: Kwon et al. 2023, arXiv:2309.06180, section 4.2.
    """

    def __init__(self, num_blocks: int, block_size: int = 16, watermark: int = 0):
        raise NotImplementedError(
            "week3/block_manager.py: BlockManager.__init__ is not written yet "
            "→ sessions/week3/block_manager.md"
        )

    @property
    def num_free_blocks(self) -> int:
        """How many blocks no table holds."""
        raise NotImplementedError(
            "week3/block_manager.py: BlockManager.num_free_blocks is not written yet "
            "→ sessions/week3/block_manager.md"
        )

    def ref_count(self, block_id: int) -> int:
        """Count the tables that hold a block."""
        raise NotImplementedError(
            "week3/block_manager.py: BlockManager.ref_count is not written yet "
            "→ sessions/week3/block_manager.md"
        )

    def block_table(self, request_id: str) -> Sequence[int]:
        """Give the blocks of a request, in the order of its tokens; () when it holds none.

        Not a copy: blocks that the request gets later show in it. The caller changes nothing in it.
        """
        raise NotImplementedError(
            "week3/block_manager.py: BlockManager.block_table is not written yet "
            "→ sessions/week3/block_manager.md"
        )

    def can_admit(self, num_tokens: int, prefix: Collection[int] = ()) -> bool:
        """Say whether a request that holds nothing yet may get room for num_tokens tokens.

        prefix: blocks, each once, that hold its first tokens already: they are shared, not taken
            anew; those that are free count as taken.
        It may when the blocks are there and, beside them, watermark others stay free. Where no
        request holds a block, the watermark does not matter: it would keep them for nobody.
        """
        raise NotImplementedError(
            "week3/block_manager.py: BlockManager.can_admit is not written yet "
            "→ sessions/week3/block_manager.md"
        )

    def allocate(self, request_id: str, num_tokens: int, prefix: Sequence[int] = ()) -> bool:
        """Let a request's table grow until it covers num_tokens tokens.

        prefix: for a request that holds nothing yet, blocks that become the beginning of its table,
            free or held by others; they cover at most num_tokens. With a table, it is empty.
        New blocks are taken in the order in which they became free. The watermark does not matter.
        Returns True; or False, with nothing changed, when too few blocks are free. A table that
        covers num_tokens already stays as it is, and so does the pool.
        """
        raise NotImplementedError(
            "week3/block_manager.py: BlockManager.allocate is not written yet "
            "→ sessions/week3/block_manager.md"
        )

    def free(self, request_id: str) -> None:
        """Take back the blocks of a request; nothing happens when it holds none.

        Blocks that no other table holds become free, the last one of the table first, so that of a
        beginning that others may share, the first blocks stay for the longest time.
        """
        raise NotImplementedError(
            "week3/block_manager.py: BlockManager.free is not written yet "
            "→ sessions/week3/block_manager.md"
        )


def utilisation(manager: BlockManager, num_tokens: Mapping[str, int]) -> float:
    """Measure which share of the slots that are held has a token in it.

    num_tokens: for each request that holds blocks, how many tokens it has there.
    Returns a number from 0 to 1; 1 when nothing is held. A block that several requests share counts
    once, as do its tokens: it has as many as the request with the most of them there.
    """
    raise NotImplementedError(
        "week3/block_manager.py: utilisation is not written yet → sessions/week3/block_manager.md"
    )
