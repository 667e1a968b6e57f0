"""Hundreds of streams for minutes, a third of them cancelled: what is left in the server?

A server with a tiny random model and a small KV pool, so that requests lose their blocks too. The
first part of the time warms it up; memory and threads are compared with what they were then. At the
end it is killed in the middle of its work, and started again.

    python -m benchmarks.soak --seconds 180 --out benchmarks/results/soak.json
"""

import argparse
import asyncio
import collections
import random
import tempfile
import time
from pathlib import Path

import openai

from benchmarks import results
from course import tiny
from course.running import ServerProcess

NUM_STREAMS = 200
WARM_UP_SHARE = 0.3
MAX_GROWTH = 0.05
# The event loop keeps up to 40 for what must not block it.
MAX_THREADS = 64
NAME = "tiny"
ENDED = ("stop", "length", "cancelled")


def soak(seconds: float, num_streams: int = NUM_STREAMS) -> dict:
    """Run it; returns what was seen. Raises AssertionError for anything that is left over."""
    with tempfile.TemporaryDirectory() as folder:
        model = tiny.make_checkpoint(Path(folder), max_position_embeddings=256)
        words = ("--kv-gb", "0.0005", "--max-waiting", str(num_streams))
        with ServerProcess(model, NAME, *words) as server:
            warm = asyncio.run(_load(server, num_streams, WARM_UP_SHARE * seconds, seed=0))
            before = _state(server)
            loaded = asyncio.run(_load(server, num_streams, (1 - WARM_UP_SHARE) * seconds, seed=1))
            after = _state(server)
            num_preemptions = int(server.metric("vllm:num_preemptions_total"))
            _kill_in_the_middle(server)
        with ServerProcess(model, NAME, *words) as server:
            assert server.complete("abc", max_tokens=2).choices, "it does not start again"
    growth = after["resident_bytes"] / before["resident_bytes"] - 1
    assert growth <= MAX_GROWTH, f"memory grew by {growth:.1%}, from {before} to {after}"
    assert after["threads"] <= MAX_THREADS, f"there are {after['threads']} threads"
    assert num_preemptions > 0, "no request lost its blocks, so that this was too easy"
    return {
        "seconds": seconds,
        "streams": num_streams,
        "outcomes": dict(sorted((warm + loaded).items())),
        "preemptions": num_preemptions,
        "after_warm_up": before,
        "at_the_end": after,
        "growth": round(growth, 4),
    }


async def _load(
    server: ServerProcess, num_streams: int, seconds: float, seed: int
) -> collections.Counter:
    """Keep so many streams open for so long; counts how they ended."""
    draw = random.Random(seed)
    outcomes: collections.Counter = collections.Counter()
    end = time.monotonic() + seconds
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120
    ) as client:

        async def one_after_the_other() -> None:
            while time.monotonic() < end:
                outcomes[await _stream(client, draw)] += 1

        await asyncio.gather(*(one_after_the_other() for _ in range(num_streams)))
    assert set(outcomes) <= set(ENDED), outcomes
    return outcomes


async def _stream(client: openai.AsyncOpenAI, draw: random.Random) -> str:
    """Ask for a stream and read it, a third of them only in part; returns how it ended."""
    is_left = draw.random() < 1 / 3
    patience = draw.randrange(20)
    stream = await client.completions.create(
        model=NAME,
        prompt="abc" * draw.randrange(1, 30),
        max_tokens=draw.randrange(1, 120),
        temperature=draw.choice((0.0, 1.0)),
        seed=draw.randrange(1000),
        stream=True,
    )
    reasons = []
    number = 0
    async for chunk in stream:
        reasons += [one.finish_reason for one in chunk.choices if one.finish_reason]
        number += 1
        if is_left and number > patience:
            await stream.close()
            return "cancelled"
    assert len(reasons) == 1, f"a stream ended {len(reasons)} times: {reasons}"
    return reasons[0]


def _state(server: ServerProcess) -> dict[str, int]:
    server.wait_until_idle(60)
    return {"resident_bytes": server.num_resident_bytes(), "threads": server.num_threads()}


def _kill_in_the_middle(server: ServerProcess) -> None:
    stream = iter(server.complete("abc", max_tokens=200, stream=True))
    next(stream)
    server.process.kill()
    server.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--streams", type=int, default=NUM_STREAMS)
    parser.add_argument("--out", type=Path, help="write the result there, with the machine's name")
    options = parser.parse_args()
    results.tell(soak(options.seconds, options.streams), "python -m benchmarks.soak", options.out)


if __name__ == "__main__":
    main()
