"""Grades week3/block_manager: every call beside plain lists, and what must hold after it."""

import random as python_random
import sys
from collections.abc import Callable, Hashable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from course.grading import History, check_equal, check_raises, check_true, lab

paging = lab("week3/block_manager")

# How many lines more a call may run in a pool of 5,000 blocks than in one of 50.
MORE_LINES = 40


class Oracle:
    """The contract in the plainest words: a list of the free blocks, and a table for everybody."""

    def __init__(self, num_blocks: int, block_size: int, watermark: int):
        self.num_blocks, self.block_size, self.watermark = num_blocks, block_size, watermark
        self.free = list(range(num_blocks))
        self.tables: dict[Hashable, list[int]] = {}

    def holders(self, block_id: int) -> list[Hashable]:
        return [name for name, table in self.tables.items() if block_id in table]

    def num_missing(self, num_tokens: int, num_blocks: int) -> int:
        """Count the blocks that begin behind num_blocks others and before the last token."""
        return len(range(num_blocks * self.block_size, num_tokens, self.block_size))

    def can_admit(self, num_tokens: int, prefix: Sequence[int] = ()) -> bool:
        left = [block_id for block_id in self.free if block_id not in prefix]
        stay_free = self.watermark if self.tables else 0
        return len(left) - self.num_missing(num_tokens, len(prefix)) >= stay_free

    def allocate(self, name: Hashable, num_tokens: int, prefix: Sequence[int] = ()) -> bool:
        left = [block_id for block_id in self.free if block_id not in prefix]
        table = [*self.tables.get(name, []), *prefix]
        count = self.num_missing(num_tokens, len(table))
        if count > len(left):
            return False
        table += left[:count]
        self.free = left[count:]
        if table:
            self.tables[name] = table
        return True

    def release(self, name: Hashable) -> None:
        for block_id in reversed(self.tables.pop(name, [])):
            if not self.holders(block_id):
                self.free.append(block_id)


class Pool:
    """A block manager beside the oracle: every call is told, and everything visible is compared."""

    def __init__(self, num_blocks: int, block_size: int = 4, watermark: int = 0):
        self.manager = paging.BlockManager(num_blocks, block_size, watermark)
        self.oracle = Oracle(num_blocks, block_size, watermark)
        self.of = History(f"BlockManager({num_blocks}, {block_size}, watermark={watermark})")
        # What each request held last; its blocks may be a prefix later, also when they are free.
        self.latest: dict[Hashable, list[int]] = {}

    def allocate(self, name: Hashable, num_tokens: int, prefix: Sequence[int] = ()) -> bool:
        text = f", prefix={[*prefix]}" if prefix else ""
        held = {block_id for table in self.oracle.tables.values() for block_id in table}
        before = self.oracle.tables.get(name, [])
        num_kept = len(before) + len(prefix)
        got = self.manager.allocate(name, num_tokens, prefix)
        self.of.note(f"allocate({name!r}, {num_tokens}{text})", got)
        table = list(self.manager.block_table(name))
        for block_id in table[num_kept:]:
            text = f"block {block_id} is given to {name!r} as new, and it is in a table already"
            check_true(block_id not in held, text, of=self.of)
        if got is False:
            text = f"allocate returned False, and the table of {name!r}, {before}, is {table} now"
            check_true(table == before, text, of=self.of)
        self.latest.setdefault(name, [])
        self.check_blocks()
        expected = self.oracle.allocate(name, num_tokens, prefix)
        check_equal(got, expected, "what allocate returns", of=self.of)
        self.check()
        self.latest[name] = list(self.oracle.tables.get(name, []))
        return expected

    def free(self, name: Hashable) -> None:
        self.of.note(f"free({name!r})", self.manager.free(name))
        self.oracle.release(name)
        self.check()

    def check(self) -> None:
        """First what must hold in every pool, then what the oracle has."""
        self.check_blocks()
        for name in self.latest | self.oracle.tables:
            table = list(self.manager.block_table(name))
            check_equal(table, self.oracle.tables.get(name, []), f"table of {name!r}", of=self.of)
        free = self.manager.num_free_blocks
        check_equal(free, len(self.oracle.free), "num_free_blocks", of=self.of)

    def check_blocks(self) -> None:
        num_blocks = self.oracle.num_blocks
        names = self.latest | self.oracle.tables
        tables = {name: list(self.manager.block_table(name)) for name in names}
        for name, table in tables.items():
            for block_id in table:
                known = type(block_id) is int and 0 <= block_id < num_blocks
                text = f"{block_id!r} is in the table of {name!r}; the pool has {num_blocks} blocks"
                check_true(known, text, of=self.of)
            text = f"a block is twice in the table of {name!r}: {table}"
            check_true(len(set(table)) == len(table), text, of=self.of)
        for block_id in range(num_blocks):
            holders = [name for name, table in tables.items() if block_id in table]
            count = self.manager.ref_count(block_id)
            text = f"ref_count({block_id}) is {count}; the tables that hold the block: {holders}"
            check_true(count == len(holders), text, of=self.of)
        held = sorted({block_id for table in tables.values() for block_id in table})
        free = self.manager.num_free_blocks
        text = f"{free} blocks are free, and in tables are {held}; the pool has {num_blocks} blocks"
        check_true(free + len(held) == num_blocks, text, of=self.of)

    def check_admission(self, num_tokens: int, prefix: Sequence[int] = ()) -> None:
        got = self.manager.can_admit(num_tokens, prefix)
        text = f", prefix={[*prefix]}" if prefix else ""
        what = f"can_admit({num_tokens}{text})"
        check_equal(got, self.oracle.can_admit(num_tokens, prefix), what, of=self.of)

    def check_admissions(self) -> None:
        """Ask for 0 tokens to more than the whole pool, around each block's end."""
        size = self.oracle.block_size
        ends = range(0, (self.oracle.num_blocks + 2) * size, size)
        for num_tokens in sorted({n for end in ends for n in (end - 1, end, end + 1) if n >= 0}):
            self.check_admission(num_tokens)

    def drain(self) -> None:
        """Take what is left block by block, then give everything back and take it again."""
        self.take_the_rest()
        for name in [*self.oracle.tables]:
            self.free(name)
        self.take_the_rest()

    def take_the_rest(self) -> None:
        num_tokens = 0
        while self.allocate("the rest", num_tokens := num_tokens + self.oracle.block_size):
            pass


