"""Grades week3/prefix_caching: hashes against hashlib, and a pool that knows what lies in it."""

import hashlib
import random as python_random
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from course.grading import History, check_equal, check_raises, check_true, lab

caching = lab("week3/prefix_caching")

# How many lines more a call may run in a pool of 5,000 blocks than in one of 50.
MORE_LINES = 40


def hashes_of(token_ids: Sequence[int], block_size: int, salt: str = "") -> list[bytes]:
    """The contract, word by word."""
    hashes, before = [], hashlib.sha256(salt.encode()).digest()
    for i in range(len(token_ids) // block_size):
        block = token_ids[i * block_size : (i + 1) * block_size]
        before = hashlib.sha256(before + struct.pack(f"<{block_size}Q", *block)).digest()
        hashes.append(before)
    return hashes


def shown(block_hash: object) -> str:
    """A hash as a reader can compare it, or what it is instead of a hash."""
    is_hash = isinstance(block_hash, bytes) and len(block_hash) == 32
    return f"{block_hash.hex()[:8]}…" if is_hash else f"no 32 bytes: {block_hash!r:.30}"


def check_hashes(got: list, expected: list[bytes], of: object = None) -> None:
    what = "the hashes in hexadecimal"
    check_equal(list(map(shown, got)), list(map(shown, expected)), what, of=of)
    check_true(got == expected, "the hashes differ behind their first 8 digits", of=of)


def check_hashes_of(token_ids: Sequence[int], block_size: int, *salt: str) -> None:
    got: list[bytes] = []
    caching.extend_hashes(got, token_ids, block_size, *salt)
    check_hashes(got, hashes_of(token_ids, block_size, *salt))


def tokens(count: int, start: int = 0) -> list[int]:
    """Token ids without a pattern that repeats."""
    return [(7919 * (i + start) ** 2 + 31) % 151_936 for i in range(count)]


# The contract's bytes, written with printf and piped through sha256sum.
FIRST = "5d8bb3bb5aa40477ed171b7100842eb16e616a7f53605a73de43b1c6cac6b89a"
SECOND = "a7d080946a97349fa0532a2c1f7ce3b910bd638fc2ee5d7a22d03516ea943f45"
SALTED = "7fe9f95e548605b2ecb4317ed6acb2c08b871570a2254fd82e722bbc77f1b6ab"


def test_hashes_by_hand():
    first, second, salted = map(bytes.fromhex, (FIRST, SECOND, SALTED))
    for token_ids, salt, expected in (
        ([1, 2], "", [first]),
        ([1, 2, 3, 4, 5], "", [first, second]),
        ([1, 2], "a", [salted]),
    ):
        got: list[bytes] = []
        caching.extend_hashes(got, token_ids, 2, salt)
        check_hashes(got, expected)


@pytest.mark.parametrize("block_size", [1, 2, 3, 16, 50])
@pytest.mark.parametrize("count", [0, 1, 2, 15, 16, 17, 48, 50, 99])
def test_hashes_of_full_blocks(count, block_size):
    check_hashes_of(tokens(count), block_size)


@pytest.mark.parametrize("salt", ["", "a", "tenant 7", "\0", "é 中文", "x" * 300])
@pytest.mark.parametrize("block_size", [1, 4])
def test_hashes_with_a_salt(block_size, salt):
    check_hashes_of(tokens(13), block_size, salt)


@pytest.mark.parametrize("token_id", [0, 1, 255, 256, 2**16, 2**31, 2**32 + 1, 2**63 - 1])
def test_hashes_of_any_token(token_id):
    check_hashes_of([token_id, 3, token_id], 1)
    check_hashes_of([3, token_id, token_id, 8], 2)


# ENGINE case 7: two blocks of two tokens that a careless way to write them takes for one.
ALIKE = {
    "the same digits": ([1, 23], [12, 3]),
    "the same digits, with a comma": ([1, 123], [1123, 1]),
    "the same low byte": ([0, 5], [256, 5]),
    "the same two low bytes": ([7, 5], [7 + 2**16, 5]),
    "the same four low bytes": ([7, 5], [7 + 2**32, 5]),
    "the same sum": ([2, 5], [3, 4]),
    "the same set": ([4, 9], [9, 4]),
    "the same product": ([2, 6], [3, 4]),
    "the same differences": ([5, 5], [6, 6]),
    "the same Python hash": ([2**61, 5], [1, 5]),
    "nothing and nothing": ([0, 0], [0, 1]),
}


@pytest.mark.parametrize("case", ALIKE)
def test_hashes_of_what_looks_alike(case):
    one, other = ALIKE[case]
    got: list[list[bytes]] = []
    for token_ids in (one, other, [*one, *other], [*other, *one]):
        got.append([])
        caching.extend_hashes(got[-1], token_ids, 2)
        check_hashes(got[-1], hashes_of(token_ids, 2))
    all_hashes = [block_hash for hashes in got for block_hash in hashes]
    of = f"the hashes of {one}, {other}, and of both in both orders, in blocks of 2"
    check_equal(len(set(all_hashes)), 4, "how many different hashes there are", of=of)


def test_hashes_of_equal_blocks_at_other_places():
    got: list[bytes] = []
    caching.extend_hashes(got, [9, 9] * 20, 2)
    check_equal(len(set(got)), 20, "how many different hashes 20 equal blocks have")


def test_hashes_depend_on_every_token_before():
    plain = tokens(24)
    before: list[bytes] = []
    caching.extend_hashes(before, plain, 4)
    for place in range(24):
        after: list[bytes] = []
        caching.extend_hashes(after, [*plain[:place], plain[place] + 1, *plain[place + 1 :]], 4)
        same = [a == b for a, b in zip(before, after, strict=True)]
        of = f"the hashes of 24 tokens in blocks of 4, before and after token {place} is changed"
        check_equal(same, [i < place // 4 for i in range(6)], "which of them stay", of=of)


@pytest.mark.parametrize("kind", [list, tuple, range])
def test_hashes_of_any_sequence(kind):
    token_ids = range(11) if kind is range else kind(tokens(11))
    got: list[bytes] = []
    caching.extend_hashes(got, token_ids, 3)
    check_hashes(got, hashes_of(list(token_ids), 3))


@pytest.mark.parametrize("salt", ["", "tenant"])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_hashes_of_a_sequence_that_grows(block_size, salt):
    token_ids, got = tokens(70), []
    draw = python_random.Random(block_size)
    end = 0
    of = History(f"a sequence that grows, in blocks of {block_size}, with the salt {salt!r}")
    while end < 70:
        end = min(70, end + draw.choice([0, 1, 1, 2, 5, 17]))
        caching.extend_hashes(got, token_ids[:end], block_size, salt)
        of.note(f"extend_hashes of the first {end} tokens", len(got))
        check_hashes(got, hashes_of(token_ids[:end], block_size, salt), of=of)
    check_equal(token_ids, tokens(70), "token_ids after the calls", of=of)


class Watched(Sequence):
    """A sequence that remembers which of its items were read."""

    def __init__(self, items: Sequence):
        self.items, self.read = items, set()

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        places = range(len(self.items))[index]
        self.read.update(places if isinstance(index, slice) else [places])
        return self.items[index]

    def __repr__(self):
        return f"{len(self)} items"


@pytest.mark.parametrize("num_known", [1, 30, 62])
def test_hashes_that_are_there_are_taken_over(num_known):
    token_ids, expected = Watched(tokens(1000)), hashes_of(tokens(1000), 16)
    got = expected[:num_known]
    caching.extend_hashes(got, token_ids, 16)
    check_hashes(got, expected)
    early = sorted(place for place in token_ids.read if place < 16 * num_known)
    check_equal(len(early), 0, f"how many tokens of the first {num_known} blocks were read")


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 2**63 - 1), max_size=30),
    st.integers(1, 7),
    st.text(max_size=12),
    st.integers(0, 30),
)
def test_hashes_of_anything_in_one_go_or_two(token_ids, block_size, salt, first):
    salt = salt.encode(errors="ignore").decode()
    check_hashes_of(token_ids, block_size, salt)
    got: list[bytes] = []
    caching.extend_hashes(got, token_ids[:first], block_size, salt)
    caching.extend_hashes(got, token_ids, block_size, salt)
    check_hashes(got, hashes_of(token_ids, block_size, salt))


