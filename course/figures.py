"""Draw the figures of the notes: `python -m course.figures` writes sessions/figures/*.svg.

What a figure of a lab shows is computed by the reference, never drawn by hand. A test compares the
committed files with what is drawn now.
"""

import io
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from course import files, layers
from course.labs import ROOT

FOLDER = ROOT / "sessions" / "figures"
INK, GREY, PALE = "#263238", "#78909c", "#eceff1"
# Told apart by colour-blind readers, and dark enough for white text on them.
COLOURS = ("#0072b2", "#d55e00", "#008060", "#7b3294")
_STYLE = {
    "svg.hashsalt": "socratic-serving",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",  # a card of its own: dark pages stay readable
}

# Its config.json, as far as it is a shape.
_QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}


def causal_mask() -> Figure:
    """Show which keys the queries of a whole sequence, and of its last three tokens, may see."""
    from week1.attention import causal_mask

    num_keys = 8
    figure, axes = pyplot.subplots(
        2, 1, figsize=(4.2, 6.6), height_ratios=(num_keys, 3.4), layout="constrained"
    )
    for ax, num_queries in zip(axes, (num_keys, 3), strict=True):
        allowed = causal_mask(num_queries, num_keys)
        first = num_keys - num_queries
        ax.imshow(allowed, cmap=ListedColormap([PALE, COLOURS[0]]), vmin=0, vmax=1)
        ax.set_title(f"causal_mask({num_queries}, {num_keys})", fontsize=12)
        ax.set_xticks(range(num_keys))
        ax.set_yticks(range(num_queries), range(first, num_keys))
        ax.set_xlabel("token of the key")
        ax.set_ylabel("token of the query")
        _grid(ax, num_queries, num_keys)
    return figure