def play(num_blocks: int, script: str, block_size: int = 4, watermark: int = 0) -> Pool:
    """Follow a script such as "a 6, b 3, free a"; "c 9 a 2" begins with the first 2 blocks of a."""
    pool = Pool(num_blocks, block_size, watermark)
    for line in script.split(", "):
        follow(pool, line.split())
    return pool


def follow(pool: Pool, words: Sequence[str]) -> None:
    if words[0] == "free":
        pool.free(words[1])
        return
    name, num_tokens, *rest = words
    prefix = pool.latest[rest[0]][: int(rest[1])] if rest else ()
    pool.allocate(name, int(num_tokens), prefix)


@pytest.mark.parametrize("block_size", [1, 2, 3, 16])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 4, 15, 16, 17, 32, 33, 1000])
def test_num_blocks_for(num_tokens, block_size):
    got = paging.num_blocks_for(num_tokens, block_size)
    expected = len({position // block_size for position in range(num_tokens)})
    check_equal(got, expected, "the number of blocks")


def test_num_blocks_for_a_very_long_context():
    got = paging.num_blocks_for(2**60 + 1, 16)
    check_equal(got, 2**56 + 1, "the number of blocks")


TABLES = {
    "in order": [0, 1, 2, 3],
    "from the end": [7, 6, 5, 4],
    "anywhere": [5, 0, 9, 2],
    "one block": [3],
    "far away": [70_000, 4, 1_000_000],
}


@pytest.mark.parametrize("block_size", [1, 2, 5, 16])
@pytest.mark.parametrize("case", TABLES)
def test_slot_mapping_of_a_table(case, block_size):
    table = TABLES[case]
    covered = len(table) * block_size
    slots = [block_id * block_size + place for block_id in table for place in range(block_size)]
    for start, end in ((0, covered), (0, 1), (covered - 1, covered), (covered // 2, covered)):
        got = paging.slot_mapping(table, start, end, block_size)
        check_equal(got, slots[start:end], "the slots")


def test_slot_mapping_of_every_part():
    table = (4, 1, 6)
    slots = [12, 13, 14, 3, 4, 5, 18, 19, 20]
    for start in range(10):
        for end in range(start, 10):
            got = paging.slot_mapping(table, start, end, 3)
            check_equal(got, slots[start:end], "the slots")


@pytest.mark.parametrize(
    "num_blocks, start, end", [(0, 0, 1), (1, 0, 5), (2, 8, 9), (3, 2, 100), (1, 8, 8)]
)
def test_slot_mapping_refuses_what_the_table_does_not_cover(num_blocks, start, end):
    table = [9, 8, 7][:num_blocks]
    mentions = [end, 4 * num_blocks]
    check_raises(ValueError, paging.slot_mapping, table, start, end, 4, mentions=mentions)


def test_slot_mapping_of_no_tokens():
    check_equal(paging.slot_mapping([], 0, 0, 4), [], "the slots of nothing in an empty table")
    check_equal(paging.slot_mapping([5], 4, 4, 4), [], "the slots behind a full table")


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 4, 5, 8, 9, 31, 32])
def test_allocate_for_one_request(num_tokens):
    play(8, f"a {num_tokens}")


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 16])
def test_allocate_token_by_token(block_size):
    pool = Pool(4, block_size)
    for num_tokens in range(1, 4 * block_size + 2):
        pool.allocate("a", num_tokens)


