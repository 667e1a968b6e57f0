"""Grades week1/rope: the rotary table, and its application to queries and keys."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

from course.grading import TOLERANCE, check_close, check_equal, check_raises, check_true, lab

rope = lab("week1/rope")

THETAS = [10.0, 1e4, 1e6]
HEAD_DIMS = [2, 24, 80, 128]
HALVES = [torch.float16, torch.bfloat16]
NUM_POSITIONS = 200


def random(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    """Signed numbers with a few outliers, as real queries and keys have them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    x[..., ::7] *= 20.0
    return x.to(dtype)


def ragged_positions(tokens: int) -> torch.Tensor:
    """Three sequences that start at 7, 0 and 129; the first skips, the last runs backwards."""
    steps = torch.arange(tokens)
    return torch.stack((7 + 3 * steps, steps, (129 + steps).flip(0)))


def angles(positions: torch.Tensor, head_dim: int, theta: float) -> torch.Tensor:
    pairs = torch.arange(head_dim // 2, dtype=torch.float64)
    return positions.double().unsqueeze(-1) * torch.exp(-pairs * 2 / head_dim * math.log(theta))


def oracle_table(num_positions: int, head_dim: int, theta: float) -> torch.Tensor:
    turned = angles(torch.arange(num_positions), head_dim, theta)
    return torch.cat((turned.cos(), turned.sin()), dim=-1)


def oracle_rotation(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """A pair is one complex number, and turning it is one multiplication, in float64."""
    half = x.shape[-1] // 2
    numbers = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = angles(positions, x.shape[-1], theta).unsqueeze(-3)
    numbers = numbers * torch.polar(torch.ones_like(turned), turned)
    return torch.cat((numbers.real, numbers.imag), dim=-1)


def float32_angles(last_position: int) -> float:
    """Say how far a result may be off when its angles are computed in float32.

    A pair's speed is rounded twice or three times, by 2⁻²⁴ of itself each, and the angle once more;
    at position p that is up to p · 2⁻²² radians. The angle's error becomes an error of the pair of
    at most the same share of its length. Tables that were computed in float64 need none of this.
    """
    return TOLERANCE[torch.float32] + last_position * 2.0**-22


def check_has_shape(got: object, shape: tuple[int, ...]) -> None:
    """Hold a result to a shape before the test itself takes it apart."""
    right = isinstance(got, torch.Tensor) and tuple(got.shape) == tuple(shape)
    check_true(right, f"the result is not a tensor of shape {tuple(shape)}")


def given_table(head_dim: int, theta: float) -> torch.Tensor:
    """A right table, so that a wrong `rotary_table` is not counted against `apply_rotary`."""
    return oracle_table(NUM_POSITIONS, head_dim, theta).float()


@pytest.mark.parametrize("theta", THETAS, ids=lambda theta: f"theta={theta:g}")
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids=lambda head_dim: f"head_dim={head_dim}")
def test_table_matches_float64(head_dim, theta):
    got = rope.rotary_table(head_dim, NUM_POSITIONS, theta)
    expected = oracle_table(NUM_POSITIONS, head_dim, theta)
    check_close(got, expected, dtype=torch.float32, tolerance=float32_angles(NUM_POSITIONS))


# Downwards, so that rows kept from one call to the next show up.
@pytest.mark.parametrize("num_positions", [31, 2, 1])
def test_table_of_few_positions(num_positions):
    got = rope.rotary_table(6, num_positions, 500.0)
    check_close(got, oracle_table(num_positions, 6, 500.0), dtype=torch.float32)


@pytest.mark.parametrize("theta", THETAS, ids=lambda theta: f"theta={theta:g}")
def test_table_of_a_long_context(theta):
    got = rope.rotary_table(20, 40_000, theta)
    expected = oracle_table(40_000, 20, theta)
    check_has_shape(got, (40_000, 20))
    # More rows each time, since the allowance grows with the position; always from row 0 on, so
    # that a difference is named by its place in the table.
    for end in (1_000, 5_000, 20_000, 40_000):
        of = f"the first {end:,} rows of rotary_table(20, 40_000, theta={theta:g})"
        tolerance = float32_angles(end)
        check_close(got[:end], expected[:end], dtype=torch.float32, tolerance=tolerance, of=of)


@pytest.mark.parametrize("head_dim", [-2, 0, 1, 7, 129])
def test_table_refuses_a_head_dim_without_pairs(head_dim):
    check_raises(ValueError, rope.rotary_table, head_dim, 4, 1e4, mentions=(head_dim,))


def test_table_is_made_where_it_is_asked_for():
    table = rope.rotary_table(8, 5, 1e4, device="meta")
    check_equal((table.device.type, tuple(table.shape)), ("meta", (5, 8)), "device and shape")


def test_table_is_made_on_the_default_device():
    with torch.device("meta"):
        table = rope.rotary_table(8, 5, 1e4)
    of = "rotary_table(8, 5, 1e4), while the default device is meta"
    check_equal(table.device.type, "meta", "the table's device", of=of)


def test_table_on_the_cpu_while_a_model_is_built_without_memory():
    with torch.device("meta"):
        table = rope.rotary_table(8, 5, 1e4, device="cpu")
    check_equal(table.device.type, "cpu", "the table's device")
    check_close(table, oracle_table(5, 8, 1e4), dtype=torch.float32)


# (row 1 of the table, a token, the same token turned to position 1)
BY_HAND = {
    "head_dim=2": ([0.6, 0.8], [1.0, 0.0], [0.6, 0.8]),
    "head_dim=2, the other axis": ([0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]),
    "head_dim=4, the first pair": (
        [0.6, 1.0, 0.8, 0.0], [1.0, 0.0, 0.0, 0.0], [0.6, 0.0, 0.8, 0.0],
    ),
    "head_dim=4, the second pair": (
        [1.0, 0.6, 0.0, 0.8], [0.0, 10.0, 0.0, 0.0], [0.0, 6.0, 0.0, 8.0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_HAND)
def test_rotation_by_hand(case):
    row, x, expected = BY_HAND[case]
    half = len(row) // 2
    table = torch.tensor([[1.0] * half + [0.0] * half, row])
    got = rope.apply_rotary(torch.tensor([[x]]), torch.tensor([1]), table)
    of = f"apply_rotary of one token {x} at position 1, row 1 of the table is {row}"
    check_close(got, torch.tensor([[expected]]), of=of)


@pytest.mark.parametrize("theta", THETAS, ids=lambda theta: f"theta={theta:g}")
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids=lambda head_dim: f"head_dim={head_dim}")
def test_rotation_matches_complex_numbers(head_dim, theta):
    x, positions = random(3, 4, 11, head_dim), ragged_positions(11)
    expected = oracle_rotation(x, positions, theta)
    got = rope.apply_rotary(x, positions, given_table(head_dim, theta))
    check_close(got, expected, dtype=torch.float32)


@pytest.mark.parametrize("head_dim", [2, 12])
@pytest.mark.parametrize(
    "leading, num_heads, tokens",
    [((), 4, 6), ((), 1, 1), ((), 5, 5), ((1,), 1, 9), ((3,), 7, 1), ((2, 3), 4, 5), ((4,), 4, 4)],
)
def test_rotation_of_other_shapes(leading, num_heads, tokens, head_dim):
    x = random(*leading, num_heads, tokens, head_dim, seed=1)
    generator = torch.Generator().manual_seed(2)
    positions = torch.randint(NUM_POSITIONS, (*leading, tokens), generator=generator)
    expected = oracle_rotation(x, positions, 300.0)
    got = rope.apply_rotary(x, positions, given_table(head_dim, 300.0))
    check_close(got, expected, dtype=torch.float32)


@pytest.mark.parametrize("theta", THETAS, ids=lambda theta: f"theta={theta:g}")
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids=lambda head_dim: f"head_dim={head_dim}")
def test_rotation_with_your_own_table_matches_transformers(head_dim, theta):
    q, k = random(3, 4, 11, head_dim, seed=3), random(3, 2, 11, head_dim, seed=4)
    positions = ragged_positions(11)
    config = Qwen2Config(
        head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": theta}
    )
    expected = apply_rotary_pos_emb(q, k, *Qwen2RotaryEmbedding(config)(q, positions))
    table = rope.rotary_table(head_dim, NUM_POSITIONS, theta)
    for x, rotated in zip((q, k), expected, strict=True):
        got = rope.apply_rotary(x, positions, table)
        # Both sides may be off by their own angles.
        check_close(got, rotated, tolerance=2 * float32_angles(NUM_POSITIONS))


@pytest.mark.parametrize("theta", THETAS, ids=lambda theta: f"theta={theta:g}")
def test_rotation_with_your_own_table_far_from_the_start(theta):
    positions = torch.tensor([[32_767, 0, 30_000], [1, 32_766, 2], [29_999, 31_001, 12_345]])
    x = random(3, 2, 3, 16, seed=5)
    expected = oracle_rotation(x, positions, theta)
    got = rope.apply_rotary(x, positions, rope.rotary_table(16, 32_768, theta))
    tolerance = float32_angles(32_768)
    check_close(got, expected, dtype=torch.float32, tolerance=tolerance)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids=lambda head_dim: f"head_dim={head_dim}")
