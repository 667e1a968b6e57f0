"""Grades basic/lru_cache against a plain list of entries, and counts what is done with keys."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from course.grading import History, check_equal, check_raises, check_true, lab

lru_lab = lab("basic/lru_cache")

MAX_KEY_OPERATIONS = 32


class Plain:
    """The contract, word by word: a list of [key, value, pins], the latest use last."""

    def __init__(self, capacity):
        self.capacity, self.entries = capacity, []

    def find(self, key):
        return next((entry for entry in self.entries if entry[0] == key), None)

    def use(self, entry):
        self.entries.remove(entry)
        self.entries.append(entry)

    def get(self, key):
        entry = self.find(key)
        self.use(entry)
        return entry[1]

    def put(self, key, value):
        evicted, entry = None, self.find(key)
        if entry is None:
            if len(self.entries) == self.capacity:
                oldest = next(entry for entry in self.entries if not entry[2])
                self.entries.remove(oldest)
                evicted = oldest[0], oldest[1]
            entry = [key, value, 0]
            self.entries.append(entry)
        entry[1] = value
        self.use(entry)
        return evicted

    def pin(self, key):
        self.find(key)[2] += 1

    def unpin(self, key):
        entry = self.find(key)
        entry[2] -= 1
        if entry[2] == 0:
            self.use(entry)

    def refuses(self, name, key):
        """Name the error that a call has to raise, or None."""
        entry = self.find(key)
        if name == "put":
            is_full = len(self.entries) == self.capacity
            return (
                ValueError
                if entry is None and is_full and all(e[2] for e in self.entries)
                else None
            )
        if entry is None:
            return KeyError
        return ValueError if name == "unpin" and not entry[2] else None

    def evictable(self):
        return [key for key, _, pins in self.entries if not pins]


class Pair:
    """A cache beside the plain one; every call is told and compared."""

    def __init__(self, capacity):
        self.cache, self.plain = lru_lab.LRUCache(capacity), Plain(capacity)
        self.of = History(f"LRUCache({capacity})")

    def do(self, name, *args):
        text = f"{name}({', '.join(map(repr, args))})"
        error = self.plain.refuses(name, args[0])
        if error is not None:
            self.refused(error, name, *args)
        else:
            got = self.of.note(text, getattr(self.cache, name)(*args))
            check_equal(got, getattr(self.plain, name)(*args), f"what {text} returns", of=self.of)
        self.check()

    def refused(self, error, name, *args):
        """Hold a call to an error; returns the error's text."""
        text = f"{name}({', '.join(map(repr, args))})"
        try:
            self.of.note(text, getattr(self.cache, name)(*args))
        except (KeyError, ValueError) as raised:
            said = type(raised).__name__
            self.of.note(text, f"raises {said}")
            check_equal(said, error.__name__, f"the error of {text}", of=self.of)
            return str(raised)
        check_equal("nothing", error.__name__, f"what {text} raises", of=self.of)

    def check(self):
        evictable = self.plain.evictable()
        check_equal(list(self.cache), evictable, "the keys in the order of eviction", of=self.of)
        check_equal(len(self.cache), len(self.plain.entries), "len", of=self.of)
        keys = sorted(entry[0] for entry in self.plain.entries)
        found = [key for key in "abcdefgh" if key in self.cache]
        check_equal(found, keys, "the keys that are `in` it", of=self.of)


def run(capacity, *calls):
    """Do calls such as "put a 1", "get a", "pin a"; returns the pair."""
    pair = Pair(capacity)
    for call in calls:
        name, key, *value = call.split()
        pair.do(name, key, *map(int, value))
    return pair


@pytest.mark.parametrize("capacity", [1, 2, 3, 6])
def test_the_oldest_entry_goes_first(capacity):
    run(capacity, *(f"put {key} {i}" for i, key in enumerate("abcdefgh")))


def test_get_is_a_use():
    run(3, "put a 1", "put b 2", "put c 3", "get a", "put d 4", "get c", "put e 5", "put f 6")


def test_put_of_a_known_key_is_a_use_and_evicts_nothing():
    run(3, "put a 1", "put b 2", "put c 3", "put a 4", "put d 5", "get a", "put a 6", "put e 7")
    run(1, "put a 1", "put a 2", "get a", "put b 3", "put b 4", "get b")


def test_looking_for_a_key_is_no_use():
    pair = run(2, "put a 1", "put b 2")
    for _ in range(3):
        pair.of.note("'a' in it", "a" in pair.cache)
        list(pair.cache)
    pair.do("put", "c", 3)


def test_a_pinned_entry_stays():
    run(3, "put a 1", "put b 2", "put c 3", "pin a", "put d 4", "put e 5", "put f 6", "get a")


def test_the_last_unpin_is_a_use():
    run(3, "put a 1", "put b 2", "put c 3", "pin a", "unpin a", "put d 4", "put e 5", "put f 6")


def test_each_pin_needs_an_unpin():
    start = ("put a 1", "put b 2", "pin a", "pin a", "unpin a")
    run(2, *start, "put c 3", "put d 4", "unpin a", "put e 5", "put f 6")