@dataclass
class Guest:
    """A request of the test: its text, one letter a token, and how much of it is computed."""

    text: str
    salt: str
    num_computed: int = 0
    table: list[int] = field(default_factory=list)
    num_seen: int = 0

    def hashes(self, block_size: int) -> list[bytes]:
        return hashes_of(ids_of(self.text), block_size, self.salt)


def ids_of(text: str) -> list[int]:
    return [1000 * ord(letter) for letter in text]


class Oracle:
    """The contract in the plainest words: free blocks, tables, and hash → block."""

    def __init__(self, num_blocks: int, block_size: int, watermark: int, enabled: bool):
        self.num_blocks, self.block_size, self.watermark = num_blocks, block_size, watermark
        self.enabled = enabled
        self.free = list(range(num_blocks))
        self.index: dict[bytes, int] = {}

    def match(self, hashes: Sequence[bytes], num_tokens: int) -> list[int]:
        found = []
        for i, block_hash in enumerate(hashes):
            if (i + 1) * self.block_size >= num_tokens or block_hash not in self.index:
                break
            found.append(self.index[block_hash])
        return found

    def room(self, num_tokens: int, num_held: int, prefix: Sequence[int]) -> int:
        """Count the blocks that are left when a request has room for num_tokens tokens."""
        covered = (num_held + len(prefix)) * self.block_size
        missing = len(range(covered, num_tokens, self.block_size))
        return len([one for one in self.free if one not in prefix]) - missing

    def allocate(self, guest: Guest, num_tokens: int, prefix: Sequence[int]) -> bool:
        left = self.room(num_tokens, len(guest.table), prefix)
        if left < 0:
            return False
        others = [one for one in self.free if one not in prefix]
        new, self.free = others[: len(others) - left], others[len(others) - left :]
        guest.table += [*prefix, *new]
        self.index = {name: one for name, one in self.index.items() if one not in new}
        return True

    def publish(self, guest: Guest) -> None:
        hashes, num_full = guest.hashes(self.block_size), guest.num_computed // self.block_size
        for i in range(guest.num_seen, num_full):
            if self.enabled and hashes[i] not in self.index:
                self.index[hashes[i]] = guest.table[i]
        guest.num_seen = num_full