@pytest.mark.parametrize("step", [2, 3, 4, 5, 7, 8, 9, 13])
def test_allocate_chunk_by_chunk(step):
    pool = Pool(9)
    for num_tokens in range(step, 37, step):
        pool.allocate("a", num_tokens)
        pool.allocate("b", num_tokens // 3)


ALLOCATIONS = {
    "two that grow in turns": "a 4, b 4, a 5, b 9, a 9, b 10, a 16",
    "nothing at first": "a 0, b 3, a 1, a 0, b 0",
    "as many as before": "a 7, a 7, a 8, a 8, a 5, a 1, a 0, a 8",
    "all blocks for one": "a 32, a 32, a 31",
    "all blocks for several": "a 8, b 8, c 8, d 8, a 8, b 7",
    "one after the other": "a 9, free a, b 9, free b, c 17, free c, d 30",
    "the same id again": "a 9, b 4, free a, a 5, a 13",
}


@pytest.mark.parametrize("case", ALLOCATIONS)
@pytest.mark.parametrize("watermark", [0, 2])
def test_allocate(watermark, case):
    play(8, ALLOCATIONS[case], watermark=watermark)


# ENGINE case 6: each of these asks for more than there is, and then for what is there.
FAILURES = {
    "a new request": "a 16, b 17, b 16",
    "a request that is much too long": "a 5, b 1000, b 8",
    "one that grows": "a 20, b 12, a 21, a 20, b 13, b 12",
    "one that grows, again and again": "a 24, b 5, b 9, b 9, b 9, free a, b 9",
    "far too much growth": "a 12, b 12, a 100, a 20",
    "the pool is full": "a 32, b 1, b 0, free a, b 1",
    "with a shared beginning": "a 20, b 25 a 2, b 20 a 2, c 17 a 3",
    "with a beginning that is free": "a 16, free a, b 16, c 40 a 2, c 12 a 2",
    "with a beginning that is free, one block short": "a 8, free a, b 20, c 16 a 2, c 12 a 2",
    "with a beginning that is half free": "a 12, b 8 a 2, free a, c 20, d 16 a 3, d 12 a 3",
}


@pytest.mark.parametrize("case", FAILURES)
def test_allocate_changes_nothing_when_it_fails(case):
    play(8, FAILURES[case]).drain()


FREED = {
    "one": "a 12, free a, b 12",
    "in the order of arrival": "a 8, b 8, c 8, free a, free b, free c, d 32",
    "in the opposite order": "a 8, b 8, c 8, free c, free b, free a, d 32",
    "the middle one": "a 8, b 8, c 8, free b, d 13, free a, free d, e 20",
    "twice": "a 8, b 8, free a, free a, c 4, free a, c 8",
    "nobody": "free x, a 8, free x, free x, b 4",
    "who holds nothing": "a 0, free a, b 9, a 0, free a",
    "who failed": "a 30, b 30, free b, free a, b 5",
    "who grew between others": "a 4, b 4, a 8, b 8, a 12, free a, c 16",
    "all of a full pool": "a 16, b 16, free b, free a, c 9, d 9",
}


@pytest.mark.parametrize("case", FREED)
def test_free(case):
    play(8, FREED[case]).drain()


def test_free_gives_the_last_block_of_a_table_back_first():
    pool = Pool(5)
    pool.allocate("a", 12)
    pool.free("a")
    # Blocks 3 and 4 have been free from the beginning.
    pool.allocate("b", 20)
    table = list(pool.manager.block_table("b"))
    check_equal(table, [3, 4, 2, 1, 0], "the table of who takes all blocks then", of=pool.of)


SHARED = {
    "with who is there": "a 12, b 10 a 2, free b, free a",
    "and the first one leaves": "a 12, b 10 a 2, free a, c 8, free b",
    "by three": "a 8, b 12 a 2, c 9 a 2, free b, free a, d 5, free c",
    "by a chain of three": "a 8, b 12 a 2, c 16 b 3, free a, free b, free c",
    "and grow": "a 9, b 9 a 2, a 13, b 13, a 17, free a, b 17",
    "as a whole": "a 8, b 8 a 2, free a, b 9, free b",
    "all that a has": "a 8, b 16 a 2, a 12, b 20, free b, a 16",
    "and come again": "a 8, b 12 a 2, free b, b 12 a 2, free a, free b",
    "twice in turns": "a 8, b 8 a 2, free a, a 8 b 2, free b, free a",
}


@pytest.mark.parametrize("case", SHARED)
def test_shared_blocks(case):
    play(10, SHARED[case]).drain()


FREE_BEGINNINGS = {
    "at the end of the queue": "a 8, free a, b 12 a 2, free b",
    "at its front": "a 40, free a, b 4 a 1, c 8 a 2, free b, free c",
    "in its middle": "a 8, b 8, free a, free b, c 8 a 2, d 32, free c",
    "the next to be taken": "a 8, b 32, free a, c 8 a 1, free c",
    "all that is free": "a 16, b 24, free a, c 16 a 4, free c, free b",
    "and new ones behind it": "a 40, free a, b 30 a 5, free b",
    "half of it free": "a 12, b 8 a 2, free a, c 20 a 3, free b, free c",
    "its first half free": "a 8, b 12 a 2, free b, c 16 b 3, free a, free c",
    "free, then shared": "a 8, free a, b 12 a 2, c 16 a 2, free b, free c",
    "free again and again": "a 8, free a, b 8 a 2, free b, c 8 a 2, free c, d 9 a 2",
}


@pytest.mark.parametrize("case", FREE_BEGINNINGS)
@pytest.mark.parametrize("watermark", [0, 1, 3])
def test_a_beginning_that_is_free(watermark, case):
    # ENGINE case 8: who takes it takes it out of the free ones, and nobody gets it as new.
    play(10, FREE_BEGINNINGS[case], watermark=watermark).drain()


def test_a_beginning_that_is_free_is_not_new_in_the_same_call():
    # Nothing else is free but the prefix, and blocks are taken from the front.
    pool = Pool(4)
    pool.allocate("a", 16)
    pool.free("a")
    pool.allocate("b", 16, [3, 2])
    pool.free("b")
    pool.allocate("c", 16, [0])
    pool.drain()


def test_a_beginning_may_be_the_table_of_another_one():
    # As it stands there, and not a copy of it.
    pool = Pool(8)
    pool.allocate("a", 8)
    pool.allocate("b", 10, pool.manager.block_table("a"))
    pool.allocate("a", 12)
    pool.allocate("b", 16)
    pool.allocate("c", 8, pool.manager.block_table("a")[:2])
    pool.drain()


def test_a_beginning_stays_the_callers():
    pool = Pool(8)
    pool.allocate("a", 8)
    prefix = list(pool.manager.block_table("a"))
    pool.allocate("b", 12, prefix)
    pool.allocate("b", 20)
    check_equal(prefix, [0, 1], "the list that was given as prefix", of=pool.of)
    prefix.clear()
    pool.allocate("c", 4)
    pool.drain()


# Around every line, each number of tokens is asked for, up to more than the pool has.
ADMISSIONS = {
    "one that runs": "a 4",
    "one that runs in all but the watermark": "a 24",
    "one that runs in the watermark": "a 28",
    "a full pool": "a 32",
    "two that run": "a 9, b 9",
    "who holds nothing": "a 0",
    "who never began": "a 33",
    "who has gone": "a 20, free a",
    "who left another one behind": "a 12, b 4, free a",
}


@pytest.mark.parametrize("watermark", [0, 1, 2, 8, 100])
@pytest.mark.parametrize("case", ADMISSIONS)
def test_can_admit(case, watermark):
    pool = Pool(8, 4, watermark)
    for line in ADMISSIONS[case].split(", "):
        pool.check_admissions()
        follow(pool, line.split())
    pool.check_admissions()


@pytest.mark.parametrize("watermark", [0, 1, 3, 7, 50])
def test_can_admit_to_an_empty_pool_whatever_the_watermark(watermark):
    # ENGINE case 2: otherwise a request that fits waits for ever.
    pool = Pool(3, 16, watermark)
    for num_tokens in (1, 16, 17, 48):
        pool.check_admission(num_tokens)
    pool.allocate("a", 48)
    pool.free("a")
    pool.check_admission(48)


@pytest.mark.parametrize("watermark", [0, 2])
def test_can_admit_never_what_the_whole_pool_cannot_hold(watermark):
    pool = Pool(3, 16, watermark)
    for num_tokens in (49, 64, 10_000):
        pool.check_admission(num_tokens)
    pool.allocate("a", 49)
    pool.check_admission(49)


# Blocks 0, 1 and 2 are held, and the others are free.
@pytest.mark.parametrize("prefix", [[0], [0, 1, 2], [3], [3, 4, 5], [0, 1, 3], [2, 4, 5], [8]])
@pytest.mark.parametrize("watermark", [0, 1, 3])
def test_can_admit_with_a_beginning(watermark, prefix):
    pool = Pool(9, 4, watermark)
    pool.allocate("a", 12)
    pool.allocate("b", 12)
    pool.free("b")
    for num_tokens in range(4 * len(prefix), 45):
        for kind in (list, tuple, set, dict.fromkeys):
            pool.check_admission(num_tokens, kind(prefix))
    pool.check()
    pool.drain()


def test_can_admit_changes_nothing():
    pool = Pool(6, 4, 1)
    pool.allocate("a", 8)
    pool.allocate("b", 8)
    pool.free("a")
    for num_tokens in (8, 12, 16, 20):
        pool.check_admission(num_tokens, pool.latest["a"])
        pool.check()
    pool.drain()


def test_watermark_is_there_for_those_that_run():
    pool = Pool(6, 4, 3)
    pool.allocate("a", 4)
    pool.allocate("b", 8)
    pool.check_admission(4)
    for num_tokens in range(5, 17):
        pool.allocate("a", num_tokens)
    pool.drain()


def test_block_table_is_no_copy():
    pool = Pool(8)
    pool.allocate("a", 3)
    table = pool.manager.block_table("a")
    pool.allocate("b", 5)
    pool.allocate("a", 12)
    expected = pool.oracle.tables["a"]
    what = "the table of 'a' that was asked for before it grew"
    check_equal(list(table), expected, what, of=pool.of)


def test_ids_of_any_kind():
    pool = Pool(12)
    names = ["", 0, (), (1, "x"), frozenset({2}), None, "0", 7.5]
    for name in names:
        pool.allocate(name, 4)
    for name in names[::2]:
        pool.free(name)
    for name in reversed(names):
        pool.allocate(name, 6)
    pool.drain()


def test_names_that_are_kept():
    manager = paging.BlockManager(num_blocks=7, block_size=3, watermark=2)
    of = "BlockManager(num_blocks=7, block_size=3, watermark=2)"
    got = manager.num_blocks, manager.block_size, manager.watermark
    check_equal(got, (7, 3, 2), "num_blocks, block_size, watermark", of=of)
    manager = paging.BlockManager(5)
    got = manager.num_blocks, manager.block_size, manager.watermark
    check_equal(got, (5, 16, 0), "num_blocks, block_size, watermark", of="BlockManager(5)")


def test_pools_do_not_share_blocks():
    one, other = Pool(4), Pool(4)
    one.allocate("a", 9)
    other.allocate("a", 5)
    one.free("a")
    for pool in (other, one):
        pool.check()
        pool.drain()


@pytest.mark.parametrize(
    "sizes, value",
    [((0, 4, 0), 0), ((-3, 4, 0), -3), ((8, 0, 1), 0), ((8, -2, 1), -2), ((8, 4, -1), -1)],
)
def test_block_manager_refuses_to_have_nothing(sizes, value):
    def make(num_blocks, block_size, watermark):
        return paging.BlockManager(num_blocks, block_size, watermark)

    check_raises(ValueError, make, *sizes, mentions=[value])


def test_block_manager_with_one_block():
    play(1, "a 4, b 1, a 5, free a, b 1, free b, c 4", watermark=1).drain()


def use(pool: Pool, draw: python_random.Random, num_names: int) -> None:
    """Do one call that the contract allows, with ids of a few requests."""
    name, size = f"r{draw.randrange(num_names)}", pool.oracle.block_size
    covered = size * len(pool.oracle.tables.get(name, ()))
    kind = draw.random()
    if kind < 0.3:
        pool.free(name)
    elif covered or kind < 0.7:
        pool.allocate(name, max(0, covered + draw.randint(-size, 2 * size)))
    else:
        lender = draw.choice([*pool.latest, name])
        prefix = pool.latest.get(lender, [])[: draw.randint(0, 4)]
        num_tokens = len(prefix) * size + draw.randint(0, 3 * size)
        pool.check_admission(num_tokens, prefix)
        pool.allocate(name, num_tokens, prefix)
    pool.check_admission(draw.randint(0, size * (pool.oracle.num_blocks + 1)))


@pytest.mark.parametrize("seed", range(12))
def test_random_calls(seed):
    draw = python_random.Random(seed)
    # Short runs in small pools come first: the first failure is the one to read.
    num_blocks = 3 + 3 * seed
    pool = Pool(num_blocks, draw.choice([1, 2, 3, 4, 16]), draw.randint(0, 3))
    for _ in range(15 + 15 * seed):
        use(pool, draw, 2 + seed)
    pool.drain()


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 3), st.randoms(use_true_random=False))
def test_anything(num_blocks, block_size, watermark, draw):
    pool = Pool(num_blocks, block_size, watermark)
    for _ in range(12):
        use(pool, draw, 3)
    pool.drain()


