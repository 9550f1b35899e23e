"""Random numbers as a function of seed, name and place."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outliermerge.errors import OutlierMergeError
from outliermerge.rng import standard_normal, uniform

MASK = (1 << 64) - 1
FUNCTIONS = [uniform, standard_normal]


def _mix(x: int) -> int:
    """SplitMix64's finaliser, as in Java's SplittableRandom."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def _bits(seed: int, name: str, place: int) -> int:
    digest = hashlib.sha256(f"{seed}\n{name}".encode()).digest()
    first, second = (int.from_bytes(digest[at : at + 8], "little") for at in (0, 8))
    return _mix(_mix((first + (place + 1) * 0x9E3779B97F4A7C15) & MASK) ^ second)


def _normal(bits: int) -> float:
    u, v = ((bits >> 24) + 0.5) / 2**40, (bits & (2**24 - 1)) / 2**24
    return math.sqrt(-2 * math.log(u)) * math.sin(math.pi / 2 * (1 - 4 * abs(v - 0.5)))


STREAMS = [(0, "a", 0), (-7, "model.layers.0.self_attn.q_proj", 10**6), (2**70, "σ", 2**62)]


@pytest.mark.parametrize(("seed", "name", "start"), STREAMS)
def test_python_integers_give_the_same(seed, name, start):
    every = [_bits(seed, name, start + place) for place in range(300)]
    expected = torch.tensor([(bits >> 11) / 2**53 for bits in every], dtype=torch.float64)
    assert torch.equal(uniform(seed, name, start, start + 300), expected)
    normal = torch.tensor([_normal(bits) for bits in every])
    found = standard_normal(seed, name, start, start + 300)
    torch.testing.assert_close(found, normal, rtol=2e-7, atol=1e-9)


def test_streams_never_change():
    """Saved adapters hold a seed in place of noise."""
    assert uniform(0, "a", 0, 3).tolist() == [
        0.28505058602182076,
        0.3207363686454674,
        0.6592348850428669,
    ]
    assert standard_normal(0, "a", 0, 3).tolist() == [
        0.9703546762466431,
        0.8166015148162842,
        -0.2447076290845871,
    ]
    whole = standard_normal(42, "model.layers.0.mlp.up_proj", 0, 1 << 17)
    digest = hashlib.sha256(whole.numpy().tobytes()).hexdigest()
    assert digest == "3488d9dd27b0a455c7203a1a6f4fbdbc0fb33aab7e0dc51f464536867f395b5d"


@pytest.fixture(scope="module")
def whole() -> dict[str, torch.Tensor]:
    return {function.__name__: function(3, "w", 0, 200_000) for function in FUNCTIONS}


@pytest.mark.parametrize("function", FUNCTIONS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_span_is_a_piece_of_the_whole(function, whole, data):
    start = data.draw(st.integers(0, 200_000))
    stop = data.draw(st.integers(start, 200_000))
    assert torch.equal(function(3, "w", start, stop), whole[function.__name__][start:stop])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_threads_change_nothing(function, whole):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if before == 1 else 1)
        assert torch.equal(function(3, "w", 0, 200_000), whole[function.__name__])
    finally:
        torch.set_num_threads(before)


NUM = 400_000


@pytest.mark.parametrize(("seed", "name"), [(0, "w"), (1, "w"), (0, "layers.17.down_proj")])
def test_moments_are_those_of_a_gaussian(seed, name):
    """Each within five standard errors."""
    values = standard_normal(seed, name, 0, NUM).double()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = (variance / NUM) ** 0.5
        assert abs((values**power).mean().item() - expected) < 5 * error, power
    for threshold in (1.0, 2.0, 3.0, 4.0):
        share = math.erfc(threshold / 2**0.5)
        found = (values.abs() > threshold).double().mean().item()
        assert abs(found - share) < 5 * (share / NUM) ** 0.5, threshold


def test_uniform_numbers_fill_the_interval():
    values = uniform(5, "u", 0, NUM)
    assert values.min() >= 0 and values.max() < 1
    counts = torch.histc(values, bins=100, min=0, max=1)
    chi_squared = ((counts - NUM / 100).square() / (NUM / 100)).sum().item()
    assert abs(chi_squared - 99) < 5 * (2 * 99) ** 0.5


@pytest.mark.parametrize(
    "other",
    [
        (0, "v", 0),
        (1, "w", 0),
        (-1, "w", 0),
        (0, "w", 1),
        (0, "w", 2),
        (0, "w", 1024),
    ],
    ids=str,
)
def test_streams_and_neighbours_are_independent(other):
    seed, name, shift = other
    a = standard_normal(0, "w", 0, NUM).double()
    b = standard_normal(seed, name, shift, shift + NUM).double()
    for power in (1, 2):  # squares too: equal sizes with random signs do not correlate
        stacked = torch.stack([a**power, b**power])
        assert abs(torch.corrcoef(stacked)[0, 1].item()) < 5 / NUM**0.5


@pytest.mark.parametrize("seed", [True, 1.0, "1", None])
def test_a_seed_is_an_integer(seed):
    with pytest.raises(OutlierMergeError, match="expected an integer"):
        uniform(seed, "a", 0, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_gpu_gives_the_same_bits(function, whole):
    found = function(3, "w", 0, 200_000, "cuda").cpu()
    assert torch.equal(found, whole[function.__name__])