class Pool:
    """A manager beside the oracle, with a memory: which tokens' keys and values lie in a block.

    Whatever can be found must lie there, whole, and with the same tokens before it.
    """

    def __init__(
        self, num_blocks: int, block_size: int = 4, watermark: int = 0, enabled: bool = True
    ):
        sizes = num_blocks, block_size, watermark, enabled
        self.manager = caching.CachingBlockManager(*sizes)
        self.oracle = Oracle(*sizes)
        off = "" if enabled else ", enabled=False"
        self.of = History(f"CachingBlockManager({num_blocks}, {block_size}, {watermark}{off})")
        self.guests: dict[str, Guest] = {}
        self.names: set[str] = set()
        self.memory: dict[int, tuple[str, str]] = {}  # block → (salt, all tokens up to its last)
        self.known: dict[bytes, tuple[str, str]] = {}  # hash → what it stands for

    def begin(self, name: str, text: str, salt: str = "", num_tokens: int | None = None) -> bool:
        """Let a request find its beginning and get room; as many tokens as found are computed."""
        guest, size = Guest(text, salt), self.oracle.block_size
        hashes = guest.hashes(size)
        for i, block_hash in enumerate(hashes):
            self.known[block_hash] = salt, text[: (i + 1) * size]
        prefix = self.manager.match(hashes, len(text))
        salted = f", salt {salt!r}" if salt else ""
        self.of.note(f"match for {name}: `{told(text, size)}`{salted}", prefix)
        check_equal(type(prefix).__name__, "list", "the type of what match returns", of=self.of)
        self.check_prefix(guest, prefix)
        check_equal(prefix, self.oracle.match(hashes, len(text)), "what match returns", of=self.of)
        num_tokens = max(len(prefix) * size, len(text) if num_tokens is None else num_tokens)
        return self.allocate(name, guest, num_tokens, prefix)

    def check_prefix(self, guest: Guest, prefix: Sequence[int]) -> None:
        size = self.oracle.block_size
        left = len(guest.text) - len(prefix) * size
        text = f"{len(prefix)} blocks are found of {len(guest.text)} tokens: {left} left to compute"
        check_true(left > 0, text, of=self.of)
        for i, block_id in enumerate(prefix):
            wanted = guest.salt, guest.text[: (i + 1) * size]
            self.check_memory(block_id, wanted, f"block {block_id} is found")

    def check_memory(self, block_id: int, wanted: tuple[str, str], found: str) -> None:
        salt, text = wanted
        there = self.memory.get(block_id)
        size = self.oracle.block_size
        inside = "what was not computed" if there is None else f"`{told(there[1], size)}`"
        salts = f", salts {salt!r} and {there[0]!r}" if there and there[0] != salt else ""
        says = f"{found} for `{told(text, size)}`, and it holds {inside}{salts}"
        check_true(there == wanted, says, of=self.of)

    def allocate(self, name: str, guest: Guest, num_tokens: int, prefix: Sequence[int]) -> bool:
        size, before = self.oracle.block_size, list(guest.table)
        got = self.manager.can_admit(num_tokens, prefix) if not before else None
        if got is not None:
            left = self.oracle.room(num_tokens, 0, prefix)
            expected = left >= (self.oracle.watermark if self.guests else 0)
            what = f"can_admit({num_tokens}, {[*prefix]})"
            check_equal(got, expected, what, of=self.of)
        got = self.manager.allocate(name, num_tokens, prefix)
        shared = f", {[*prefix]}" if prefix else ""
        self.of.note(f"allocate({name!r}, {num_tokens}{shared})", got)
        self.names.add(name)
        table = list(self.manager.block_table(name))
        held = {one for other in self.guests.values() for one in other.table}
        for block_id in table[len(before) + len(prefix) :]:
            text = f"block {block_id} is given to {name!r} as new, and it is in a table already"
            check_true(block_id not in held, text, of=self.of)
            self.memory.pop(block_id, None)
        expected = self.oracle.allocate(guest, num_tokens, prefix)
        if guest.table:
            self.guests[name] = guest
        guest.num_computed = max(guest.num_computed, len(prefix) * size)
        check_equal(got, expected, "what allocate returns", of=self.of)
        self.check()
        return expected

    def add(self, name: str, text: str) -> bool:
        """Give a request more tokens, and room for them."""
        guest = self.guests[name]
        fits = self.allocate(name, guest, len(guest.text + text), ())
        if fits:
            guest.text += text
            for i, block_hash in enumerate(guest.hashes(self.oracle.block_size)):
                self.known[block_hash] = guest.salt, guest.text[: (i + 1) * self.oracle.block_size]
        return fits

    def compute(self, name: str, num_tokens: int | None = None) -> None:
        """Write keys and values of a request's tokens up to num_tokens, and publish."""
        guest, size = self.guests[name], self.oracle.block_size
        end = len(guest.text) if num_tokens is None else min(num_tokens, len(guest.text))
        end = max(min(end, len(guest.table) * size), guest.num_computed)
        for i in range(guest.num_computed // size, end // size):
            self.memory[guest.table[i]] = guest.salt, guest.text[: (i + 1) * size]
        guest.num_computed = end
        hashes = guest.hashes(size)
        self.manager.publish(name, hashes, end)
        self.of.note(f"publish for {name}: `{told(guest.text, size)}`, {end} computed", None)
        self.oracle.publish(guest)
        self.check()

    def end(self, name: str) -> None:
        self.manager.free(name)
        self.of.note(f"free({name!r})", None)
        guest = self.guests.pop(name, Guest("", ""))
        for block_id in reversed(guest.table):
            if not any(block_id in other.table for other in self.guests.values()):
                self.oracle.free.append(block_id)
        self.check()

    def check(self) -> None:
        """First what must hold in every pool, then what the oracle has."""
        self.check_blocks()
        for block_hash, wanted in self.known.items():
            block_id = self.manager.find(block_hash)
            if block_id is not None:
                self.check_memory(block_id, wanted, f"find gives block {block_id}")
        for name in sorted(self.names):
            guest = self.guests.get(name, Guest("", ""))
            table = list(self.manager.block_table(name))
            check_equal(table, guest.table, f"table of {name!r}", of=self.of)
        for block_hash, (salt, text) in self.known.items():
            salted = f" with the salt {salt!r}" if salt else ""
            what = f"what find gives for `{told(text, self.oracle.block_size)}`{salted}"
            expected = self.oracle.index.get(block_hash)
            check_equal(self.manager.find(block_hash), expected, what, of=self.of)
        got = self.manager.num_cached_blocks
        check_equal(got, len(self.oracle.index), "num_cached_blocks", of=self.of)

    def check_blocks(self) -> None:
        tables = {name: list(self.manager.block_table(name)) for name in sorted(self.names)}
        for block_id in range(self.oracle.num_blocks):
            holders = [name for name, table in tables.items() if block_id in table]
            count = self.manager.ref_count(block_id)
            text = f"ref_count({block_id}) is {count}; the tables that hold the block: {holders}"
            check_true(count == len(holders), text, of=self.of)
        held = sorted({block_id for table in tables.values() for block_id in table})
        free, num_blocks = self.manager.num_free_blocks, self.oracle.num_blocks
        text = f"{free} blocks are free, and in tables are {held}; the pool has {num_blocks} blocks"
        check_true(free + len(held) == num_blocks, text, of=self.of)

    def drain(self) -> None:
        """Take what is free block by block; then end everybody, and find what they left."""
        self.take_the_rest()
        for name in [*self.guests]:
            self.end(name)
        for salt, text in list(self.known.values()):
            self.begin("who looks for it", f"{text}z", salt)
            self.end("who looks for it")
        self.take_the_rest()

    def take_the_rest(self) -> None:
        guest, size = Guest("", ""), self.oracle.block_size
        while self.allocate("the rest", guest, (len(guest.table) + 1) * size, ()):
            pass


def told(text: str, block_size: int) -> str:
    """Show tokens block by block: abcd|ef."""
    return "|".join(text[i : i + block_size] for i in range(0, len(text), block_size))


def play(num_blocks: int, script: str, block_size: int = 4, **options) -> Pool:
    """Follow a script.

    "a begins abcdef", or "a begins abcdef with s" for a salt: look for its beginning, get room.
    "a computes 4": its first 4 tokens; without a number, all. "a adds xy": two more tokens.
    "a ends": its blocks are free.
    """
    pool = Pool(num_blocks, block_size, **options)
    for line in script.split(", "):
        name, verb, *rest = line.split()
        if verb == "begins":
            pool.begin(name, rest[0], *rest[2:])
        elif verb == "computes":
            pool.compute(name, *map(int, rest))
        elif verb == "adds":
            pool.add(name, rest[0])
        else:
            pool.end(name)
    return pool


LOOKUPS = {
    "nothing is there": "a begins abcdefghij, a computes, b begins klmnopqrst",
    "the same prompt": "a begins abcdefghij, a computes, b begins abcdefghij, b computes",
    "a longer one": "a begins abcdefghij, a computes, b begins abcdefghijklmnop, b computes",
    "a shorter one": "a begins abcdefghij, a computes, b begins abcdefg, b computes",
    "another first token": "a begins abcdefghij, a computes, b begins xbcdefghij, b computes",
    "another first block": "a begins abcdefghij, a computes, b begins xxxxefghij, b computes",
    "another second block": "a begins abcdefghijkl, a computes, b begins abcdexghijklm",
    "the same block elsewhere": "a begins abcdabcdabcd, a computes, b begins abcdabcdabcdabcd",
    "behind the end of the other": "a begins abcdefgh, a computes, a ends, b begins abcdefgh",
    "by three": "a begins abcdefgh, a computes, b begins abcdefghi, c begins abcdefghxyz",
    "less than a block": "a begins abcdef, a computes, b begins abc, c begins a",
    "what was chosen in decode": "a begins abcdef, a computes, a adds gh, a computes, "
    "a adds i, a computes, a ends, b begins abcdefghixyz",
    "a chain of three": "a begins abcdefgh, a computes, b begins abcdefghijkl, b computes, "
    "a ends, c begins abcdefghijklmn, b ends, c computes",
}


@pytest.mark.parametrize("case", LOOKUPS)
def test_match(case):
    play(16, LOOKUPS[case])


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 7, 8, 9, 12])
def test_match_leaves_a_token_to_compute(num_tokens, block_size):
    # ENGINE case 5: the prompt is there as a whole, and so is what a request before it went on to.
    text = "abcdefghijkl"[:num_tokens]
    play(
        40,
        f"a begins {text}, a computes, a adds mnopqrst, a computes, b begins {text}, b computes, "
        f"a ends, c begins {text}",
        block_size,
    )


