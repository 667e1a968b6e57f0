"""`course serve --tensor-parallel 2` as its users meet it: a process, its ranks, and their ends.

Case 22 of the engine's list: every rank computes alike, and a dead rank ends the engine with an
error, not a hang.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from course.labs import ROOT
from course.running import ServerProcess

NAME = "tiny"
# Nothing here takes a tenth of it.
SECONDS = 60.0

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")


def serving(model: str, *words: str) -> ServerProcess:
    return ServerProcess(model, NAME, "--kv-gb", "0.002", *words)


def ranks_of(server: ServerProcess) -> list[int]:
    """Find the processes of the other ranks: the children of the server."""
    tasks = Path(f"/proc/{server.process.pid}/task").glob("*/children")
    return [int(pid) for file in tasks for pid in file.read_text().split()]


def is_there(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_gone(pids: list[int]) -> None:
    end = time.monotonic() + SECONDS
    while any(map(is_there, pids)):
        assert time.monotonic() < end, f"of {pids}, some are still there"
        time.sleep(0.02)


def course(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "course", *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=2 * SECONDS,
    )


@pytest.fixture(scope="module")
def model(make_checkpoint) -> str:
    return make_checkpoint(max_position_embeddings=256)


@pytest.fixture(scope="module")
def server(model) -> Iterator[ServerProcess]:
    with serving(model, "--tensor-parallel", "2") as running:
        yield running


PROMPTS = [
    "Hello",
    "Ünïcödé 🙂",
    "a",
    "The same beginning, and more",
    "The same beginning, or less",
]


def test_answers_are_those_of_one_process(server, model):
    assert "tensor_parallel reference" in server.said
    assert len(ranks_of(server)) == 1
    with serving(model) as alone:
        for params in ({"temperature": 0}, {"seed": 5}, {"seed": 6, "top_p": 0.5, "n": 2}):
            for prompt in PROMPTS:
                got, expected = (
                    [c.text for c in each.complete(prompt, max_tokens=30, **params).choices]
                    for each in (server, alone)
                )
                assert got == expected, (prompt, params)


def test_a_stream_a_chat_and_all_at_once(server):
    whole = server.complete(PROMPTS, max_tokens=20, temperature=0).choices
    alone = [server.complete(p, max_tokens=20, temperature=0).choices[0].text for p in PROMPTS]
    assert [choice.text for choice in whole] == alone
    chunks = server.complete(PROMPTS[0], max_tokens=20, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == alone[0]
    messages = [{"role": "user", "content": "Who are you?"}]
    answer = server.client.chat.completions.create(model=NAME, messages=messages, max_tokens=5)
    assert answer.usage.completion_tokens <= 5
    server.wait_until_idle()


def test_who_stops_the_server_leaves_no_process(model):
    for how, status in ((signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)):
        with serving(model, "--tensor-parallel", "2", "--quantization", "int8") as running:
            ranks = ranks_of(running)
            assert running.complete("Hello", max_tokens=3).usage.completion_tokens == 3
            assert running.stop(how) == status
        wait_until_gone(ranks)


def test_a_leader_that_is_killed_takes_its_ranks_along(model):
    with serving(model, "--tensor-parallel", "4") as running:
        ranks = ranks_of(running)
        assert len(ranks) == 3
        assert running.complete("Hello", max_tokens=3).usage.completion_tokens == 3
        running.process.kill()
        wait_until_gone(ranks)


@pytest.mark.parametrize("is_busy", [True, False], ids=["in the middle of a stream", "idle"])
def test_a_rank_that_is_killed_ends_the_server_with_a_sentence(model, is_busy):
    start = time.monotonic()
    with serving(model, "--tensor-parallel", "2") as running:
        (rank,) = ranks_of(running)
        if is_busy:
            stream = running.complete("Hello", max_tokens=240, stream=True, temperature=0)
            next(stream)
            os.kill(rank, signal.SIGKILL)
            # The stream ends with an error, or breaks off, or another request is refused.
            with pytest.raises((openai.APIError, httpx.HTTPError)):
                for _ in stream:
                    pass
                while True:
                    running.complete("Hello", max_tokens=3)
        else:
            os.kill(rank, signal.SIGKILL)
        said = running.process.stdout.read()
        assert running.process.wait(SECONDS) == 1
        assert f"rank 1 (process {rank}) was ended by SIGKILL; the server ends" in said
    assert time.monotonic() - start < SECONDS


def test_generate_on_two_ranks(model):
    words = ("generate", "--engine", "solutions", "--model", model, "--max-tokens", "12", "--json")
    prompts = ("--prompt", PROMPTS[0], "--prompt", PROMPTS[1])
    texts = []
    for size in ("1", "2"):
        done = course(*words, *prompts, "--tensor-parallel", size)
        assert done.returncode == 0, done
        texts.append([answer["text"] for answer in json.loads(done.stdout)["completions"]])
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("--tensor-parallel", "0"), "tensor_parallel must be at least 1, got 0"),
        (("--tensor-parallel", "3"), "num_attention_heads 4 does not divide by 3 ranks"),
        (
            ("--tensor-parallel", "2", "--until", "week2"),
            "--tensor-parallel 2 needs week 3's engine",
        ),
    ],
    ids=["none", "heads", "until week 2"],
)
def test_what_cannot_be_is_said_in_a_sentence(model, words, sentence):
    done = course("chat", "--engine", "solutions", "--model", model, "--prompt", "Hi", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("course: ") and sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_a_learners_lab_runs_on_every_rank(tree, model):
    lab = "week3/tensor_parallel"
    tree.solve("week1", lab)
    text = tree.read(f"code/{lab}.py")
    place = "    weight, cache = model.embed_tokens.weight, None\n"
    assert text.count(place) == 1
    tree.write(
        f"code/{lab}.py", text.replace(place, f'    print("mine, on rank", group.rank)\n{place}')
    )
    words = ("--model", model, "--prompt", "Hello", "--max-tokens", "5", "--tensor-parallel", "2")
    done = tree.run("course", "generate", "--engine", "code", *words)
    assert done.returncode == 0, done.stdout
    assert "tensor_parallel yours" in done.stdout
    assert "mine, on rank 1" in done.stdout


HANGING = """
import os, signal, sys, time, torch
from pathlib import Path
from week3.paged_attention import PagedBatch, paged_cache_for
from week3.tensor_parallel import Plan, Ranks, RanksFailed

