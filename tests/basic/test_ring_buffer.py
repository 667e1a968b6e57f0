"""Grades basic/ring_buffer against a list that keeps everything."""

import contextlib
import gc
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from course.grading import History, check_equal, check_raises, check_true, lab

ring_lab = lab("basic/ring_buffer")


def filled(capacity, items):
    """A buffer that was fed, and the story of it."""
    ring, of = ring_lab.RingBuffer(capacity), History(f"RingBuffer({capacity})")
    for item in items:
        of.note(f"append({item!r})", ring.append(item))
    return ring, of


def read(capacity, items, index):
    """Feed a buffer and read one of its items."""
    return filled(capacity, items)[0][index]


def latest(capacity, items, count):
    """Feed a buffer and list its latest items."""
    return filled(capacity, items)[0].latest(count)


@pytest.mark.parametrize("capacity", [1, 2, 3, 7, 64])
def test_append_tells_what_was_dropped(capacity):
    ring, of = ring_lab.RingBuffer(capacity), History(f"RingBuffer({capacity})")
    for item in range(3 * capacity + 2):
        dropped = of.note(f"append({item})", ring.append(item))
        expected = (item - capacity,) if item >= capacity else ()
        check_equal(dropped, expected, "what was dropped", of=of)


@pytest.mark.parametrize("capacity", [1, 2, 3, 7, 64])
def test_items_from_the_oldest_to_the_latest(capacity):
    ring, of = ring_lab.RingBuffer(capacity), History(f"RingBuffer({capacity})")
    for item in range(3 * capacity + 2):
        of.note(f"append({item})", ring.append(item))
        kept = list(range(max(0, item + 1 - capacity), item + 1))
        check_equal(list(ring), kept, "list(ring)", of=of)
        check_equal(len(ring), len(kept), "len(ring)", of=of)


@pytest.mark.parametrize("num_items", [0, 1, 3, 4, 5, 9, 13])
def test_index_from_either_end(num_items):
    ring, of = filled(5, "abcdefghijklm"[:num_items])
    kept = list("abcdefghijklm"[:num_items])[-5:]
    indices = range(-len(kept), len(kept))
    check_equal([ring[i] for i in indices], [kept[i] for i in indices], f"{[*indices]}", of=of)


@pytest.mark.parametrize("num_items", [0, 1, 3, 5, 12])
def test_index_outside_is_refused(num_items):
    size = min(num_items, 5)
    for index in (size, -size - 1, size + 5, 99, -99):
        check_raises(IndexError, read, 5, range(num_items), index, mentions=(index,))


@pytest.mark.parametrize("num_items", [0, 1, 4, 6, 7, 20])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 6, 7, 100])
def test_latest_items(num_items, count):
    ring, of = filled(6, range(num_items))
    kept = list(range(num_items))[-6:]
    expected = kept[max(0, len(kept) - count) :]
    check_equal(ring.latest(count), expected, f"latest({count})", of=of)


def test_latest_items_are_a_list_of_their_own():
    ring, of = filled(3, "abcd")
    ring.latest(3).clear()
    ring.latest(2)[0] = "x"
    check_equal(list(ring), ["b", "c", "d"], "the buffer after its copies were changed", of=of)


def test_any_object_is_an_item():
    items = [None, 0, "", [], None, False, (), None]
    ring, of = filled(3, items[:3])
    check_equal(list(ring), items[:3], "list(ring)", of=of)
    for i, item in enumerate(items[3:]):
        check_equal(ring.append(item), (items[i],), f"what append({item!r}) drops", of=of)
    check_equal(list(ring), items[-3:], "list(ring)", of=of)


def test_iterations_do_not_disturb_each_other():
    ring, of = filled(3, "abcde")
    pairs = [(a, b) for a in ring for b in ring]
    check_equal(pairs, [(a, b) for a in "cde" for b in "cde"], "two loops, one inside", of=of)
    check_equal([list(ring), list(ring)], [list("cde")] * 2, "list(ring), twice", of=of)


def test_buffers_do_not_share_items():
    (one, of), (other, _) = filled(2, "abc"), filled(3, "x")
    check_equal([list(one), list(other)], [["b", "c"], ["x"]], "two buffers' items", of=of)


class Item:
    pass


@contextlib.contextmanager
def garbage_collected():
    """At the end, free what the block made and nothing refers to; older objects take too long."""
    gc.disable()
    try:
        yield
        gc.collect(0)
    finally:
        gc.enable()


@pytest.mark.parametrize("capacity", [1, 4])
def test_dropped_items_are_let_go(capacity):
    with garbage_collected():
        ring = ring_lab.RingBuffer(capacity)
        items = [Item() for _ in range(3 * capacity)]
        alive = [weakref.ref(item) for item in items]
        while items:
            ring.append(items.pop(0))
    num_alive = sum(item() is not None for item in alive)
    of = f"RingBuffer({capacity}), {3 * capacity} objects appended"
    check_equal(num_alive, capacity, "how many objects are still in memory", of=of)


@pytest.mark.parametrize("capacity", [0, -1, -8])
def test_a_capacity_below_one_is_refused(capacity):
    check_raises(ValueError, ring_lab.RingBuffer, capacity, mentions=(capacity,))


def test_a_negative_count_is_refused():
    for count in (-1, -3, -100):
        check_raises(ValueError, latest, 3, range(5), count, mentions=(count,))


@settings(max_examples=60)
@given(st.integers(1, 9), st.lists(st.integers(-99, 99), max_size=40), st.integers(0, 12))
def test_any_stream_beside_a_list_that_keeps_everything(capacity, items, count):
    ring, of = ring_lab.RingBuffer(capacity), History(f"RingBuffer({capacity})")
    for i, item in enumerate(items):
        dropped = of.note(f"append({item})", ring.append(item))
        expected = tuple(items[i - capacity : i - capacity + 1]) if i >= capacity else ()
        check_equal(dropped, expected, "what was dropped", of=of)
    kept = items[-capacity:]
    check_equal(list(ring), kept, "list(ring)", of=of)
    check_equal([ring[~i] for i in range(len(kept))], kept[::-1], "ring[-1], ring[-2], …", of=of)
    check_equal(ring.latest(count), kept[max(0, len(kept) - count) :], f"latest({count})", of=of)
    check_true(len(ring) == len(kept), f"len(ring) is {len(ring)}, expected {len(kept)}", of=of)