def test_match_changes_nothing():
    pool = Pool(6)
    pool.begin("a", "abcdefghijkl")
    pool.compute("a")
    pool.end("a")
    hashes = hashes_of(ids_of("abcdefghijkl"), 4)
    for _ in range(3):
        pool.of.note("match for `abcd|efgh|ijkl`", pool.manager.match(hashes, 12))
        pool.check()
    check_equal(len(hashes), 3, "the number of hashes that match was given", of=pool.of)
    # Whoever only looked has taken nothing, and moved nothing in the queue either.
    pool.begin("b", "nopqrstuvwxyzABCD")
    pool.drain()


def test_match_of_nothing():
    pool = Pool(4)
    for hashes, num_tokens in (([], 1), ([], 7), ([bytes(32)], 5)):
        got = pool.manager.match(hashes, num_tokens)
        of = f"{pool.of}\nmatch({[*map(shown, hashes)]}, {num_tokens})"
        check_equal(got, [], "what match returns", of=of)
    check_equal(pool.manager.find(bytes(32)), None, "what find gives", of=pool.of)


PUBLISHED = {
    "nothing before it is computed": "a begins abcdefghij, b begins abcdefghij, a computes",
    "chunk by chunk": "a begins abcdefghijklmn, a computes 3, b begins abcdefghijklmn, "
    "a computes 4, c begins abcdefghijklmn, a computes 11, d begins abcdefghijklmn, a computes",
    "no block that is not full": "a begins abcdefg, a computes, b begins abcdefgh, b computes",
    "a block that fills in decode": "a begins abcdefg, a computes, a adds h, b begins abcdefghi, "
    "a computes, c begins abcdefghi",
    "room is not content": "a begins abcdefghijkl, a ends, b begins abcdefghijkl, b computes",
    "not the last token": "a begins abc, a computes, a adds d, b begins abcde, c begins abcd, "
    "a adds e, a computes 4, d begins abcde",
    "the same twice": "a begins abcdefgh, a computes, a computes, a computes, b begins abcdefghi",
    "behind what was found": "a begins abcdefgh, a computes, b begins abcdefghijklmnop, "
    "b computes 12, c begins abcdefghijklmnop, b computes, d begins abcdefghijklmnopq",
    "again after it has lost its blocks": "a begins abcdefghijkl, a computes 4, a ends, "
    "a begins abcdefghijkl, a computes 10, a ends, a begins abcdefghijkl, a computes",
    "another text under the same id": "a begins abcdefgh, a computes, a ends, "
    "a begins mnopqrstuvwx, a computes, b begins mnopqrstuvwxyz, a ends, a begins abcdefghi",
    "a short text under the same id": "a begins abcdefghijkl, a computes, a ends, "
    "a begins mnop, a computes, b begins mnopq",
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_publish(case):
    play(24, PUBLISHED[case])


# ENGINE case 9: who computes what is published already keeps the own block.
DUPLICATES = {
    "two at once": "a begins abcdefghij, b begins abcdefghij, a computes, b computes",
    "in the other order": "a begins abcdefghij, b begins abcdefghij, b computes, a computes",
    "three at once": "a begins abcdefghij, b begins abcdefghij, c begins abcdefghij, b computes, "
    "c computes, a computes, d begins abcdefghijk, b ends, e begins abcdefghijk",
    "block by block in turns": "a begins abcdefghij, b begins abcdefghij, a computes 4, "
    "b computes 8, a computes, b computes, c begins abcdefghij, b ends, a ends",
    "the first one ends": "a begins abcdefghij, b begins abcdefghij, a computes, b computes, "
    "a ends, c begins abcdefghij, b ends, c computes",
    "the second one ends": "a begins abcdefghij, b begins abcdefghij, a computes, b computes, "
    "b ends, c begins abcdefghij, a ends, c computes",
    "both end": "a begins abcdefghij, b begins abcdefghij, a computes, b computes, b ends, a ends, "
    "c begins abcdefghij, c computes, d begins abcdefghij",
    "the last block of a full hit": "a begins abcdefgh, a computes, b begins abcdefgh, b computes, "
    "a ends, b ends, c begins abcdefghij",
}


@pytest.mark.parametrize("case", DUPLICATES)
@pytest.mark.parametrize("num_blocks", [15, 20])
def test_publish_what_another_one_has_published(num_blocks, case):
    play(num_blocks, DUPLICATES[case]).drain()


def test_publish_never_later_what_was_there_once():
    # b's own copy stays unpublished when the block that was first is written over.
    pool = Pool(6)
    for name in "ab":
        pool.begin(name, "abcdefgh")
    for name in "ab":
        pool.compute(name)
    pool.end("a")
    pool.begin("c", "nopqrstuvwxyzABC"[:16])
    pool.compute("b")
    pool.end("c")
    pool.add("b", "ijkl")
    pool.compute("b")
    pool.drain()


def test_publish_under_hashes_that_begin_alike():
    manager = caching.CachingBlockManager(6, 4)
    hashes = {"a": b"x" * 31 + b"a", "b": b"x" * 31 + b"b", "c": b"y" + b"x" * 30 + b"a"}
    for name, block_hash in hashes.items():
        manager.allocate(name, 4)
        manager.publish(name, [block_hash], 4)
    got = {name: manager.find(block_hash) for name, block_hash in hashes.items()}
    of = "three requests of one block; their hashes, made by hand, differ in one byte"
    check_equal(got, {name: manager.block_table(name)[0] for name in hashes}, "find", of=of)


# ENGINE case 8: a block that is taken anew is forgotten; one that is found is no longer free.
REUSED = {
    "the last blocks first": "a begins abcdefghijklmnop, a computes, a ends, b begins qrstuvwxyz, "
    "c begins abcdefghijkl, b ends, c computes",
    "the free ones before": "a begins abcdefgh, a computes, a ends, b begins nopqrstuvwxy, "
    "c begins abcdefghi",
    "all of them": "a begins abcdefghijklmnop, a computes, a ends, "
    "b begins ABCDEFGHIJKLMNOPQRSTUVWX, b computes, b ends, c begins abcdefghijklmnop",
    "and published anew": "a begins abcdefghijkl, a computes, a ends, "
    "b begins ABCDEFGHIJKLMNOPQRSTUVWX, b computes, b ends, a begins abcdefghijkl, a computes, "
    "a ends, c begins abcdefghijklm, b begins ABCDEFGHI",
    "by a request that grows": "a begins abcdefgh, a computes, a ends, b begins mnopqrstuvwxyzAB, "
    "b computes, b adds CDEF, c begins abcdefgh, b computes",
    "while it is held": "a begins abcdefgh, a computes, b begins abcdefghi, a ends, "
    "c begins mnopqrstuvwx, b ends, d begins abcdefgh",
    "a hit makes it young": "a begins abcdefgh, a computes, a ends, b begins mnopqrst, b computes, "
    "b ends, c begins abcdefghi, c ends, d begins ABCDEFGHIJKL, e begins abcdefgh",
    "a hit on all that is free": "a begins abcdefghijklmnopqrstuvwx, a computes, a ends, "
    "b begins abcdefghijklmnopqrstuvwx, b computes, b ends, c begins abcdefghi",
    "a hit and new ones in one call": "a begins abcdefghijkl, a computes, a ends, "
    "b begins ABCDEFGHIJKL, b computes, b ends, c begins abcdefghMNOPQRSTUV, c computes",
}


@pytest.mark.parametrize("case", REUSED)
def test_reused_blocks(case):
    play(6, REUSED[case]).drain()


def test_reused_blocks_keep_the_beginning_for_longest():
    pool, text = Pool(8), "abcdefghijklmnopqrstuvwxyzABCDEF"
    pool.begin("a", text)
    pool.compute("a")
    pool.end("a")
    pool.begin("b", "1234")
    for num_taken in range(1, 8):
        found = pool.manager.match(hashes_of(ids_of(text), 4), 99)
        what = f"how many blocks of a are found when {num_taken} of 8 were taken"
        check_equal(len(found), 8 - num_taken, what, of=pool.of)
        pool.add("b", "5678")


def test_match_stops_at_a_gap():
    # a publishes the first block and b the second and third; then a's is written over.
    pool = Pool(9)
    pool.begin("a", "abcdefghijklm")
    pool.begin("b", "abcdefghijklm")
    pool.compute("a", 4)
    pool.compute("b")
    pool.end("a")
    pool.begin("c", "nopqrstuvwxyzABCDEFGH"[:20])
    pool.begin("d", "abcdefghijklm", num_tokens=0)
    pool.compute("b")
    pool.drain()


# ENGINE case 6: the last but one finds blocks, and cannot get the others.
FAILURES = {
    "found blocks are free": "a begins abcdefgh, a computes, a ends, b begins mnopqrstuvwx, "
    "c begins abcdefghijklmnop, c begins abcdefghi",
    "found blocks are held": "a begins abcdefghi, a computes, b begins mnopqrst, "
    "c begins abcdefghijkl, b ends, c begins abcdefghijkl, c computes",
    "one block short": "a begins abcdefgh, a computes, a ends, b begins mnopqrstuv, "
    "c begins abcdefghijklm, b ends, c begins abcdefghijklm",
    "nothing is free": "a begins abcdefghijklmnopqrst, a computes, b begins abcdefghijklmnopqrst, "
    "a ends, b begins abcdefghijklmnopqrst, b computes",
    "one that grows": "a begins abcdefgh, a computes, a ends, b begins mnopqrstuvwx, b computes, "
    "b adds ABCDEFGHI, b adds ABCD, c begins abcdefgh",
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_hit_changes_nothing_when_the_rest_does_not_fit(case):
    play(5, FAILURES[case]).drain()


SALTS = {
    "two tenants": "a begins abcdefghij with x, a computes, b begins abcdefghij with y, b computes",
    "with and without": "a begins abcdefghij, a computes, b begins abcdefghij with y, b computes",
    "the same tenant": "a begins abcdefghij with x, a computes, b begins abcdefghij with x",
    "each its own": "a begins abcdefghi with x, a computes, b begins abcdefghi with y, b computes, "
    "a ends, b ends, c begins abcdefghi with x, d begins abcdefghi with y, e begins abcdefghi",
}


@pytest.mark.parametrize("case", SALTS)
def test_tenants(case):
    play(16, SALTS[case]).drain()


@pytest.mark.parametrize("case", [*LOOKUPS][:4])
@pytest.mark.parametrize("watermark", [0, 2])
def test_a_manager_that_is_not_enabled(watermark, case):
    play(16, LOOKUPS[case], watermark=watermark, enabled=False).drain()


def test_a_manager_that_is_not_enabled_needs_no_hashes():
    manager = caching.CachingBlockManager(8, 4, 0, False)
    of = "CachingBlockManager(8, 4, enabled=False); allocate for 12 tokens, publish without hashes"
    manager.allocate("a", 12)
    manager.publish("a", [], 12)
    check_equal(manager.num_cached_blocks, 0, "num_cached_blocks", of=of)
    check_equal(manager.match(hashes_of(tokens(12), 4), 13), [], "what match returns", of=of)


@pytest.mark.parametrize("watermark", [0, 1, 3, 20])
def test_the_watermark_and_what_is_found(watermark):
    play(
        10,
        "a begins abcdefghijkl, a computes, a ends, b begins abcdefghijklmnop, b computes, "
        "c begins abcdefghijklmnopq, c computes, d begins ABCDEFGHIJKLMNOP, b ends, c ends",
        watermark=watermark,
    ).drain()


def test_names_that_are_kept():
    manager = caching.CachingBlockManager(7, block_size=3, watermark=2, enabled=False)
    got = manager.num_blocks, manager.block_size, manager.watermark, manager.enabled
    what = "num_blocks, block_size, watermark, enabled"
    of = "CachingBlockManager(7, block_size=3, watermark=2, enabled=False)"
    check_equal(got, (7, 3, 2, False), what, of=of)
    manager = caching.CachingBlockManager(5)
    got = manager.num_blocks, manager.block_size, manager.watermark, manager.enabled
    check_equal(got, (5, 16, 0, True), what, of="CachingBlockManager(5)")


@pytest.mark.parametrize("sizes, value", [((0, 4, 0), 0), ((8, -2, 0), -2), ((8, 4, -1), -1)])
def test_a_manager_refuses_to_have_nothing(sizes, value):
    def make(num_blocks, block_size, watermark):
        return caching.CachingBlockManager(num_blocks, block_size, watermark)

    check_raises(ValueError, make, *sizes, mentions=[value])


def test_managers_remember_each_for_itself():
    one, other = Pool(8), Pool(8)
    one.begin("a", "abcdefghi")
    one.compute("a")
    for pool in (other, one):
        pool.begin("b", "abcdefghi")
        pool.compute("b")
        pool.drain()


def test_block_table_is_no_copy():
    pool = Pool(8)
    pool.begin("a", "abcdefghi")
    table = pool.manager.block_table("a")
    pool.add("a", "jklmnop")
    expected = pool.guests["a"].table
    what = "the table of 'a' that was asked for before it grew"
    check_equal(list(table), expected, what, of=pool.of)


def test_free_of_who_holds_nothing():
    pool = Pool(8)
    pool.end("x")
    pool.begin("a", "abcdefghi")
    pool.compute("a")
    for _ in range(2):
        pool.end("a")
    pool.end("x")
    pool.drain()


def test_publish_looks_at_new_blocks_only():
    manager = caching.CachingBlockManager(600, 16)
    of = History("CachingBlockManager(600, 16), a request of 500 blocks")
    hashes = hashes_of(tokens(8000), 16)
    manager.allocate("a", 8000)
    for num_before, num_full in ((0, 400), (400, 401), (401, 401), (401, 450), (450, 500)):
        watched = Watched(hashes)
        manager.publish("a", watched, 16 * num_full + 5 * (num_full < 500))
        of.note(f"publish, now that {num_full} blocks are full", None)
        early = [place for place in watched.read if place < num_before]
        what = f"how many hashes of the {num_before} blocks before were read"
        check_equal(len(early), 0, what, of=of)
        check_equal(manager.num_cached_blocks, num_full, "num_cached_blocks", of=of)


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
    """Use a pool in which nearly everything is free and can be found."""
    manager = caching.CachingBlockManager(num_blocks, 4, 1)
    token_ids = tokens(4 * num_blocks)
    manager.allocate("a", 4 * num_blocks)
    manager.publish("a", hashes_of(token_ids, 4), 4 * num_blocks)
    manager.free("a")
    hashes = hashes_of(token_ids[:20], 4)
    others = hashes_of(tokens(40, start=10**6), 4)
    calls = {
        "num_cached_blocks": lambda: manager.num_cached_blocks,
        "find": lambda: manager.find(hashes[2]),
        "match": lambda: manager.match(hashes, 20),
        "can_admit": lambda: manager.can_admit(20, manager.match(hashes, 20)),
        "allocate with what was found": lambda: manager.allocate(
            "b", 24, manager.match(hashes, 20)
        ),
        "allocate": lambda: manager.allocate("c", 40),
        "publish": lambda: manager.publish("c", others, 40),
        "free": lambda: manager.free("c"),
    }
    return {name: num_lines(call) for name, call in calls.items()}


def test_no_call_takes_longer_because_the_pool_is_larger():
    small, large = lines_of_calls(50), lines_of_calls(5000)
    for name, count in large.items():
        check_true(
            count <= small[name] + MORE_LINES,
            f"{name} takes {small[name]} steps in a pool of 50 blocks, {count:,} in one of 5,000; "
            "a step is a line of Python",
            of="CachingBlockManager; the same calls in two pools of which most is free and found",
        )


TREE = ["abcdefgh", "abcdefghijkl", "abcdxxxx", "mnop", "mnopqrst", "abab", "x"]


def use(pool: Pool, draw: python_random.Random, num_names: int) -> None:
    """Do one call that the contract allows; texts share beginnings and are long enough to."""
    name = f"r{draw.randrange(num_names)}"
    guest = pool.guests.get(name)
    kind = draw.random()
    if guest is None:
        text = draw.choice(TREE) + "".join(draw.choices("ab", k=draw.randint(0, 9)))
        num_tokens = draw.choice([None, None, draw.randint(0, len(text))])
        pool.begin(name, text, draw.choice(["", "", "", "t"]), num_tokens)
    elif kind < 0.55:
        pool.compute(name, draw.choice([None, draw.randint(0, len(guest.text))]))
    elif kind < 0.8:
        pool.add(name, "".join(draw.choices("ab", k=draw.randint(1, 5))))
    else:
        pool.end(name)


@pytest.mark.parametrize("seed", range(12))
def test_random_calls(seed):
    draw = python_random.Random(seed)
    # Short runs in small pools come first: the first failure is the one to read.
    pool = Pool(4 + 3 * seed, draw.choice([1, 2, 2, 3, 4, 8]), draw.randint(0, 2))
    for _ in range(20 + 12 * seed):
        use(pool, draw, 2 + seed // 2)
    pool.drain()


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(1, 4), st.randoms(use_true_random=False))
def test_anything(num_blocks, block_size, draw):
    pool = Pool(num_blocks, block_size)
    for _ in range(15):
        use(pool, draw, 3)
    pool.drain()
