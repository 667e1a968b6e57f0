"""Grades basic/priority_queue against a sorted list; counts comparisons, and what is kept."""

import contextlib
import gc
import itertools
import math
import random
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from course.grading import History, check_equal, check_raises, check_true, lab

queue_lab = lab("basic/priority_queue")

MAX_COMPARISONS = 16


class Pair:
    """A queue beside a plain list of [priority, number of the push, id]; calls are compared."""

    def __init__(self):
        self.queue, self.plain = queue_lab.PriorityQueue(), []
        self.num_pushed = 0
        self.of = History("PriorityQueue()")

    def find(self, request_id):
        return next((entry for entry in self.plain if entry[2] == request_id), None)

    def do(self, name, *args):
        """Make a call and compare it; a call that has to be refused is held to that."""
        text = f"{name}({', '.join(map(repr, args))})"
        error = self.refuses(name, *args[:1])
        if error is None:
            got = self.of.note(text, getattr(self.queue, name)(*args))
            check_equal(got, getattr(self, name)(*args), f"what {text} returns", of=self.of)
        else:
            self.check_refused(error, name, *args)
        check_equal(len(self.queue), len(self.plain), "len", of=self.of)

    def refuses(self, name, request_id=None):
        if name in ("peek", "pop"):
            return None if self.plain else IndexError
        return ValueError if (self.find(request_id) is None) == (name != "push") else None

    def check_refused(self, error, name, *args):
        text = f"{name}({', '.join(map(repr, args))})"
        try:
            self.of.note(text, getattr(self.queue, name)(*args))
        except (ValueError, IndexError) as raised:
            self.of.note(text, f"raises {type(raised).__name__}")
            check_equal(type(raised), error, f"the error of {text}", of=self.of)
        else:
            check_true(False, f"{text} raises nothing, expected {error.__name__}", of=self.of)

    def push(self, request_id, priority):
        self.plain.append([priority, self.num_pushed, request_id])
        self.plain.sort()
        self.num_pushed += 1

    def peek(self):
        return self.plain[0][2]

    def pop(self):
        return self.plain.pop(0)[2]

    def remove(self, request_id):
        self.plain.remove(self.find(request_id))

    def change(self, request_id, priority):
        self.find(request_id)[0] = priority
        self.plain.sort()

    def drain(self):
        """Take everybody, and hold the whole order at once."""
        expected = [request_id for _, _, request_id in self.plain]
        got = [self.queue.pop() for _ in expected]
        self.of.note(f"pop(), {len(expected)} times", got)
        check_equal(got, expected, "the order", of=self.of)
        self.plain = []
        self.do("pop")


def run(*calls):
    """Make calls such as "push a 1", "remove a", "pop"; then take everybody."""
    pair = Pair()
    for call in calls:
        name, *args = call.split()
        pair.do(name, *args[:1], *map(int, args[1:]))
    pair.drain()


@pytest.mark.parametrize("order", list(itertools.permutations("abcd", 4))[::3], ids="".join)
def test_the_lowest_number_is_first(order):
    run(*(f"push {request_id} {'abcd'.index(request_id)}" for request_id in order))


@pytest.mark.parametrize("ids", ["abcdefgh", "hgfedcba", "dahbgcfe"])
def test_equals_come_in_the_order_of_their_push(ids):
    run(*(f"push {request_id} 5" for request_id in ids))
    run(*(f"push {request_id} {i % 2}" for i, request_id in enumerate(ids)))
    run(
        *(f"push {request_id} 5" for request_id in ids), "pop", "pop", "push z 5", "pop", "push y 5"
    )


def test_peek_takes_nobody():
    run("push b 2", "peek", "peek", "push a 1", "peek", "push c 3", "peek", "pop", "peek")


def test_negative_priorities_come_first():
    run("push a 0", "push b -3", "push c 3", "push d -4", "push e 0")


@pytest.mark.parametrize("request_id", "abcdefg")
def test_anybody_can_leave(request_id):
    start = [
        f"push {other} {priority}"
        for other, priority in zip("abcdefg", (4, 1, 4, 0, 6, 4, 2), strict=True)
    ]
    run(*start, f"remove {request_id}")
    run(*start, f"remove {request_id}", "push h 4", f"push {request_id} 4", "pop", "pop")