class NoisyId(int):
    """A block id that runs a line of Python whenever it is compared."""

    def __eq__(self, other):
        return int(self) == int(other)

    __hash__ = int.__hash__


def num_lines(call: Callable[[], object]) -> int:
    """Count the lines of Python that a call runs, every round of a loop anew."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def lines_of_calls(num_blocks: int) -> dict[str, int]:
    """Use a pool that is mostly free; in the same way, however large it is."""
    manager = paging.BlockManager(num_blocks, 4, 1)
    manager.allocate("a", 12)
    manager.allocate("b", 4 * (num_blocks // 2))
    manager.free("b")
    last = NoisyId(num_blocks // 2 - 1), NoisyId(num_blocks // 4)
    calls = {
        "num_free_blocks": lambda: manager.num_free_blocks,
        "ref_count(0)": lambda: manager.ref_count(0),
        "block_table('a')": lambda: manager.block_table("a"),
        "can_admit(20)": lambda: manager.can_admit(20),
        "can_admit(20, prefix)": lambda: manager.can_admit(20, last),
        "allocate('a', 13)": lambda: manager.allocate("a", 13),
        "allocate('c', 20, prefix)": lambda: manager.allocate("c", 20, last),
        "allocate of more than there is": lambda: manager.allocate("a", 4 * num_blocks + 1),
        "free('c')": lambda: manager.free("c"),
    }
    return {name: num_lines(call) for name, call in calls.items()}


def test_no_call_takes_longer_because_the_pool_is_larger():
    small, large = lines_of_calls(50), lines_of_calls(5000)
    for name, count in large.items():
        check_true(
            count <= small[name] + MORE_LINES,
            f"{name} takes {small[name]} steps in a pool of 50 blocks, {count:,} in one of 5,000; "
            "a step is a line of Python, or a comparison of two ids",
            of="BlockManager; the same calls in two pools of which most is free",
        )


def share_of_slots(pool: Pool, num_tokens: dict[Hashable, int]) -> float:
    """Mark every slot that has a token, and count."""
    size = pool.oracle.block_size
    slots = {
        (pool.oracle.tables[name][position // size], position % size)
        for name, count in num_tokens.items()
        for position in range(count)
    }
    held = {block_id for table in pool.oracle.tables.values() for block_id in table}
    return len(slots) / (len(held) * size) if held else 1.0


def check_utilisation(pool: Pool, num_tokens: dict[Hashable, int]) -> None:
    of = f"{pool.of}\nutilisation(manager, {num_tokens})"
    got, expected = paging.utilisation(pool.manager, num_tokens), share_of_slots(pool, num_tokens)
    check_equal(round(float(got), 9), round(expected, 9), "the share", of=of)


UTILISATIONS = {
    "full blocks": ("a 8, b 16", {"a": 8, "b": 16}),
    "one token": ("a 1", {"a": 1}),
    "the last block partly": ("a 9, b 2, c 7", {"a": 9, "b": 2, "c": 7}),
    "room for what comes next": ("a 12, b 8", {"a": 3, "b": 4}),
    "room without any token": ("a 12, b 8", {"a": 0, "b": 8}),
    "shared blocks": ("a 12, b 10 a 2", {"a": 12, "b": 10}),
    "shared by three": ("a 9, b 12 a 2, c 13 a 2", {"a": 9, "b": 12, "c": 13}),
    "shared as a whole": ("a 8, b 8 a 2", {"a": 8, "b": 8}),
    "shared, and one has computed less": ("a 12, b 12 a 2", {"a": 12, "b": 5}),
    "the first one has gone": ("a 12, b 10 a 2, free a", {"b": 10}),
    "somebody has gone": ("a 12, b 10, free a", {"b": 9}),
    "somebody came again": ("a 12, b 10, free a, a 5", {"a": 5, "b": 10}),
}


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("case", UTILISATIONS)
def test_utilisation(case, block_size):
    script, num_tokens = UTILISATIONS[case]
    pool = Pool(40, block_size)
    for line in script.split(", "):
        follow(pool, line.split())
    check_utilisation(pool, num_tokens)
    check_utilisation(pool, dict(reversed(num_tokens.items())))


def test_utilisation_when_nothing_is_held():
    pool = Pool(8)
    check_utilisation(pool, {})
    pool.allocate("a", 5)
    pool.free("a")
    check_utilisation(pool, {})


def nano_lengths() -> list[tuple[int, int]]:
    """Give (prompt, output) lengths of the workload `nano` of 256 requests."""
    draw = python_random.Random(0)
    prompts = []
    for _ in range(256):
        prompts.append(draw.randint(100, 1024))
        for _ in range(prompts[-1]):
            draw.randint(0, 10_000)
    outputs = [draw.randint(100, 1024) for _ in range(256)]
    assert (sum(prompts), sum(outputs)) == (142_827, 133_966)
    return list(zip(prompts, outputs, strict=True))


def test_utilisation_of_the_workload_nano():
    manager = paging.BlockManager(18_000, 16)
    of = "256 requests with 276,793 tokens in blocks of 16, each alive until all have all tokens"
    lengths = dict(enumerate(nano_lengths()))
    now = {name: prompt for name, (prompt, _) in lengths.items()}
    for name, count in now.items():
        check_true(manager.allocate(name, count), f"allocate({name}, {count}) is False", of=of)
    while growing := [name for name, count in now.items() if count < sum(lengths[name])]:
        for name in growing:
            now[name] += 1
            manager.allocate(name, now[name])
    held = 18_000 - manager.num_free_blocks
    expected = sum(len(range(0, count, 16)) for count in now.values())
    check_equal(held, expected, "blocks that are held", of=of)
    share = paging.utilisation(manager, now)
    check_true(share >= 0.96, f"{share:.2%} of the held slots have a token; at least 96 %", of=of)
    check_equal(round(share, 9), round(sum(now.values()) / (expected * 16), 9), "the share", of=of)
