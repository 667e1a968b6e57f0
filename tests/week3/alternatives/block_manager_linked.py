"""Week3/block_manager another way: free blocks in a ring, tables of objects behind a view."""

from collections.abc import Sequence

__all__ = ["num_blocks_for", "slot_mapping", "BlockManager", "utilisation"]


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Count full blocks, then one for the rest."""
    full, rest = divmod(num_tokens, block_size)
    return full + bool(rest)


def slot_mapping(block_table: Sequence[int], start: int, end: int, block_size: int) -> list[int]:
    """Cut the wanted part out of the slots of all blocks that it touches."""
    if num_blocks_for(end, block_size) > len(block_table):
        limit = block_size * len(block_table)
        raise ValueError(f"{end} tokens do not fit into the {limit} places of the table")
    first, last = start // block_size, num_blocks_for(end, block_size)
    slots = []
    for block_id in block_table[first:last]:
        slots.extend(range(block_id * block_size, (block_id + 1) * block_size))
    return slots[start - first * block_size : end - first * block_size]


class Block:
    """A block; linked to its neighbours while it is free."""

    def __init__(self, block_id: int):
        self.block_id, self.num_users = block_id, 0
        self.before: Block | None = None
        self.behind: Block | None = None

    @property
    def is_free(self) -> bool:
        """Say whether it is in the list."""
        return self.before is not None

    def insert_before(self, other: "Block") -> None:
        """Stand in front of another one."""
        self.before, self.behind = other.before, other
        self.before.behind = self.behind.before = self

    def unlink(self) -> None:
        """Leave the list."""
        self.before.behind, self.behind.before = self.behind, self.before
        self.before = self.behind = None


class Table(Sequence):
    """Block objects, seen as their ids."""

    def __init__(self):
        self.blocks: list[Block] = []

    def __len__(self):
        return len(self.blocks)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [block.block_id for block in self.blocks[index]]
        return self.blocks[index].block_id


class BlockManager:
    """Blocks as objects. The list of the free ones is a ring through `end`."""

    def __init__(self, num_blocks: int, block_size: int = 16, watermark: int = 0):
        if num_blocks <= 0 or block_size <= 0 or watermark < 0:
            raise ValueError(f"{num_blocks} blocks of {block_size}, {watermark} of them kept free")
        self.num_blocks, self.block_size, self.watermark = num_blocks, block_size, watermark
        self.end = Block(-1)
        self.end.before = self.end.behind = self.end
        self.blocks = [Block(i) for i in range(num_blocks)]
        for block in self.blocks:
            block.insert_before(self.end)
        self.num_free = num_blocks
        self.of: dict = {}

    @property
    def num_free_blocks(self) -> int:
        """Counted along."""
        return self.num_free

    def ref_count(self, block_id: int) -> int:
        """Ask the block."""
        return self.blocks[block_id].num_users

    def block_table(self, request_id) -> Sequence[int]:
        """Give the view."""
        return self.of.get(request_id, ())

    def can_admit(self, num_tokens: int, prefix=()) -> bool:
        """Pretend to take everything."""
        left = self.num_free - self.cost(num_tokens, prefix)
        return left >= 0 and (not self.of or left >= self.watermark)

    def cost(self, num_tokens: int, prefix, num_held: int = 0) -> int:
        """Count the free blocks that a request would take."""
        missing = num_blocks_for(num_tokens, self.block_size) - num_held - len(prefix)
        return max(missing, 0) + sum(self.blocks[i].is_free for i in prefix)

    def allocate(self, request_id, num_tokens: int, prefix=()) -> bool:
        """Look at the cost first, then take one block after the other."""
        table = self.of.get(request_id) or Table()
        if self.cost(num_tokens, prefix, len(table)) > self.num_free:
            return False
        for block_id in prefix:
            self.take(self.blocks[block_id], table)
        while len(table) * self.block_size < num_tokens:
            self.take(self.end.behind, table)
        if table:
            self.of[request_id] = table
        return True

    def take(self, block: Block, table: Table) -> None:
        """Put a block, free or not, into a table."""
        if block.is_free:
            block.unlink()
            self.num_free -= 1
        block.num_users += 1
        table.blocks.append(block)

    def free(self, request_id) -> None:
        """Take the blocks off the table's end."""
        table = self.of.pop(request_id, None)
        while table:
            block = table.blocks.pop()
            block.num_users -= 1
            if not block.num_users:
                block.insert_before(self.end)
                self.num_free += 1


def utilisation(manager: BlockManager, num_tokens) -> float:
    """Count the places that are empty, in the block of whoever has most of it."""
    size, empty = manager.block_size, {}
    for name, count in num_tokens.items():
        for i, block_id in enumerate(manager.block_table(name)):
            here = max(0, (i + 1) * size - max(count, i * size))
            empty[block_id] = min(here, empty.get(block_id, size))
    held = size * (manager.num_blocks - manager.num_free_blocks)
    return 1 - sum(empty.values()) / held if held else 1
