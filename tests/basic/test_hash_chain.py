"""Grades basic/hash_chain against hashlib and struct, fed with the contract's bytes."""

import hashlib
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from course.grading import check_equal, check_raises, check_true, lab

hash_lab = lab("basic/hash_chain")


def oracle(token_ids, block_size, salt=b""):
    """The contract, word by word."""
    keys, before = [], b"\x00" * 32 + struct.pack("<q", len(salt)) + salt
    for i in range(len(token_ids) // block_size):
        block = token_ids[i * block_size : (i + 1) * block_size]
        before = hashlib.sha256(before + struct.pack(f"<{block_size}q", *block)).digest()
        keys.append(before)
    return keys


def shown(key):
    """A key as a reader can compare it: its first hex digits, or what it is instead of a key."""
    is_key = isinstance(key, bytes) and len(key) == 32
    return f"{key.hex()[:8]}…" if is_key else f"no 32 bytes: {key!r:.30}"


def check_keys(got, expected, what="the keys"):
    check_equal(type(got).__name__, "list", "the type of the result")
    check_equal(list(map(shown, got)), list(map(shown, expected)), f"{what} in hexadecimal")
    check_true(got == expected, f"{what} differ behind their first 8 digits")


def check_keys_of(token_ids, block_size, *salt):
    got = hash_lab.block_keys(token_ids, block_size, *salt)
    check_keys(got, oracle(token_ids, block_size, *salt))


def tokens(count, start=0):
    """Token ids without a pattern that repeats."""
    return [(7919 * (i + start) ** 2 + 31) % 151_936 for i in range(count)]


# The contract's bytes, written with printf and piped through sha256sum.
FIRST = "4bf7f8c17d1f0f970b5a8a289403c2b32f0e3b2928b5a508073ddeaa6fd1421f"
SECOND = "7c537df659a977f1dee13b6caecf6728cbb726d73fe66a48e6419c6316b6ddde"


def test_keys_by_hand():
    first, second = bytes.fromhex(FIRST), bytes.fromhex(SECOND)
    check_keys(hash_lab.block_keys([1, 2], 2), [first])
    check_keys(hash_lab.block_keys([1, 2, 3, 4, 5], 2), [first, second])


@pytest.mark.parametrize("block_size", [1, 2, 3, 16, 50])
@pytest.mark.parametrize("count", [0, 1, 2, 15, 16, 17, 48, 50, 99])
def test_keys_of_full_blocks(count, block_size):
    check_keys_of(tokens(count), block_size)


@pytest.mark.parametrize(
    "salt", [b"", b"a", b"tenant 7", b"\x00", b"\x00" * 40, bytes(range(256)) * 2]
)
@pytest.mark.parametrize("block_size", [1, 4])
def test_keys_with_a_salt(block_size, salt):
    check_keys_of(tokens(13), block_size, salt)


def test_a_salt_cannot_be_mistaken_for_tokens():
    token = struct.pack("<q", 5)
    of = "block_keys of the tokens [5] with no salt, and of none of them salted with their bytes"
    plain = hash_lab.block_keys([5, 6], 2)
    salted = hash_lab.block_keys([6], 1, token)
    check_true(plain != salted, "two different sequences have the same key", of=of)


@pytest.mark.parametrize("token", [0, -1, 1, 255, 256, 2**31, 2**32 + 1, 2**63 - 1, -(2**63)])
def test_keys_of_any_token(token):
    check_keys_of([token, 3, token], 1)
    check_keys_of([3, token, token, 8], 2)


def test_a_key_depends_on_every_token_before_it():
    plain = tokens(24)
    before = hash_lab.block_keys(plain, 4)
    for place in range(24):
        changed = [*plain[:place], plain[place] + 1, *plain[place + 1 :]]
        after = hash_lab.block_keys(changed, 4)
        same = [a == b for a, b in zip(before, after, strict=True)]
        of = f"block_keys of 24 tokens in blocks of 4, before and after token {place} is changed"
        check_equal(same, [i < place // 4 for i in range(6)], "which keys stay", of=of)


def test_equal_blocks_at_other_places_have_other_keys():
    keys = hash_lab.block_keys([9, 9] * 20, 2)
    check_equal(len(set(keys)), 20, "how many different keys 20 equal blocks have")


@pytest.mark.parametrize("kind", [list, tuple, range])
def test_tokens_in_any_sequence(kind):
    token_ids = range(11) if kind is range else kind(tokens(11))
    check_keys(hash_lab.block_keys(token_ids, 3), oracle(list(token_ids), 3))


def test_arguments_are_left_alone():
    token_ids = tokens(10)
    known = oracle(token_ids, 3)[:1]
    result = hash_lab.block_keys(token_ids, 3, b"", known)
    check_equal(token_ids, tokens(10), "token_ids after the call")
    check_equal(known, oracle(tokens(10), 3)[:1], "known after the call")
    check_true(result is not known, "the result is the list of known keys, not a new one")
    complete = oracle(token_ids, 3)
    result = hash_lab.block_keys(token_ids, 3, b"", complete)
    check_true(result is not complete, "the result is the list of known keys, not a new one")


@pytest.mark.parametrize("num_known", [0, 1, 2, 5])
@pytest.mark.parametrize("salt", [b"", b"tenant"])
def test_known_keys_are_taken_over(num_known, salt):
    expected = oracle(tokens(22), 4, salt)
    got = hash_lab.block_keys(tokens(22), 4, salt, expected[:num_known])
    check_keys(got, expected)
    other = [bytes([i]) * 32 for i in range(num_known)]
    got = hash_lab.block_keys(tokens(22), 4, salt, other)
    check_keys(got[:num_known], other, "the first keys, which were known,")


class Watched(Sequence):
    """A sequence of tokens that remembers which of them were read."""

    def __init__(self, items):
        self.items, self.read = items, set()

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        places = range(len(self.items))[index]
        self.read.update(places if isinstance(index, slice) else [places])
        return self.items[index]

    def __repr__(self):
        return f"{len(self)} tokens"


@pytest.mark.parametrize("num_known", [1, 30, 62])
def test_tokens_of_known_blocks_are_not_read(num_known):
    token_ids, expected = Watched(tokens(1000)), oracle(tokens(1000), 16)
    got = hash_lab.block_keys(token_ids, 16, b"", expected[:num_known])
    check_keys(got, expected)
    early = sorted(place for place in token_ids.read if place < 16 * num_known)
    check_equal(len(early), 0, f"how many tokens of the first {num_known} blocks were read")


@pytest.mark.parametrize("block_size", [0, -1, -16])
def test_a_block_size_below_one_is_refused(block_size):
    for count in (0, 5):
        check_raises(
            ValueError, hash_lab.block_keys, tokens(count), block_size, mentions=(block_size,)
        )


@pytest.mark.parametrize("count, num_known", [(0, 1), (7, 2), (8, 3), (11, 9)])
def test_too_many_known_keys_are_refused(count, num_known):
    known = [bytes([i]) * 32 for i in range(num_known)]
    check_raises(
        ValueError, hash_lab.block_keys, tokens(count), 4, known=known, mentions=(num_known,)
    )


@pytest.mark.parametrize("token", [2**63, -(2**63) - 1, 10**30])
def test_a_token_out_of_range_is_refused(token):
    check_raises(ValueError, hash_lab.block_keys, [1, token], 2, mentions=(token,))
    check_raises(ValueError, hash_lab.block_keys, [1, 2, 3, token], 2, mentions=(token,))


class Cache:
    """A container that counts what it is asked."""

    def __init__(self, keys):
        self.keys, self.asked = set(keys), []

    def __contains__(self, key):
        self.asked.append(key)
        return key in self.keys

    def __repr__(self):
        return f"{len(self.keys)} keys"


def names(count):
    return [bytes([65 + i]) for i in range(count)]


PREFIXES = {
    "nothing is cached": ((), 0),
    "all": ((0, 1, 2, 3, 4, 5), 6),
    "the first": ((0,), 1),
    "the first half": ((0, 1, 2), 3),
    "all but the first": ((1, 2, 3, 4, 5), 0),
    "all but the last": ((0, 1, 2, 3, 4), 5),
    "a gap": ((0, 1, 3, 4, 5), 2),
    "two gaps": ((0, 2, 4), 1),
    "the last": ((5,), 0),
}


@pytest.mark.parametrize("case", PREFIXES)
def test_longest_prefix(case):
    cached, expected = PREFIXES[case]
    keys = names(6)
    of = f"longest_prefix of 6 blocks, A to F; cached: {case}"
    for container in (set, list, frozenset, dict.fromkeys):
        got = hash_lab.longest_prefix(keys, container(keys[i] for i in cached))
        check_equal(got, expected, "the number of blocks", of=of)
    cache = Cache(keys[i] for i in cached)
    check_equal(hash_lab.longest_prefix(keys, cache), expected, "the number of blocks", of=of)
    check_equal(cache.asked, keys[: expected + 1], "what the cache was asked", of=of)


def test_longest_prefix_of_no_blocks():
    check_equal(hash_lab.longest_prefix([], {b"A"}), 0, "the number of blocks")


@pytest.mark.parametrize("num_common", [0, 1, 15, 16, 17, 40, 64, 70])
def test_two_prompts_share_their_common_beginning(num_common):
    one = tokens(70)
    other = [*one[:num_common], *tokens(70 - num_common, start=1000)]
    cached = set(hash_lab.block_keys(one, 16))
    got = hash_lab.longest_prefix(hash_lab.block_keys(other, 16), cached)
    of = f"two prompts of 70 tokens that share the first {num_common}, in blocks of 16"
    check_equal(got, num_common // 16, "how many blocks are shared", of=of)
    stranger = hash_lab.block_keys(one, 16, b"another tenant")
    check_equal(hash_lab.longest_prefix(stranger, cached), 0, "blocks shared with a salt", of=of)


@settings(max_examples=80)
@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=30),
    st.integers(1, 7),
    st.binary(max_size=12),
    st.integers(0, 30),
)
def test_any_sequence_in_one_go_or_two(token_ids, block_size, salt, first):
    expected = oracle(token_ids, block_size, salt)
    check_keys(hash_lab.block_keys(token_ids, block_size, salt), expected)
    known = hash_lab.block_keys(token_ids[:first], block_size, salt)
    got = hash_lab.block_keys(token_ids, block_size, salt, known)
    check_keys(got, expected, f"the keys, where those of the first {first} tokens were known,")