def test_who_left_and_comes_again_is_new():
    run("push a 1", "push b 1", "remove a", "push a 1")
    run("push a 1", "push b 1", "pop", "push a 1")
    run("push a 5", "remove a", "push a 1", "push b 3")
    run("push a 1", "remove a", "push a 5", "push b 3", "remove a", "push a 2", "pop")


def test_a_change_moves_forwards_and_backwards():
    start = ("push a 1", "push b 2", "push c 3", "push d 4")
    run(*start, "change d 0")
    run(*start, "change a 9")
    run(*start, "change c 1", "pop", "change c 7", "change d 2")
    run(*start, "change b 2", "change b 8", "change b 0", "peek")


def test_a_change_keeps_the_place_among_equals():
    run("push a 5", "push b 5", "push c 5", "change b 1", "change b 5")
    run("push a 9", "push b 5", "push c 5", "change a 5")
    run("push a 5", "push b 5", "push c 1", "change c 5", "push d 5")


def test_calls_that_are_refused_change_nothing():
    run("pop", "peek", "remove a", "change a 1", "push a 2", "push a 1", "push b 1", "push b 3")
    run("push a 2", "pop", "pop", "remove a", "change a 0", "push b 1", "push a 1")
    run("push a 2", "push b 1", "remove a", "remove a", "change a 0", "peek", "pop", "peek")


def test_errors_name_the_request():
    queue = queue_lab.PriorityQueue()
    queue.push("r17", 1)
    check_raises(ValueError, queue.push, "r17", 2, mentions=("r17",))
    check_raises(ValueError, queue.remove, "r18", mentions=("r18",))
    check_raises(ValueError, queue.change, "r19", 2, mentions=("r19",))


def test_who_waits_is_in_it():
    pair = Pair()
    for name, *args in (
        ("push", "a", 1),
        ("push", "b", 2),
        ("change", "b", 0),
        ("pop",),
        ("push", "c", 1),
        ("remove", "a"),
    ):
        pair.do(name, *args)
        waiting = sorted(request_id for _, _, request_id in pair.plain)
        got = [request_id for request_id in "abc" if request_id in pair.queue]
        check_equal(got, waiting, "the ids that are `in` it", of=pair.of)


def test_ids_are_never_compared_with_each_other():
    queue, of = queue_lab.PriorityQueue(), History("PriorityQueue()")
    for request_id in ("a", 7, None, (1, 2), b"x"):
        of.note(f"push({request_id!r}, 1)", queue.push(request_id, 1))
    of.note("change(None, 0)", queue.change(None, 0))
    of.note("remove((1, 2))", queue.remove((1, 2)))
    got = [queue.pop() for _ in range(4)]
    check_equal(got, [None, "a", 7, b"x"], "the order", of=of)


def test_priorities_may_be_tuples():
    queue, of = queue_lab.PriorityQueue(), History("PriorityQueue()")
    for request_id, priority in (
        ("a", (1, 2.5)),
        ("b", (0, 9.0)),
        ("c", (1, 0.5)),
        ("d", (0, 9.0)),
    ):
        of.note(f"push({request_id!r}, {priority})", queue.push(request_id, priority))
    check_equal([queue.pop() for _ in range(4)], ["b", "d", "c", "a"], "the order", of=of)


def test_queues_do_not_share_requests():
    one, other = queue_lab.PriorityQueue(), queue_lab.PriorityQueue()
    one.push("a", 1)
    check_equal(
        (len(one), len(other), "a" in other), (1, 0, False), "their contents", of="two queues"
    )
    check_raises(IndexError, other.pop)


CALLS = st.tuples(
    st.sampled_from(["push", "push", "push", "pop", "peek", "remove", "change"]),
    st.sampled_from("abcdef"),
    st.integers(0, 3),
)


@settings(max_examples=100)
@given(st.lists(CALLS, max_size=30))
def test_any_calls_beside_a_sorted_list(calls):
    pair = Pair()
    for name, request_id, priority in calls:
        args = {"push": (request_id, priority), "change": (request_id, priority)}
        pair.do(name, *args.get(name, (request_id,) if name == "remove" else ()))
    pair.drain()