def rotary() -> Figure:
    """Turn the point (1, 0) of each pair to eight positions."""
    from week1.rope import apply_rotary, rotary_table

    head_dim, theta, num_positions = 8, 100.0, 8
    half = head_dim // 2
    x = torch.zeros(1, num_positions, head_dim)
    x[..., :half] = 1.0
    table = rotary_table(head_dim, num_positions, theta)
    turned = apply_rotary(x, torch.arange(num_positions), table)[0]
    figure, axes = pyplot.subplots(2, half // 2, figsize=(5, 5), layout="constrained")
    for pair, ax in enumerate(axes.flat):
        ax.add_patch(pyplot.Circle((0, 0), 1, fill=False, color=GREY, lw=0.8))
        for position, (a, b) in enumerate(turned[:, [pair, pair + half]].tolist()):
            ax.plot([0, a], [0, b], color=COLOURS[0], alpha=0.2 + 0.1 * position, lw=2)
            # Where the slow pairs' positions lie on each other, only the ends are named.
            if pair < 2 or position in (0, num_positions - 1):
                ax.text(1.22 * a, 1.22 * b, str(position), ha="center", va="center", fontsize=10)
        ax.set_title(f"dimensions {pair} and {pair + half}", fontsize=11)
        ax.set(xlim=(-1.45, 1.45), ylim=(-1.45, 1.45), aspect="equal")
        ax.axis("off")
    return figure


def head_groups() -> Figure:
    """Let every query head return the number of the key/value head that it reads."""
    from week1.gqa import grouped_attention

    num_heads = 8
    figure, axes = pyplot.subplots(3, 1, figsize=(5, 5.4), layout="constrained")
    for ax, num_kv_heads in zip(axes, (8, 2, 1), strict=True):
        v = torch.arange(float(num_kv_heads)).reshape(-1, 1, 1)
        q = torch.zeros(num_heads, 1, 1)
        read = grouped_attention(q, torch.zeros_like(v), v).flatten().int().tolist()
        centres = [(i + 0.5) * num_heads / num_kv_heads - 0.5 for i in range(num_kv_heads)]
        for head, kv_head in enumerate(read):
            colour = COLOURS[kv_head % len(COLOURS)]
            ax.plot([head, centres[kv_head]], [1, 0], color=colour, lw=1.5, zorder=1)
            _node(ax, head, 1, head, colour)
        for kv_head, centre in enumerate(centres):
            _node(ax, centre, 0, kv_head, COLOURS[kv_head % len(COLOURS)])
        ax.text(-0.9, 1, "query heads", ha="right", va="center", fontsize=10)
        ax.text(-0.9, 0, "key/value heads", ha="right", va="center", fontsize=10)
        ax.set(xlim=(-4.2, 7.6), ylim=(-0.4, 1.4))
        ax.axis("off")
    return figure


def sampling_filters() -> Figure:
    """Filter one distribution in four ways; what is taken away stays as an outline."""
    from week1.sampling import token_probabilities

    before = torch.tensor([[0.34, 0.22, 0.15, 0.1, 0.08, 0.05, 0.04, 0.02]])
    settings = (
        ("temperature 0.5", (0.5, 0, 1.0, 0.0)),
        ("top_k 3", (1.0, 3, 1.0, 0.0)),
        ("top_p 0.75", (1.0, 0, 0.75, 0.0)),
        ("min_p 0.2", (1.0, 0, 1.0, 0.2)),
    )
    figure, axes = pyplot.subplots(2, 2, figsize=(5.6, 4.4), sharey=True, layout="constrained")
    for ax, (title, values) in zip(axes.flat, settings, strict=True):
        columns = [torch.tensor([value]) for value in values]
        after = token_probabilities(before.log(), *columns)[0]
        tokens = range(before.shape[-1])
        ax.bar(tokens, after, color=COLOURS[0], width=0.8)
        ax.bar(tokens, before[0], fill=False, edgecolor=COLOURS[1], width=0.8, lw=1.3)
        ax.set_title(title, fontsize=12)
        ax.set_xticks([])
    figure.supylabel("probability", fontsize=11)
    figure.supxlabel("tokens, the most likely one first", fontsize=11)
    return figure


def detokenizer() -> Figure:
    """Follow ids that carry a few bytes each until their text may be shown."""
    from week1.generate import IncrementalDetokenizer

    # "café €→!", in characters that every font has.
    pieces = [b"caf", b"\xc3", b"\xa9 ", b"\xe2\x82", b"\xac\xe2", b"\x86\x92", b"!"]

    def decode(ids: list[int]) -> str:
        return b"".join(pieces[i] for i in ids).decode("utf-8", "replace")

    stream = IncrementalDetokenizer(decode)
    figure, ax = pyplot.subplots(figsize=(5.4, 4.2), layout="constrained")
    for i, piece in enumerate(pieces):
        shown = stream.add(i)
        ax.text(-0.6, -i, f"id {i}", ha="right", va="center", color=GREY)
        _cell(ax, 0, -i, " ".join(f"{byte:02x}" for byte in piece), PALE, INK)
        _cell(ax, 1, -i, decode(list(range(i + 1))), "white", INK)
        _cell(ax, 2, -i, shown.replace(" ", "␣"), COLOURS[2] if shown else PALE, "white")
    for column, name in enumerate(("its bytes", "decode(all ids)", "add returns")):
        ax.text(column, 0.8, name, ha="center", va="center")
    ax.set(xlim=(-1.1, 2.5), ylim=(0.5 - len(pieces), 1.1))
    ax.axis("off")
    return figure


def cache_growth() -> Figure:
    """Add up the keys and values of a sequence, for as many key/value heads as there may be."""
    from week1.gqa import Attention

    num_layers, hidden_size, num_heads, head_dim, num_bytes = 28, 3584, 28, 128, 2
    lengths = torch.arange(0, 32769, 4096)
    figure, ax = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for colour, num_kv_heads in zip(COLOURS, (28, 4, 2), strict=False):
        with torch.device("meta"):
            block = Attention(hidden_size, num_heads, num_kv_heads, head_dim, None, 0)
        width = block.k_proj.out_features + block.v_proj.out_features
        per_token = num_layers * width * num_bytes
        gigabytes = (lengths * per_token / 1e9).tolist()
        ax.plot(lengths, gigabytes, color=colour, lw=2.5)
        label = f" {num_kv_heads} heads: {gigabytes[-1]:.2f} GB"
        ax.text(lengths[-1], gigabytes[-1], label, va="center")
    ax.set(xlim=(0, 48000), ylim=(0, None), xlabel="tokens of one sequence", ylabel="GB")
    ax.set_xticks(lengths[::2].tolist(), [f"{n:,}" for n in lengths[::2].tolist()])
    ax.set_title("key/value heads in 28 layers, head_dim 128, bfloat16", fontsize=12)
    return figure


def decode_reads() -> Figure:
    """Weigh what one decode step reads: the weights once, and each sequence's keys and values."""
    from week1.qwen import Qwen, QwenConfig
    from week2.kv_cache import cache_for

    with torch.device("meta"):
        model = Qwen(QwenConfig.from_dict(_QWEN3_0_6B)).bfloat16()
    weights = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
    lengths = torch.arange(0, 16385, 1024).tolist()
    figure, ax = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for colour, num_rows in zip(COLOURS, (1, 8, 32), strict=False):
        cache = cache_for(model, num_rows)
        cache.reserve(lengths[-1])
        per_token = cache.nbytes / cache.capacity / 1e9
        ax.plot(lengths, [n * per_token for n in lengths], color=colour, lw=2.5)
        height = min(6.4, lengths[-1] * per_token)
        text = f"{num_rows} sequence{'s' * (num_rows > 1)}"
        ax.text(height / per_token + 250, height, text, va="center", color=colour)
    ax.axhline(weights, color=INK, lw=1.5)
    ax.text(lengths[-1], weights, f"weights: {weights:.2f} GB", va="top", ha="right")
    ax.set(xlim=(0, lengths[-1] + 3400), ylim=(0, 7), ylabel="GB")
    ax.set_xlabel("tokens of each sequence")
    ax.set_xticks(lengths[::4], [f"{n:,}" for n in lengths[::4]])
    ax.set_title("read by one decode step of Qwen3-0.6B, bfloat16", fontsize=12)
    return figure


def roofline() -> Figure:
    """Draw what two machines can reach, and where four steps of Qwen3-0.6B stand under it."""
    from week1.qwen import QwenConfig
    from week2.roofline import Hardware, arithmetic_intensity

    config = QwenConfig.from_dict(_QWEN3_0_6B)
    prompt, new = (0, 512), (1023, 1)
    steps = {"1 new token": [new], "8": [new] * 8, "32": [new] * 32, "prompt of 512": [prompt]}
    intensities = {name: arithmetic_intensity(config, step, 2) for name, step in steps.items()}
    machines = {
        "1,000 TFLOP/s, 4 TB/s": Hardware(1e15, 4e12),
        "100 GFLOP/s, 40 GB/s": Hardware(1e11, 4e10),
    }
    figure, ax = pyplot.subplots(figsize=(6, 4.2), layout="constrained")
    for colour, (name, hardware) in zip(COLOURS, machines.items(), strict=False):
        draw_roof(ax, hardware, intensities, colour)
        ax.text(2600, hardware.flops * 0.33, name, ha="right", va="top", color=colour)
    for name, intensity in intensities.items():
        ax.text(intensity, 1.5e11, name, ha="center", va="bottom", rotation=90, fontsize=10)
    ax.set(ylim=(1e10, 2e15), ylabel="floating-point operations a second")
    ax.set_yticks([1e11, 1e12, 1e13, 1e14, 1e15], ["100 G", "1 T", "10 T", "100 T", "1,000 T"])
    ax.minorticks_off()
    return figure


def draw_roof(ax: Axes, hardware: Any, intensities: Mapping[str, float], colour: str) -> None:
    """Draw a machine's roofline on axes of its own kind, and what steps reach at best."""
    from week2.roofline import attainable_flops

    ridge = hardware.flops / hardware.bytes_per_second
    line = [0.25, ridge, 3000.0]
    ax.loglog(line, [attainable_flops(x, hardware) for x in line], color=colour, lw=2.5)
    best = [attainable_flops(x, hardware) for x in intensities.values()]
    ax.scatter(list(intensities.values()), best, color=colour, s=45, zorder=3)
    ax.set(xlim=(0.25, 3000), xlabel="floating-point operations for each byte")
    ax.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])