def test_a_pinned_entry_may_be_read_and_replaced():
    start = ("put a 1", "put b 2", "pin a", "get a", "put a 3", "get a")
    run(2, *start, "put c 4", "unpin a", "put d 5", "put e 6")


def test_pins_do_not_outlive_an_entry():
    run(1, "put a 1", "pin a", "unpin a", "put b 2", "put a 3", "put c 4", "unpin a")
    run(2, "put a 1", "pin a", "unpin a", "put b 2", "put c 3", "put a 4", "unpin a")


@pytest.mark.parametrize("capacity", [1, 2, 4])
def test_when_all_are_pinned_a_new_key_is_refused(capacity):
    keys = "abcd"[:capacity]
    pair = run(capacity, *(f"put {key} 1" for key in keys), *(f"pin {key}" for key in keys))
    text = pair.refused(ValueError, "put", "x", 9)
    check_true(str(capacity) in text, f"the error does not name {capacity}: {text}", of=pair.of)
    pair.check()
    for key in keys:
        pair.do("put", key, 5)
        pair.do("unpin", key)
    pair.do("put", "e", 6)


@pytest.mark.parametrize("name", ["get", "pin", "unpin"])
def test_an_unknown_key_is_refused(name):
    run(2, f"{name} a")
    run(2, "put a 1", f"{name} b")
    run(2, "put a 1", "put b 2", "put c 3", f"{name} a")


def test_unpin_of_an_entry_without_a_pin_is_refused():
    run(2, "put a 1", "unpin a")
    run(2, "put a 1", "pin a", "unpin a", "unpin a")
    cache = lru_lab.LRUCache(2)
    cache.put("r17", 1)
    check_raises(ValueError, cache.unpin, "r17", mentions=("r17",))


@pytest.mark.parametrize("value", [None, 0, "", (), False], ids=repr)
def test_any_object_is_a_value(value):
    cache, of = lru_lab.LRUCache(1), History("LRUCache(1)")
    check_equal(of.note("put", cache.put("a", value)), None, "what put returns", of=of)
    check_equal(of.note("get", cache.get("a")), value, "what get returns", of=of)
    check_equal(of.note("put", cache.put("b", 1)), ("a", value), "what put returns", of=of)


def test_any_hashable_object_is_a_key():
    cache, of = lru_lab.LRUCache(2), History("LRUCache(2)")
    for key in (None, 0, b"\x00", (1, 2), ""):
        of.note(f"put({key!r}, 7)", cache.put(key, 7))
        check_equal(of.note(f"get({key!r})", cache.get(key)), 7, "the value", of=of)
    check_equal(list(cache), [(1, 2), ""], "the keys in the order of eviction", of=of)


@pytest.mark.parametrize("capacity", [0, -1, -9])
def test_a_capacity_below_one_is_refused(capacity):
    check_raises(ValueError, lru_lab.LRUCache, capacity, mentions=(capacity,))


CALLS = st.tuples(
    st.sampled_from(["get", "put", "put", "pin", "unpin"]),
    st.sampled_from("abcdef"),
    st.integers(0, 9),
)


@settings(max_examples=100)
@given(st.integers(1, 4), st.lists(CALLS, max_size=30))
def test_any_calls_beside_a_plain_cache(capacity, calls):
    pair = Pair(capacity)
    for name, key, value in calls:
        pair.do(name, key, *([value] if name == "put" else []))


@pytest.mark.parametrize("seed", range(3))
def test_many_calls_beside_a_plain_cache(seed):
    generator, pair = random.Random(seed), Pair(5)
    for i in range(400):
        name = generator.choice(["get", "get", "put", "put", "pin", "unpin", "unpin"])
        pair.do(name, generator.choice("abcdefgh"), *([i] if name == "put" else []))


class CountedKey:
    """A key that counts how often any key is hashed or compared."""

    num_operations = 0

    def __init__(self, number):
        self.number = number

    def __hash__(self):
        CountedKey.num_operations += 1
        return hash(self.number)

    def __eq__(self, other):
        CountedKey.num_operations += 1
        return self.number == other.number


@pytest.mark.parametrize("pinned", ["none", "all but one", "the oldest half"])
def test_the_work_of_a_call_does_not_grow(pinned):
    capacity = 600
    cache, keys = lru_lab.LRUCache(capacity), [CountedKey(i) for i in range(capacity + 40)]
    for key in keys[:capacity]:
        cache.put(key, key.number)
    num_pinned = {"none": 0, "all but one": capacity - 1, "the oldest half": capacity // 2}[pinned]
    for key in keys[:num_pinned]:
        cache.pin(key)
    last = keys[capacity - 1]
    for new in keys[capacity:]:
        for name, *args in (("get", last), ("pin", last), ("unpin", last), ("put", new, 0)):
            CountedKey.num_operations = 0
            getattr(cache, name)(*args)
            count = CountedKey.num_operations
            check_true(
                count < MAX_KEY_OPERATIONS,
                f"{name} hashed or compared keys {count:,} times; "
                f"allowed: less than {MAX_KEY_OPERATIONS}",
                of=f"LRUCache({capacity}), full; pinned: {pinned}",
            )
        last = new