def test_rotation_of_half_precision_inputs(head_dim, dtype):
    x, positions = random(3, 5, 9, head_dim, seed=6, dtype=dtype), ragged_positions(9)
    expected = oracle_rotation(x, positions, 1e4)
    got = rope.apply_rotary(x, positions, given_table(head_dim, 1e4))
    # Computed in float32, the result is rounded once, by half a step of its dtype at most.
    tolerance = 0.5 * torch.finfo(dtype).eps + TOLERANCE[torch.float32]
    check_close(got, expected, dtype=dtype, tolerance=tolerance)


def test_rotation_of_float64_inputs():
    x, positions = random(3, 2, 5, 24, dtype=torch.float64), ragged_positions(5)
    table = given_table(24, 1e4)
    # The table's own float32 numbers: nothing but the rotation is rounded.
    turns = torch.complex(*table.double()[positions].unsqueeze(-3).chunk(2, dim=-1))
    turned = torch.complex(*x.chunk(2, dim=-1)) * turns
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    check_close(rope.apply_rotary(x, positions, table), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rotation_leaves_its_inputs_alone(dtype):
    x, positions = random(3, 2, 5, 8, dtype=dtype), ragged_positions(5)
    table = given_table(8, 1e4)
    before = x.clone(), positions.clone(), table.clone()
    got = rope.apply_rotary(x, positions, table)
    check_has_shape(got, x.shape)
    check_close(x, before[0], tolerance=0.0, of="x after apply_rotary(x, positions, table)")
    check_equal(positions, before[1], "positions after the call")
    check_close(table, before[2], tolerance=0.0, of="table after apply_rotary(x, positions, table)")


def test_rotation_of_a_view_that_is_not_contiguous():
    x, positions = random(3, 6, 4, 10).transpose(1, 2), ragged_positions(6)
    expected = oracle_rotation(x, positions, 1e4)
    got = rope.apply_rotary(x, positions, given_table(10, 1e4))
    check_close(got, expected, dtype=torch.float32)


def test_rotation_at_position_zero_changes_nothing():
    x = random(2, 3, 1, 32)
    before = x.clone()
    got = rope.apply_rotary(x, torch.zeros(2, 1, dtype=torch.int64), given_table(32, 1e4))
    check_close(got, before)
    got.zero_()
    check_close(x, before, tolerance=0.0, of="x after the result of apply_rotary was written to")


def test_rotation_of_no_tokens():
    x, positions = random(3, 4, 0, 8), torch.zeros(3, 0, dtype=torch.int64)
    got = rope.apply_rotary(x.clone(), positions, given_table(8, 1e4))
    check_close(got, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e30, 1e-30], ids=lambda scale: f"scale={scale:g}")
