"""Grades basic/free_list against a plain list of ids, and counts how often ids are compared."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from course.grading import History, check_equal, check_raises, check_true, lab

free_lab = lab("basic/free_list")

MAX_COMPARISONS = 16


class Pool:
    """A free list beside a plain list; every call is told, and held against the plain one."""

    def __init__(self, num_blocks):
        self.free = free_lab.FreeList(num_blocks)
        self.plain = list(range(num_blocks))
        self.num_blocks = num_blocks
        self.of = History(f"FreeList({num_blocks})")

    def pop(self):
        expected = self.plain.pop(0)
        got = self.of.note("pop()", self.free.pop())
        check_equal(got, expected, "the block that pop takes", of=self.of)
        self.check()

    def append(self, block_id):
        self.plain.append(block_id)
        self.of.note(f"append({block_id})", self.free.append(block_id))
        self.check()

    def remove(self, block_id):
        self.plain.remove(block_id)
        self.of.note(f"remove({block_id})", self.free.remove(block_id))
        self.check()

    def check(self):
        check_equal(list(self.free), self.plain, "the free blocks in order", of=self.of)
        check_equal(len(self.free), len(self.plain), "len", of=self.of)
        are_free = [block_id for block_id in range(self.num_blocks) if block_id in self.free]
        check_equal(are_free, sorted(self.plain), "the ids that are `in` it", of=self.of)

    def taken(self):
        return [block_id for block_id in range(self.num_blocks) if block_id not in self.plain]

    def do(self, kind, number):
        """Do one call; a number chooses the block, so that it always is a legal one."""
        taken = self.taken()
        if kind == "append" and taken:
            self.append(taken[number % len(taken)])
        elif kind == "remove" and self.plain:
            self.remove(self.plain[number % len(self.plain)])
        elif self.plain:
            self.pop()


def told(name, *args):
    return f"{name}({', '.join(map(str, args))})"


def refused(error, num_blocks, calls, call, *mentions):
    """Make some calls, then hold the last one to being refused without any effect."""
    pool = free_lab.FreeList(num_blocks)
    for name, *args in calls:
        getattr(pool, name)(*args)
    before = list(pool)

    def after(earlier, last):
        """Make the last call."""
        name, *args = call
        return getattr(pool, name)(*args)

    story = [f"FreeList({num_blocks})", *(told(*earlier) for earlier in calls)]
    check_raises(error, after, story, told(*call), mentions=mentions)
    check_equal(list(pool), before, "the free blocks after a refused call", of=story)


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 17])
def test_blocks_are_taken_in_the_order_of_their_ids(num_blocks):
    pool = Pool(num_blocks)
    pool.check()
    for _ in range(num_blocks):
        pool.pop()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
def test_blocks_come_back_in_the_order_of_their_return(order):
    pool = Pool(3)
    for _ in range(3):
        pool.pop()
    for block_id in order:
        pool.append(block_id)
    for _ in range(3):
        pool.pop()


def test_a_block_that_comes_back_stands_behind_those_that_stayed():
    pool = Pool(5)
    pool.pop()
    pool.pop()
    pool.append(0)
    pool.pop()
    pool.append(1)
    pool.append(2)
    for _ in range(5):
        pool.pop()


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 6])
def test_any_block_can_be_removed(num_blocks):
    for block_id in range(num_blocks):
        pool = Pool(num_blocks)
        pool.remove(block_id)
        pool.append(block_id)
        for _ in range(num_blocks):
            pool.pop()


@pytest.mark.parametrize("order", ["forwards", "backwards", "from the middle"])
def test_all_blocks_can_be_removed_and_come_back(order):
    ids = {
        "forwards": range(6),
        "backwards": range(5, -1, -1),
        "from the middle": [2, 3, 1, 4, 0, 5],
    }
    pool = Pool(6)
    for block_id in ids[order]:
        pool.remove(block_id)
    for block_id in ids[order]:
        pool.append(block_id)
    for block_id in ids[order]:
        pool.remove(block_id)


@pytest.mark.parametrize("num_blocks", [1, 4])
def test_pop_of_an_empty_list_is_refused(num_blocks):
    calls = [("pop",)] * num_blocks
    refused(IndexError, num_blocks, calls, ("pop",))
    refused(IndexError, num_blocks, [*calls, ("append", 0), ("remove", 0)], ("pop",))


@pytest.mark.parametrize("calls", [[], [("pop",)], [("pop",), ("append", 0)]], ids=len)
@pytest.mark.parametrize("block_id", [1, 2, 3])
def test_a_double_free_is_refused(block_id, calls):
    refused(ValueError, 4, calls, ("append", block_id), block_id)


def test_a_block_that_came_back_cannot_come_back_again():
    refused(ValueError, 3, [("pop",), ("append", 0)], ("append", 0), 0)
    refused(ValueError, 3, [("remove", 1), ("append", 1)], ("append", 1), 1)
    refused(ValueError, 1, [("pop",), ("append", 0)], ("append", 0), 0)


def test_a_block_that_is_taken_cannot_be_removed():
    refused(ValueError, 4, [("pop",)], ("remove", 0), 0)
    refused(ValueError, 4, [("remove", 2)], ("remove", 2), 2)
    refused(ValueError, 4, [("remove", 3)], ("remove", 3), 3)
    refused(ValueError, 1, [("pop",)], ("remove", 0), 0)


@pytest.mark.parametrize("block_id", [-1, -4, 4, 5, 1000])
@pytest.mark.parametrize("name", ["append", "remove", "__contains__"])
def test_what_is_no_block_is_refused(name, block_id):
    for calls in ([], [("pop",)] * 4):
        refused(ValueError, 4, calls, (name, block_id), block_id)


@pytest.mark.parametrize("num_blocks", [0, -1, -16])
def test_a_pool_without_blocks_is_refused(num_blocks):
    check_raises(ValueError, free_lab.FreeList, num_blocks, mentions=(num_blocks,))


def test_pools_do_not_share_blocks():
    one, other = free_lab.FreeList(3), free_lab.FreeList(3)
    of = History("two FreeLists of 3 blocks; one of them gives 0 away and takes it back")
    one.pop()
    check_equal([list(one), list(other)], [[1, 2], [0, 1, 2]], "their free blocks", of=of)
    one.append(0)
    check_equal([list(one), list(other)], [[1, 2, 0], [0, 1, 2]], "their free blocks", of=of)


@settings(max_examples=80)
@given(
    st.integers(1, 8),
    st.lists(
        st.tuples(st.sampled_from(["pop", "append", "remove"]), st.integers(0, 99)), max_size=30
    ),
)
def test_any_calls_beside_a_plain_list(num_blocks, calls):
    pool = Pool(num_blocks)
    for kind, number in calls:
        pool.do(kind, number)


@pytest.mark.parametrize("seed", range(3))
def test_many_calls_beside_a_plain_list(seed):
    generator, pool = random.Random(seed), Pool(40)
    for _ in range(400):
        pool.do(generator.choice(["pop", "append", "remove"]), generator.randrange(1000))


class CountedId(int):
    """An id that counts how often any id is compared with another one."""

    num_comparisons = 0

    def _counted(name):
        def compare(self, other):
            CountedId.num_comparisons += 1
            return getattr(int, name)(self, other)

        return compare

    __eq__, __ne__, __lt__, __le__, __gt__, __ge__ = map(
        _counted, ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
    )
    __hash__ = int.__hash__


@pytest.mark.parametrize("num_blocks", [100, 1000])
def test_the_work_of_a_call_does_not_grow_with_the_pool(num_blocks):
    free, generator = free_lab.FreeList(num_blocks), random.Random(0)
    ids = [CountedId(block_id) for block_id in range(num_blocks)]
    for block_id in generator.sample(range(num_blocks), num_blocks // 2):
        free.remove(block_id)
        free.append(block_id)
    for block_id in generator.sample(ids, 30):
        for call in (free.remove, free.append, free.__contains__):
            CountedId.num_comparisons = 0
            call(block_id)
            count = CountedId.num_comparisons
            check_true(
                count < MAX_COMPARISONS,
                f"{call.__name__}({int(block_id)}) compared ids {count:,} times; "
                f"allowed: less than {MAX_COMPARISONS}",
                of=f"FreeList({num_blocks}), half of its blocks taken and given back",
            )