def online_softmax() -> Figure:
    """Read a row of scores in blocks; what is known of peak and sum after each of them."""
    from week1.attention import softmax

    scores = torch.tensor([1.0, 2.5, 0.5, 2.0, 4.0, 1.5, 3.0, 0.0, 2.0, 3.5, 4.5, 1.0])
    block = 3
    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(6, 4.4), sharex=True, layout="constrained"
    )
    top.bar(range(len(scores)), scores, color=[COLOURS[i // block] for i in range(len(scores))])
    top.set_ylabel("score")
    for end in range(block, len(scores) + 1, block):
        seen = scores[:end]
        peak = seen.max()
        left, right = end - block - 0.5, end - 0.5
        top.plot([left, right], [peak, peak], color=INK, lw=2)
        # softmax gives the best score the share 1 / sum: the sum without a formula of our own.
        total = 1 / float(softmax(seen).max())
        bottom.bar((left + right) / 2, total, width=0.8 * block, color=COLOURS[end // block - 1])
        bottom.text((left + right) / 2, total + 0.1, f"{total:.2f}", ha="center")
    top.set_title("largest score so far (line), block by block", fontsize=12)
    bottom.set_title("sum of exp(score − largest so far)", fontsize=12)
    bottom.set(ylim=(0, 3.6), ylabel="sum", xlabel="key")
    return figure


def block_table() -> Figure:
    """Give two growing sequences blocks of a shared pool in the order in which they ask."""
    block_size, num_blocks = 4, 8
    lengths, tables = {"A": 0, "B": 0}, {"A": [], "B": []}
    owner: dict[int, tuple[str, int]] = {}
    for name, count in (("A", 5), ("B", 4), ("A", 6), ("B", 3)):
        lengths[name] += count
        while len(tables[name]) * block_size < lengths[name]:
            owner[len(owner)] = (name, len(tables[name]))
            tables[name].append(len(owner) - 1)
    figure, ax = pyplot.subplots(figsize=(5.6, 4.4), layout="constrained")
    colours = dict(zip("AB", COLOURS, strict=False))
    for y, name in ((1.6, "A"), (0.9, "B")):
        text = f"block_table of {name} ({lengths[name]} tokens)"
        ax.text(0, y, text, va="center", color=colours[name])
        for index, block in enumerate(tables[name]):
            _cell(ax, 2.4 + 0.45 * index, y, str(block), "white", INK, width=0.4, height=0.5)
    for block in range(num_blocks):
        name, index = owner.get(block, ("", 0))
        left, y = block % 4, -1.2 * (block // 4)
        for slot in range(block_size):
            token = index * block_size + slot
            used = bool(name) and token < lengths[name]
            face, text = (colours[name], str(token)) if used else ("white", "")
            x = left + (slot + 0.5) / block_size
            _cell(ax, x, y, text, face, "white", width=1 / block_size, height=0.6)
        ax.add_patch(Rectangle((left, y - 0.3), 1, 0.6, fill=False, edgecolor=INK, lw=1.6))
        ax.text(left + 0.5, y - 0.5, f"block {block}", ha="center", va="center", color=GREY)
    ax.set(xlim=(-0.1, 4.1), ylim=(-1.9, 2))
    ax.axis("off")
    return figure


def paged_reads() -> Figure:
    """Show at which slots of the pool the tokens of a pass look, as the reference weighs them."""
    from week3.paged_attention import PagedBatch, PagedKVCache, paged_attend

    # A decodes its eleventh token; of B's seven tokens, four are in this pass.
    block_size, num_blocks = 4, 8
    queries = (("A", 10), ("B", 3), ("B", 4), ("B", 5), ("B", 6))
    slots = torch.tensor([14, 27, 4, 5, 6])
    tables = torch.tensor([[5, 0, 3], [6, 1, 1]])
    batch = PagedBatch(slots, tables, torch.tensor([0, 1, 5]), torch.tensor([11, 7]), 1, 4)
    num_slots = num_blocks * block_size
    cache = PagedKVCache(1, num_blocks, block_size, 1, num_slots)
    # All scores are 0, and each slot's value is a number of its own: what is gathered are weights.
    values = torch.eye(num_slots)
    cache.values.copy_(values.view(cache.values.shape))
    zeros = torch.zeros(1, len(queries), num_slots)
    looked_at = paged_attend(cache, batch)(0, zeros, zeros, values[None, slots])[0] > 0
    rows = torch.tensor([1 if name == "A" else 2 for name, _ in queries])[:, None]

    figure, ax = pyplot.subplots(figsize=(7.4, 2.5), layout="constrained")
    colours = ListedColormap([PALE, *COLOURS[:2]])
    ax.imshow(looked_at * rows, cmap=colours, vmin=0, vmax=2, aspect="auto")
    labels = [f"{name}, token {token}" for name, token in queries]
    ax.set_yticks(range(len(queries)), labels)
    ax.set_xticks(range(0, num_slots, block_size))
    ax.set_xlabel(f"slot of the pool, in blocks of {block_size}")
    _grid(ax, len(queries), num_slots)
    for block in range(1, num_blocks):
        ax.axvline(block * block_size - 0.5, color=INK, lw=1.2)
    return figure


def mixed_batch() -> Figure:
    """Schedule four requests under a budget of eight tokens a step; hatched where they decode."""
    budget = 8
    prompts = {"A": (0, 6), "B": (1, 14), "C": (2, 5), "D": (4, 9)}
    steps = _schedule({name: (*of, 4) for name, of in prompts.items()}, budget, len(prompts))
    figure, ax = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for step, parts in enumerate(steps):
        bottom = 0
        for part in parts:
            name, count = part.request_id, len(part.token_ids)
            decodes = part.num_computed_tokens >= prompts[name][1]
            ax.bar(
                step,
                count,
                bottom=bottom,
                color=COLOURS["ABCD".index(name)],
                edgecolor="white",
                hatch="//" * decodes,
            )
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
            y = bottom + count / 2
            ax.text(step, y, name, ha="center", va="center", fontsize=9, bbox=box)
            bottom += count
    ax.axhline(budget, color=INK, lw=1.5)
    ax.text(len(steps) - 0.4, budget + 0.15, "token budget", ha="right", va="bottom")
    ax.set(xlim=(-0.6, len(steps) - 0.4), ylim=(0, budget + 1.2), xlabel="step", ylabel="tokens")
    ax.set_xticks(range(len(steps)))
    return figure


def rows_taken() -> Figure:
    """Run eight requests through four rows, in two static batches and continuously."""
    lengths = dict(zip("ABCDEFGH", (3, 12, 5, 4, 6, 3, 10, 5), strict=True))
    names = list(lengths)
    batches = names[:4], names[4:]
    # A static batch begins when the one before has ended; all of its requests are there by then.
    start = max(lengths[name] for name in batches[0])
    ways = {
        "static batches: A to D, then E to H": {
            name: (start * number, 1, lengths[name])
            for number, batch in enumerate(batches)
            for name in batch
        },
        "continuous": {name: (0, 1, lengths[name]) for name in names},
    }
    figure, axes = pyplot.subplots(2, 1, figsize=(6.4, 4), layout="constrained", sharex=True)
    for ax, (title, requests) in zip(axes, ways.items(), strict=True):
        for step, parts in enumerate(_schedule(requests, budget=8, num_rows=4)):
            for part in parts:
                colour = COLOURS[names.index(part.request_id) % 4]
                _cell(ax, step, part.row, part.request_id, colour, "white")
        ax.set_title(title, fontsize=11, loc="left")
        ax.set(xlim=(-0.6, 22.6), ylim=(3.6, -0.6), ylabel="row")
        ax.set_yticks(range(4))
    axes[1].set(xlabel="step")
    return figure


def blocks_held() -> Figure:
    """Let three requests grow in a pool of seven blocks of four, until one of them gives way."""
    from week3.prefix_caching import CachingBlockManager
    from week3.scheduler import Request, Scheduler

    blocks = CachingBlockManager(7, 4, enabled=False)
    scheduler = Scheduler(blocks, max_num_seqs=3, token_budget=24, max_model_len=28)
    requests = {"A": (7, 10), "B": (6, 8), "C": (5, 7)}
    for name, (num_tokens, num_new) in requests.items():
        scheduler.add(Request(name, [0] * num_tokens, num_new))
    figure, ax = pyplot.subplots(figsize=(6.4, 3), layout="constrained")
    num_steps = 0
    while scheduler.num_unfinished:
        step = scheduler.schedule()
        for name, colour in zip(requests, COLOURS, strict=False):
            for block_id in blocks.block_table(name):
                _cell(ax, num_steps, block_id, name, colour, "white")
        for name in step.preempted:
            ax.text(num_steps, -0.95, f"{name} waits", ha="center", va="center", color=INK)
        scheduler.update(step, {part.request_id: [0] for part in step.parts if part.catches_up})
        num_steps += 1
    ax.set(xlim=(-0.6, num_steps - 0.4), ylim=(6.6, -1.4), xlabel="step", ylabel="block")
    ax.set_xticks(range(num_steps))
    ax.set_yticks(range(7))
    return figure


def _schedule(
    requests: dict[str, tuple[int, int, int]], budget: int, num_rows: int
) -> list[list[Any]]:
    """Plan by the reference; returns the parts of each step.

    requests: name → the step in which it arrives, its prompt's tokens, and how many come out.
    """
    from week2.continuous_batching import Request, Scheduler

    scheduler = Scheduler(num_rows, budget, max_model_len=1000)
    waiting = dict(requests)
    steps: list[list[Any]] = []
    while waiting or scheduler.num_unfinished:
        for name in [name for name, (arrival, _, _) in waiting.items() if arrival <= len(steps)]:
            _, num_tokens, num_new = waiting.pop(name)
            scheduler.add(Request(name, [0] * num_tokens, num_new))
        steps.append(scheduler.schedule())
        scheduler.update({part.request_id: 0 for part in steps[-1] if part.catches_up})
    return steps


DRAWINGS: dict[str, Callable[[], Figure]] = {
    "causal_mask": causal_mask,
    "rotary": rotary,
    "head_groups": head_groups,
    "sampling_filters": sampling_filters,
    "detokenizer": detokenizer,
    "cache_growth": cache_growth,
    "decode_reads": decode_reads,
    "roofline": roofline,
    "online_softmax": online_softmax,
    "block_table": block_table,
    "paged_reads": paged_reads,
    "mixed_batch": mixed_batch,
    "rows_taken": rows_taken,
    "blocks_held": blocks_held,
}


def svg(name: str) -> str:
    """Draw a figure; the same text every time. `weekN` must be the reference's."""
    with matplotlib.rc_context(_STYLE):
        figure = DRAWINGS[name]()
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    return "\n".join(line.rstrip() for line in target.getvalue().splitlines()) + "\n"


def _grid(ax: Axes, num_rows: int, num_columns: int) -> None:
    ax.set_xticks([i - 0.5 for i in range(num_columns + 1)], minor=True)
    ax.set_yticks([i - 0.5 for i in range(num_rows + 1)], minor=True)
    ax.grid(which="minor", color="white", lw=2)
    ax.tick_params(which="both", length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _node(ax: Axes, x: float, y: float, text: object, colour: str) -> None:
    ax.scatter([x], [y], s=260, color=colour, zorder=2)
    ax.text(x, y, str(text), ha="center", va="center", color="white", fontsize=10, zorder=3)


def _cell(
    ax: Axes,
    x: float,
    y: float,
    text: str,
    face: str,
    colour: str,
    width: float = 0.92,
    height: float = 0.8,
) -> None:
    corner = (x - width / 2, y - height / 2)
    ax.add_patch(Rectangle(corner, width, height, facecolor=face, edgecolor=GREY, lw=0.8))
    ax.text(x, y, text, ha="center", va="center", color=colour)


def main(folder: Path) -> None:
    """Write every figure into a folder."""
    sys.path.insert(0, str(layers.SOLUTIONS))  # the reference's numbers, whatever the learner has
    matplotlib.use("svg")
    for name in DRAWINGS:
        files.replace(folder / f"{name}.svg", svg(name))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