def test_rotation_of_huge_and_tiny_numbers(scale, dtype):
    x, positions = (random(3, 2, 7, 16, seed=7) * scale).to(dtype), ragged_positions(7)
    expected = oracle_rotation(x, positions, 1e4)
    got = rope.apply_rotary(x, positions, given_table(16, 1e4))
    check_close(got, expected, dtype=dtype)


def test_rotation_reads_the_table_it_is_given():
    # Tables with stretched positions are one way to serve longer contexts.
    x, positions = random(3, 2, 5, 8), ragged_positions(5)
    turned = angles(torch.arange(NUM_POSITIONS) / 4, 8, 1e4)
    stretched = torch.cat((turned.cos(), turned.sin()), dim=-1).float()
    expected = oracle_rotation(x, positions / 4, 1e4)
    got = rope.apply_rotary(x, positions, stretched)
    check_close(got, expected, dtype=torch.float32)


@pytest.mark.parametrize("wrong", [-1, -40, 40, 41, 100_000])
@pytest.mark.parametrize("place", [(0, 0), (1, 4), (2, 2)], ids=str)
def test_rotation_refuses_positions_outside_the_table(wrong, place):
    positions = torch.arange(15).reshape(3, 5)
    positions[place] = wrong
    table = given_table(8, 1e4)[:40]
    x = random(3, 2, 5, 8)
    check_raises(ValueError, rope.apply_rotary, x, positions, table, mentions=(wrong, 40))