ranks = Ranks(Plan(Path(sys.argv[1]), 2, collective_seconds=5.0))
cache = paged_cache_for(ranks.leader, 4, 16)
zero = torch.zeros(1, dtype=torch.int64)
batch = PagedBatch(zero, zero[None], torch.tensor([0, 1]), zero + 1, 1, 1)
one_pass = lambda: ranks.leader(zero, zero, ranks.leader.attend(cache, batch))
one_pass()
time.sleep(6.0)  # nobody is late who has nothing to do
one_pass()
os.kill(ranks.pids[0], signal.SIGSTOP)
try:
    one_pass()
except RanksFailed as error:
    print("failed:", error)
print("failure:", ranks.failure)
"""


def test_a_rank_that_hangs_ends_the_others(model):
    start = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT / "solutions"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HANGING, model],
        env=environment,
        capture_output=True,
        text=True,
        timeout=2 * SECONDS,
    )
    failed, failure = done.stdout.splitlines()
    assert failed.startswith("failed: rank 0 cannot reach the others: "), done
    assert failure.startswith("failure: rank 0 cannot reach the others: "), done
    assert time.monotonic() - start < SECONDS


RANK = """
import hashlib, sys, torch
from pathlib import Path
from week1.gqa import causal_attend
from week1.qwen import QwenConfig
from week3.tensor_parallel import DistributedGroup, Plan, open_checkpoint, shard_model

folder, file, rank, size, dtype = sys.argv[1:]
plan = Plan(Path(folder), int(size), getattr(torch, dtype))
group = DistributedGroup(int(rank), plan, file, print, print)
config = QwenConfig.from_folder(folder)
part = shard_model(open_checkpoint(folder, "cpu"), config, group, plan.dtype)
for count in (1, 7, 60):
    ids = torch.arange(count) * 37 % config.vocab_size
    hidden = part(ids, torch.arange(count), causal_attend)
    for x in (hidden, part.logits(hidden)):
        print(hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest())
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_rank_has_the_same_bits(model, tmp_path, dtype):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "solutions"), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, model, str(tmp_path / "store"), str(rank), "4", dtype],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    said = [rank.communicate(timeout=2 * SECONDS)[0].split() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0, 0]
    assert len(said[0]) == len(set(said[0])) == 6
    assert said == [said[0]] * 4