@pytest.mark.parametrize("seed", range(3))
def test_many_calls_beside_a_sorted_list(seed):
    generator, pair = random.Random(seed), Pair()
    for i in range(600):
        waiting = [request_id for _, _, request_id in pair.plain]
        name = generator.choice(["push", "push", "pop", "peek", "remove", "change", "change"])
        if name == "push":
            pair.do("push", f"r{i}", generator.randrange(9))
        elif name in ("peek", "pop"):
            pair.do(name)
        elif waiting:
            priority = [generator.randrange(9)] if name == "change" else []
            pair.do(name, generator.choice(waiting), *priority)
    pair.drain()


class Counted:
    """A priority that counts how often any is compared, and can be watched."""

    num_comparisons = 0

    def __init__(self, value):
        self.value = value

    def __lt__(self, other):
        Counted.num_comparisons += 1
        return self.value < other.value

    def __gt__(self, other):
        Counted.num_comparisons += 1
        return self.value > other.value

    def __le__(self, other):
        Counted.num_comparisons += 1
        return self.value <= other.value

    def __ge__(self, other):
        Counted.num_comparisons += 1
        return self.value >= other.value

    def __eq__(self, other):
        Counted.num_comparisons += 1
        return self.value == other.value

    __hash__ = None


def drill(num_waiting, num_calls, names, seed=0):
    """Fill a queue, then make calls that leave as many waiting; returns the number of calls."""
    generator, queue = random.Random(seed), queue_lab.PriorityQueue()
    waiting, new = list(range(num_waiting)), itertools.count(num_waiting)
    for request_id in waiting:
        queue.push(request_id, Counted(generator.random()))
    total = num_waiting
    for name in itertools.islice(itertools.cycle(names), num_calls):
        place = generator.randrange(len(waiting))
        total += 1
        if name == "change":
            queue.change(waiting[place], Counted(generator.random()))
            continue
        if name == "remove":
            queue.remove(waiting[place])
        else:
            place = waiting.index(queue.pop())
        waiting[place] = next(new)
        queue.push(waiting[place], Counted(generator.random()))
        total += 1
    return total


@pytest.mark.parametrize(
    "names", [["pop"], ["remove"], ["change"], ["pop", "change", "remove"]], ids="-".join
)
@pytest.mark.parametrize("num_waiting", [16, 500])
def test_comparisons_grow_with_the_logarithm(num_waiting, names):
    Counted.num_comparisons = 0
    num_calls = drill(num_waiting, 400, names)
    average = Counted.num_comparisons / num_calls
    allowed = MAX_COMPARISONS * (1 + math.log2(num_waiting))
    check_true(
        average < allowed,
        f"each call compared priorities {average:.0f} times on average; allowed: {allowed:.0f}",
        of=f"{num_waiting:,} requests waiting; push and {', '.join(names)}: {num_calls:,} calls",
    )


def test_asking_who_waits_compares_no_priorities():
    queue = queue_lab.PriorityQueue()
    for request_id in range(50):
        queue.push(request_id, Counted(request_id))
    Counted.num_comparisons = 0
    answers = (len(queue), 30 in queue, 99 in queue)
    check_equal(answers, (50, True, False), "len, 30 in it, 99 in it", of="50 requests waiting")
    check_equal(Counted.num_comparisons, 0, "comparisons of priorities", of="len and `in`")


@contextlib.contextmanager
def garbage_collected():
    """At the end, free what the block made and nothing refers to; older objects take too long."""
    gc.disable()
    try:
        yield
        gc.collect(0)
    finally:
        gc.enable()


@pytest.mark.parametrize("who", ["one changes", "others come and go", "one comes and goes"])
@pytest.mark.parametrize("num_waiting", [1, 20])
def test_what_has_left_is_let_go(num_waiting, who):
    alive = []

    def priority(value):
        made = Counted(value)
        alive.append(weakref.ref(made))
        return made

    with garbage_collected():
        queue = queue_lab.PriorityQueue()
        # Those who wait have the better priority, so that nobody who leaves ever comes up.
        for request_id in range(num_waiting):
            queue.push(request_id, priority(0))
        for i in range(300):
            if who == "one changes":
                queue.change(0, priority(1 + i))
            else:
                guest = ("guest", i if who == "others come and go" else 0)
                queue.push(guest, priority(1 + i))
                queue.remove(guest)
    num_alive, allowed = sum(made() is not None for made in alive), 4 * (num_waiting + 1) + 16
    check_true(
        num_alive <= allowed,
        f"{num_alive} priorities are still in memory; allowed: {allowed}",
        of=f"{num_waiting} requests wait, 300 times: {who}",
    )