def test_rotation_accepts_the_first_and_the_last_position_of_the_table():
    x, positions = random(2, 2, 8), torch.tensor([39, 0])
    expected = oracle_rotation(x, positions, 1e4)
    got = rope.apply_rotary(x, positions, given_table(8, 1e4)[:40])
    check_close(got, expected, dtype=torch.float32)


def test_rotation_of_queries_and_keys_in_a_model_of_half_precision():
    with torch.device("meta"):
        rotary = rope.Rotary(24, NUM_POSITIONS, 300.0)
    q, k, positions = random(3, 7, 5, 24), random(3, 2, 5, 24, seed=1), ragged_positions(5)
    got = rotary.to(torch.bfloat16)(q, k, positions)
    tolerance = float32_angles(NUM_POSITIONS)
    call = "Rotary(24, 200, theta=300) in bfloat16, called with float32 q and k"
    for x, rotated in zip((q, k), got, strict=True):
        expected = oracle_rotation(x, positions, 300.0)
        check_close(rotated, expected, dtype=torch.float32, tolerance=tolerance, of=call)


def test_rotation_of_a_batch_equals_rotation_token_by_token():
    x, positions, table = random(3, 4, 6, 24, seed=8), ragged_positions(6), given_table(24, 1e4)
    batch = rope.apply_rotary(x, positions, table)
    for row in range(3):
        for token in range(6):
            one = slice(token, token + 1)
            alone = rope.apply_rotary(x[row, :, one], positions[row, one], table)
            check_close(alone, batch[row, :, one])


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 139), st.sampled_from([2, 6, 24, 64]))
def test_rotation_makes_scores_depend_on_the_distance_only(q_position, k_position, shift, head_dim):
    q, k = random(2, 1, head_dim, seed=9), random(2, 1, head_dim, seed=10)
    table = given_table(head_dim, 100.0)

    def rotated(moved_by: int) -> list[torch.Tensor]:
        places = torch.tensor([q_position + moved_by]), torch.tensor([k_position + moved_by])
        pairs = zip((q, k), places, strict=True)
        return [rope.apply_rotary(x, place, table).double() for x, place in pairs]

    (here_q, here_k), (there_q, there_k) = rotated(0), rotated(shift)
    change = ((here_q * here_k).sum(-1) - (there_q * there_k).sum(-1)).abs().max()
    allowed = TOLERANCE[torch.float32] * float((q.norm(dim=-1) * k.norm(dim=-1)).max())
    check_true(
        change <= allowed,
        f"moving q and k together by {shift} changed their score by {change:.3g}",
    )


@given(st.lists(st.integers(0, NUM_POSITIONS - 1), min_size=1, max_size=12))
def test_rotation_keeps_every_pairs_length(places):
    x = random(3, len(places), 12, seed=11)
    expected = torch.hypot(*x.chunk(2, dim=-1))
    got = rope.apply_rotary(x, torch.tensor(places), given_table(12, 50.0))
    check_has_shape(got, x.shape)
    lengths = torch.hypot(*got.chunk(2, dim=-1))
    check_close(lengths, expected)
