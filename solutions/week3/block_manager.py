"""Who owns which block of the KV pool: block tables, shared blocks, and the order of the free."""

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence

__all__ = ["num_blocks_for", "slot_mapping", "BlockManager", "utilisation"]


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Count the blocks that hold num_tokens tokens; the last block may be partly empty.

    num_tokens: at least 0. block_size: tokens a block, at least 1.
    """
    return -(-num_tokens // block_size)


def slot_mapping(block_table: Sequence[int], start: int, end: int, block_size: int) -> list[int]:
    """Find where the tokens from position start up to, not including, end lie in the pool.

    block_table: the blocks of one request, in the order of its tokens.
    Slot s is place s % block_size of block s // block_size. Returns one slot for each token.
    Raises ValueError, which names end and the number of tokens that the table covers, when the
    table ends before end.
    Source: Kwon et al. 2023, arXiv:2309.06180, section 4.
    """
    covered = len(block_table) * block_size
    if end > covered:
        raise ValueError(f"the table covers {covered} tokens, and ends before {end}")
    return [
        block_table[position // block_size] * block_size + position % block_size
        for position in range(start, end)
    ]


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
        for name, value, least in (
            ("num_blocks", num_blocks, 1),
            ("block_size", block_size, 1),
            ("watermark", watermark, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.num_blocks, self.block_size, self.watermark = num_blocks, block_size, watermark
        # Every block is a key of _free, or stands in ref_count many tables.
        self._free = OrderedDict.fromkeys(range(num_blocks))  # the next one to be taken first
        self._ref_counts = [0] * num_blocks
        self._tables: dict[str, list[int]] = {}

    @property
    def num_free_blocks(self) -> int:
        """How many blocks no table holds."""
        return len(self._free)

    def ref_count(self, block_id: int) -> int:
        """Count the tables that hold a block."""
        return self._ref_counts[block_id]

    def block_table(self, request_id: str) -> Sequence[int]:
        """Give the blocks of a request, in the order of its tokens; () when it holds none.

        Not a copy: blocks that the request gets later show in it. The caller changes nothing in it.
        """
        return self._tables.get(request_id, ())

    def can_admit(self, num_tokens: int, prefix: Collection[int] = ()) -> bool:
        """Say whether a request that holds nothing yet may get room for num_tokens tokens.

        prefix: blocks, each once, that hold its first tokens already: they are shared, not taken
            anew; those that are free count as taken.
        It may when the blocks are there and, beside them, watermark others stay free. Where no
        request holds a block, the watermark does not matter: it would keep them for nobody.
        """
        needed = num_blocks_for(num_tokens, self.block_size) - len(prefix)
        left = len(self._free) - needed - sum(block_id in self._free for block_id in prefix)
        return left >= (self.watermark if self._tables else 0)

    def allocate(self, request_id: str, num_tokens: int, prefix: Sequence[int] = ()) -> bool:
        """Let a request's table grow until it covers num_tokens tokens.

        prefix: for a request that holds nothing yet, blocks that become the beginning of its table,
            free or held by others; they cover at most num_tokens. With a table, it is empty.
        New blocks are taken in the order in which they became free. The watermark does not matter.
        Returns True; or False, with nothing changed, when too few blocks are free. A table that
        covers num_tokens already stays as it is, and so does the pool.
        """
        table = self._tables.get(request_id, [])
        missing = num_blocks_for(num_tokens, self.block_size) - len(table) - len(prefix)
        if missing > len(self._free) - sum(block_id in self._free for block_id in prefix):
            return False
        for block_id in prefix:
            self._free.pop(block_id, None)
        new = [self._free.popitem(last=False)[0] for _ in range(missing)]
        for block_id in (*prefix, *new):
            self._ref_counts[block_id] += 1
        if prefix or new:
            self._tables.setdefault(request_id, table).extend((*prefix, *new))
        return True

    def free(self, request_id: str) -> None:
        """Take back the blocks of a request; nothing happens when it holds none.

        Blocks that no other table holds become free, the last one of the table first, so that of a
        beginning that others may share, the first blocks stay for the longest time.
        """
        for block_id in reversed(self._tables.pop(request_id, [])):
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._free[block_id] = None


def utilisation(manager: BlockManager, num_tokens: Mapping[str, int]) -> float:
    """Measure which share of the slots that are held has a token in it.

    num_tokens: for each request that holds blocks, how many tokens it has there.
    Returns a number from 0 to 1; 1 when nothing is held. A block that several requests share counts
    once, as do its tokens: it has as many as the request with the most of them there.
    """
    size = manager.block_size
    filled: dict[int, int] = {}
    for request_id, count in num_tokens.items():
        for i, block_id in enumerate(manager.block_table(request_id)):
            in_block = min(max(count - i * size, 0), size)
            filled[block_id] = max(filled.get(block_id, 0), in_block)
    held = (manager.num_blocks - manager.num_free_blocks) * size
    return sum(filled.values()) / held if held else 1.0
