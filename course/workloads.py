"""The workloads that engines are compared with: what is asked, not how long it takes."""

import random

NUM_VOCABULARY = 10_000
# Prompt and output length.
Request = tuple[list[int], int]


def nano(
    num_requests: int = 256,
    prompt_lengths: tuple[int, int] = (100, 1024),
    output_lengths: tuple[int, int] = (100, 1024),
) -> list[Request]:
    """Draw the offline workload that nano-vllm and mini-sglang publish with.

    num_requests: all there from the start. prompt_lengths, output_lengths: the least and the most
        tokens. All prompts are drawn first, each as its length and then its ids; the output lengths
        come behind them.
    """
    draw = random.Random(0)
    prompts = []
    for _ in range(num_requests):
        length = draw.randint(*prompt_lengths)
        prompts.append([draw.randint(0, NUM_VOCABULARY) for _ in range(length)])
    return [(ids, draw.randint(*output_lengths)) for ids in prompts]


def nano_cpu() -> list[Request]:
    """Draw the same for a laptop: 32 requests, prompts of 16 to 128 and outputs of 16 to 64."""
    return nano(32, (16, 128), (16, 64))


def prefix(num_requests: int = 64, num_shared: int = 1024, num_own: int = 32) -> list[list[int]]:
    """Draw prompts that begin with the same num_shared ids, and go on with num_own of their own."""
    draw = random.Random(0)
    shared = [draw.randint(0, NUM_VOCABULARY) for _ in range(num_shared)]
    return [
        shared + [draw.randint(0, NUM_VOCABULARY) for _ in range(num_own)]
        for _ in range(num_requests)
    ]
